"""LoRA: the adapter's pytree, its initialisation, and merging it into the base weights.

Hu et al. 2021 (arXiv:2106.09685): W' = W + (alpha / r) B A. Letters of `a` and `b` follow from the
parameter table: q "LDNH" has a "LDR" and b "LRNH". Where an adapter meets an activation is
`model.layers.linear`; files are `lora.peft`.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gemma_cot.axes import shape_of
from gemma_cot.config import ModelConfig
from gemma_cot.model.params import LAYER_TABLE, Params, merged_layers

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@flax.struct.dataclass
class Lora:
    """An adapter: trainable float32 leaves, and the constant factor that multiplies B A x."""

    layers: dict  # {target: {"a": L, input axes, R; "b": L, R, output axes}}, float32
    scale: float = flax.struct.field(pytree_node=False)  # alpha / rank

    @property
    def rank(self) -> int:
        """R, read from the shape of any `a`."""
        return next(iter(self.layers.values()))["a"].shape[-1]


def init_lora(
    key: jax.Array,
    cfg: ModelConfig,
    rank: int,
    alpha: float,
    targets: tuple[str, ...] = TARGETS,
) -> Lora:
    """Draw a ~ N(0, 1 / fan-in) and set b = 0, so that a fresh adapter changes nothing.

    Raises ValueError for an unknown target or a rank below 1.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        raise ValueError(
            f"LoRA targets: must be some of {', '.join(TARGETS)}, got {unknown or 'none'}; "
            "correct the list"
        )
    if rank < 1:
        raise ValueError(f"LoRA rank: must be at least 1, got {rank}; set --lora_rank=32")
    sizes = cfg.sizes | {"R": rank}
    layers = {}
    for target in targets:
        letters_a, letters_b = LAYER_TABLE[target].adapter_letters
        shape_a = shape_of(letters_a, sizes)
        fan_in = 1
        for letter in letters_a[1:-1]:
            fan_in *= sizes[letter]
        noise = jax.random.normal(jax.random.fold_in(key, TARGETS.index(target)), shape_a)
        layers[target] = {
            "a": (fan_in**-0.5 * noise).astype(jnp.float32),
            "b": jnp.zeros(shape_of(letters_b, sizes), jnp.float32),
        }
    return Lora(layers, alpha / rank)


def merge(params: Params, lora: Lora | None) -> Params:
    """Return params with W + scale A B in every adapted weight (same dtype; sum in float32)."""
    if lora is None:
        return params
    return params | {"layers": merged_layers(params["layers"], lora.layers, lora.scale)}
