"""What a run left in its folder: the settings and the adapter. Called by export and replay."""

import dataclasses
from pathlib import Path

import jax

from gemma_cot import checkpoint
from gemma_cot.config import ModelConfig, TrainConfig, embedded
from gemma_cot.hf_config import read_json
from gemma_cot.lora import Lora, init_lora
from gemma_cot.optim import TrainState


def read_config(folder: str | Path) -> tuple[TrainConfig, str]:
    """Return (settings, base model folder) of the run in `folder`, wherever it was moved to."""
    stored = read_json(Path(folder) / "config.json")
    needed = {"lora_rank", "lora_alpha", "max_completion_tokens", "reward"}
    if not needed <= stored.keys():
        raise ValueError(
            f"{folder}/config.json: must hold the settings of a run, got none of "
            f"{sorted(needed - stored.keys())}; point --run at a folder that train wrote"
        )
    values = {f.name: stored[f.name] for f in dataclasses.fields(TrainConfig) if f.name in stored}
    values |= {"output_dir": str(folder), "reward": tuple(stored["reward"])}
    cfg = TrainConfig(**values)  # a setting that is younger than the run has its default
    return cfg, cfg.model or embedded("tiny_model")


def saved_adapter(
    cfg: TrainConfig, model_cfg: ModelConfig, number: int | None = None
) -> tuple[Lora, str]:
    """Return the adapter of a checkpoint of a run (None: the latest), and which one that is."""
    lora = init_lora(jax.random.key(0), model_cfg, cfg.lora_rank, cfg.lora_alpha)
    tree = {"state": TrainState(step=None, lora=lora, opt_state=None)}
    folder = Path(cfg.output_dir) / "checkpoints"
    tree, meta = checkpoint.restore(folder, tree, number, partial=True)
    return tree["state"].lora, f"{meta['stage']} step {meta['step']}"
