"""One request to an OpenAI-compatible server, and what its outcome means.

Four outcomes: an answer; `Retry` (the server or the line failed, nothing usable came); `TooFast`
(429); `Stop` (asking on is pointless: key, balance, a refused request). What servers really do is
expected here: blank lines before the JSON while they work, an empty 200, HTML with 200, a body cut
short, blank content, `insufficient_system_resource` as a success. Knows no row.
"""

import asyncio
import json
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from gemma_cot.distill.journal import Stop
from gemma_cot.distill.settings import Settings, is_loopback, redact, teacher_of, usd

BODY_SECONDS = 30  # a reply is sent when it is complete: one that drips in is a fault
MAX_RETRY_AFTER = 3600  # seconds; a server that asks for more is not waited for


class Retry(Exception):
    """The request may be sent again, after `seconds`.

    record: set after a whole reply: what the journal keeps of it, and what it cost.
    """

    def __init__(self, code: str, detail: str = "", record: dict | None = None, seconds=0.0):
        super().__init__(f"{code} {detail}".strip())
        self.code, self.record, self.seconds = code, record, seconds


class TooFast(Exception):
    """429: wait for `seconds`, and ask less at a time."""

    def __init__(self, seconds: float):
        super().__init__(f"429, wait {seconds:.0f} s")
        self.seconds = seconds


def open_client(cfg: Settings, key: str):
    """Return an httpx client for the teacher. Raises ValueError without the extra `teacher`."""
    try:
        import httpx
    except ImportError:
        raise ValueError(
            "httpx: must be installed to ask a teacher, got no such module; "
            "pip install 'gemma_cot[teacher]'"
        ) from None
    url = teacher_of(cfg).base_url
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(cfg.timeout, connect=min(cfg.timeout, 20)),
        limits=httpx.Limits(max_connections=None),
        trust_env=not is_loopback(url),  # proxies are for other machines
    )


async def ask(client, cfg: Settings, body: dict, key: str, once: str) -> dict:
    """Send one request. Returns the answer: model, date, finish_reason, content, usage, usd, fault.

    once: the Idempotency-Key header: a server that knows it answers the same request a second time,
    after a kill or a broken line, from memory; others ignore it.
    cfg.timeout bounds the whole exchange, blank lines and all; a body that has begun has to end
    within BODY_SECONDS. Raises Retry, TooFast or Stop; no message holds the key.
    """
    import httpx

    url, content = f"{teacher_of(cfg).base_url}/chat/completions", b""
    try:
        async with (
            asyncio.timeout(cfg.timeout) as deadline,
            client.stream("POST", url, json=body, headers={"Idempotency-Key": once}) as response,
        ):
            async for chunk in response.aiter_bytes():
                if not content.strip() and chunk.strip():
                    soon = asyncio.get_running_loop().time() + BODY_SECONDS
                    deadline.reschedule(min(deadline.when(), soon))
                content += chunk
    except (TimeoutError, httpx.TimeoutException):
        raise Retry("timeout", f"no whole answer in {cfg.timeout:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        detail = redact(f"{type(error).__name__}: {error}", key)
        raise Retry("connection", detail) from None
    text = redact(content.decode(errors="replace"), key)
    if response.status_code == 200:
        return read_answer(cfg, text)
    return refuse(response.status_code, text, response.headers.get("retry-after", ""))


def read_answer(cfg: Settings, text: str) -> dict:
    """Return the answer that a 200 body holds. Raises Retry for what is none."""
    def nothing(code: str) -> dict:
        return _record(cfg, None, "", "", None) | {"fault": code}

    if not text.strip():
        raise Retry("empty_body", record=nothing("empty_body"))
    try:
        body = json.loads(text)  # blank lines that kept the connection alive are white space
    except (ValueError, RecursionError):
        raise Retry("not_json", f"{text.strip()!r:.60}", nothing("not_json")) from None
    try:
        choice, usage = body["choices"][0], body.get("usage")
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (TypeError, KeyError, IndexError, AttributeError):
        raise Retry("no_choices", f"{text.strip()!r:.60}", nothing("no_choices")) from None
    if content is not None and not isinstance(content, str):
        raise Retry("no_choices", f"content {content!r:.60}", nothing("no_choices"))
    record = _record(cfg, body.get("model"), str(reason), content or "", usage)
    if reason == "insufficient_system_resource":
        raise Retry("insufficient_resource", record=record | {"fault": "insufficient_resource"})
    if not record["content"].strip() and reason != "content_filter":
        raise Retry("empty_content", record=record | {"fault": "empty_content"})
    return record


def refuse(status: int, text: str, retry_after: str) -> dict:
    """Raise what a status other than 200 means; return a refusal that is about one prompt only."""
    try:
        error = json.loads(text)["error"]
        message, code = str(error["message"]), str(error.get("code"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        message, code = " ".join(text.split()), ""
    if status == 429 and code != "insufficient_quota":
        raise TooFast(wait_of(retry_after, time.time()))
    if status in (408, 409, 425) or status >= 500:
        raise Retry(f"http_{status}", f"{message:.60}", seconds=wait_of(retry_after, time.time()))
    if status == 400 and "Content Exists Risk" in message:  # DeepSeek's filter of prompts
        return _record(None, "", "content_filter", "", None)
    hints = {401: "correct the key", 402: "top up the balance", 404: "correct --base_url or "
             "--teacher", 429: "top up the balance"}  # fmt: skip
    raise Stop(
        f"teacher: requests must be accepted, got HTTP {status} ({message:.200}); "
        f"{hints.get(status, 'change the settings')}, then run the same command again"
    )


def wait_of(retry_after: str, now: float) -> float:
    """Return the seconds a Retry-After header asks for (a number or a date), 0 without one."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - now
        except (ValueError, TypeError, IndexError):
            return 0.0
    if not seconds <= MAX_RETRY_AFTER:  # NaN as well
        raise Stop(
            f"teacher: must answer again within {MAX_RETRY_AFTER} s, got Retry-After "
            f"{retry_after:.40}; run the same command again later"
        )
    return max(seconds, 0.0)


def _record(cfg: Settings | None, model: object, reason: str, content: str, usage: object) -> dict:
    now = datetime.now(UTC)
    counts = _usage(usage)
    return {
        "fault": None,
        "model": str(model),
        "date": now.isoformat(timespec="seconds"),
        "finish_reason": reason,
        "content": content,
        "usage": counts,
        "usd": usd(teacher_of(cfg).price, counts, now) if cfg else 0.0,
    }


def _usage(usage: object) -> dict:
    """Return prompt, cached and completion tokens; 0 for what the server does not say."""
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = usage.get("prompt_cache_hit_tokens")  # DeepSeek's name
    if cached is None and isinstance(details, dict):  # OpenAI's
        cached = details.get("cached_tokens")
    counts = [usage.get("prompt_tokens"), cached, usage.get("completion_tokens")]
    counts = [n if type(n) is int and n >= 0 else 0 for n in counts]
    return dict(zip(("prompt_tokens", "cached_tokens", "completion_tokens"), counts, strict=True))
