"""How the time of one piece of work grows with rows and with length: python benchmarks/scaling.py

    python benchmarks/scaling.py --work=update --rows=4,8,16 --new=128,256,512,1024 > scaling.jsonl

One process of `ours.py` a point, one after the other: first over --rows at 256 + 512 tokens, then
over --new (completion tokens) at the first of --rows. One JSON line a point; `us_per_token` is the
median time divided by rows x new, `growth` the exponent of time between a point and the one before
it (1: linear). Nothing else should run on the machine then.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

OURS = Path(__file__).parent / "ours.py"


def run(work: str, rows: int, new: int, repeats: int) -> dict:
    """Return the figures of one point."""
    command = [sys.executable, str(OURS), f"--work={work}", f"--rows={rows}", f"--new={new}",
               f"--repeats={repeats}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    line = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "work": work, "rows": rows, "new": new, "median_s": line["median_s"],
        "us_per_token": 1e6 * line["median_s"] / (rows * new), "peak_gib": line["peak_gib"],
    }  # fmt: skip


def main() -> None:
    """Parse the command line and print a line a point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default="update")
    parser.add_argument("--rows", default="4,8,16")
    parser.add_argument("--new", default="128,256,512,1024")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    rows, news = ([int(n) for n in text.split(",")] for text in (flags.rows, flags.new))
    for points in ([(n, 512) for n in rows], [(rows[0], n) for n in news]):
        before = None
        for point in points:
            line = run(flags.work, *point, flags.repeats)
            if before:
                size = math.prod(point) / math.prod(before[0])
                line["growth"] = math.log(line["median_s"] / before[1]) / math.log(size)
            before = point, line["median_s"]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
