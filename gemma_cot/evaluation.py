"""Evaluate a policy on unseen rows: completions, scores, rates with intervals, paired tests.

The same prompts, sampler and reward functions as training. Called by train and evaluate; knows no
flag.
"""

import math
import time
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_cot import hosts
from gemma_cot.axes import round_up
from gemma_cot.config import ModelConfig
from gemma_cot.data import Encoded
from gemma_cot.grpo.reward import (
    RewardFunction,
    checkpoint_hits,
    format_reward,
    outcome_reward,
    process_reward,
    repeated_share,
    split_blocks,
    visible_checkpoints,
)
from gemma_cot.grpo.rollout import (
    completion_ids,
    completion_texts,
    reward_columns,
    sample_prompts,
)
from gemma_cot.model.params import Params
from gemma_cot.model.sample import Samples
from gemma_cot.progress import Progress
from gemma_cot.scores import budgets, fold_samples, pass_at_k, rate_interval, samples_of
from gemma_cot.stats import mcnemar_exact, mean_interval
from gemma_cot.tokenizer import Tokenizer

QUEUE = 4  # calls of the sampler this many times longer than its batch: ends of calls are idle
RATES = ("full_format_accuracy", "answer_accuracy", "process_score", "truncated_rate")


def evaluate_batches(
    params: Params,
    cfg: ModelConfig,
    lora,
    tokenizer: Tokenizer,
    rows: list[Encoded],
    mesh: Mesh,
    *,
    width: int,
    max_new_tokens: int,
    batch: int,
    matcher: str,
    outcome: RewardFunction = outcome_reward,
    code: RewardFunction | None = None,
    num_completions: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    label: str = "evaluate",
    done: int = 0,
) -> Iterator[list[dict]]:
    """Complete and score every row, greedily at temperature 0; yield results, a row each, in order.

    batch: completions decoded together, over all devices; each call of the sampler takes about
    `QUEUE` times as many, which wait for a place. The last call is filled up with repeats that are
    not scored. code: what runs the answer's code, None: nothing does. done: rows that were
    evaluated before, for the progress bar.
    """
    devices, k = mesh.shape["data"], num_completions
    calls = math.ceil(len(rows) * k / (QUEUE * batch))
    size = round_up(math.ceil(len(rows) / max(calls, 1)), devices)
    key = jax.random.key(seed)
    began, tokens = time.monotonic(), 0
    with Progress(label, done + len(rows), start=done) as progress:
        for first in range(0, len(rows), max(size, 1)):
            part = rows[first : first + size]
            filled = [part[i % len(part)] for i in range(size)]
            samples = hosts.own(
                sample_prompts(
                    params, cfg, lora, [row.prompt_ids for row in filled], width, key, mesh,
                    prompt_ids=[row.example.id for row in filled], num_completions=k,
                    max_new_tokens=max_new_tokens, temperature=temperature,
                    stop_ids=tokenizer.stop_ids, slots=math.ceil(batch / devices),
                )
            )  # fmt: skip
            own = part[hosts.share(size)]  # completed by this process's devices, and scored here
            score = partial(score_completions, samples, own, k, tokenizer, matcher, outcome, code)
            results = [result for results in hosts.gather(score) for result in results]
            yield results
            tokens += int(k * sum(result["num_tokens"] for result in results))
            rate = tokens / (time.monotonic() - began)
            progress.update(len(part), f"{rate:.0f} tokens/s")


def score_completions(
    samples: Samples, rows: list[Encoded], k: int, tokenizer: Tokenizer, matcher: str,
    outcome: RewardFunction, code: RewardFunction | None = None,
) -> list[dict]:
    """Return the results of `rows`, k samples each, from the first of `samples` (host arrays)."""
    tokens_BT, mask_BT, stopped_B = (
        array[: len(rows) * k]
        for array in (samples.tokens_BT, samples.completion_mask_BT, samples.stopped_B)
    )
    texts = completion_texts(tokenizer, tokens_BT, mask_BT, stopped_B)
    ids = completion_ids(tokens_BT, mask_BT)
    return score_rows(rows, texts, ids, stopped_B, matcher, outcome, code) if rows else []


