"""What a run ran on and with: versions, devices, memory, model, data.

Called by train, which prints it and writes it beside its settings; read by report.
"""

import json
import platform
import resource
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import jax

from gemma_cot.config import embedded
from gemma_cot.data import Encoded
from gemma_cot.model.params import num_params
from gemma_cot.results import write_whole
from gemma_cot.run import Run

PACKAGES = ("gemma_cot", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy",
            "sentencepiece")  # fmt: skip


def write_environment(run: Run) -> None:
    """Write environment.json into the run's folder."""
    write_whole(run.out / "environment.json", json.dumps(environment(run), indent=2) + "\n")


def environment(run: Run) -> dict:
    """Return versions, devices, model and data of a run as JSON values."""
    files = {"train": run.cfg.train_data, "eval": run.cfg.eval_data}
    rows = {"train": run.train, "eval": run.eval}
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": platform.platform(),
        "devices": [str(device) for device in run.mesh.devices.flat],
        "model": f"{run.model_dir}, {num_params(run.model_cfg):,} parameters",
        "data": {
            split: {"file": files[split] or embedded(f"{split}.jsonl")}
            | {"hash": run.fingerprint[f"{split}_data"]}
            | data_card(rows[split])
            for split in files
        },
    }


def describe(run: Run) -> str:
    """Return what a run is, to be printed at its beginning."""
    cfg, model_cfg = run.cfg, run.model_cfg
    lines = [
        f"model {run.model_dir}: {num_params(model_cfg):,} parameters, {model_cfg.num_layers} "
        f"layers; LoRA rank {cfg.lora_rank} alpha {cfg.lora_alpha:g}",
        f"data: {len(run.train)} training rows, {len(run.eval)} evaluation rows; devices: "
        f"{run.mesh.devices.size} {run.mesh.devices.flat[0].platform}, mesh "
        f"{run.mesh.shape['data']}x{run.mesh.shape['model']}",
        *run.rejects,
    ]
    return "\n".join(lines)


def data_card(rows: list[Encoded]) -> dict:
    """Return which rows a run takes: how many, their domains, median and longest lengths."""
    domains = [row.example.domain for row in rows]
    prompts = [len(row.prompt_ids) for row in rows]
    targets = [len(row.target_ids) for row in rows]
    return {
        "rows": len(rows),
        "domains": {name: domains.count(name) for name in sorted(set(domains))},
        "prompt_tokens": [median(prompts), max(prompts)],
        "target_tokens": [median(targets), max(targets)],
    }


def peak_memory_gib() -> float:
    """Return the most memory in GiB that this process had so far: of a device, where it says so
    (the fullest one here), else of the host."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    if peaks:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # libtpu on most machines
            continue
    return found
