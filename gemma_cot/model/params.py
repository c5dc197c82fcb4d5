"""The parameter table: one row per leaf, from which shapes, init, sharding and names all follow.

Fifteen leaves, the layers stacked on axis L. `load` and `save` walk this table in both directions;
the letters of adapters follow from it too. Knows no files.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_cot.axes import shape_of, sharding_of
from gemma_cot.config import ModelConfig

Params = dict  # {"embed", "final_norm", "layers": {13 stacked leaves}}


@dataclass(frozen=True)
class Leaf:
    """One parameter: where it lives here, and how Hugging Face names and stores it."""

    path: str  # "embed" or "layers/q"
    letters: str  # axes of our array
    fan_in: str  # letters summed over by the matmul; "" = a norm weight, which starts at 0
    hf_name: str  # "{i}" stands for the layer number
    hf_layout: str  # axes as stored there, one group of letters per stored axis

    @property
    def stacked(self) -> bool:
        """Whether the leaf has the layer axis L in front (one stored tensor per layer)."""
        return self.letters.startswith("L")

    @property
    def adapter_letters(self) -> tuple[str, str]:
        """Axes of an adapter's (a, b): ("LDR", "LRNH") of a weight "LDNH" whose fan-in is "D"."""
        kept = "".join(c for c in self.letters if c != "L" and c not in self.fan_in)
        return f"L{self.fan_in}R", f"LR{kept}"


_LAYER = "model.layers.{i}."
PARAM_TABLE = (
    Leaf("embed", "VD", "D", "model.embed_tokens.weight", "V,D"),
    Leaf("final_norm", "D", "", "model.norm.weight", "D"),
    Leaf("layers/pre_attn_norm", "LD", "", _LAYER + "input_layernorm.weight", "D"),
    Leaf("layers/q", "LDNH", "D", _LAYER + "self_attn.q_proj.weight", "NH,D"),
    Leaf("layers/k", "LDKH", "D", _LAYER + "self_attn.k_proj.weight", "KH,D"),
    Leaf("layers/v", "LDKH", "D", _LAYER + "self_attn.v_proj.weight", "KH,D"),
    Leaf("layers/q_norm", "LH", "", _LAYER + "self_attn.q_norm.weight", "H"),
    Leaf("layers/k_norm", "LH", "", _LAYER + "self_attn.k_norm.weight", "H"),
    Leaf("layers/o", "LNHD", "NH", _LAYER + "self_attn.o_proj.weight", "D,NH"),
    Leaf("layers/post_attn_norm", "LD", "", _LAYER + "post_attention_layernorm.weight", "D"),
    Leaf("layers/pre_mlp_norm", "LD", "", _LAYER + "pre_feedforward_layernorm.weight", "D"),
    Leaf("layers/gate", "LDF", "D", _LAYER + "mlp.gate_proj.weight", "F,D"),
    Leaf("layers/up", "LDF", "D", _LAYER + "mlp.up_proj.weight", "F,D"),
    Leaf("layers/down", "LFD", "F", _LAYER + "mlp.down_proj.weight", "D,F"),
    Leaf("layers/post_mlp_norm", "LD", "", _LAYER + "post_feedforward_layernorm.weight", "D"),
)
LAYER_TABLE = {leaf.path.removeprefix("layers/"): leaf for leaf in PARAM_TABLE if leaf.stacked}


def put(tree: dict, path: str, value) -> None:
    """Store `value` under "a/b" in a nested dict, making the inner dict when it is absent."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def build(make) -> Params:
    """Return the parameter tree whose every leaf is `make(leaf)` for its table row."""
    tree: Params = {}
    for leaf in PARAM_TABLE:
        put(tree, leaf.path, make(leaf))
    return tree


def param_shapes(cfg: ModelConfig, dtype="float32", mesh: Mesh | None = None) -> Params:
    """Return the tree of `jax.ShapeDtypeStruct`s of a model, with shardings when given a mesh."""
    return build(
        lambda leaf: jax.ShapeDtypeStruct(
            shape_of(leaf.letters, cfg.sizes),
            jnp.dtype(dtype),
            sharding=sharding_of(leaf.letters, mesh, leaf.path) if mesh is not None else None,
        )
    )


def param_shardings(mesh: Mesh) -> Params:
    """Return the tree of NamedShardings of the parameters on `mesh`."""
    return build(lambda leaf: sharding_of(leaf.letters, mesh, leaf.path))


def init_params(key: jax.Array, cfg: ModelConfig, dtype="float32") -> Params:
    """Draw random parameters: normal with variance 1 / fan-in, norm weights 0 (they act as 1 + w).

    The embedding has variance 1 / D, so that scaled by sqrt(D) it enters the first layer at 1.
    """

    def make(leaf: Leaf) -> jax.Array:
        shape = shape_of(leaf.letters, cfg.sizes)
        if not leaf.fan_in:
            return jnp.zeros(shape, dtype)
        row = [known.path for known in PARAM_TABLE].index(leaf.path)
        scale = math.prod(shape_of(leaf.fan_in, cfg.sizes)) ** -0.5
        draw = jax.random.normal(jax.random.fold_in(key, row), shape, jnp.float32)
        return (scale * draw).astype(dtype)

    return build(make)


def num_params(cfg: ModelConfig) -> int:
    """Return the number of parameters, e.g. 999,885,952 for Gemma 3 1B."""
    return sum(math.prod(shape_of(leaf.letters, cfg.sizes)) for leaf in PARAM_TABLE)


def merged_layers(layers: dict, adapters: dict, scale: float) -> dict:
    """Return stacked layers with W + scale A B in every weight that has an adapter {"a", "b"} (same
    dtype; sum in float32)."""
    layers = dict(layers)
    for name, ab in adapters.items():
        w, leaf = layers[name], LAYER_TABLE[name]
        product = f"{','.join(leaf.adapter_letters)}->{leaf.letters}"
        delta = scale * jnp.einsum(product, ab["a"], ab["b"])
        layers[name] = (w.astype(jnp.float32) + delta).astype(w.dtype)
    return layers
