"""What a resumed run goes on from, and what both must share: flags, code, model, data, rewards.

`fingerprint` hashes what flags only point to; RUN/fingerprint.json keeps it beside config.json.
Called by run; knows no model.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import sys
from functools import cache
from pathlib import Path

import jax

from gemma_cot import checkpoint
from gemma_cot.config import TrainConfig, embedded
from gemma_cot.hf_config import read_json
from gemma_cot.model.load import weight_files
from gemma_cot.policy import resolve_dtype

FILE, LOCK = "fingerprint.json", ".lock"
OUTPUTS = ("config.json", "metrics.jsonl", "summary.json", "rejects.txt", "reward_errors.jsonl",
           "curves.svg", "bad", "eval",
           "checkpoints", "adapter", "merged", "tensorboard", "traces", "profile", "wandb",
           "environment.json", "report.html", FILE)  # fmt: skip
# Settings that a resumed run may be given anew: they change no number of the run beyond rounding.
# Model and data are hashed below, wherever they lie.
FREE_ON_RESUME = {"output_dir", "resume", "overwrite", "allow_changes", "session", "mesh",
                  "sample_every",
                  "coordinator", "num_processes", "process_id",
                  "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_best",
                  "trace_every", "profile_steps", "max_reward_errors", "max_skipped",
                  "model", "train_data", "eval_data"}  # fmt: skip
_ROOMS = ("grpo", "guard", "lora", "model")  # folders of the package that training runs through
_WHOLE, _PIECES, _PIECE = 2**26, 64, 2**16  # bytes; larger files are hashed in pieces


def fingerprint(cfg: TrainConfig) -> dict:
    """Return name -> hash of what a run depends on besides its flags; None for what is not there.

    Weight files over 64 MiB are hashed by their size, first MiB and 64 pieces of 64 KiB.
    """
    model_dir = Path(cfg.model or embedded("tiny_model"))
    try:
        weights = weight_files(model_dir)
    except ValueError:
        weights = []
    files = [model_dir / "config.json", model_dir / "tokenizer.model", *weights]
    modules = [sys.modules.get(spec.partition(":")[0].strip()) for spec in cfg.reward]
    sources = [getattr(module, "__file__", None) for module in modules]
    return {
        "code": code_hash(),
        "jax": jax.__version__,
        "dtype": resolve_dtype(cfg.dtype),
        "reward": [digest(Path(source)) for source in sources if source],
        "model": {path.name: digest(path) for path in files},
        "train_data": digest(Path(cfg.train_data or embedded("train.jsonl"))),
        "eval_data": digest(Path(cfg.eval_data or embedded("eval.jsonl"))),
    }


@cache
def code_hash() -> str:
    """Return one hash of the package's files that training runs through, as first seen."""
    package = Path(__file__).parent
    paths = [*package.glob("*.py"), *(p for room in _ROOMS for p in (package / room).rglob("*.py"))]
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def as_json(cfg: TrainConfig) -> dict:
    """Return the settings as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def check_folder(cfg: TrainConfig, prints: dict) -> dict:
    """Return the meta and number of the checkpoint to go on from, {} to begin.

    Raises ValueError when --output_dir holds another run, or none where one is to be resumed, or
    one that began with other flags or another fingerprint than `prints`.
    """
    out = Path(cfg.output_dir)
    config = out / "config.json"
    holds_run = (out / FILE).is_file() or (config.is_file() and "lora_rank" in read_json(config))
    if cfg.resume:
        if not config.exists():
            raise ValueError(
                f"--resume: {cfg.output_dir} must hold a run, got no config.json there; "
                "correct --output_dir or drop --resume"
            )
        check_same(cfg, prints)
        return read_begin(cfg)
    if holds_run and not cfg.overwrite:
        raise ValueError(
            f"--output_dir: {cfg.output_dir} must not hold a run, got one; add --resume to go on "
            "with it, --overwrite to delete it, or choose another folder"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output_dir: {cfg.output_dir} must be a folder, got a file; choose one")
    others = [name for name in OUTPUTS if (out / name).is_file() or any((out / name).glob("*"))]
    if others and not holds_run:
        raise ValueError(
            f"--output_dir: {cfg.output_dir} must hold a run or none of its files, got "
            f"{', '.join(others)} of something else; choose another folder"
        )
    return {}


def take(folder: Path) -> int:
    """Take a run's folder for this process, until it closes the file that is returned (or another
    one on the same path), or ends in whatever way. Raises ValueError, one line, where another
    process of this machine has it."""
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return fd  # a file system without locks
        raise ValueError(
            f"--output_dir: {folder} must be in use by no other run, got one that goes on there, "
            f"process {os.read(fd, 20).decode().strip()}; wait for it, stop it or choose another "
            "folder"
        ) from None
    os.pwrite(fd, f"{os.getpid()}".ljust(20).encode(), 0)
    return fd


def read_begin(cfg: TrainConfig) -> dict:
    """Return the meta and number of the latest intact checkpoint, {} where there is none yet."""
    folder = Path(cfg.output_dir) / "checkpoints"
    number = checkpoint.latest_step(folder)
    if number is None:
        trains = cfg.sft_steps or cfg.grpo_steps
        if trains and (folder.parent / "summary.json").exists():
            raise ValueError(
                f"--resume: {folder} must hold a checkpoint to go on from, got a run that has "
                "ended and none; set --overwrite in its place to delete it and start anew"
            )
        return {}
    meta = checkpoint.read_meta(folder, number)
    if meta["stage"] == "grpo" and number != meta["step"] + cfg.sft_steps:
        raise ValueError(
            f"--sft_steps: must stay what GRPO began with, {number - meta['step']}, got "
            f"{cfg.sft_steps}; set it back"
        )
    return meta | {"number": number}


def check_same(cfg: TrainConfig, now: dict) -> None:
    """Raise ValueError when flags or fingerprint `now` are not those of the run in output_dir.

    Names in --allow_changes are let pass.
    """
    folder, settings = Path(cfg.output_dir), as_json(cfg)
    allowed = {name.strip() for name in cfg.allow_changes.split(",") if name.strip()}
    unknown = sorted(allowed - settings.keys() - now.keys())
    if unknown:
        raise ValueError(
            f"--allow_changes: must name settings or {', '.join(now)}, got {unknown}; correct it"
        )
    before = read_json(folder / "config.json")
    flags = {n: v for n, v in settings.items() if n not in FREE_ON_RESUME}
    differ = {n: (before.get(n), v) for n, v in flags.items() if before.get(n) != v}
    stored = read_json(folder / FILE) if (folder / FILE).exists() else {}
    now = json.loads(json.dumps(now))
    for name in ("train_data", "eval_data"):
        if now[name] is None and name not in allowed:
            raise ValueError(
                f"--{name}: the run's rows must be there, got no file {getattr(cfg, name)!r} in "
                f"{Path.cwd()}; set --{name} to where they lie now"
            )
    differ |= {n: (stored.get(n), v) for n, v in now.items() if stored.get(n) != v}
    differ = {name: pair for name, pair in differ.items() if name not in allowed}
    if differ:
        shown = "; ".join(f"{name} {_changed(*pair)}" for name, pair in differ.items())
        raise ValueError(
            f"--resume: flags, code, model and data must be those of the run in {folder}, got "
            f"{len(differ)} that differ: {shown}; set them back, choose another --output_dir or "
            f"insist with --allow_changes={','.join(differ)}"
        )


def _changed(then, now) -> str:
    """Return what differs, of two dicts their first entry that does."""
    if isinstance(then, dict) and isinstance(now, dict):
        name = next(n for n in sorted(then | now) if then.get(n) != now.get(n))
        return f"({name}) {_changed(then.get(name), now.get(name))}"
    return f"{then!r} then, {now!r} now"


def digest(path: Path) -> str | None:
    """Return the hash of a file's content; of a large one, of its size and of pieces of it."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size <= _WHOLE or path.suffix != ".safetensors":
                return hashlib.file_digest(file, "sha256").hexdigest()[:16]
            total = hashlib.sha256(str(size).encode() + file.read(2**20))
            for i in range(_PIECES):
                file.seek(2**20 + (size - 2**20 - _PIECE) * i // (_PIECES - 1))
                total.update(file.read(_PIECE))
            return total.hexdigest()[:16]
    except OSError:
        return None
