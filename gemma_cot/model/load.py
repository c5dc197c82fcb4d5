"""Read and write a model in the Hugging Face layout, both directions by the parameter table.

One file or sharded, text-only or the text tower of a multimodal checkpoint. A missing, extra,
duplicate or misshapen tensor is an error that names it. Tokenizer files are only copied.
"""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemma_cot import hosts
from gemma_cot.axes import shape_of
from gemma_cot.config import ModelConfig
from gemma_cot.hf_config import read_json
from gemma_cot.model.params import PARAM_TABLE, Leaf, Params, build, param_shardings

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
# Multimodal checkpoints put the text tower under one of these.
_PREFIXES = ("language_model.", "model.language_model.")
# ... and these beside it; we leave them alone.
_OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.",
                 "model.multi_modal_projector.")  # fmt: skip
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def weight_files(model_dir: Path) -> list[Path]:
    """Return the safetensors files of a model folder: those of the index, else every one."""
    index = model_dir / INDEX
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
            raise ValueError(f"{index}: weight_map must name a file per tensor; download it again")
        names = sorted(set(places.values()))
        files = [model_dir / name for name in names]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ValueError(
                f"{index}: every file of its weight_map must be present, missing {missing}; "
                "download them again"
            )
    else:
        files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{model_dir}: must hold *.safetensors weights, got none; "
            "convert or download the safetensors files"
        )
    return files


def text_name(stored: str) -> str | None:
    """Return the text-only name of a stored tensor, or None for another tower's tensor."""
    if stored.startswith(_OTHER_TOWERS):
        return None
    for prefix in _PREFIXES:
        if stored.startswith(prefix):
            rest = stored.removeprefix(prefix)
            return rest if rest.startswith(("model.", "lm_head.")) else "model." + rest
    return stored


def wanted_names(cfg: ModelConfig) -> dict[str, tuple[Leaf, int | None]]:
    """Return Hugging Face name -> (table row, layer number or None) of every expected tensor."""
    names: dict[str, tuple[Leaf, int | None]] = {}
    for leaf in PARAM_TABLE:
        for i in range(cfg.num_layers) if leaf.stacked else (None,):
            names[leaf.hf_name.format(i=i)] = (leaf, i)
    return names


def from_stored(
    leaf: Leaf,
    sizes: dict[str, int],
    stored: np.ndarray,
    name: str,
    source: str = "config.json",
) -> np.ndarray:
    """Rearrange one stored tensor into our axes (layer axis left out).

    source: the file that `sizes` are from; raises ValueError when it does not fit the shape.
    """
    groups = leaf.hf_layout.split(",")
    letters = leaf.letters.removeprefix("L")
    expected = tuple(int(np.prod(shape_of(group, sizes))) for group in groups)
    if stored.shape != expected:
        raise ValueError(
            f"tensor {name}: shape must be {expected} by {source}, got {stored.shape}; "
            "these are of different models"
        )
    flat = "".join(groups)
    return stored.reshape(shape_of(flat, sizes)).transpose([flat.index(c) for c in letters])


def to_stored(leaf: Leaf, sizes: dict[str, int], ours: np.ndarray) -> np.ndarray:
    """Rearrange one of our tensors (layer axis left out) into the stored layout."""
    groups = leaf.hf_layout.split(",")
    letters = leaf.letters.removeprefix("L")
    shape = [int(np.prod(shape_of(group, sizes))) for group in groups]
    moved = ours.transpose([letters.index(c) for c in "".join(groups)])
    return np.ascontiguousarray(moved.reshape(shape))


def check_lm_head(head: np.ndarray, params: Params) -> None:
    """Accept a stored copy of the tied embedding; refuse one that differs in the loaded dtype."""
    if not np.array_equal(head.astype(params["embed"].dtype), params["embed"]):
        raise ValueError(
            "tensor lm_head.weight: must equal the embedding (Gemma 3 ties them), got other "
            "values; use a checkpoint with tied embeddings"
        )


