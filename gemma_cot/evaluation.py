"""Evaluate a policy on unseen rows: completions, scores, rates with intervals, paired tests.

The same prompts, sampler and reward functions as training. Called by train and evaluate; knows no
flag.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_cot.axes import round_up
from gemma_cot.config import ModelConfig
from gemma_cot.data import Encoded
from gemma_cot.grpo.reward import (
    checkpoint_hits,
    format_reward,
    outcome_reward,
    process_reward,
    split_blocks,
)
from gemma_cot.grpo.rollout import completion_texts, reward_columns, sample_prompts
from gemma_cot.model.params import Params
from gemma_cot.progress import Progress
from gemma_cot.stats import mcnemar_exact, mean_interval, wilson
from gemma_cot.tokenizer import Tokenizer

RATES = ("full_format_accuracy", "answer_accuracy", "process_score", "truncated_rate")


def evaluate_rows(
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
    temperature: float = 0.0,
    seed: int = 0,
    label: str = "evaluate",
) -> list[dict]:
    """Complete and score every row, greedily at temperature 0. Returns a result per row.

    batch: prompts decoded together, rounded up to the mesh; the last batch is filled up with
    repeats that are not scored.
    """
    batch = min(round_up(batch, mesh.shape["data"]), round_up(len(rows), mesh.shape["data"]))
    key = jax.random.key(seed)
    results = []
    with Progress(label, len(rows)) as progress:
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            filled = [part[i % len(part)] for i in range(batch)]
            samples = jax.device_get(
                sample_prompts(
                    params, cfg, lora, [row.prompt_ids for row in filled], width, key, mesh,
                    prompt_ids=[row.example.id for row in filled], num_completions=1,
                    max_new_tokens=max_new_tokens, temperature=temperature,
                    stop_ids=tokenizer.stop_ids,
                )
            )  # fmt: skip
            count = len(part)
            texts = completion_texts(
                tokenizer,
                samples.tokens_BT[:count],
                samples.completion_mask_BT[:count],
                samples.stopped_B[:count],
            )
            lengths = samples.completion_mask_BT[:count].sum(axis=1)
            results += score_rows(part, texts, lengths, samples.stopped_B[:count], matcher)
            progress.update(count)
    return results


def score_rows(
    rows: list[Encoded], texts: list[str], lengths: np.ndarray, stopped: np.ndarray, matcher: str
) -> list[dict]:
    """Return the result of every row: what was asked, what came, what it scores."""
    prompts, columns = reward_columns(rows, 1)
    formats = format_reward(prompts, texts, **columns)
    processes = process_reward(prompts, texts, matcher=matcher, **columns)
    outcomes = outcome_reward(prompts, texts, **columns)
    results = []
    for i, row in enumerate(rows):
        reasoning = split_blocks(texts[i])[0] or ""
        checkpoints = row.example.metadata["checkpoints"]
        results.append(
            {
                "id": row.example.id,
                "domain": row.example.domain,
                "prompt": row.example.prompt,
                "completion": texts[i],
                "format": formats[i],
                "process": processes[i],
                "outcome": outcomes[i],
                "num_tokens": int(lengths[i]),
                "stop_reason": "stop" if stopped[i] else "length",
                "checkpoints": len(set(checkpoints)),
                "checkpoints_literal": checkpoint_hits(reasoning, checkpoints, "literal")[0],
                "checkpoints_normalised": checkpoint_hits(reasoning, checkpoints)[0],
            }
        )
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
    n = len(results)
    counts = {
        "full_format_accuracy": [r["format"] for r in results],
        "answer_accuracy": [r["outcome"] for r in results if r["outcome"] is not None],
        "truncated_rate": [float(r["stop_reason"] == "length") for r in results],
    }
    summary: dict = {"n": n}
    for name, values in counts.items():
        successes = int(sum(values))
        summary[name] = successes / max(len(values), 1)
        summary[f"{name}_interval"] = list(wilson(successes, len(values)))
    process = [r["process"] for r in results if r["process"] is not None]
    mean, low, high = mean_interval(process)
    summary |= {"process_score": mean, "process_score_interval": [low, high]}
    summary["mean_completion_tokens"] = sum(r["num_tokens"] for r in results) / max(n, 1)
    return summary


def compare(before: list[dict], after: list[dict], score: str) -> dict:
    """Return the exact McNemar test of a 0/1 `score` ("format", "outcome") on the same rows.

    Keys: gained (wrong before, right after), lost, p_value. Rows without a score are left out.
    """
    old = {result["id"]: result[score] for result in before}
    pairs = [(old[r["id"]], r[score]) for r in after if r["id"] in old]
    gained = sum(1 for a, b in pairs if a == 0 and b == 1)
    lost = sum(1 for a, b in pairs if a == 1 and b == 0)
    return {"gained": gained, "lost": lost, "p_value": mcnemar_exact(lost, gained)}


def write_results(path: str | Path, results: list[dict]) -> None:
    """Write one JSON object per row; the file appears by one rename, whole."""
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(path).with_suffix(".tmp")
    fresh.write_text(lines, encoding="utf-8")
    os.replace(fresh, path)


def read_results(path: str | Path) -> list[dict]:
    """Read what `write_results` wrote."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # U+2028 in a text ends no line
    return [json.loads(line) for line in lines if line]


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
    return "\n".join(lines)
