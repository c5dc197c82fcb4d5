"""Work of every function of a run, for one chip, counted from shapes and through loops.

FLOPs are those of the matrix products that the program does in bfloat16 (in float32 an adapter may
be merged first, which is less), masked and recomputed ones included.
HBM bytes are those that no schedule avoids: weights once a pass, what each layer hands on, caches,
logits where they exist, optimiser state. XLA's own cost analysis counts a loop's body once and
in-place updates as full reads; the tests hold the FLOPs against it on a program without loops.
"""

import math
from dataclasses import dataclass

import numpy as np

from gemma_cot.axes import RULES, shape_of
from gemma_cot.config import ModelConfig
from gemma_cot.lora import TARGETS
from gemma_cot.model.kernels.logprob import BLOCK_C
from gemma_cot.model.layers import QUERY_BLOCK
from gemma_cot.model.logprob import chunk_of
from gemma_cot.model.params import LAYER_TABLE, PARAM_TABLE

F32 = 4  # bytes
ADAPTER_LETTERS = [x for target in TARGETS for x in LAYER_TABLE[target].adapter_letters]
BACKWARD = 2  # products per forward product whose two factors both need a gradient


@dataclass(frozen=True)
class Cost:
    """What one chip does."""

    flops: float
    hbm: float  # bytes from and to its memory
    ici: float  # bytes sent to other chips

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.hbm + other.hbm, self.ici + other.ici)

    def times(self, n: float) -> "Cost":
        """Return the cost of doing it n times."""
        return Cost(n * self.flops, n * self.hbm, n * self.ici)


@dataclass(frozen=True)
class Share:
    """What a chip has of a model whose heads, MLP and vocabulary are cut over `model` chips."""

    cfg: ModelConfig
    rank: int
    data: int
    model: int
    item: int  # bytes of a weight or an activation

    def local(self, letters: str) -> float:
        """Return the elements that a chip has of an array with axes `letters`."""
        cut = any(RULES.get(letter) == "model" for letter in letters)
        sizes = self.cfg.sizes | {"R": self.rank}
        return math.prod(shape_of(letters, sizes)) / (self.model if cut else 1)

    @property
    def layer_weights(self) -> float:
        """Elements of all layers' matrices, each multiplied once with every token."""
        return sum(self.local(leaf.letters) for leaf in PARAM_TABLE if leaf.stacked and leaf.fan_in)

    @property
    def adapter(self) -> float:
        """Elements of the adapter that take part in a chip's products."""
        return sum(self.local(x) for x in ADAPTER_LETTERS)

    @property
    def whole_adapter(self) -> int:
        """Elements of the whole adapter, which every chip keeps."""
        sizes = self.cfg.sizes | {"R": self.rank}
        return sum(math.prod(shape_of(x, sizes)) for x in ADAPTER_LETTERS)

    @property
    def cache_token(self) -> float:
        """Bytes of all layers' keys and values of one token."""
        cfg = self.cfg
        cut = self.model if cfg.num_kv_heads % self.model == 0 else 1
        return 2 * cfg.num_layers * cfg.num_kv_heads / cut * cfg.head_dim * self.item

    @property
    def pair(self) -> float:
        """FLOPs of all layers' score and mix of one query and one key."""
        cfg = self.cfg
        return 4 * cfg.num_layers * cfg.num_heads / self.model * cfg.head_dim


@dataclass(frozen=True)
class Rows:
    """Rows of `prompt` and then `completion` columns, of which every `group` share their prompt,
    run once for all of them."""

    rows: int
    prompt: int
    completion: int
    group: int = 1

    @property
    def tokens(self) -> float:
        """Tokens that go through the layers."""
        return self.rows * (self.prompt / self.group + self.completion)

    def pairs(self, block: int) -> float:
        """Return the pairs of a query and a key, masked ones included, when `block` queries at a
        time leave out the keys behind them."""
        T = self.prompt + self.completion
        if self.group == 1:
            return self.rows * triangle(T, T, block)
        own = triangle(self.prompt, self.prompt, block) / self.group
        return self.rows * (own + triangle(self.completion, T, block))


def triangle(T: int, S: int, block: int) -> int:
    """Return the pairs of the last T of S columns with those before them, as `Rows.pairs`."""
    ends = [min(first + block, T) for first in range(0, T, block)]
    starts = range(0, T, block)
    return sum((end - first) * (S - T + end) for first, end in zip(starts, ends, strict=True))


def ring(num_bytes: float, chips: int) -> float:
    """Return the bytes that each of `chips` sends in an all-reduce of `num_bytes`."""
    return 2 * (chips - 1) / chips * num_bytes


def layers(s: Share, batch: Rows, base: float, lora: float, scores: float) -> Cost:
    """Return the cost of all layers: `base`, `lora` say how often the forward work on
    weights and on the adapter is done, `scores` how many pairs attention looks at."""
    handed_on = batch.tokens * s.cfg.embed_dim * s.item
    products = 2 * batch.tokens * (base * s.layer_weights + lora * s.adapter)
    return Cost(
        products + scores * s.pair,
        base * (s.layer_weights * s.item + 2 * s.cfg.num_layers * handed_on),
        base * 2 * s.cfg.num_layers * ring(handed_on, s.model),
    )