def load_pretrained(
    model_dir: str | Path, dtype: str = "bfloat16", mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Load a Hugging Face model folder. Returns (ModelConfig, params) in `dtype`.

    mesh: place every leaf with its sharding; None: on the default device. Raises ValueError, naming
    file or tensor, for anything missing, unexpected, doubled, misshapen or unreadable.
    """
    model_dir = Path(model_dir)
    cfg = ModelConfig.from_hf(read_json(model_dir / "config.json"))
    np_dtype = jnp.dtype(dtype)
    wanted = wanted_names(cfg)
    params = build(lambda leaf: np.empty(shape_of(leaf.letters, cfg.sizes), np_dtype))
    leaves = {leaf.path: params for leaf in PARAM_TABLE}
    seen: dict[str, str] = {}
    lm_head = None
    for path in weight_files(model_dir):
        try:
            with safe_open(path, framework="np") as file:
                for stored_name in file.keys():  # noqa: SIM118 - safe_open is not a dict
                    name = text_name(stored_name)
                    if name is None:
                        continue
                    if name in seen:
                        raise ValueError(
                            f"tensor {name}: must be stored once, got it in {seen[name]} and "
                            f"{path.name}; remove the files of another checkpoint from {model_dir}"
                        )
                    seen[name] = path.name
                    if name == "lm_head.weight":
                        lm_head = read_tensor(file, stored_name, path)
                        continue
                    if name not in wanted:
                        raise ValueError(
                            f"tensor {name} in {path.name}: not part of a {cfg.num_layers}-layer "
                            "Gemma 3 text model; weights and config.json are of different models"
                        )
                    leaf, i = wanted[name]
                    stored = read_tensor(file, stored_name, path)
                    value = from_stored(leaf, cfg.sizes, stored, name)
                    target = _leaf_of(leaves[leaf.path], leaf.path)
                    target[... if i is None else i] = value.astype(np_dtype)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: must be a whole safetensors file, got {error}; download it again"
            ) from None
    missing = [name for name in wanted if name not in seen]
    if missing:
        raise ValueError(
            f"{model_dir}: {len(missing)} tensors are missing, the first is {missing[0]}; "
            "download the weights again"
        )
    if lm_head is not None:
        check_lm_head(lm_head, params)
    if mesh is None:
        return cfg, jax.tree.map(jnp.asarray, params)
    return cfg, hosts.place(params, param_shardings(mesh))


def read_tensor(file, name: str, path: Path) -> np.ndarray:
    """Return a tensor of an open safetensors file. Raises ValueError for one of a quantised model,
    whose numbers mean nothing by themselves."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(
            f"tensor {name} in {path}: must be float64, float32, float16 or bfloat16, got {dtype}; "
            "take the model or adapter that is not quantised"
        )
    return file.get_tensor(name)


def _leaf_of(tree: dict, path: str):
    for part in path.split("/"):
        tree = tree[part]
    return tree


def stored_tensors(cfg: ModelConfig, params: Params):
    """Yield (Hugging Face name, array in stored layout) of every tensor, one at a time."""
    for name, (leaf, i) in wanted_names(cfg).items():
        ours = _leaf_of(params, leaf.path)
        yield name, to_stored(leaf, cfg.sizes, np.asarray(ours if i is None else ours[i]))


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file. Raises OSError where the disk refuses, as other writers do."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if not code:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(path)) from None


def save_pretrained(
    out_dir: str | Path,
    cfg: ModelConfig,
    params: Params,
    tokenizer_dir: str | Path | None = None,
) -> None:
    """Write config.json, generation_config.json and safetensors (sharded above 5 GB) to `out_dir`.

    tokenizer_dir: a model folder whose tokenizer files and generation_config.json travel along.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    shards: list[dict] = [{}]
    size = 0
    for name, array in stored_tensors(cfg, params):
        if size + array.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    many = len(shards) > 1
    names = [
        f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        for n in range(len(shards))
    ]
    # weights of an earlier save would be found beside the new ones, an old index even before them
    stale = [*out_dir.glob("model-*-of-*.safetensors"), out_dir / "model.safetensors"]
    for old in [*stale, out_dir / INDEX]:
        old.unlink(missing_ok=True)
    for name, shard in zip(names, shards, strict=True):
        save_tensors(out_dir / name, shard)
    if many:
        weight_map = {key: n for n, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(array.nbytes for shard in shards for array in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out_dir / INDEX, index)
    hf = cfg.to_hf() | {"torch_dtype": str(jax.tree.leaves(params)[0].dtype)}
    write_json(out_dir / "config.json", hf)
    generation = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}
    write_json(out_dir / "generation_config.json", generation)
    if tokenizer_dir is not None:
        for name in (*_TOKENIZER_FILES, "generation_config.json"):
            if (Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(Path(tokenizer_dir) / name, out_dir / name)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object, indented, ending in a newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
