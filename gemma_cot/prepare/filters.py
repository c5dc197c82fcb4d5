"""What a row must pass: the checks of its content, overlap with test sets, repeats; and its split.

Pure functions on rows and arrays of 8-gram hashes.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from math import ceil

import numpy as np

from gemma_cot.grpo.answer import answers_match
from gemma_cot.grpo.reward import checkpoint_hits, has_format, split_blocks
from gemma_cot.prepare.convert import Rejected, question_of, split_key
from gemma_cot.prepare.spool import GramFile

GRAM = 8
PART = 1 << 19  # grams sorted at a time
# A gram's hash is a polynomial in the hashes of its words, in 64-bit arithmetic that wraps around.
_POWERS = np.array([pow(0x9E3779B97F4A7C15, GRAM - 1 - k, 1 << 64) for k in range(GRAM)], np.uint64)
_PROSE, _CODE = re.compile(r"\w+|[-+*/=<>%^]"), re.compile(r"\w+|[^\w\s]")
_OPERATORS = [b"-", b"+", b"*", b"/", b"=", b"<", b">", b"%", b"^"]
_BLANK = {*range(128)} - {i for i in range(128) if _PROSE.match(chr(i))}  # of ASCII
_TOKENS_ONLY = bytes(32 if i in _BLANK else i for i in range(256))


def check_content(row: dict) -> None:
    """Raise Rejected unless `chosen` scores full: form, answer, every checkpoint in it."""
    chosen, metadata = row["chosen"], row["metadata"]
    if not has_format(chosen):
        raise Rejected("bad_format", "chosen must be one reasoning and one answer block", True)
    reasoning, answer = split_blocks(chosen)
    if not answers_match(metadata["final_answer"], answer, row["domain"]):
        detail = f"chosen must answer {metadata['final_answer']!r:.60}, got {answer!r:.60}"
        raise Rejected("wrong_answer", detail, True)
    for matcher in ("literal", "normalised"):
        found, wanted = checkpoint_hits(reasoning, metadata["checkpoints"], matcher)
        if found < wanted:
            detail = f"reasoning must hold all {wanted} checkpoints, got {found} ({matcher})"
            raise Rejected("checkpoint_missing", detail, True)


def text_key(domain: str, text: str) -> bytes:
    """Return a digest of a text without case and spacing; code keeps its case."""
    text = " ".join(text.split())
    text = text if domain == "code" else text.casefold()
    return blake2b(f"{domain}\n{text}".encode(), digest_size=16).digest()


def _tokens(domain: str, text: str) -> list[bytes]:
    """Return words, numbers and operators of a text without case; of code also punctuation."""
    if domain == "code" or not text.isascii():
        found = _CODE.findall(text) if domain == "code" else _PROSE.findall(text.casefold())
        return [token.encode() for token in found]
    text = text.lower().encode()  # as _PROSE does, without its search
    for operator in _OPERATORS:
        if operator in text:
            text = text.replace(operator, b" %s " % operator)
    return text.translate(_TOKENS_ONLY).split()


@lru_cache(maxsize=2)  # a row is compared with the test sets, then with the other rows
def grams(domain: str, text: str) -> np.ndarray:
    """Return the sorted hashes (uint64) of the distinct 8-grams; a shorter text is one gram.

    They are those of this process: Python draws the key of its `hash` anew in each.
    """
    words = _tokens(domain, text)
    if not words:
        return np.zeros(1, np.uint64)
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    found = np.correlate(hashes, _POWERS[-len(words) :], "valid")
    found.sort()
    is_new = np.ones(len(found), bool)
    np.not_equal(found[1:], found[:-1], out=is_new[1:])
    return found[is_new]


class TestQuestions:
    """The questions of the test sets, as hashes."""

    __test__ = False  # no test of pytest's

    def __init__(self, rows: Sequence[dict] = ()):
        questions = [(row["domain"], question_of(row["prompt"])) for row in rows]
        self._exact = {text_key(*question) for question in questions}
        empty = np.zeros(0, np.uint64)
        self._grams = np.unique(np.concatenate([empty, *(grams(*q) for q in questions)]))

    def check(self, row: dict, max_overlap: float) -> None:
        """Raise Rejected where a row's question is a test question or shares 8-grams with them."""
        if not self._exact:
            return
        question = (row["domain"], question_of(row["prompt"]))
        if text_key(*question) in self._exact:
            raise Rejected("in_test_set", "the question is one of --against")
        own = grams(*question)
        at = np.minimum(np.searchsorted(self._grams, own), len(self._grams) - 1)
        shared = int((self._grams[at] == own).sum())
        if shared > max_overlap * len(own):
            raise Rejected("overlaps_test_set", f"{shared} of {len(own)} 8-grams in --against")


def near_duplicates(rows: Sequence[np.ndarray] | GramFile, threshold: float) -> dict[int, int]:
    """Return {row: the earlier kept row whose Jaccard index with it is above `threshold`}.

    Exact, by prefix filtering: sets that similar share one of the rarest n - ceil(t n) + 1 grams of
    each, so only those are indexed, and a gram that occurs once never needs to be. A `GramFile`
    keeps the rows on disk; memory then grows with what repeats.
    """
    names, counts = repeated_grams(rows)
    index: dict[int, list[int]] = {}
    repeats = {}
    for i in range(len(rows) if len(names) else 0):
        own = rows[i]
        n = len(own)
        at = np.minimum(np.searchsorted(names, own), len(names) - 1)
        frequency = np.where(names[at] == own, counts[at], 1)
        if frequency.max() == 1:
            continue
        prefix = np.lexsort((own, frequency))[: n - ceil(threshold * n - 1e-9) + 1]
        keys = [int(own[j]) for j in prefix if frequency[j] > 1]
        near = sorted({other for key in keys for other in index.get(key, ())})
        for other in near:
            m = len(rows[other])
            if min(n, m) < threshold * max(n, m):
                continue
            both = len(np.intersect1d(own, rows[other], assume_unique=True))
            if both > threshold * (n + m - both):
                repeats[i] = other
                break
        else:
            for key in keys:
                index.setdefault(key, []).append(i)
    return repeats


def repeated_grams(rows: Sequence[np.ndarray] | GramFile) -> tuple[np.ndarray, np.ndarray]:
    """Return (hashes that occur in several rows, sorted; in how many).

    Goes over all grams once for every `PART` of them, so that at most about as many are held.
    """
    blocks = rows.blocks if isinstance(rows, GramFile) else lambda: iter(rows)
    passes = sum(map(len, blocks())) // PART + 1
    bounds = [k * 2**64 // passes for k in range(passes + 1)]
    found = [(np.zeros(0, np.uint64), np.zeros(0, np.int64))]
    for low, high in zip(bounds, bounds[1:], strict=False):
        inside = [b[(b >= np.uint64(low)) & (b <= np.uint64(high - 1))] for b in blocks()]
        names, counts = np.unique(np.concatenate([found[0][0], *inside]), return_counts=True)
        found.append((names[counts > 1], counts[counts > 1]))
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def in_eval(prompt: str, eval_share: float) -> bool:
    """Return whether a prompt belongs to the eval split: a function of its text alone."""
    digest = blake2b(split_key(prompt).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48 < eval_share
