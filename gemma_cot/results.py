"""Result files of an evaluation: a JSON line a row, and the protocol that the numbers stand for.

Lines are appended batch by batch and synced, so that a killed evaluation goes on where it stopped.
`NAME.protocol.json` beside `NAME.jsonl` says how the rows were asked and scored. Called by
run, evaluate, report and prepare; knows no model.
"""

import hashlib
import json
import os
from pathlib import Path

from gemma_cot.tokenizer import render_turns

KEYS = {"id", "domain", "prompt", "format", "process", "outcome"}
# What a summary needs besides; evaluations of older versions lack some of it.
SUMMARY_KEYS = {"num_tokens", "repetition", "checkpoints", "checkpoints_literal",
                "checkpoints_normalised"}  # fmt: skip
# Where files lie decides nothing: their hashes do, and these stand in the protocol too.
PLACES = ("model", "adapter", "data")


def template_hash(instruction: str) -> str:
    """Return the SHA-256 of the rendered prompt with `{prompt}` in the place of the question."""
    return hashlib.sha256(render_turns("{prompt}", instruction).encode()).hexdigest()


def files_hash(*paths: Path) -> str:
    """Return one SHA-256 of the contents of files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def beside(path: str | Path, name: str) -> Path:
    """Return where a result file's "protocol.json", "summary.json", "changed.jsonl" is."""
    path = Path(path)
    stem = path.stem if path.suffix in (".jsonl", ".json") else path.name  # "t0.7" is all name
    return path.with_name(f"{stem}.{name}")


def write_whole(path: str | Path, text: str) -> None:
    """Write a file that appears by one rename, whole."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(f"{path}.tmp")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _lines(results: list[dict]) -> str:
    return "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)


def write_results(path: str | Path, results: list[dict]) -> None:
    """Write one JSON object per row; the file appears by one rename, whole."""
    write_whole(path, _lines(results))


def append_results(path: str | Path, results: list[dict]) -> None:
    """Append rows and wait until they are on the disk. Raises ValueError when it takes none."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(_lines(results))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"--output: {path} must take the results as they come, got {error.strerror}; make room "
            "and go on with --resume"
        ) from None


def read_results(path: str | Path, torn_is_out: bool = False) -> list[dict]:
    """Read a result file. Raises ValueError, with the line, for what is none.

    torn_is_out: leave out a last line that is only half there, as of an evaluation under way.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: must be a result file of evaluate, got {error.strerror}; correct the path"
        ) from None
    if torn_is_out:
        content = content[: content.rfind(b"\n") + 1]
    results = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
        except ValueError:
            result = None
        if not isinstance(result, dict) or KEYS - result.keys():
            raise ValueError(
                f"{path}:{number}: a line must be a result of evaluate, got {line[:60]!r}; point "
                "to a whole result file (evaluate --resume completes one)"
            )
        results.append(result)
    return results


def read_protocol(path: str | Path) -> dict:
    """Return the protocol beside a result file, {} where there is none."""
    try:
        return json.loads(beside(path, "protocol.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{beside(path, 'protocol.json')}: must be JSON, got {error}; delete the file"
        ) from None


def differing(before: dict, now: dict) -> list[str]:
    """Return the names of the parts in which two protocols differ; places of files do not count."""
    names = sorted(before.keys() | now.keys())
    return [n for n in names if n not in PLACES and before.get(n) != now.get(n)]


def open_results(path: str | Path, protocol: dict, resume: bool, overwrite: bool) -> list[dict]:
    """Make a result file ready to be appended to; return the rows that are done already.

    Resuming cuts off a torn last line; with nothing there it begins. Raises ValueError for a file
    that is in the way, or that was begun under another protocol.
    """
    path, done = Path(path), []
    try:
        holds_rows = path.exists() and path.stat().st_size > 0
        if holds_rows and not (resume or overwrite):
            raise ValueError(
                f"--output: must be a new file, got {path} with results in it; add --resume to go "
                "on with it, --overwrite to replace it, or name another"
            )
        if resume and holds_rows:
            _check_same(path, protocol)
            whole = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, whole)
            done = read_results(path)
            lacking = sorted(SUMMARY_KEYS.difference(*done[:1]))
            if done and lacking:
                raise ValueError(
                    f"--resume: rows in {path} must hold all that this version scores, got none of "
                    f"{', '.join(lacking)}: an older version wrote them; begin anew with "
                    "--overwrite, or name another file"
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        text = json.dumps(protocol, indent=1, ensure_ascii=False) + "\n"
        write_whole(beside(path, "protocol.json"), text)
    except OSError as error:
        raise ValueError(
            f"--output: must be a file to write to, got {path} ({error.strerror}); name another one"
        ) from None
    return done


def _check_same(path: Path, protocol: dict) -> None:
    """Raise ValueError unless the rows in `path` were begun under `protocol`."""
    before = read_protocol(path)
    names = differing(before, json.loads(json.dumps(protocol)))
    if names:
        name = names[0]
        raise ValueError(
            f"--resume: settings must be those of the results in {path}, got {len(names)} that "
            f"differ, first {name}: {before.get(name)!r} then, {protocol.get(name)!r} now; set it "
            "back or choose another --output"
        )
