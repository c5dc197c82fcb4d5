"""Measure how many completions a second one core scores with the three rewards.

    python benchmarks/rewards.py

Four completions of every embedded training row: as taught, with another answer, with a unit and
other spelling, and with the tags broken; no two are the same text. "short" is their own length,
"long" pads the reasoning to about 1,500 characters, what 512 tokens of a real model hold. Prints
one JSON line: the median of the repeats, per reward in microseconds a completion and together;
and, where the machine allows, completions a second whose code is run in the sandbox, on all cores.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time

from gemma_cot.config import embedded
from gemma_cot.data import read_jsonl
from gemma_cot.grpo.reward import format_reward, outcome_reward, process_reward, split_blocks
from gemma_cot.guard.corpus import tagged
from gemma_cot.guard.sandbox import check, code_reward

REWARDS = {"format": format_reward, "process": process_reward, "outcome": outcome_reward}
FILLER = "Let me go through this once more, number by number, so that nothing is lost. "
LONG = 1500  # characters


def completions_of(chosen: str, draw: random.Random, length: int) -> list[str]:
    """Return four different completions for a row."""
    reasoning, answer = split_blocks(chosen)
    start = f"Try {draw.randrange(10**6)}. "
    start += FILLER * max(0, (length - len(reasoning)) // len(FILLER))
    return [
        tagged(start + reasoning, answer),
        tagged(start + reasoning.replace(" * ", "*"), str(draw.randrange(2000))),
        tagged(start + reasoning.replace("*", "×"), f"${answer}.0$ units"),
        f"<reasoning>{start}{reasoning} <answer>{answer}",
    ]


def measure(length: int, repeats: int) -> dict:
    """Return microseconds a completion for every reward, and completions a second together."""
    draw = random.Random(0)
    examples, _ = read_jsonl(embedded("train.jsonl"))
    texts, rows = [], []
    for example in examples[::4]:
        texts += completions_of(example.chosen, draw, length)
        rows += [example] * 4
    columns = {"metadata": [row.metadata for row in rows], "domain": [row.domain for row in rows]}
    prompts = [row.prompt for row in rows]
    seconds = {name: [] for name in REWARDS}
    for _ in range(repeats):
        for name, reward in REWARDS.items():
            began = time.process_time()
            reward(prompts, texts, **columns)
            seconds[name].append(time.process_time() - began)
    each = {name: 1e6 * statistics.median(s) / len(texts) for name, s in seconds.items()}
    return {
        "characters": round(statistics.mean(map(len, texts))),
        "microseconds": {name: round(value, 2) for name, value in each.items()},
        "completions_per_second": round(1e6 / sum(each.values())),
    }


def measure_sandbox(count: int) -> dict:
    """Return completions a second of the code reward on honest code, and what is missing here."""
    missing = check()
    texts = [tagged("A sum.", f"def f(x):\n    return x + {i}") for i in range(count)]
    metadata = [{"tests": [f"assert f(1) == {i + 1}"]} for i in range(count)]
    began = time.perf_counter()
    scores = code_reward(["p"] * count, texts, metadata=metadata, allow_code_execution=True)
    seconds = time.perf_counter() - began
    if scores != [1.0] * count:
        raise SystemExit(f"{scores.count(0.0)} of {count} honest completions failed")
    return {"completions_per_second": round(count / seconds, 1), "missing": missing,
            "cores": len(os.sched_getaffinity(0))}  # fmt: skip


def main() -> None:
    """Parse the command line and print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    result = {"short": measure(0, repeats), "long": measure(LONG, repeats)}
    result |= {"sandbox": measure_sandbox(100), "python": platform.python_version()}
    print(json.dumps(result | {"machine": platform.machine()}))


if __name__ == "__main__":
    main()
