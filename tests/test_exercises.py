"""The exercises teach: empty holes fail, our own functions pass, each usual mistake is named."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.config import TINY
from gemma_cot.grpo import loss
from gemma_cot.grpo.reward import process_reward, split_blocks
from gemma_cot.lora import init_lora, merge
from gemma_cot.model.layers import causal_mask
from gemma_cot.model.sample import Loop, record

FOLDER = Path(__file__).parents[1] / "exercises"


# ---- the library's answers ----------------------------------------------------------------------


def library_merge(w_DF, a_DR, b_RF, alpha):
    """`lora.merge` of a model of one layer that has this weight only."""
    lora = init_lora(jax.random.key(0), TINY, a_DR.shape[1], alpha, ("gate",))
    lora = lora.replace(layers={"gate": {"a": a_DR[None], "b": b_RF[None]}})
    return merge({"layers": {"gate": w_DF[None]}}, lora)["layers"]["gate"][0]


def library_stop_token_mask(tokens_BT, stop_ids):
    """What the sampler's `record` notes down when it draws these tokens one after the other."""
    B, T = tokens_BT.shape
    zeros_B, rows_B = jnp.zeros(B, jnp.int32), jnp.arange(B, dtype=jnp.int32)
    state = Loop(
        clock=jnp.int32(0), next_row=jnp.int32(B), row_B=rows_B, began_B=zeros_B,
        done_B=jnp.zeros(B, bool), token_B=zeros_B, cache=None,
        tokens_NT=jnp.zeros((B, T), jnp.int32), logp_NT=jnp.zeros((B, T)), length_N=zeros_B,
        stopped_N=jnp.zeros(B, bool),
    )  # fmt: skip
    for t in range(T):
        drawn = jnp.asarray(tokens_BT[:, t]), jnp.zeros(B)
        state = record(state, drawn, ~state.done_B, stop_ids).replace(clock=state.clock + 1)
    return np.arange(T)[None] < np.asarray(state.length_N)[:, None]


SOLUTIONS = {
    "group_advantages": lambda reward_PG: loss.group_advantages(jnp.asarray(reward_PG)),
    "token_weights": lambda mask_BT, *rest: loss.token_weights(jnp.asarray(mask_BT), *rest),
    "clipped_objective": loss.clipped_objective,
    "k3": lambda d_BT: loss.kl_per_token(d_BT, None, "k3"),
    "sliding_window_mask": lambda *arguments: causal_mask(*arguments)[0],
    "lora_merge": library_merge,
    "stop_token_mask": library_stop_token_mask,
    "process_reward": process_reward,
}


# ---- usual mistakes -----------------------------------------------------------------------------


def advantages(std, epsilon=1e-4, signal=True):
    """Return an answer to group_advantages that divides by std(rewards)."""

    def answer(reward_PG):
        centred_PG = reward_PG - reward_PG.mean(axis=1, keepdims=True)
        with np.errstate(all="ignore"):
            advantage_PG = centred_PG / (std(reward_PG) + epsilon)
        if not signal:
            return advantage_PG
        return np.where(np.ptp(reward_PG, axis=1, keepdims=True) > 1e-6, advantage_PG, 0)

    return answer


def group_std(reward_PG):
    return reward_PG.std(axis=1, ddof=1, keepdims=True)


def weights(**replaced):
    """Return an answer to token_weights with some aggregations replaced."""

    def answer(mask_BT, aggregation, longest):
        n_B1, B = mask_BT.sum(axis=1, keepdims=True), len(mask_BT)
        if aggregation in replaced:
            with np.errstate(all="ignore"):
                return replaced[aggregation](mask_BT, n_B1, B, longest)
        return np.asarray(SOLUTIONS["token_weights"](mask_BT, aggregation, longest))

    return answer


def window(allowed, padding=True):
    """Return an answer to sliding_window_mask: allowed(query - key, window)."""

    def answer(start_B, T, size):
        distance_TS = np.arange(T)[:, None] - np.arange(T)[None, :]
        real_B1S = np.arange(T) >= start_B[:, None, None] if padding else np.ones((2, 1, T), bool)
        return allowed(distance_TS, size) & real_B1S

    return answer


def stops(tokens_BT, stop_ids):
    return np.isin(tokens_BT, stop_ids)


def before_stop(tokens_BT, stop_ids):
    return np.cumsum(stops(tokens_BT, stop_ids), axis=1) == 0


