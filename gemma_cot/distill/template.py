"""What the teacher is asked: one prompt a domain, one request body a question, one key a request.

The teacher returns JSON; the tags are written here (`answer.make_row`), so that the form of a row
cannot be wrong. Pure functions.
"""

import json
from dataclasses import dataclass
from hashlib import blake2b

from gemma_cot.distill.settings import Settings, teacher_of

# The same words first in every request: servers that cache prefixes bill them less.
_TASK = """\
You write worked solutions from which a small model learns. Solve the problem step by step, as \
briefly as is clear, and reply with one JSON object and nothing else, like this example:

{example}

"steps": one to eight steps in order. "text": one short sentence without tags or markup. \
"equation": the calculation of that step, if it has one, with numbers and + - * / ( ) only, one =, \
no units, no letters, no rounding: both sides must be exactly equal. Leave "equation" out of a \
step that calculates nothing, and do not repeat it in "text".
"answer": {answer}"""

_EXAMPLE = {
    "steps": [
        {"text": "The trays hold this many eggs in all", "equation": "12 * 30 = 360"},
        {"text": "Take away the broken ones", "equation": "360 - 15 = 345"},
    ],
    "answer": "345",
}
_ANSWER = {
    "math": "the final value alone, as a string, with a unit only if the problem asks for one.",
    "code": "exactly what the program prints or the call returns, as a string holding the Python "
    "literal, with nothing around it.",
    "science": "the value with its unit, as a string; if the problem lists options, the letter and "
    'the text of the right one as listed, like "B) the text".',
}


@dataclass(frozen=True)
class Question:
    """A prompt to be answered, and what came with it."""

    domain: str
    prompt: str
    gold: str  # "" where there is none
    metadata: dict  # of the input row, further keys included
    extra: dict  # further keys of the input row, kept as they are


def system_prompt(domain: str) -> str:
    """Return the instructions of a domain."""
    return _TASK.format(example=json.dumps(_EXAMPLE), answer=_ANSWER[domain])


def request_body(cfg: Settings, question: Question, number: int) -> dict:
    """Return the JSON of request `number` (0, 1, ...) for a question; each has its own seed.

    A field that extra_body sets to null is left out.
    """
    body = {
        "model": cfg.teacher,
        "messages": [
            {"role": "system", "content": system_prompt(question.domain)},
            {"role": "user", "content": question.prompt},
        ],
        "response_format": {"type": "json_object"},
        "temperature": cfg.temperature,
        "max_tokens": cfg.max_tokens,
        "seed": cfg.seed + number,
    } | teacher_of(cfg).extra_body
    return {name: value for name, value in body.items() if value is not None}


def request_key(cfg: Settings, question: Question, number: int) -> str:
    """Return the identity of a request: prompt, domain, seed, template, model and sampling.

    A change of any of them is another request; nothing is ever reused in its place.
    """
    body = request_body(cfg, question, number)
    return digest(question.domain, str(cfg.seed + number), json.dumps(body, sort_keys=True))


def digest(*parts: str) -> str:
    """Return 32 hexadecimal digits of the parts."""
    return blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
