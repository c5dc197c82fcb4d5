"""A run's folder as train writes it, made in a moment, full of texts that attack a page."""

import dataclasses
import json
import math
import random

import pytest
from report_browser import ATTACK

from gemma_cot.config import PRESETS, TrainConfig
from gemma_cot.evaluation import compare, summarise
from gemma_cot.results import write_results
from gemma_cot.traces import write_trace


def completion(text: str, reward: float, advantage: float, rng: random.Random) -> dict:
    """Return a traced completion: a token a character, numbers as of a step that moved a little."""
    pieces = [c.replace(" ", "\u2581") for c in text] + ["<end_of_turn>"]
    logp = [-round(abs(rng.gauss(0, 0.5)), 6) for _ in pieces]
    ratio = [round(math.exp(rng.gauss(0, 0.1)), 6) for _ in pieces]
    return {
        "text": text, "stopped": True, "reward": reward, "valid": True, "advantage": advantage,
        "kl_penalty": None,
        "scores": {"format": 1.0, "process": round(reward - 1, 6), "outcome": 0.0},
        "ids": list(range(len(pieces))), "pieces": pieces, "logp_sampler": logp, "logp_old": logp,
        "logp": [round(a + math.log(r), 6) for a, r in zip(logp, ratio, strict=True)],
        "logp_ref": logp, "ratio": ratio, "kl": [0.001] * len(pieces),
        "entropy": [0.25] * len(pieces), "weight": [0.001] * len(pieces),
        "clipped": [r > 1.2 for r in ratio],
    }  # fmt: skip


def trace(step: int, groups: int, rng: random.Random) -> dict:
    """Return a trace: rewards 1.4, 1.2, 1, 1 in every group but the last, whose are equal."""
    made = []
    for number in range(groups):
        rewards = (1.4, 1.2, 1.0, 1.0) if number < groups - 1 else (1.0,) * 4
        std = (sum((r - 1.15) ** 2 for r in rewards) / 3) ** 0.5
        signal = len(set(rewards)) > 1
        text = "<reasoning>4 * 2 = 8, 8 + 1 = 9" + " and so on" * 8 + "</reasoning><answer>9"
        made.append(
            {
                "row": number + 1, "sampled_in": step - 1, "domain": "math",
                "prompt": f"What is 4 * 2 + {number}? {ATTACK}",
                "metadata": {"checkpoints": ["4 * 2 = 8", "8 + 3 = 11"], "final_answer": "11"},
                "prompt_ids": [2, 105], "prompt_pieces": ["<bos>", "<start_of_turn>"],
                "completions": [
                    completion(text + (ATTACK if g == 1 else "") + "</answer>", reward,
                               round((reward - 1.15) / (std + 1e-4), 6) if signal else 0.0, rng)
                    for g, reward in enumerate(rewards)
                ],
            }
        )  # fmt: skip
    return {"step": step, "groups": made}


def results(stage: str, n: int) -> list[dict]:
    """Return the evaluated rows of a stage: SFT answers every fifth row, GRPO every second."""
    right = {"base": 0, "sft": 5, "grpo": 2}[stage]
    return [
        {
            "id": i, "domain": ("math", "code", "science")[i % 3],
            "prompt": f"question {i} {ATTACK if i == 3 else ''}",
            "completion": f"<reasoning>{stage} {i}</reasoning><answer>{ATTACK}</answer>",
            "format": float(stage != "base"), "process": 0.2, "num_tokens": 40 + i % 7,
            "outcome": float(bool(right) and i % right == 0), "stop_reason": "stop",
            "repetition": 0.0, "checkpoints": 2, "checkpoints_literal": 1,
            "checkpoints_normalised": 1,
        }
        for i in range(1, n + 1)
    ]  # fmt: skip


def metrics(sft: int, grpo: int) -> list[dict]:
    """Return rows of metrics.jsonl of a run that learns and drifts."""
    rows = [
        {"stage": "sft", "step": s, "loss": 3 / s, "grad_norm": 1 / s, "tokens_per_second": 9e3}
        for s in range(1, sft + 1)
    ]
    for s in range(1, grpo + 1):
        t = s / grpo
        rows.append(
            {
                "stage": "grpo", "step": s, "loss": 0.01 * t, "grad_norm": 0.2, "reward": 1 + t,
                "reward_std": 0.3, "reward_format": 0.9, "reward_process": 0.3 * t,
                "reward_outcome": 0.6 * t, "reward_short": 0.1, "kl": 0.1 * t,
                "entropy": 0.5 - 0.2 * t, "completion_tokens": 60 + 30 * t, "repetition": 0.01,
                "signal_share": 0.7 - 0.6 * t, "truncated_rate": 0.1 * t, "clip_share": 0.01,
                "ratio_max": 1.3, "seconds_rollout": 0.5, "seconds_reward": 0.02,
                "seconds_update": 0.4, "tokens_per_second": 3000.0, "memory_gib": 1.0 + 0.2 * t,
                "decode_useful": 0.8, "logp_drift_mean": 1e-6, "logp_drift_max": 1e-5,
                "learning_rate": 1e-3 * (1 - t), "tokens": 5000.0,
            }
        )  # fmt: skip
    return rows


def make_run(folder, *, sft=500, grpo=2000, rows=300, every=20, groups=16, finished=True):
    """Write the folder of a run; return it."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = TrainConfig(**PRESETS["tiny"] | dict(sft_steps=sft, grpo_steps=grpo, instruction=ATTACK))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    lines = [json.dumps(row) + "\n" for row in metrics(sft, grpo if finished else grpo // 2)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for step in [1, *range(every, grpo + 1, every)]:
        write_trace(folder, trace(step, groups, rng))
    names = ("base", "sft", "grpo") if finished else ("base", "sft")
    stages = {name: results(name, rows) for name in names}
    for name, made in stages.items():
        write_results(folder / "eval" / f"{name}.jsonl", made)
    card = {"file": str(folder / "train.jsonl"), "hash": "0" * 16, "rows": rows}
    card |= {"domains": {"math": rows}, "prompt_tokens": [20, 40], "target_tokens": [50, 90]}
    (folder / "card.md").write_text(f"# Data card\n{ATTACK}\n")
    (folder / "environment.json").write_text(
        json.dumps({"versions": {"jax": "0.10.2"}, "devices": ["TFRT_CPU_0"], "model": ATTACK,
                    "data": {"train": card}})
    )  # fmt: skip
    if finished:
        summary = {
            "stages": {name: summarise(made) for name, made in stages.items()},
            "comparisons": {
                f"{a} -> {b}, {score}": compare(stages[a], stages[b], column)
                for a, b in (("base", "sft"), ("sft", "grpo"))
                for score, column in (("full format", "format"), ("answer", "outcome"))
            },
            "seconds": {"grpo": 100.0, "total": 200.0}, "steps": {"sft": sft, "grpo": grpo},
            "discarded": [f"2 training rows over 64 tokens: discarded {ATTACK}"],
            "canaries": {}, "reward_errors": 0, "jax": "0.10.2", "devices": ["TFRT_CPU_0"],
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A finished run of 40 GRPO steps."""
    return make_run(tmp_path_factory.mktemp("runs") / "small", sft=20, grpo=40, rows=40, groups=3)
