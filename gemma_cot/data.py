"""From a JSONL line to padded token arrays: rows, prompts, lengths, and which rows a step takes.

Host only. Over-length samples are discarded and counted, never truncated, so that every target
keeps its stop token. The rows of a step are a pure function of (seed, step): resuming needs no
iterator state. Called by train, evaluate and prepare; of rewards it knows the format only.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_cot.axes import round_up
from gemma_cot.grpo.reward import has_format
from gemma_cot.tokenizer import PAD, Tokenizer, encode_prompt, encode_target

DOMAINS = ("math", "code", "science")
MAX_LINE = 1 << 20  # bytes; far more than any sample that fits, little enough to be looked at
WIDTH_STEP = 16  # prompt and completion widths are multiples of this, so that few shapes compile


@dataclass(frozen=True)
class Example:
    """One row of a dataset."""

    id: int  # line number in its file, from 1
    domain: str
    prompt: str
    chosen: str  # the tagged completion to imitate
    metadata: dict  # {"checkpoints": [str, ...], "final_answer": str}
    extra: dict  # further keys of the row, kept as they are


@dataclass(frozen=True)
class Encoded:
    """An example and its token ids."""

    example: Example
    prompt_ids: list[int]  # <bos>, the user turn, the opening of the model turn
    target_ids: list[int]  # `chosen` and the stop token


def read_jsonl(path: str | Path, on_bad_row: str = "fail") -> tuple[list[Example], list[str]]:
    """Read a dataset. Returns (examples, one "file:line: reason" for every row that was skipped).

    on_bad_row: "fail" raises at the first bad row, "skip" leaves it out. Raises ValueError for a
    missing, unreadable or empty file too.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(
            f"{path}: must be a readable JSONL file, got {error.strerror}; correct the path"
        ) from None
    examples, rejects = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            examples.append(parse_row(line, number))
        except ValueError as error:
            if on_bad_row == "fail":
                raise ValueError(f"{path}:{number}: {error}; correct or delete the line or set "
                                 "--on_bad_row=skip") from None  # fmt: skip
            rejects.append(f"{path}:{number}: {error}")
    if not examples:
        first = f", the first {rejects[0]}" if rejects else ""
        raise ValueError(
            f"{path}: must hold at least one good row, got {len(rejects)} bad ones and no other"
            f"{first}; point to a dataset with rows"
        )
    return examples, rejects


def parse_row(line: bytes | str, number: int) -> Example:
    """Turn one line into an Example. Raises ValueError saying what is wrong with it."""
    example = check_row(parse_json(line), number)
    if not has_format(example.chosen):  # it would teach a form that the format reward refuses
        raise ValueError(
            "chosen must be <reasoning>..</reasoning><answer>..</answer>, every tag once, nothing "
            f"else, got {example.chosen!r:.60}"
        )
    return example


def parse_json(line: bytes | str) -> object:
    """Decode one line of JSON in UTF-8, perhaps behind a byte order mark. Raises ValueError."""
    if len(line) > MAX_LINE:
        raise ValueError(f"must be at most {MAX_LINE} bytes long, got a longer line")
    try:
        text = line.removeprefix(b"\xef\xbb\xbf").decode() if isinstance(line, bytes) else line
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # perhaps half a surrogate pair, which is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, bottomless nesting
        raise ValueError(f"must be JSON in UTF-8, got {error}") from None
    return value


