"""A policy to sample from: a model folder, perhaps an adapter, its tokenizer and its recipe.

`gemma_cot.json`, written beside exported weights, keeps the instruction and the token limits of
training, so that evaluation and generation build the very same prompts. Called by the
commands that load one; defines the flags that they share.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from gemma_cot import hosts
from gemma_cot.axes import auto_mesh, check_mesh, check_processes, make_mesh, replicated
from gemma_cot.config import LEAST_TEMPERATURE, ModelConfig, TrainConfig, embedded
from gemma_cot.hf_config import read_json
from gemma_cot.lora import Lora, load_peft
from gemma_cot.model.load import load_pretrained, write_json
from gemma_cot.model.params import Params, num_params
from gemma_cot.tokenizer import Tokenizer, load_tokenizer

RECIPE = "gemma_cot.json"
RECIPE_FIELDS = ("instruction", "max_prompt_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Policy:
    """What sampling needs."""

    cfg: ModelConfig
    params: Params
    lora: Lora | None
    tokenizer: Tokenizer
    mesh: Mesh
    instruction: str
    max_prompt_tokens: int
    max_completion_tokens: int


def write_recipe(folder: str | Path, cfg: TrainConfig) -> None:
    """Write the part of a run's settings that prompts depend on beside its weights."""
    write_json(Path(folder) / RECIPE, {name: getattr(cfg, name) for name in RECIPE_FIELDS})


def read_recipe(*folders: str) -> dict:
    """Return the recipe of the first folder that has one, else the defaults of training."""
    recipe = {name: getattr(TrainConfig(), name) for name in RECIPE_FIELDS}
    for folder in folders:
        path = Path(folder) / RECIPE
        if folder and path.is_file():
            stored = read_json(path)
            for name, value in recipe.items():
                recipe[name] = stored.get(name, value)
                if type(recipe[name]) is not type(value):
                    raise ValueError(
                        f"{path}: {name} must be {type(value).__name__}, got {recipe[name]!r}; "
                        "repair it"
                    )
            return recipe
    return recipe


def define_policy_flags() -> None:
    """Define the flags of every command that loads a policy."""
    flags.DEFINE_string("model", "", "Hugging Face model folder; empty: the embedded tiny model.")
    flags.DEFINE_string("adapter", "", "PEFT adapter folder to put on it; empty: none.")
    flags.DEFINE_string("instruction", None, "Text before the question; default: as trained.")
    for part, most in (("prompt", 256), ("completion", 512)):
        text = f"Longest {part}; default: as trained, else {most}."
        flags.DEFINE_integer(f"max_{part}_tokens", None, text)
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", "float32", "bfloat16"], "Weights, activations; auto: by device."
    )
    flags.DEFINE_enum(
        "attention", "reference", ["reference", "pallas"], "Plain jnp, or TPU kernels."
    )
    flags.DEFINE_integer("seed", 0, "Seed of sampling.", 0, 2**32 - 1)
    flags.DEFINE_string("mesh", "auto", "Devices as DATAxMODEL; auto: suits model and memory.")


def check_positions(cfg: ModelConfig, max_prompt_tokens: int, max_completion_tokens: int) -> None:
    """Raise ValueError when a sample may be longer than the model's positions."""
    longest = max_prompt_tokens + max_completion_tokens
    if longest > cfg.max_positions:
        raise ValueError(
            f"--max_completion_tokens: prompt + completion must fit the model's "
            f"{cfg.max_positions} positions, got {longest}; lower it"
        )


def check_temperature(values: flags.FlagValues) -> None:
    """Raise ValueError for a --temperature that draws nothing, or the same several times."""
    if values.temperature and not LEAST_TEMPERATURE <= values.temperature < math.inf:
        raise ValueError(
            f"--temperature: must be 0 (greedy) or a number from {LEAST_TEMPERATURE} on, got "
            f"{values.temperature}; set --temperature=1"
        )
    if values.num_completions > 1 and values.temperature == 0:
        raise ValueError(
            f"--temperature: must be above 0 for {values.num_completions} completions, got 0 (all "
            "would be the same); set --temperature=1"
        )


def load_policy(values: flags.FlagValues) -> Policy:
    """Load what the flags name. Raises ValueError, one line, for anything missing or unfit."""
    model_dir = values.model or embedded("tiny_model")
    if "lora_rank" in (config := read_json(Path(model_dir) / "config.json")):
        raise ValueError(
            f"--model: must be a model's folder, got {model_dir}, that of a run; set "
            f"--model={Path(model_dir) / 'merged'}"
        )
    recipe = read_recipe(values.adapter, model_dir)
    for name in recipe:
        if values[name].value is not None:
            recipe[name] = values[name].value
    for name in ("max_prompt_tokens", "max_completion_tokens"):
        if recipe[name] < 1:
            raise ValueError(f"--{name}: must be at least 1, got {recipe[name]}; raise it")
    cfg = replace(ModelConfig.from_hf(config), attention=values.attention)
    check_positions(cfg, recipe["max_prompt_tokens"], recipe["max_completion_tokens"])
    tokenizer = load_tokenizer(model_dir, cfg.vocab_size)
    lora = load_peft(values.adapter, cfg) if values.adapter else None
    dtype = resolve_dtype(values.dtype)
    mesh = mesh_for(values.mesh, cfg, dtype)
    _, params = load_pretrained(model_dir, dtype, mesh)
    lora = hosts.place(lora, replicated(mesh))
    return Policy(cfg, params, lora, tokenizer, mesh, *(recipe[name] for name in RECIPE_FIELDS))


def mesh_for(
    text: str,
    cfg: ModelConfig,
    dtype: str,
    batches: tuple[int, ...] = (),
    devices: list | None = None,
    memory: float | None = None,
) -> Mesh:
    """Return the mesh that `--mesh` asks for over `devices` (None: all); "auto" suits the model,
    their `memory` in bytes (None: ask them) and `batches` (numbers of rows that data must divide).

    Raises ValueError when the model cannot be cut so.
    """
    here = jax.local_devices() if devices is None else devices
    if text == "auto":
        memory = device_memory(here[0]) if memory is None else memory
        weight_bytes = num_params(cfg) * jnp.dtype(dtype).itemsize
        count = jax.device_count() if devices is None else len(devices)
        text = auto_mesh(count, cfg.sizes, weight_bytes, memory, batches, len(here))
    mesh = make_mesh(text, devices)
    check_mesh(mesh, cfg.sizes)
    if devices is None:
        check_processes(mesh)
    return mesh


def device_memory(device: jax.Device) -> float:
    """Return the bytes that programs may have of a device; infinity where it does not say (CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit", float("inf"))


def resolve_dtype(dtype: str) -> str:
    """Return the dtype that "auto" stands for: float32 on a CPU, bfloat16 on accelerators."""
    on_cpu = jax.default_backend() == "cpu"
    return {"auto": "float32" if on_cpu else "bfloat16"}.get(dtype, dtype)
