"""Score completions: format, process and outcome rewards, and two penalties in tokens.

Every reward function has the signature of TRL's and Tunix's: lists in, a list out, dataset columns
as keyword lists; None means "does not apply to this example" and is counted by the caller. Knows
no weights, no tokenizer and no device. grpo/rollout.py and the evaluation call them.
"""

import json
import math
import numbers
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from gemma_cot.grpo.answer import answers_match

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
CHECKPOINTS_FOR_FULL_SCORE = 5  # 0.2 each
NGRAM = 8  # tokens; shorter runs repeat in honest arithmetic too

RewardFunction = Callable[..., list]


class RewardError(ValueError):
    """A reward function raised, or returned something that is no list of scores."""


# What stands in a completion

# Letters and symbols by category that show nothing: Hangul fillers, the blank Braille pattern.
_INVISIBLE = {"\u115f", "\u1160", "\u2800", "\u3164", "\uffa0"}


def completion_text(completion: object) -> str:
    """Return the text of a completion: a string, or TRL's list of {"role", "content"} messages."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        content = completion.get("content")
        return content if isinstance(content, str) else ""
    if isinstance(completion, (list, tuple)):
        return "".join(completion_text(part) for part in completion if isinstance(part, Mapping))
    return ""


def split_blocks(text: str) -> tuple[str | None, str | None]:
    """Return the reasoning and the answer block, None for a block that does not exist.

    A block exists when its opening and its closing tag occur once each, in that order.
    """
    return _block(text, *TAGS[:2]), _block(text, *TAGS[2:])


def _block(text: str, opening: str, closing: str) -> str | None:
    """Return what stands between the only `opening` and the only `closing` after it."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.find(opening) + len(opening), text.find(closing)
    return text[start:end] if start <= end else None


def has_format(text: str) -> bool:
    """Return whether `text` is exactly one non-blank reasoning and one non-blank answer block."""
    text = text.strip()
    reasoning, answer = split_blocks(text)
    if reasoning is None or answer is None:
        return False
    open_reasoning, close_reasoning, open_answer, close_answer = TAGS
    between = text[text.find(close_reasoning) + len(close_reasoning) : text.find(open_answer)]
    return (
        text.startswith(open_reasoning)
        and text.endswith(close_answer)
        and text.find(close_reasoning) < text.find(open_answer)
        and not between.strip()
        and is_visible(reasoning)
        and is_visible(answer)
    )


def is_visible(text: str) -> bool:
    """Return whether `text` holds a letter, digit, punctuation mark or symbol that shows."""
    return any(unicodedata.category(c)[0] in "LNPS" and c not in _INVISIBLE for c in text)


# What stands in the dataset's columns


def _cell(column: object, row: int) -> object:
    """Return `column[row]`, None where the column is absent, no list, or too short."""
    if isinstance(column, (str, bytes, Mapping)) or not hasattr(column, "__getitem__"):
        return None
    try:
        return column[row]
    except (IndexError, KeyError, TypeError):
        return None


def _metadata(metadata: object, metadata_json: object, row: int) -> Mapping:
    """Return the metadata of a row, {} where neither column holds an object for it."""
    value = _cell(metadata, row)
    if value is None:
        value = _cell(metadata_json, row)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, Mapping) else {}


def visible_checkpoints(metadata: Mapping) -> list[str]:
    """Return the non-blank strings in `metadata["checkpoints"]`, [] if that is not a list."""
    values = metadata.get("checkpoints")
    if not isinstance(values, (list, tuple)):
        return []
    return [value for value in values if isinstance(value, str) and is_visible(value)]


def _gold(metadata: Mapping) -> str | int | float | None:
    """Return `metadata["final_answer"]` if it is a non-blank string or a finite number."""
    value = metadata.get("final_answer")
    if isinstance(value, str):
        return value if is_visible(value) else None
    is_finite = isinstance(value, numbers.Real) and (
        isinstance(value, numbers.Rational) or math.isfinite(value))
    return value if is_finite else None


# How checkpoints are found

_OPERATORS = "+-*/=^<>%()"
_TO_ASCII = {
    "\u00d7": "*", "\u2715": "*", "\u2217": "*", "\u22c5": "*", "\u00b7": "*", "\u2219": "*",
    "\u00f7": "/", "\u2215": "/", "\u2044": "/", "\u2212": "-", "\u2010": "-", "\u2011": "-",
    "\u2012": "-", "\u2013": "-", "\u2014": "-", "\uff0b": "+", "\uff1d": "=", "\uff0d": "-",
}
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_LATEX_OPERATORS = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\$", "$"))


def normalise(text: str) -> str:
    """Return `text` as the normalised matcher compares it.

    Case is dropped, typographic operators become ASCII, currency signs go, white space collapses
    and disappears beside operators.
    """
    text = text.casefold()
    if "\\" in text:
        for command, operator in _LATEX_OPERATORS:
            text = text.replace(command, operator)
    for char in "$" if text.isascii() else {"$", *_NOT_ASCII.findall(text)}:
        if char in _TO_ASCII or unicodedata.category(char) == "Sc":
            text = text.replace(char, _TO_ASCII.get(char, ""))
    if "  " in text or not text.isprintable():  # of white space only " " is printable
        text = " ".join(text.split())
    for operator in _OPERATORS:
        if operator in text:
            text = operator.join([part.strip(" ") for part in text.split(operator)])
    return text.strip(" ")