def check_row(row: object, number: int) -> Example:
    """Turn decoded JSON into an Example. Raises ValueError saying what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, got {type(row).__name__}")
    for key in ("domain", "prompt", "chosen"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{key} must be a non-blank string, got {row.get(key)!r:.60}")
    if row["domain"] not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {row['domain']!r:.60}")
    metadata = row.get("metadata")
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be an object, got {type(metadata).__name__}")
    checkpoints = metadata.get("checkpoints")
    if not isinstance(checkpoints, list) or not all(isinstance(c, str) for c in checkpoints):
        raise ValueError(f"metadata.checkpoints must be a list of strings, got {checkpoints!r:.60}")
    if not isinstance(metadata.get("final_answer"), str):
        raise ValueError(
            f"metadata.final_answer must be a string, got {metadata.get('final_answer')!r:.60}"
        )
    known = ("domain", "prompt", "chosen", "metadata")
    extra = {key: value for key, value in row.items() if key not in known}
    return Example(number, *(row[key] for key in known), extra)


def encode_examples(
    tokenizer: Tokenizer,
    examples: list[Example],
    instruction: str,
    max_prompt_tokens: int,
    max_completion_tokens: int,
) -> tuple[list[Encoded], int]:
    """Encode and drop what is too long. Returns (encoded, number of examples discarded).

    The stop token of a target is counted. Raises ValueError when nothing is left.
    """
    encoded = [
        Encoded(
            example,
            encode_prompt(tokenizer, example.prompt, instruction),
            encode_target(tokenizer, example.chosen),
        )
        for example in examples
    ]
    kept = [
        row
        for row in encoded
        if len(row.prompt_ids) <= max_prompt_tokens and len(row.target_ids) <= max_completion_tokens
    ]
    if not kept:
        raise ValueError(
            f"dataset: at least one of {len(examples)} rows must fit {max_prompt_tokens} prompt "
            f"and {max_completion_tokens} completion tokens, got none; raise --max_prompt_tokens "
            "or --max_completion_tokens"
        )
    return kept, len(encoded) - len(kept)


def prompt_width(rows: list[Encoded]) -> int:
    """Return one width for every prompt of a dataset: the longest, rounded up."""
    return round_up(max(len(row.prompt_ids) for row in rows), WIDTH_STEP)


def target_width(rows: list[Encoded]) -> int:
    """Return one width for every target of a dataset: the longest, rounded up."""
    return round_up(max(len(row.target_ids) for row in rows), WIDTH_STEP)


def left_pad(prompts: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens_PT, start_P): each prompt at the right end, `start_P` its first real column.

    Raises ValueError for a prompt longer than `width`.
    """
    tokens_PT = np.full((len(prompts), width), PAD, np.int32)
    start_P = np.zeros((len(prompts),), np.int32)
    for p, ids in enumerate(prompts):
        if len(ids) > width:
            raise ValueError(
                f"prompt {p}: must fit {width} columns, got {len(ids)} tokens; raise the width"
            )
        start_P[p] = width - len(ids)
        tokens_PT[p, start_P[p] :] = ids
    return tokens_PT, start_P


def sft_rows(rows: list[Encoded], width: int, target_width: int) -> dict[str, np.ndarray]:
    """Return {"tokens_BT", "start_B", "mask_BT"}: left-padded prompt, then target, then padding.

    One row with a prompt of 2 and a target of 3 tokens, width 3, target_width 4:
        tokens  . p p t t s .
        mask    . . . 1 1 1 .      (s = stop token, in the loss; the prompt never is)
    """
    prompt_BT, start_B = left_pad([row.prompt_ids for row in rows], width)
    target_BT = np.full((len(rows), target_width), PAD, np.int32)
    mask_BT = np.zeros((len(rows), width + target_width), bool)
    for b, row in enumerate(rows):
        target_BT[b, : len(row.target_ids)] = row.target_ids
        mask_BT[b, width : width + len(row.target_ids)] = True
    tokens_BT = np.concatenate([prompt_BT, target_BT], axis=1)
    return {"tokens_BT": tokens_BT, "start_B": start_B, "mask_BT": mask_BT}


def indices_for_step(step: int, seed: int, num_rows: int, count: int) -> np.ndarray:
    """Return the `count` row numbers of step 0, 1, 2, ...: epochs of independent permutations.

    Every row is taken once before any is taken twice; a pure function of its arguments.
    """
    first = step * count
    epochs = range(first // num_rows, (first + count - 1) // num_rows + 1)
    order = np.concatenate([np.random.default_rng((seed, e)).permutation(num_rows) for e in epochs])
    at = first - epochs[0] * num_rows
    return order[at : at + count]
