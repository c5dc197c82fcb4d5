"""Measure how fast one core converts and checks rows, and how memory grows with their number.

    python benchmarks/prepare.py --rows=10000,100000,1000000

Every size is a process of its own: synthetic problems in GSM8K's layout (45 words, three calculator
marks) are written to a temporary file and go through the whole of `prepare` with --dataset=gsm8k:
conversion, schema, content, lengths, exact and near duplicates, split, card. Prints one JSON line a
size: rows a second of CPU time of one core, those of conversion and validation (schema, content and
lengths, of at most 10,000 rows), the same without lengths, and the peak memory of the process.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from gemma_cot.config import embedded
from gemma_cot.data import check_row
from gemma_cot.prepare.convert import gsm8k, parse_object, read_rows
from gemma_cot.prepare.filters import check_content
from gemma_cot.prepare.pipeline import CHUNK, Settings, prepare
from gemma_cot.tokenizer import Tokenizer, encode_prompt, encode_target, load_tokenizer

WORDS = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split()
WORDS = sorted({word for word in WORDS if word.isalpha()})


def problem(draw: random.Random) -> dict:
    """Return a made-up row in GSM8K's layout; hardly any two are alike."""
    a, b, c, d = (draw.randrange(2, 900) for _ in range(4))
    text = draw.choices(WORDS, k=41)
    for place, number in zip((8, 18, 28, 38), (a, b, c, d), strict=True):
        text.insert(place, str(number))
    answer = (
        f"The first part is {a} * {b} = <<{a}*{b}={a * b}>>{a * b}.\n"
        f"With the second it is {a * b} + {c} = <<{a * b}+{c}={a * b + c}>>{a * b + c}.\n"
        f"In all there are {a * b + c}+{d}=<<{a * b + c}+{d}={a * b + c + d}>>{a * b + c + d} left."
        f"\n#### {a * b + c + d}"
    )
    return {"question": " ".join(text) + "?", "answer": answer}


def convert_and_check(path: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the rows a second of conversion and validation, with and without lengths; nothing is
    compared with other rows."""
    lines = list(islice(read_rows(path), 10_000))
    checks = counts = 0.0
    for first in range(0, len(lines), CHUNK):
        began = time.process_time()
        parsed = [parse_object(text) for _, text in lines[first : first + CHUNK]]
        rows = [row for raw in parsed for row in gsm8k(raw, "here")]
        for row in rows:
            check_row(row, 0)
        for row in rows:
            check_content(row)
        checked = time.process_time()
        for row in rows:
            encode_prompt(tokenizer, row["prompt"]), encode_target(tokenizer, row["chosen"])
        checks += checked - began
        counts += time.process_time() - checked
    return round(len(lines) / (checks + counts)), round(len(lines) / checks)


def measure(rows: int) -> dict:
    """Prepare `rows` rows in this process."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(rows):
                file.write(json.dumps(problem(draw)) + "\n")
        cfg = Settings(
            dataset="gsm8k", input=(str(path),), output=f"{folder}/out", model="", instruction="",
            max_prompt_tokens=512, max_completion_tokens=512, against=(), max_overlap=0.0,
            max_similarity=0.8, eval_share=0.05, tasks="", on_bad_row="fail",
        )  # fmt: skip
        tokenizer = load_tokenizer(embedded("tiny_model"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        report = prepare(cfg, tokenizer)
        seconds = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        validated, unmeasured = convert_and_check(path, tokenizer)
    return {
        "rows": rows,
        "kept": report.kept,
        "rows_per_second": round(rows / seconds),
        "converted_and_validated_per_second": validated,
        "without_lengths_per_second": unmeasured,
        "cpu_seconds": round(seconds, 1),
        "peak_mib": round(peak / 1024),
        "mib_before": round(before / 1024),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Parse the command line and print a line a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="10000,100000,1000000", help="comma-separated")
    parser.add_argument("--here", action="store_true", help="in this process, one size")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(int(arguments.rows))), flush=True)
        return
    for rows in arguments.rows.split(","):
        subprocess.run([sys.executable, __file__, "--here", f"--rows={rows}"], check=True)


if __name__ == "__main__":
    main()