def score_rows(
    rows: list[Encoded], texts: list[str], ids: list[list[int]], stopped: np.ndarray, matcher: str,
    outcome: RewardFunction = outcome_reward, code: RewardFunction | None = None,
) -> list[dict]:
    """Return the result of every row: what was asked, what came, what it scores.

    texts, ids (the tokens, stop token included), stopped: one completion of a row after the other,
    the same number for each row. Several are scored one by one and together (`fold_samples`).
    """
    k = len(texts) // len(rows)
    prompts, columns = reward_columns(rows, k)
    formats = format_reward(prompts, texts, **columns)
    processes = process_reward(prompts, texts, matcher=matcher, **columns)
    outcomes = outcome(prompts, texts, **columns)
    codes = code(prompts, texts, **columns) if code else []
    samples = []
    for i, text in enumerate(texts):
        reasoning = split_blocks(text)[0] or ""
        checkpoints = visible_checkpoints(columns["metadata"][i])
        samples.append(
            {
                "completion": text,
                "format": formats[i],
                "process": processes[i],
                "outcome": outcomes[i],
                "num_tokens": len(ids[i]),
                "stop_reason": "stop" if stopped[i] else "length",
                "repetition": repeated_share(ids[i]),
                "checkpoints_literal": checkpoint_hits(reasoning, checkpoints, "literal")[0],
                "checkpoints_normalised": checkpoint_hits(reasoning, checkpoints)[0],
            }
            | ({"code": codes[i]} if code else {})
        )
    results = []
    for p, row in enumerate(rows):
        example, own = row.example, samples[p * k : p * k + k]
        head = {"id": example.id, "domain": example.domain, "prompt": example.prompt}
        scores = own[0] if k == 1 else fold_samples(own, example.domain)
        distinct = len(set(visible_checkpoints(example.metadata)))
        results.append(head | scores | {"checkpoints": distinct})
    return results


def summarise(results: list[dict]) -> dict:
    """Return rates with 95 % intervals (`NAME_interval`), lengths, and the same by domain."""
    summary = _rates(results)
    domains = sorted({result["domain"] for result in results})
    by_domain = {d: _rates([r for r in results if r["domain"] == d]) for d in domains}
    total = sum(result["checkpoints"] for result in results)
    hits = {
        f"checkpoint_rate_{matcher}": sum(r[f"checkpoints_{matcher}"] for r in results)
        / max(total, 1)
        for matcher in ("literal", "normalised")
    }
    return summary | hits | {"domains": by_domain}


def _rates(results: list[dict]) -> dict:
    n, k = len(results), max((len(samples_of(r)) for r in results), default=1)
    truncated = [
        float(np.mean([sample["stop_reason"] == "length" for sample in samples_of(r)]))
        for r in results
    ]
    answered = [r for r in results if r["outcome"] is not None]
    rates = {
        "full_format_accuracy": [r["format"] for r in results],
        "answer_accuracy": [r["outcome"] for r in answered],
        "truncated_rate": truncated,
    }
    tested = [r["code"] for r in results if r.get("code") is not None]
    if tested:
        rates["code_accuracy"] = tested
    if k > 1:
        rates["majority_accuracy"] = [r["majority"] for r in answered]
        for budget in budgets(k):
            rates[f"pass_at_{budget}"] = [_pass_at(r, budget) for r in answered]
    summary: dict = {"n": n, "num_completions": k}
    for name, values in rates.items():
        summary[name] = sum(values) / max(len(values), 1)
        summary[f"{name}_interval"] = list(rate_interval(values, k))
    process = [r["process"] for r in results if r["process"] is not None]
    lengths = [r["num_tokens"] for r in results]
    longest = max(lengths, default=0) or 1
    for name, values, scale in (
        ("process_score", process, 1),
        ("repetition_rate", [r["repetition"] for r in results], 1),
        ("mean_completion_tokens", [length / longest for length in lengths], longest),
    ):
        mean, low, high = mean_interval(values)
        summary |= {name: mean * scale, f"{name}_interval": [low * scale, high * scale]}
    summary["mean_completion_tokens"] = sum(lengths) / max(n, 1)
    summary["rows_without"] = {
        "checkpoints": n - len(process), "gold answer": n - len(answered)
    }  # fmt: skip
    return summary


