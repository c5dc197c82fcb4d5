"""Time ours and the peers side by side, process by process in turn, and print the ratios.

    python benchmarks/compare.py --tunix=VENV/bin/python --torch=VENV/bin/python >> small.jsonl

Each flag names the interpreter of an environment in which `tunix_peer.py` or `torch_peer.py` runs;
a peer without one is left out. For every row: one process of each, in turn, `--rounds` times;
medians of the processes' medians; ratios of peer to ours (above 1: ours is faster, or smaller). One
JSON line a row on stdout, a line of text on stderr. Nothing else should run on the machine then.
Flags that are not named here go to the scripts: `--shape=1b --rows=4 --prompt=128 --new=64` for the
shapes of Gemma 3 1B, `--dtype=bfloat16` on a GPU, where Tunix' script does not run.
"""

import argparse
import json
import statistics
import sys

import shapes

SCRIPTS = {"ours": "ours.py", "tunix": "tunix_peer.py", "torch": "torch_peer.py"}
ROWS = (("forward", 4), ("sample", 4), ("sample", 16), ("logprobs", 4), ("update", 4),
        ("iteration", 16))  # fmt: skip


def main() -> None:
    """Parse the command line and print a line a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tunix", help="python with google-tunix")
    parser.add_argument("--torch", help="python with torch, transformers, trl, peft, datasets")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--works", default="", help="comma-separated; empty: all")
    parser.add_argument("--rows", type=int, help="sequences in every row; else as in ROWS")
    flags, extra = parser.parse_known_args()
    pythons = {"ours": sys.executable, "tunix": flags.tunix, "torch": flags.torch}
    pythons = {who: python for who, python in pythons.items() if python}
    wanted = [row for row in ROWS if not flags.works or row[0] in flags.works.split(",")]
    if flags.rows:
        wanted = list(dict.fromkeys((work, flags.rows) for work, _ in wanted))
    for work, rows in wanted:
        records = {who: [] for who in pythons}
        for _ in range(flags.rounds):
            for who, python in pythons.items():
                line = shapes.run_script(
                    SCRIPTS[who], f"--work={work}", f"--rows={rows}", *extra, python=python
                )
                records[who].append(line)
        line = {"work": work, "rows": rows, "rounds": flags.rounds}
        for who, results in records.items():
            line[who] = {
                "median_s": statistics.median(r["median_s"] for r in results),
                "all_s": [r["median_s"] for r in results],
                "first_call_s": statistics.median(r["first_call_s"] for r in results),
                "peak_gib": max(r["peak_gib"] for r in results),
                "versions": results[0]["versions"],
            }
        for who in pythons.keys() - {"ours"}:
            line[f"{who}_time_ratio"] = line[who]["median_s"] / line["ours"]["median_s"]
            line[f"{who}_memory_ratio"] = line[who]["peak_gib"] / line["ours"]["peak_gib"]
        print(json.dumps(line), flush=True)
        cells = [f"{who} {line[who]['median_s']:.2f} s {line[who]['peak_gib']:.2f} GiB"
                 for who in pythons]  # fmt: skip
        print(f"{work} x {rows}:  {'   '.join(cells)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
