"""Kill the distiller again and again under a misbehaving teacher: python tests/distill_kills.py

    python tests/distill_kills.py --kills=50              # kill -9 of the command
    python tests/distill_kills.py --kills=50 --whole_tree # ... and of the process that asks
    ... --whole_tree --server_remembers  # a server that knows Idempotency-Key headers

Then let it finish, and count at the server's side: every row obtained once, no complete answer to
one request delivered twice. Prints one JSON line; exit code 1 when a count is wrong. Not part of
the test suite, which kills three times.

A kill comes at a random time after the start, every fourth time, else after the first request of
that start, so that on a slow machine too most kills find answers on their way. The first way leaves
the asking process to receive these. With --whole_tree nothing is left that could, so an answer that
the system has taken off the wire and the process has not yet written is lost, and asked and paid
for again: the line says how many these were.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from teacher_server import BAD_ANSWERS, FAULTS, TeacherServer, problems, question_row


def command(folder: Path, url: str, *more: str) -> list[str]:
    """Return the command line that distils folder/questions.jsonl into folder/out."""
    flags = {
        "input": folder / "questions.jsonl", "output": folder / "out", "teacher": "scripted",
        "base_url": url, "max_similarity": 1, "concurrency": 8, "timeout": 10, "backoff": 0.05,
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "gemma_cot.distill", *given, *more]


def kill(process: subprocess.Popen, whole_tree: bool) -> None:
    """Kill -9 a running command, and first the process that asks for it."""
    if whole_tree and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGKILL)
    process.kill()
    process.wait()


def check(folder: Path, server: TeacherServer) -> dict:
    """Return what came of it, from the rows and from the server's count."""
    rows = [json.loads(line) for line in (folder / "out" / "rows.jsonl").open()]
    journal = [json.loads(line) for line in (folder / "out" / "journal.jsonl").open()]
    times = Counter(row["prompt"] for row in rows)
    return {
        "questions": len(server.scripted),
        "rows": len(rows),
        "missing": len(set(server.scripted) - set(times)),
        "duplicates": sum(count - 1 for count in times.values()),
        "wrong": sum(row["metadata"]["final_answer"] != server.scripted[row["prompt"]].answer
                     for row in rows),  # fmt: skip
        "complete_answers": sum(server.delivered.values()),
        "paid_twice": sum(count - 1 for count in server.delivered.values()),
        "answers_in_journal": sum(record["fault"] is None for record in journal),
        "faults_met": dict(server.met),
    }


def main() -> int:
    """Kill, finish, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--longest", type=float, default=2.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole_tree", action="store_true")
    parser.add_argument("--server_remembers", action="store_true")
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.monotonic()
    scripted = problems(args.seed, args.rows)
    with tempfile.TemporaryDirectory() as name, TeacherServer(
        scripted, FAULTS, BAD_ANSWERS, latency=0.4, storm=97, seed=args.seed,
        remembers=args.server_remembers,
    ) as server:
        folder, kills, answered = Path(name), 0, []
        rows = "".join(json.dumps(question_row(p)) + "\n" for p in scripted.values())
        (folder / "questions.jsonl").write_text(rows)
        while kills < args.kills:
            process = subprocess.Popen(command(folder, server.url), stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)  # fmt: skip
            asked = server.requests
            while kills % 4 and server.requests == asked and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, args.longest))
            alive = process.poll() is None
            kill(process, args.whole_tree)
            kills += alive
            answered.append(sum(server.delivered.values()))
            if not alive:
                break  # nothing left to ask: more rows, or fewer seconds
        done = subprocess.run(command(folder, server.url), capture_output=True, text=True)
        print(done.stdout, done.stderr[-2000:], sep="\n", file=sys.stderr)
        counts = check(folder, server)
    during = sum(a != b for a, b in zip([0, *answered], answered, strict=False))
    result = {"kills": kills, "kills_while_answers_came": during, "whole_tree": args.whole_tree}
    result |= {"answers_from_memory": server.from_memory}
    result |= counts | {"exit_code": done.returncode, "seconds": round(time.monotonic() - began)}
    print(json.dumps(result))
    may_not = args.server_remembers or not args.whole_tree
    bad = counts["missing"] or counts["duplicates"] or counts["wrong"] or done.returncode
    return int(bool(bad or kills < args.kills or (counts["paid_twice"] and may_not)))


if __name__ == "__main__":
    sys.exit(main())