def _pass_at(result: dict, budget: int) -> float:
    """Return pass@budget of a row."""
    samples = samples_of(result)
    return pass_at_k(len(samples), int(sum(sample["outcome"] for sample in samples)), budget)


def compare(before: list[dict], after: list[dict], score: str) -> dict:
    """Return the exact McNemar test of a 0/1 `score` ("format", "outcome") on the same rows.

    Keys: gained (wrong before, right after), lost, p_value. Rows without a score are left out.
    """
    old = {result["id"]: result[score] for result in before}
    pairs = [(old[r["id"]], r[score]) for r in after if r["id"] in old]
    gained = sum(1 for a, b in pairs if a == 0 and b == 1)
    lost = sum(1 for a, b in pairs if a == 1 and b == 0)
    return {"gained": gained, "lost": lost, "p_value": mcnemar_exact(lost, gained)}


def compare_stages(results: dict[str, list[dict]]) -> dict[str, dict]:
    """Return `compare` of every stage with the one before it, by "BEFORE -> AFTER, full format" and
    "BEFORE -> AFTER, answer"."""
    names = list(results)
    return {
        f"{before} -> {after}, {score}": compare(results[before], results[after], column)
        for before, after in zip(names, names[1:], strict=False)
        for score, column in (("full format", "format"), ("answer", "outcome"))
    }


def table(stages: dict[str, dict], comparisons: dict[str, dict]) -> str:
    """Return the printed table: a line per stage, a column per rate with its interval in per cent,
    and the paired tests under it."""
    head = f"{'stage':6s} {'full format':>22s} {'answer right':>22s} {'process score':>22s}"
    lines = [head + f" {'tokens':>7s} {'cut off':>8s} {'rows':>5s}"]
    for stage, summary in stages.items():
        cells = []
        for name in RATES[:3]:
            low, high = summary[f"{name}_interval"]
            cell = f"{100 * summary[name]:5.1f} % ({100 * low:4.1f}-{100 * high:5.1f})"
            cells.append(cell.rjust(22))
        lines.append(
            f"{stage:6s} {' '.join(cells)} {summary['mean_completion_tokens']:7.1f} "
            f"{100 * summary['truncated_rate']:6.1f} % {summary['n']:5d}"
        )
    for name, test in comparisons.items():
        lines.append(
            f"{name}: {test['gained']} rows gained, {test['lost']} lost, "
            f"McNemar exact p = {test['p_value']:.2g}"
        )
    return "\n".join(lines + alarms(comparisons))


def alarms(comparisons: dict[str, dict]) -> list[str]:
    """Return a line for every two stages between which the format rose while the answers fell.

    comparisons: those of `compare_stages`.
    """
    lines = []
    for name, form in comparisons.items():
        pair, _, kind = name.partition(", ")
        answer = comparisons.get(f"{pair}, answer")
        if kind != "full format" or answer is None:
            continue
        if form["gained"] > form["lost"] and answer["lost"] > answer["gained"]:
            p_value = answer["p_value"]
            lines.append(
                f"ALARM: {pair}: format rises while answers fall"
                f"{'' if p_value < 0.05 else f' (perhaps by chance, p = {p_value:.2g})'}: the "
                "policy learns to look right. Try a lower --format_weight, a higher "
                "--outcome_weight or --beta, or fewer --grpo_steps, and read eval/*.jsonl"
            )
    return lines