def unembedding(s: Share, rows: int, positions: int, passes: int, reads: int, logits: bool) -> Cost:
    """Return the cost of `passes` products with the embedding, which each reads it `reads` times.

    logits: whether they go through memory (float32, written and read once a pass).
    """
    scores, table = rows * positions * s.local("V"), s.local("VD")
    return Cost(
        2 * passes * scores * s.cfg.embed_dim,
        passes * (reads * table * s.item + (2 * F32 * scores if logits else 0)),
        0.0,
    )


def logprobs(s: Share, rows: int, positions: int, passes: int) -> Cost:
    """Return the cost of `model.logprob` after the layers: in chunks, or by the kernel."""
    if s.cfg.logprob == "pallas":
        return unembedding(s, rows, positions, passes, math.ceil(rows * positions / BLOCK_C), False)
    chunks = math.ceil(positions / min(positions, chunk_of(s.cfg, rows)))
    padded = chunks * min(positions, chunk_of(s.cfg, rows))
    return unembedding(s, rows, padded, passes, chunks, True)


def forward(s: Share, batch: Rows) -> Cost:
    """Return the cost of the completions' log-probs without gradient."""
    return layers(s, batch, 1, 1, attended(s, batch)) + logprobs(s, batch.rows, batch.completion, 1)


def gradient(s: Share, batch: Rows, remat: str) -> Cost:
    """Return the cost of one micro-batch: forward, backward, and the recomputing in between.

    Base weights have no gradient. Attention computes its scores once more for its gradient, which
    is plain, by blocks, for kernels too.
    """
    once = 1 + (remat == "all")
    scores = once * attended(s, batch) + (0.5 + BACKWARD) * batch.pairs(QUERY_BLOCK)
    body = layers(s, batch, once + 1, once + BACKWARD, scores)
    passes = 3 if s.cfg.logprob == "pallas" else 2  # kernels compute the logits again
    return body + logprobs(s, batch.rows, batch.completion, passes)


def attended(s: Share, batch: Rows) -> float:
    """Return the pairs that attention computes: kernels skip the future, blocks most of it."""
    if s.cfg.attention == "pallas":
        return 0.5 * batch.pairs(batch.prompt + batch.completion)
    return batch.pairs(QUERY_BLOCK)


def optimiser(s: Share) -> Cost:
    """Return the cost of an update: gradients summed over `data`; gradient, weight and both moments
    read, weight and moments written, float32."""
    return Cost(0.0, 7 * F32 * s.whole_adapter, ring(F32 * s.whole_adapter, s.data))


def prefill(s: Share, prompts: int, width: int) -> Cost:
    """Return the cost of running the prompts, logits at their last position only."""
    cache = Cost(0.0, prompts * width * s.cache_token, 0.0)
    last = unembedding(s, prompts, 1, 1, 1, False)
    rows = Rows(prompts, width, 0)
    return layers(s, rows, 1, 1, attended(s, rows)) + last + cache


def decode_step(s: Share, slots: int, prompts: int, width: int, T: int) -> Cost:
    """Return the mean cost of one token of `slots` rows that share `prompts` prompt caches.

    Plain attention reads whole caches, of `width` and T columns; kernels read what is visible.
    """
    prompt_keys, tail_keys = (width, T) if s.cfg.attention != "pallas" else visible(s.cfg, width, T)
    D, L, V = s.cfg.embed_dim, s.cfg.num_layers, s.cfg.vocab_size
    flops = slots * (2 * (s.layer_weights + s.adapter) + s.pair * (prompt_keys + tail_keys))
    hbm = (s.layer_weights + s.adapter) * s.item
    hbm += (prompts * prompt_keys + slots * tail_keys) * s.cache_token
    wire = ring(slots * D * s.item, s.model)
    logits = (s.model - 1) / s.model * slots * V * F32
    return Cost(flops, hbm, (2 * L + 1) * wire + logits) + unembedding(s, slots, 1, 1, 1, False)


def visible(cfg: ModelConfig, width: int, T: int) -> tuple[float, float]:
    """Return the columns (of prompt, of tail) that a token of the tail sees, mean over layers and
    over tokens 1 to T - 1."""
    step = np.arange(1, max(T, 2))
    tail, everything = step + 1, width + step + 1
    near_tail, near = np.minimum(tail, cfg.window), np.minimum(everything, cfg.window)
    share = sum(cfg.global_layers) / cfg.num_layers
    prompts = share * width + (1 - share) * (near - near_tail)
    return float(np.mean(prompts)), float(np.mean(share * tail + (1 - share) * near_tail))


def sampling(s: Share, prompts: int, group: int, slots: int, width: int, T: int) -> list[Cost]:
    """Return the two phases of `sample` on one chip, every completion being T tokens long.

    slots: rows decoded at a time; with fewer than there are, each keeps its prompt's cache itself.
    """
    rows = prompts * group
    caches = prompts if slots == rows else slots
    steps = math.ceil(rows / slots) * (T - 1)
    return [prefill(s, prompts, width), decode_step(s, slots, caches, width, T).times(steps)]


def bound(phases: list[Cost], chip) -> tuple[float, str]:
    """Return (seconds that a `Chip` needs at least, what limits it in the longest phase)."""
    longest, total, limiter = 0.0, 0.0, ""
    for phase in phases:
        seconds = {
            "compute": phase.flops / chip.flops,
            "HBM": phase.hbm / chip.hbm,
            "interconnect": phase.ici / chip.ici,
        }
        name = max(seconds, key=lambda kind: seconds[kind])
        total += seconds[name]
        if seconds[name] >= longest:
            longest, limiter = seconds[name], name
    return total, limiter