def to_second_stop(tokens_BT, stop_ids):
    return np.cumsum(stops(tokens_BT, stop_ids), axis=1) <= 1


def to_last_stop(tokens_BT, stop_ids):
    stop_BT = stops(tokens_BT, stop_ids)
    after_BT = np.cumsum(stop_BT[:, ::-1], axis=1)[:, ::-1] > 0
    return after_BT | ~stop_BT.any(axis=1, keepdims=True)


def process(distinct=True, cap=True, block=True, none=None, share=False, everywhere=None):
    """Return an answer to process_reward with one thing wrong."""

    def answer(prompts, completions, *, metadata=None, **columns):
        scores = []
        for text, row in zip(completions, metadata, strict=True):
            steps = row["checkpoints"]
            reasoning = (split_blocks(text)[0] or "") if block else text
            wanted = set(steps) if distinct else steps
            hits = sum(reasoning.count(one) if everywhere else one in reasoning for one in wanted)
            score = 0.2 * hits if not share else hits / max(len(wanted), 1)
            scores.append((min(score, 1.0) if cap else score) if steps else none)
        return scores

    return answer


def wants_reasoning(prompts, completions, *, metadata=None, **columns):
    """Answer None where there is no reasoning block."""
    right = process_reward(prompts, completions, metadata=metadata)
    return [score if split_blocks(text)[0] else None
            for score, text in zip(right, completions, strict=True)]  # fmt: skip


WRONG = [
    ("group_advantages", advantages(lambda r: r.std(axis=1, keepdims=True)), "ddof=1"),
    ("group_advantages", advantages(group_std, 0.0), "the 1e-4 in the denominator is missing"),
    ("group_advantages", advantages(lambda r: r.std(axis=1, keepdims=True), 0.0), "then add 1e-4"),
    ("group_advantages", advantages(lambda r: r.std(ddof=1)), "each group's own"),
    ("group_advantages", advantages(lambda r: 1.0, 0.0), "is Dr. GRPO's advantage"),
    ("group_advantages", advantages(group_std, signal=False), "noise becomes a training signal"),
    ("group_advantages", advantages(group_std, 0.0, signal=False), "0 / 0"),
    ("group_advantages", lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-4), "whole batch"),
    ("group_advantages", lambda r: (r - r.mean()) / (r.std() + 1e-4), "axis=1, ddof=1"),
    ("group_advantages", lambda r: r - r.mean(axis=1), "With keepdims=True a mean"),
    ("group_advantages", lambda r: (r - r.mean(0)) / (r.std(0, ddof=1) + 1e-4), "use axis=1"),
    ("token_weights", weights(grpo=lambda m, n, B, L: m / (B * L)), "that is Dr. GRPO"),
    ("token_weights", weights(grpo=lambda m, n, B, L: m / (B * m.shape[1])), "padded. length"),
    ("token_weights", weights(grpo=lambda m, n, B, L: m / np.maximum(n, 1)), "1/B is missing"),
    ("token_weights", weights(grpo=lambda m, n, B, L: m / (B * n)), "do not divide by 0"),
    ("token_weights", weights(dapo=lambda m, n, B, L: m / (B * np.maximum(n, 1))), "means .GRPO."),
    ("token_weights", weights(dapo=lambda m, n, B, L: m / m.size), "padding is counted"),
    ("token_weights", weights(dr_grpo=lambda m, n, B, L: m / (B * n.max())), "a constant"),
    ("clipped_objective",
     lambda r, A, low, high: np.maximum(r * A, np.clip(r, 1 - low, 1 + high) * A), "swapped"),
    ("clipped_objective",
     lambda r, A, low, high: np.clip(r, 1 - low, 1 + high) * A, "min is missing"),
    ("clipped_objective", lambda r, A, low, high: r * A, "clip is missing"),
    ("clipped_objective",
     lambda r, A, low, high: np.minimum(r * A, np.clip(r, 1 - high, 1 + low) * A), "clip-higher"),
    ("clipped_objective",
     lambda r, A, low, high: np.minimum(r, np.clip(r, 1 - low, 1 + high)) * A, "of the products"),
    ("k3", lambda d: -d, "that is k1"),
    ("k3", lambda d: d**2 / 2, "that is k2"),
    ("k3", lambda d: np.exp(-d) + d - 1, "turned round"),
    ("k3", lambda d: np.exp(d) - d, "the 1 is missing"),
    ("sliding_window_mask", window(lambda d, w: (d >= 0) & (d <= w)), "sees window . 1"),
    ("sliding_window_mask", window(lambda d, w: (d >= 0) & (d < w - 1)), "sees window - 1"),
    ("sliding_window_mask", window(lambda d, w: (d > 0) & (d < w)), "itself is left out"),
    ("sliding_window_mask", window(lambda d, w: (d >= 0) & (d < w), False), "padding on the left"),
    ("sliding_window_mask", window(lambda d, w: abs(d) < w), "the future is visible"),
    ("sliding_window_mask", window(lambda d, w: d >= 0), "a global layer"),
    ("lora_merge", lambda w, a, b, alpha: w + a @ b, "alpha / r is missing"),
    ("lora_merge", lambda w, a, b, alpha: w + alpha * a @ b, "division by the rank is not"),
    ("lora_merge", lambda w, a, b, alpha: w + a @ b / a.shape[1], "alpha is missing"),
    ("lora_merge", lambda w, a, b, alpha: w + a.shape[1] / alpha * a @ b, "turned round"),
    ("lora_merge", lambda w, a, b, alpha: alpha / a.shape[1] * a @ b, "W is missing"),
    ("lora_merge", lambda w, a, b, alpha: w + alpha / a.shape[1] * a @ b, "dtype of W"),
    ("stop_token_mask", before_stop, "nothing teaches the model to"),
    ("stop_token_mask", to_last_stop, "ends at the first"),
    ("stop_token_mask", to_second_stop, "up to the second"),
    ("stop_token_mask",
     lambda tokens, ids: library_stop_token_mask(tokens, ids[:1]), "only the first id"),
    ("stop_token_mask", lambda tokens, ids: ~stops(tokens, ids), "what follows the first"),
    ("process_reward", process(distinct=False), "listed twice counts twice"),
    ("process_reward", process(everywhere=True), "written three times"),
    ("process_reward", process(cap=False), "cap it"),
    ("process_reward", process(block=False), "answer block are paid"),
    ("process_reward", process(none=0.0), "does not apply"),
    ("process_reward", process(share=True), "not the share"),
    ("process_reward", wants_reasoning, "0.0, not None"),
    ("process_reward", lambda p, c, **columns: 0.4, "in a list"),
]  # fmt: skip


