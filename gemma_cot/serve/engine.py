"""The model's thread: completions of waiting requests, made together, a token at a time.

Two functions are compiled, once, for one shape: the prompts padded to the longest prompt, the batch
to its size; temperatures, seeds and limits are data. Every draw is that of `model.sample`. Knows no
HTTP: what is new of a completion goes to its row's `tell`.
"""

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_cot.axes import round_up, sharding_of
from gemma_cot.data import WIDTH_STEP, left_pad
from gemma_cot.model.cache import decode_step, decode_weights, new_cache, prefill
from gemma_cot.model.sample import draw
from gemma_cot.policy import Policy
from gemma_cot.serve.request import Request
from gemma_cot.tokenizer import decode


@dataclass
class Row:
    """A completion being made. `tell` takes (row, new text, finish reason or None) or an error."""

    request: Request
    index: int
    key: np.ndarray
    tell: Callable
    ids: list[int] = field(default_factory=list)  # sampled so far, the stop token included
    sent: int = 0  # characters
    done: bool = False

    def take(self, token: int, policy: Policy) -> None:
        """Take the next token: tell what is new, and whether it ends here."""
        self.ids.append(token)
        stopped = token in policy.tokenizer.stop_ids
        text = decode(policy.tokenizer, self.ids[:-1] if stopped else self.ids)
        ends = [at for at in (text.find(stop) for stop in self.request.stop) if at >= 0]
        text = text[: min(ends)] if ends else text
        full = len(self.ids) >= self.request.max_tokens
        reason = "stop" if stopped or ends else "length" if full else None
        end = len(text) if reason else sendable(text, self.request.stop)
        if reason or end > self.sent:
            self.tell((self.index, text[self.sent : end], reason, len(self.ids)))
        self.sent, self.done = max(self.sent, end), bool(reason)


def sendable(text: str, stops: tuple[str, ...]) -> int:
    """Return how much of an unfinished text is sure: no half character, no beginning of a stop."""
    end = len(text.rstrip("\ufffd"))
    begun = [k for stop in stops for k in range(1, len(stop)) if text[:end].endswith(stop[:k])]
    return end - max(begun, default=0)


@partial(jax.jit, static_argnames=("cfg", "max_new_tokens"))
def start(params, cfg, tokens_BT, start_B, lora, *, max_new_tokens: int):
    """Run the prompts. Returns (logits_BV of the first token, cache)."""
    logits_BV, kv_LBSKH = prefill(params, cfg, tokens_BT, start_B, lora)
    return logits_BV, new_cache(cfg, kv_LBSKH, start_B, len(start_B), max_new_tokens)


@partial(jax.jit, static_argnames="cfg", donate_argnames=("logits_BV", "cache"))
def advance(weights, cfg, logits_BV, cache, step, key_B, temperature_B):
    """Draw token `step` of every row, as `model.sample` does, and run it.

    Returns (token_B, logits_BV of the next one, cache).
    """
    key_now_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, step)
    is_greedy_B = temperature_B == 0
    scaled_BV = logits_BV / jnp.where(is_greedy_B, 1.0, temperature_B)[:, None]
    greedy_B, _ = draw(logits_BV, key_now_B, 0.0)
    drawn_B, _ = draw(scaled_BV, key_now_B, 1.0)
    token_B = jnp.where(is_greedy_B, greedy_B, drawn_B)
    logits_BV, cache = decode_step(weights, cfg, token_B, step, cache)
    return token_B, logits_BV, cache


def weights_of(policy: Policy):
    """Return the policy's weights for `advance`."""
    with jax.set_mesh(policy.mesh):
        prepare = jax.jit(decode_weights, static_argnames="cfg")
        return prepare(policy.params, policy.cfg, policy.lora)


def complete(policy: Policy, weights, batch: int, rows: list[Row]) -> None:
    """Make up to `batch` completions together; the rest of the batch is padding."""
    width = round_up(policy.max_prompt_tokens, WIDTH_STEP)
    blank = batch - len(rows)
    tokens_BT, start_B = left_pad([row.request.prompt_ids for row in rows] + [[]] * blank, width)
    spare = jax.random.key(0)
    key_B = jnp.stack([row.key for row in rows] + [spare] * blank)
    temperature_B = np.array([row.request.temperature for row in rows] + [0] * blank, np.float32)
    with jax.set_mesh(policy.mesh):
        place = {letter: sharding_of(letter, policy.mesh) for letter in ("B", "BT")}
        logits_BV, cache = start(
            policy.params, policy.cfg, jax.device_put(tokens_BT, place["BT"]),
            jax.device_put(start_B, place["B"]), policy.lora,
            max_new_tokens=policy.max_completion_tokens,
        )  # fmt: skip
        temperature_B = jax.device_put(temperature_B, place["B"])
        for step in range(policy.max_completion_tokens):
            token_B, logits_BV, cache = advance(
                weights, policy.cfg, logits_BV, cache, np.int32(step), key_B, temperature_B
            )  # fmt: skip
            for row, token in zip(rows, np.asarray(token_B), strict=False):
                if not row.done:
                    row.take(int(token), policy)
            if all(row.done for row in rows):
                return


def work(policy: Policy, weights, batch: int, jobs: queue.Queue) -> None:
    """Answer jobs, lists of rows, for ever; as many as fit into a batch at a time."""
    waiting: list[Row] = []
    while True:
        rows, waiting = waiting or jobs.get(), []
        while not waiting and not jobs.empty():
            more = jobs.get()
            if len(rows) + len(more) <= batch:
                rows = rows + more
            else:
                waiting = more
        try:
            complete(policy, weights, batch, rows)
        except Exception as error:  # the server stays up; `listen` raises it for the client
            for row in rows:
                row.tell(error)
