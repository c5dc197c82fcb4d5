"""From the JSON of a chat completion to a checked request, or an error in OpenAI's shape.

What would change the answer and is not served is refused; what changes nothing is ignored. Knows no
HTTP and no model beyond its tokenizer and limits.
"""

from dataclasses import dataclass

from gemma_cot.config import LEAST_TEMPERATURE
from gemma_cot.policy import Policy
from gemma_cot.tokenizer import encode_prompt

MAX_STOPS = 4  # as OpenAI's
# Fields that would change the answer and are not served, with the values that change nothing.
NEUTRAL = {
    "top_p": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False,),
    "logit_bias": ({},), "tools": ([],), "functions": ([],), "modalities": (["text"],),
    "top_k": (0, -1), "min_p": (0,), "best_of": (1,), "echo": (False,), "top_logprobs": (0,),
}  # fmt: skip


class BadRequest(Exception):
    """A request that cannot be served: HTTP status, message, and the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, code=None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


@dataclass(frozen=True)
class Request:
    """A checked request."""

    prompt_ids: list[int]
    n: int
    temperature: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int | None
    stream: bool
    include_usage: bool


def parse_request(body: object, policy: Policy, name: str, batch: int) -> Request:
    """Check the JSON of a chat completion. Raises BadRequest naming the field that is wrong."""
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    if body.get("model") != name:
        got = body.get("model")
        message = f"model must be {name!r}, got {got!r:.80}"
        raise BadRequest(message, "model", "model_not_found", 404)
    for param, values in NEUTRAL.items():
        if body.get(param) is not None and body[param] not in values:
            raise BadRequest(f"{param} is not supported, got {body[param]!r:.60}", param)
    if body.get("stream") not in (None, True, False):
        raise BadRequest(f"stream must be true or false, got {body['stream']!r:.60}", "stream")
    form = body.get("response_format") or {"type": "text"}
    if not isinstance(form, dict) or form.get("type") not in ("text", "json_object"):
        raise BadRequest("response_format must be text or json_object", "response_format")
    user, system, earlier = _turns(body.get("messages"))
    ids = encode_prompt(policy.tokenizer, user, system or policy.instruction, earlier)
    if len(ids) > policy.max_prompt_tokens:
        raise BadRequest(
            f"the prompt must be at most {policy.max_prompt_tokens} tokens, got {len(ids)}",
            "messages", "context_length_exceeded",
        )  # fmt: skip
    limit_name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    limit = _number(body, limit_name, int, policy.max_completion_tokens, 1, 2**31)
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise BadRequest(f"stop must be a string or a list of strings, got {stop!r:.60}", "stop")
    if len(stop) > MAX_STOPS:
        raise BadRequest(f"stop must hold at most {MAX_STOPS} strings, got {len(stop)}", "stop")
    temperature = _number(body, "temperature", (int, float), 1.0, 0, 2)
    if 0 < temperature < LEAST_TEMPERATURE:
        rule = f"temperature must be 0 or from {LEAST_TEMPERATURE} to 2, got {temperature!r}"
        raise BadRequest(rule, "temperature")
    options = body.get("stream_options")
    return Request(
        prompt_ids=ids,
        n=_number(body, "n", int, 1, 1, batch),
        temperature=temperature,
        max_tokens=min(limit, policy.max_completion_tokens),
        stop=tuple(stop),
        seed=_number(body, "seed", int, None, -(2**63), 2**63 - 1),
        stream=bool(body.get("stream")),
        include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
    )


def _number(body: dict, name: str, kind, default, least, most):
    """Return body[name], a number from `least` to `most`. Raises BadRequest."""
    value = default if body.get(name) is None else body[name]
    if value is None:
        return None
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
        word = "an integer" if kind is int else "a number"
        raise BadRequest(f"{name} must be {word} from {least} to {most}, got {value!r:.60}", name)
    return value


def _turns(messages: object) -> tuple[str, str, list[tuple[str, str]]]:
    """Return (last user text, system text, earlier (user, assistant) pairs). Raises BadRequest."""
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list that is not empty", "messages")
    turns = [(m.get("role"), _text(m.get("content"))) if isinstance(m, dict) else (None, "")
             for m in messages]  # fmt: skip
    system = turns.pop(0)[1] if turns[0][0] in ("system", "developer") else ""
    wanted = ["user", "assistant"] * len(turns)
    if len(turns) % 2 == 0 or [role for role, _ in turns] != wanted[: len(turns)]:
        raise BadRequest(
            "messages must be an optional system message, then user and assistant in turn, the "
            f"last one user's, got {[role for role, _ in turns]!r:.80}", "messages",
        )  # fmt: skip
    texts = [text for _, text in turns]
    return texts[-1], system, list(zip(texts[:-1:2], texts[1::2], strict=True))


def _text(content: object) -> str:
    """Return the text of a message: a string, or a list of text parts. Raises BadRequest."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if isinstance(parts, list) and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
        for p in parts
    ):
        return "".join(part["text"] for part in parts)
    raise BadRequest(f"content must be text or text parts, got {content!r:.60}", "messages")


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict:
    """Return an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
