"""Measure what dropping prompts by pass rate does to the share of GRPO groups with signal.

    python -m gemma_cot.train --grpo_steps=0 --output_dir=SFT
    python benchmarks/curriculum.py --adapter=SFT/adapter --seed=1

The policy completes N training rows K times at temperature 1 (the seed), `prepare --pass_rates`
drops prompts in one of three ways, and held-out draws of the same N rows (the next seed) say how
many groups have rewards that differ among those it keeps and those it drops. "answer": always-right
and never-right ones are dropped; "not_always_right": with --pass_rate_min=0; "reward": with
--pass_rate_by=reward. Prints one JSON line; "outcome": the answer reward alone, "total": the sum
of the three rewards with the recipe's weights. Intervals: 95 % Wilson over groups; the filter never
saw the draws that are counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np

from gemma_cot.config import TrainConfig, embedded
from gemma_cot.data import read_jsonl
from gemma_cot.grpo.loss import has_signal
from gemma_cot.grpo.rollout import combine_rewards
from gemma_cot.results import read_results
from gemma_cot.stats import wilson

FILTERS = {"answer": "--pass_rate_by=answer", "not_always_right": "--pass_rate_min=0",
           "reward": "--pass_rate_by=reward"}  # fmt: skip


def run(command: str, *arguments: str) -> None:
    """Run a command of the package."""
    subprocess.run([sys.executable, "-m", f"gemma_cot.{command}", *arguments], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def signal(results: list[dict], weights: dict[str, float]) -> dict:
    """Return the share of groups whose weighted rewards differ, its interval, and n."""
    k = len(results[0]["samples"])
    scores = {name: [s[name] for r in results for s in r["samples"]] for name in weights}
    reward_PG, valid_PG = combine_rewards(scores, weights, k)
    signal_P = np.asarray(has_signal(reward_PG, valid_PG))
    low, high = wilson(int(signal_P.sum()), len(signal_P))
    return {"share": round(float(signal_P.mean()), 4), "interval": [round(low, 4), round(high, 4)],
            "groups": len(signal_P)}  # fmt: skip


def main() -> None:
    """Parse the command line, measure, print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    cfg = TrainConfig()
    weights = {"format": cfg.format_weight, "process": cfg.process_weight,
               "outcome": cfg.outcome_weight}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        with open(embedded("train.jsonl"), encoding="utf-8") as file:
            data.write_text("".join(islice(file, arguments.rows)), encoding="utf-8")
        for name, seed in (("rates", arguments.seed), ("held_out", arguments.seed + 1)):
            run("evaluate", f"--adapter={arguments.adapter}", f"--data={data}", f"--seed={seed}",
                f"--num_completions={arguments.k}", "--temperature=1",
                f"--output={folder}/{name}.jsonl")  # fmt: skip
        held_out = read_results(f"{folder}/held_out.jsonl")
        groups = {"all": held_out}
        for name, flag in FILTERS.items():
            run("prepare", "--dataset=ours", f"--input={data}", "--max_similarity=1", flag,
                f"--pass_rates={folder}/rates.jsonl", f"--output={folder}/{name}")  # fmt: skip
            kept = {row.prompt for row in read_jsonl(f"{folder}/{name}/train.jsonl")[0]}
            groups[name] = [r for r in held_out if r["prompt"] in kept]
            groups[f"{name}, dropped"] = [r for r in held_out if r["prompt"] not in kept]
    line = {"rows": len(held_out), "k": arguments.k, "seed": arguments.seed}
    for name, only in (("outcome", {"outcome": cfg.outcome_weight}), ("total", weights)):
        line[name] = {group: signal(rows, only) for group, rows in groups.items() if rows}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