# ---- the proof ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exercises():
    """(the module of holes, {name of a hole: its tests}), loaded from the folder."""
    loaded = {}
    for name in ("holes", "test_holes"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        loaded[name] = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded[name]
        spec.loader.exec_module(loaded[name])
    tests = {hole: [test for name, test in vars(loaded["test_holes"]).items()
                    if name.startswith(f"test_{hole}")] for hole in SOLUTIONS}  # fmt: skip
    yield loaded["holes"], tests
    for name in loaded:
        del sys.modules[name]


def test_there_are_eight_holes(exercises):
    holes, tests = exercises
    named = {name for name, value in vars(holes).items() if callable(value)}
    assert named == set(SOLUTIONS) and len(named) == 8
    assert all(tests.values())


def test_empty_holes_fail_and_say_so():
    command = [sys.executable, "-m", "pytest", "exercises", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 1 and " passed" not in done.stdout
    for name in SOLUTIONS:
        assert f"{name}: the hole is empty; fill it in exercises/holes.py" in done.stdout
    assert "Traceback" not in done.stdout and "def ask" not in done.stdout


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_librarys_own_function_is_right(exercises, monkeypatch, name):
    holes, tests = exercises
    with pytest.raises(pytest.fail.Exception, match="the hole is empty"):
        tests[name][0]()
    monkeypatch.setattr(holes, name, SOLUTIONS[name])
    assert [test() for test in tests[name]] == [None] * len(tests[name])


@pytest.mark.parametrize(
    ("name", "wrong", "message"), WRONG, ids=[f"{name}-{text}" for name, _, text in WRONG]
)
def test_a_usual_mistake_is_named(exercises, monkeypatch, name, wrong, message):
    holes, tests = exercises
    monkeypatch.setattr(holes, name, wrong)
    told = []
    for test in tests[name]:
        try:
            test()
        except pytest.fail.Exception as failure:
            told.append(str(failure))
    assert told, "a wrong answer passed"
    assert re.search(message, " ".join(" ".join(told).split())), told