def checkpoint_hits(
    reasoning: str, checkpoints: Sequence[str], matcher: str = "normalised"
) -> tuple[int, int]:
    """Return how many distinct checkpoints stand in `reasoning`, and how many there are.

    `literal` looks for plain substrings. `normalised` compares `normalise`d texts and refuses a hit
    whose first or last digit continues a longer number, so that "= 15" is not found in "= 150".
    """
    if matcher == "literal":
        wanted = set(checkpoints)
        return sum(checkpoint in reasoning for checkpoint in wanted), len(wanted)
    if matcher != "normalised":
        raise ValueError(f"process matcher - must be 'normalised' or 'literal' - got {matcher!r} - "
                         "use one of the two")
    wanted = set(map(_normalised, checkpoints)) - {""}
    text = normalise(reasoning)
    return sum(_stands_in(text, checkpoint) for checkpoint in wanted), len(wanted)


_normalised = lru_cache(maxsize=4096)(normalise)  # a row's checkpoints come back G times a rollout


_DIGITS = re.compile(r"\.?\d(?s:.*\d)?")  # from the first number to the last


def _stands_in(text: str, checkpoint: str) -> bool:
    """Return whether `checkpoint` occurs in `text` without cutting a longer number."""
    digits = _DIGITS.search(checkpoint)
    start = text.find(checkpoint)
    while start >= 0:
        if not digits or not (
            _number_goes_on_before(text, start + digits.start())
            or _number_goes_on_after(text, start + digits.end() - 1)
        ):
            return True
        start = text.find(checkpoint, start + 1)
    return False


def _number_goes_on_before(text: str, position: int) -> bool:
    """Return whether the digit or point at `position` has digits of its number to its left."""
    left = text[max(position - 2, 0) : position]
    before, further = left[-1:], left[:-1]
    if before == "." != text[position]:
        return not further.isalpha()  # ".5" and "1.5" are numbers, "done.5" starts a sentence
    return before.isdecimal() or (before == "," and further.isdecimal())


def _number_goes_on_after(text: str, position: int) -> bool:
    """Return whether the digit at `position` has digits of the same number to its right."""
    after, further = text[position + 1 : position + 2], text[position + 2 : position + 3]
    return after.isdecimal() or (after in (".", ",") and further.isdecimal())


# The three rewards


def format_reward(prompts: list, completions: list, **columns) -> list[float]:
    """Return 1.0 for every completion that has the format, else 0.0; no credit per tag."""
    return [float(has_format(completion_text(completion))) for completion in completions]


def process_reward(
    prompts: list, completions: list, *, matcher: str = "normalised",
    metadata=None, metadata_json=None, **columns,
) -> list[float | None]:
    """Return 0.2 for each distinct checkpoint in the reasoning block, at most 1.0.

    None where the metadata are missing, malformed or hold no checkpoint.
    """
    scores: list[float | None] = []
    for row, completion in enumerate(completions):
        reasoning, _ = split_blocks(completion_text(completion))
        checkpoints = visible_checkpoints(_metadata(metadata, metadata_json, row))
        hits, distinct = checkpoint_hits(reasoning or "", checkpoints, matcher)
        share = min(hits, CHECKPOINTS_FOR_FULL_SCORE) / CHECKPOINTS_FOR_FULL_SCORE
        scores.append(share if distinct else None)
    return scores


def outcome_reward(
    prompts: list, completions: list, *, matches: Callable[[str, str, str], bool] = answers_match,
    metadata=None, metadata_json=None, domain=None, **columns,
) -> list[float | None]:
    """Return 1.0 where the answer block equals the gold answer, else 0.0; None without a gold."""
    scores: list[float | None] = []
    for row, completion in enumerate(completions):
        gold = _gold(_metadata(metadata, metadata_json, row))
        _, answer = split_blocks(completion_text(completion))
        kind = _cell(domain, row)
        is_right = gold is not None and answer is not None and matches(
            gold, answer, kind if isinstance(kind, str) else "math")
        scores.append(None if gold is None else float(is_right))
    return scores


# Penalties, in tokens


def length_penalty(
    prompts: list, completions: list, *, limit: int, cache: int, completion_ids=None, **columns
) -> list[float | None]:
    """Return the `overlong` penalty of every completion; None without its token ids."""
    rows = [_cell(completion_ids, row) for row in range(len(completions))]
    return [None if ids is None else overlong(len(ids), limit, cache) for ids in rows]


def overlong(num_tokens: int, limit: int, cache: int) -> float:
    """Return DAPO's penalty (eq. 13): 0 up to limit - cache tokens, linear to -1 at `limit`."""
    return 0.0 - min(max(num_tokens - limit + cache, 0) / cache, 1.0)


def repetition_penalty(
    prompts: list, completions: list, *, completion_ids=None, **columns
) -> list[float | None]:
    """Return minus the `repeated_share` of every completion's tokens; None without token ids."""
    rows = [_cell(completion_ids, row) for row in range(len(completions))]
    return [None if ids is None else 0.0 - repeated_share(ids) for ids in rows]


def repeated_share(ids: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of the runs of `n` tokens that stood there before: 1 - distinct / all."""
    count = len(ids) - n + 1
    runs = zip(*(ids[first : first + count] for first in range(n)), strict=True)
    return 1.0 - len(set(runs)) / count if count > 0 else 0.0
