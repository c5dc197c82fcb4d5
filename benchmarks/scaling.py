"""How the time of one piece of work grows with rows, length and devices: benchmarks/scaling.py

    python benchmarks/scaling.py --work=update --rows=4,8,16 --new=128,256,512,1024 > scaling.jsonl
    python benchmarks/scaling.py --work=update --rows=16 --new=512 --devices=1,2,4 >> scaling.jsonl

One process of `ours.py` a point, one after the other: first over --rows at 256 + 512 tokens, then
over --new (completion tokens) at the first of --rows, then over --devices at the last of --rows and
256 + 512 tokens; a list of one number is not gone over. One JSON line a point; `us_per_token` is
the median time divided by rows x new, `growth` the exponent of time between a point and the one
before it (1: linear). CPU devices share the machine's cores, so that more of them do the same work:
what time grows is what cutting it up costs. Nothing else should run on the machine.
"""

import argparse
import json
import math

import shapes


def run(work: str, rows: int, new: int, devices: int, repeats: int) -> dict:
    """Return the figures of one point."""
    line = shapes.run_script(
        "ours.py", f"--work={work}", f"--rows={rows}", f"--new={new}", f"--devices={devices}",
        f"--repeats={repeats}",
    )  # fmt: skip
    return {
        "work": work, "rows": rows, "new": new, "devices": devices, "median_s": line["median_s"],
        "us_per_token": 1e6 * line["median_s"] / (rows * new), "peak_gib": line["peak_gib"],
    }  # fmt: skip


def main() -> None:
    """Parse the command line and print a line a point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default="update")
    parser.add_argument("--rows", default="4,8,16")
    parser.add_argument("--new", default="128,256,512,1024")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    rows, news, devices = (
        [int(n) for n in text.split(",")] for text in (flags.rows, flags.new, flags.devices)
    )
    for points in (
        [(n, 512, 1) for n in rows],
        [(rows[0], n, 1) for n in news],
        [(rows[-1], 512, n) for n in devices],
    ):
        before = None
        for point in points if len(points) > 1 else ():
            line = run(flags.work, *point, flags.repeats)
            if before:
                size = math.prod(point) / math.prod(before[0])
                line["growth"] = math.log(line["median_s"] / before[1]) / math.log(size)
            before = point, line["median_s"]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
