"""Read and write an adapter in the layout of the Hugging Face PEFT library, by the parameter table.

A folder of adapter_config.json and adapter_model.safetensors. Names and layouts are those of the
weight a pair adapts: "q" stored as [N*H, D] has lora_A [R, D] and lora_B [N*H, R]. Options of PEFT
that would change what the tensors mean are refused. Called by train, export and `--adapter`.
"""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gemma_cot.config import ModelConfig
from gemma_cot.lora.lora import TARGETS, Lora
from gemma_cot.model.load import (
    from_stored,
    read_json,
    read_tensor,
    save_tensors,
    text_name,
    to_stored,
    write_json,
)
from gemma_cot.model.params import LAYER_TABLE, Leaf

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's wrapper around the model whose names the table holds
# Plain LoRA, option -> values we accept; the first is the one we write.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    # PEFT's other initialisers (pissa, olora, loftq, ...) also change the base weights
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# The same of options that older releases of PEFT do not know: not written.
_YOUNG = {"alora_invocation_tokens": (None,), "layer_replication": (None, [])}


def pair_leaves(target: str) -> dict[str, Leaf]:
    """Return {"a": row, "b": row}: letters here, PEFT name and stored layout of a target's pair."""
    leaf = LAYER_TABLE[target]
    outputs, inputs = leaf.hf_layout.split(",")
    letters_a, letters_b = LAYER_TABLE[target].adapter_letters
    stem = _PREFIX + leaf.hf_name.removesuffix("weight")
    return {
        "a": Leaf(leaf.path, letters_a, "", stem + "lora_A.weight", f"R,{inputs}"),
        "b": Leaf(leaf.path, letters_b, "", stem + "lora_B.weight", f"{outputs},R"),
    }


def save_peft(
    directory: str | Path, cfg: ModelConfig, lora: Lora, base_model_name: str | None
) -> None:
    """Write `lora` to `directory` as PEFT does: float32, one [R, in] and one [out, R] a layer.

    base_model_name: the folder or hub name that PEFT's users will load the adapter onto.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sizes = cfg.sizes | {"R": lora.rank}
    tensors = {
        leaf.hf_name.format(i=i): to_stored(leaf, sizes, ours)
        for target in lora.layers
        for part, leaf in pair_leaves(target).items()
        for i, ours in enumerate(np.asarray(lora.layers[target][part], np.float32))
    }
    save_tensors(directory / WEIGHTS, tensors)
    alpha = lora.scale * lora.rank
    whole = round(alpha)  # undo the rounding of alpha / rank where alpha was a whole number
    config = {key: values[0] for key, values in _PLAIN.items()} | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": whole if whole / lora.rank == lora.scale else alpha,
        "lora_dropout": 0.0,
        "target_modules": [
            LAYER_TABLE[t].hf_name.split(".")[-2] for t in TARGETS if t in lora.layers
        ],
        "fan_in_fan_out": False,
        "use_rslora": False,
    }
    write_json(directory / CONFIG, config)


def load_peft(directory: str | Path, cfg: ModelConfig) -> Lora:
    """Load a PEFT LoRA folder made for a model of shape `cfg`; float32 whatever was stored.

    The targets are those of the tensors present. Raises ValueError, naming file or tensor, for
    anything missing, unexpected, doubled, misshapen or unreadable, and for options of PEFT other
    than plain LoRA and rsLoRA.
    """
    directory = Path(directory)
    absent = [name for name in (CONFIG, WEIGHTS) if not (directory / name).is_file()]
    if absent:
        raise ValueError(
            f"{directory}: must hold {CONFIG} and {WEIGHTS}, got no {' and no '.join(absent)}; "
            "point --adapter at a folder that PEFT or gemma_cot wrote"
        )
    rank, scale = read_scale(directory / CONFIG)
    sizes = cfg.sizes | {"R": rank}
    stored = read_tensors(directory / WEIGHTS)
    made_for = read_json(directory / CONFIG).get("base_model_name_or_path")
    source = f"--model and {CONFIG} (an adapter of {made_for})"
    layers: dict = {}
    for target in TARGETS:
        pair = pair_leaves(target)
        names = {p: [pair[p].hf_name.format(i=i) for i in range(cfg.num_layers)] for p in "ab"}
        if stored.keys().isdisjoint(names["a"] + names["b"]):
            continue
        layers[target] = {}
        for part, leaf in pair.items():
            for name in names[part]:
                if name not in stored:
                    raise ValueError(
                        f"tensor {name}: must be in {directory / WEIGHTS} (lora_A and lora_B of "
                        f"every layer of {target}), got none; save the adapter of all layers"
                    )
            layers[target][part] = jnp.stack(
                [from_stored(leaf, sizes, stored.pop(name), name, source) for name in names[part]]
            )
    if stored or not layers:
        raise ValueError(
            f"tensor {next(iter(stored), 'of any name')} in {directory / WEIGHTS}: must be lora_A "
            f"or lora_B of {', '.join(TARGETS)} in layers 0 to {cfg.num_layers - 1}, got "
            f"{'another name' if stored else 'no tensor'}; use an adapter made for this model"
        )
    return Lora(layers, scale)


def read_scale(path: Path) -> tuple[int, float]:
    """Return (rank, factor of B A) of an adapter_config.json; raises ValueError as `load_peft`.

    The factor is alpha / r, with use_rslora alpha / sqrt(r) (arXiv:2312.03732).
    """
    accepted = _PLAIN | _YOUNG
    defaults = {key: values[0] for key, values in accepted.items()} | {"peft_type": None}
    config = defaults | read_json(path)
    for key, values in accepted.items():
        if config[key] not in values:
            raise ValueError(
                f"{path}: {key} must be {' or '.join(map(repr, values))}, got {config[key]!r}; "
                "merge the adapter with PEFT (merge_and_unload), give the result as --model"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r must be a whole number from 1, got {rank!r}; repair it")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"{path}: lora_alpha must be a finite number, got {alpha!r}; repair it")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return PEFT name as for a text-only model -> float32; raises ValueError as `load_peft`.

    Multimodal prefixes are taken off; adapters of the vision tower are left out, as its weights.
    """
    tensors: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="np") as file:
            for stored_name in file.keys():  # noqa: SIM118 - safe_open is not a dict
                prefix = _PREFIX if stored_name.startswith(_PREFIX) else ""
                name = text_name(stored_name.removeprefix(prefix))
                if name is None:
                    continue
                name = prefix + name
                if name in tensors:
                    raise ValueError(
                        f"tensor {name} in {path}: must be stored once, got it under two "
                        "prefixes; save the adapter again"
                    )
                tensors[name] = read_tensor(file, stored_name, path).astype(np.float32)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: must be a whole safetensors file, got {error}; download it again"
        ) from None
    return tensors
