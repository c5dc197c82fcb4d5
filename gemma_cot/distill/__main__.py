"""Ask a teacher for worked solutions: questions in, checked rows of our schema out.

    export DEEPSEEK_API_KEY=...
    python -m gemma_cot.distill --input=questions.jsonl --output=distilled --dry_run
    python -m gemma_cot.distill --input=questions.jsonl --output=distilled --max_usd=2

Needs the extra `teacher`. The asking is done by a process of its own (`gemma_cot.distill.command`,
in a session of its own): when this one is killed, that one lets the answers in flight arrive, which
are paid for, writes them and ends. Ctrl-C does the same and waits for it.
"""

import os
import subprocess
import sys
from contextlib import suppress


def main() -> int:
    """Run the asking process; return its exit code."""
    command = [sys.executable, "-m", "gemma_cot.distill.command", *sys.argv[1:]]
    asking = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        code = asking.wait()
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):  # it has just ended
            os.write(asking.stdin.fileno(), b"stop")
        print("\nno more questions; waiting for the answers in flight", file=sys.stderr)
        try:
            code = asking.wait()
        except KeyboardInterrupt:  # it goes on without this process
            return 130
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
