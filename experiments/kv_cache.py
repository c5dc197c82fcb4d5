"""What a KV cache saves: operations and bytes of a token by formula, and its time measured.

    python experiments/kv_cache.py        # half a minute on a CPU; writes docs/kv_cache.*

With a cache: `sample`. Without: the whole text through `hidden_states` for every token. Times want
a machine that does nothing else. docs/kv_cache.md discusses the numbers.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from laboratory import markdown_table, side_by_side, store

from gemma_cot.config import GEMMA3_1B, ModelConfig, embedded
from gemma_cot.curves import BLUE, ORANGE, Line, Panel
from gemma_cot.model.gemma import hidden_states, unembed
from gemma_cot.model.load import load_pretrained
from gemma_cot.model.params import num_params
from gemma_cot.model.sample import sample

LENGTHS = (64, 128, 256, 512, 1024)
TOKENS, REPEATS = 32, 5
PANEL = Panel("Time a token, tiny model (ms)", "grpo",
              (Line("without", "without a cache", ORANGE), Line("with", "with", BLUE)))  # fmt: skip


def matrix_flops(cfg: ModelConfig) -> int:
    """Return the operations of one token in all matrices of the layers, 2 for each weight.

    The norms' weights are counted too; they are a 10,000th of it.
    """
    return 2 * (num_params(cfg) - cfg.vocab_size * cfg.embed_dim)


def visible(cfg: ModelConfig, position: int) -> int:
    """Return the keys that a query at `position` (from 1) sees, summed over the layers."""
    return sum(position if wide else min(position, cfg.window) for wide in cfg.global_layers)


def flops(cfg: ModelConfig, length: int, cached: bool) -> float:
    """Return the operations for token `length` of a text: of this token, or of all so far.

    Score and mix take 4 N H for each visible key; the unembedding is only needed for the last one.
    """
    positions = (length,) if cached else range(1, length + 1)
    keys = sum(visible(cfg, position) for position in positions)
    attention = 4 * cfg.num_heads * cfg.head_dim * keys
    unembedding = 2 * cfg.vocab_size * cfg.embed_dim
    return matrix_flops(cfg) * len(positions) + attention + unembedding


def cache_bytes(cfg: ModelConfig, length: int, item: int = 2) -> int:
    """Return the bytes of keys and values of `length` tokens in all layers (bfloat16: item 2)."""
    return 2 * cfg.num_layers * length * cfg.num_kv_heads * cfg.head_dim * item


def seconds(work) -> float:
    """Return the least time of `work()` in REPEATS tries, after one that compiles."""
    jax.block_until_ready(work())
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(work())
        found.append(time.perf_counter() - began)
    return min(found)


def measure_length(cfg: ModelConfig, params: dict, length: int) -> dict[str, float]:
    """Return the milliseconds a token takes behind `length` others, with and without a cache."""
    tokens_PT = jnp.asarray(np.random.default_rng(0).integers(110, 768, (1, length)))
    start_P = jnp.zeros((1,), jnp.int32)

    def cached(count: int) -> float:
        return seconds(lambda: sample(
            params, cfg, tokens_PT, start_P, jax.random.key(0), num_completions=1,
            max_new_tokens=count, temperature=0.0, stop_ids=()).tokens_BT)  # fmt: skip

    last = jax.jit(lambda tokens: unembed(params, hidden_states(params, cfg, tokens)[0][:, -1]))
    per_token = (cached(1 + TOKENS) - cached(1)) / TOKENS  # less the prefill
    return {"with": round(1000 * per_token, 3),
            "without": round(1000 * seconds(lambda: last(tokens_PT)), 3)}  # fmt: skip


def table(result: dict) -> str:
    """Return the table of the page."""
    names = ("tokens so far", "GFLOPs without", "with", "ratio", "cache, MiB", "tiny: ms without",
             "with")  # fmt: skip
    rows = []
    for length in LENGTHS:
        without, with_ = (flops(GEMMA3_1B, length, cached) / 1e9 for cached in (False, True))
        times = result["ms"][str(length)]
        kept = f"{cache_bytes(GEMMA3_1B, length) / 2**20:.1f}"
        rows.append((length, f"{without:,.0f}", f"{with_:.2f}", f"{without / with_:.0f}", kept,
                     f"{times['without']:.2f}", f"{times['with']:.2f}"))  # fmt: skip
    return markdown_table(names, rows)


def draw(result: dict) -> str:
    """Return the plot of the page."""
    rows = [{"stage": "grpo", "step": int(length)} | ms for length, ms in result["ms"].items()]
    return side_by_side([PANEL], rows, "Time a token with and without a KV cache",
                        x_title="tokens so far")  # fmt: skip


def main() -> None:
    """Measure, write docs/kv_cache.* and print the table."""
    cfg, params = load_pretrained(embedded("tiny_model"), "float32")
    ms = {str(length): measure_length(cfg, params, length) for length in LENGTHS}
    result = {"tokens": TOKENS, "repeats": REPEATS, "ms": ms}
    store("kv_cache", "kv_cache", result, draw(result), table(result))


if __name__ == "__main__":
    main()
