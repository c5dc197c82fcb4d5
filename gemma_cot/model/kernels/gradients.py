"""The parts of the model whose gradient is written out: norm, attention, the two forms of LoRA, and
the log-prob of a frozen embedding.

Automatic differentiation would keep the attention weights and transpose arrays of their size, which
on a CPU costs more than the products do, and compute logits twice. Values are those of the plain
einsums; knows no model.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Large and finite: a row that may attend to nothing gets uniform weights, never NaN.
MASKED = -2.0e38
PRODUCT = "product"  # the name of what `gemma.rematerialised` may keep


def as_product(x: jax.Array) -> jax.Array:
    """Name x as PRODUCT, rounded to its dtype also where it is not kept: XLA would go on with more
    digits than bfloat16 has, and pi_old, taken without a gradient, would be another policy's."""
    if x.dtype.itemsize < 4:
        kind = jnp.finfo(x.dtype)
        x = jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
    return checkpoint_name(x, PRODUCT)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, w_D: jax.Array, eps: float) -> jax.Array:
    """Return x r (1 + w), r = 1 / rms(x), over the last axis, computed in float32, in x's dtype.

    Zhang & Sennrich 2019 (arXiv:1910.07467), with Gemma's (1 + w). Its gradient written out:
        d_x = r (d_y (1 + w) - x r^2 mean(d_y x (1 + w)))        d_w = d_y x r, summed
    where the mean is a product of d_y x with 1 + w: XLA's CPU backend takes factors into a sum, and
    runs that number by number.
    """
    x_f32 = x.astype(jnp.float32)
    return (x_f32 * _inverse_rms(x_f32, eps) * _norm_scale(x, w_D)).astype(x.dtype)


def _inverse_rms(x_f32, eps: float):
    return jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)


def _norm_scale(x, w_D):
    return jnp.expand_dims(1.0 + w_D.astype(jnp.float32), tuple(range(x.ndim - 1)))


def _rms_norm_backward(eps: float, kept, d_y):
    x, w_D = kept
    x_f32, d_y = x.astype(jnp.float32), d_y.astype(jnp.float32)
    r, scale = _inverse_rms(x_f32, eps), _norm_scale(x, w_D)
    along_x = d_y * x_f32
    mean = jnp.matmul(along_x, scale.reshape(-1, 1), precision="highest") / x.shape[-1]
    d_x = r * (d_y * scale - x_f32 * (r * r * mean))
    d_w_D = (along_x * r).sum(tuple(range(x.ndim - 1)))
    return d_x.astype(x.dtype), d_w_D.astype(w_D.dtype)


rms_norm.defvjp(lambda x, w_D, eps: (rms_norm(x, w_D, eps), (x, w_D)), _rms_norm_backward)


def exponentials(q_BKQTH: jax.Array, k_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Return float32 `e_BKQTS` = exp(score - its maximum over S), 0 where a query may not look; all
    are 1 where it may look at nothing."""
    score_BKQTS = jnp.einsum(
        "BKQTH,BKSH->BKQTS", q_BKQTH, k_BKSH, preferred_element_type=jnp.float32
    )
    score_BKQTS = jnp.where(mask_BTS[:, None, None], score_BKQTS, MASKED)
    return jnp.exp(score_BKQTS - score_BKQTS.max(-1, keepdims=True))


@jax.custom_vjp
def block_attention(q_BKQTH, k_BKSH, v_BKSH, mask_BTS):
    """Return `mix_BKQTH` = softmax over S of the scores, times v; its gradient written out.

    As in FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4, here in one block):
        e = exp(score - top)    total = sum_s e    mix = e v / total
        d_score = e d_e - e sum_s e d_e / total    with d_e = d_mix v / total
    so that the exponentials are divided nowhere, and the gradient computes them again, as the value
    does, and transposes nothing of their size: on a CPU each costs about as much as a product. Only
    `total` is kept. (Were `top` kept too, XLA would compute the exponentials of a forward pass with
    a gradient in another way than those of one without, and on-policy ratios would not be 1.)
    """
    return _block_attention_forward(q_BKQTH, k_BKSH, v_BKSH, mask_BTS)[0]


def _block_attention_forward(q_BKQTH, k_BKSH, v_BKSH, mask_BTS):
    e_BKQTS = exponentials(q_BKQTH, k_BKSH, mask_BTS)
    total_BKQT1 = as_product(e_BKQTS.sum(-1, keepdims=True))
    mix_BKQTH = jnp.einsum(
        "BKQTS,BKSH->BKQTH", e_BKQTS.astype(v_BKSH.dtype), v_BKSH,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    mix_BKQTH = as_product((mix_BKQTH / total_BKQT1).astype(v_BKSH.dtype))
    return mix_BKQTH, (q_BKQTH, k_BKSH, v_BKSH, mask_BTS, total_BKQT1)


def _block_attention_backward(kept, d_mix_BKQTH):
    q_BKQTH, k_BKSH, v_BKSH, mask_BTS, total_BKQT1 = kept
    e_BKQTS = exponentials(q_BKQTH, k_BKSH, mask_BTS)
    d_mix_BKQTH = d_mix_BKQTH.astype(jnp.float32) / total_BKQT1  # from here on divided
    d_mix_BKQTH = d_mix_BKQTH.astype(v_BKSH.dtype)
    d_v_BKHS = jnp.einsum("BKQTH,BKQTS->BKHS", d_mix_BKQTH, e_BKQTS.astype(v_BKSH.dtype))
    d_e_BKQTS = jnp.einsum(
        "BKQTH,BKSH->BKQTS", d_mix_BKQTH, v_BKSH, preferred_element_type=jnp.float32
    )
    product_BKQTS = e_BKQTS * d_e_BKQTS
    mean_BKQT1 = product_BKQTS.sum(-1, keepdims=True) / total_BKQT1
    d_score_BKQTS = (product_BKQTS - e_BKQTS * mean_BKQT1).astype(k_BKSH.dtype)
    d_q_BKQTH = jnp.einsum("BKQTS,BKSH->BKQTH", d_score_BKQTS, k_BKSH)
    d_k_BKHS = jnp.einsum("BKQTH,BKQTS->BKHS", q_BKQTH, d_score_BKQTS)
    return d_q_BKQTH, d_k_BKHS.swapaxes(2, 3), d_v_BKHS.swapaxes(2, 3), None


block_attention.defvjp(_block_attention_forward, _block_attention_backward)


@cache
def lora_axes(einsum: str) -> tuple[str, str, str, str, str]:
    """Return the axes (x, z, y, summed, kept) of x·a = z and z·b = y, where z ends in the rank R:
    "BTD,DNH->BTNH" gives ("BTD", "BTR", "BTNH", "D", "NH")."""
    inputs, y = einsum.split("->")
    x, w = inputs.split(",")
    summed = "".join(c for c in w if c not in y)
    kept = "".join(c for c in w if c in y)
    return x, "".join(c for c in x if c not in summed) + "R", y, summed, kept


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def lora_product(einsum: str, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return (x·a)·b, its gradient written out: only what has the rank's width is transposed."""
    return _lora_product_forward(einsum, x, a, b)[0]


def _lora_product_forward(einsum: str, x, a, b):
    x_, z_, y_, summed, kept = lora_axes(einsum)
    z = as_product(jnp.einsum(f"{x_},{summed}R->{z_}", x, a))
    return jnp.einsum(f"{z_},R{kept}->{y_}", z, b), (x, z, a, b)


def _lora_product_backward(einsum: str, inputs, d_y):
    x, z, a, b = inputs
    x_, z_, y_, summed, kept = lora_axes(einsum)
    d_z = jnp.einsum(f"{y_},R{kept}->{z_}", d_y, b)
    d_x = jnp.einsum(f"{z_},{summed}R->{x_}", d_z, a)
    d_a = jnp.moveaxis(jnp.einsum(f"{z_},{x_}->R{summed}", d_z, x), 0, -1)
    return d_x, d_a, jnp.einsum(f"{z_},{y_}->R{kept}", z, d_y)


lora_product.defvjp(_lora_product_forward, _lora_product_backward)


def adapted_product(einsum: str, x, w, a, b, scale: float) -> jax.Array:
    """Return x·w + scale x·a·b, multiplied out or merged first, whichever is less work.

    Merged first only in float32: a sum in bfloat16 would lose what is small beside w.
    """
    rank = a.shape[-1]
    tokens = x.size // (a.size // rank)
    is_exact = x.dtype == w.dtype == jnp.float32
    if is_exact and tokens * (a.size + b.size) > rank * w.size:
        return merged_product(einsum, x, w, a, b, scale)
    return jnp.einsum(einsum, x, w) + scale * lora_product(einsum, x, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def merged_product(einsum: str, x, w, a, b, scale: float) -> jax.Array:
    """Return x·(w + scale a·b). The gradients of a and b go through the rank: nothing of w's size
    is made for them."""
    return jnp.einsum(einsum, x, merged(einsum, w, a, b, scale))


def merged(einsum: str, w, a, b, scale: float) -> jax.Array:
    """Return w + scale a·b."""
    _, _, _, summed, kept = lora_axes(einsum)
    letters = einsum.split("->")[0].split(",")[1]
    return w + scale * jnp.einsum(f"{summed}R,R{kept}->{letters}", a, b)


def _merged_product_forward(einsum: str, x, w, a, b, scale: float):
    return merged_product(einsum, x, w, a, b, scale), (x, w, a, b)


def _merged_product_backward(einsum: str, scale: float, inputs, d_y):
    x, w, a, b = inputs
    x_, z_, y_, summed, kept = lora_axes(einsum)
    letters = einsum.split("->")[0].split(",")[1]
    d_x = jnp.einsum(f"{y_},{letters}->{x_}", d_y, merged(einsum, w, a, b, scale))
    d_w = jnp.einsum(f"{x_},{y_}->{letters}", x, d_y)
    z = jnp.einsum(f"{x_},{summed}R->{z_}", x, a)
    d_z = scale * jnp.einsum(f"{y_},R{kept}->{z_}", d_y, b)
    d_a = jnp.moveaxis(jnp.einsum(f"{z_},{x_}->R{summed}", d_z, x), 0, -1)
    return d_x, d_w, d_a, scale * jnp.einsum(f"{z_},{y_}->R{kept}", z, d_y)


merged_product.defvjp(_merged_product_forward, _merged_product_backward)


def of_logits(logits: jax.Array, target: jax.Array, temperature: float = 1.0) -> tuple:
    """Return (log p(target), entropy in nats), both [...], of softmax(logits / temperature).

    With e = exp((logits - top) / temperature), z their sum: entropy = log z - sum e log e / z. In
    two passes over logits [..., V], for the maximum and for the sums.
    """
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    below = (logits - top) / temperature
    e = jnp.exp(below)
    total = e.sum(-1)
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    logp = (chosen - top[..., 0]) / temperature - jnp.log(total)
    return logp, jnp.log(total) - (e * below).sum(-1) / total


def logits_of(embed_VD: jax.Array, x: jax.Array, product=jnp.einsum) -> jax.Array:
    """Return float32 logits [..., V] of hidden states [..., D]; product: how x meets a weight."""
    return product("...D,VD->...V", x, embed_VD, preferred_element_type=jnp.float32)


@jax.custom_vjp
def chosen_once(embed_VD: jax.Array, x: jax.Array, target: jax.Array, temperature: float):
    """Return `of_logits` of logits / temperature, of which only the log-prob carries a gradient.

    The gradient for x is computed with the value, while the logits are there:
        d log p(y) / d x = sum_v (1[v = y] - p_v) embed_v / temperature
    so that the backward pass multiplies with a number a position. Where the embedding is trained
    too, the backward pass computes the logits again instead.
    """
    return of_logits(logits_of(embed_VD, x), target, temperature)


def _chosen_once_forward(*primals):
    embed_VD, x, target, temperature = (primal.value for primal in primals)
    logits = logits_of(embed_VD, x)
    both = of_logits(logits, target, temperature)
    if primals[0].perturbed:
        return both, (embed_VD, x, target, temperature)
    top = logits.max(-1, keepdims=True)
    e = jnp.exp((logits - top) / temperature)
    d_logits = jax.nn.one_hot(target, len(embed_VD)) - e / e.sum(-1, keepdims=True)
    d_x = jnp.einsum(
        "...V,VD->...D", d_logits.astype(embed_VD.dtype), embed_VD,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return both, (d_x / temperature).astype(x.dtype)


def _chosen_once_backward(kept, cotangents):
    d_logp = cotangents[0]
    if not isinstance(kept, tuple):
        d_x = d_logp[..., None] * kept.astype(jnp.float32)
        return None, d_x.astype(kept.dtype), None, None
    embed_VD, x, target, temperature = kept

    def logp(embed_VD, x):
        return of_logits(logits_of(embed_VD, x), target, temperature)[0]

    return *jax.vjp(logp, embed_VD, x)[1](d_logp), None, None


chosen_once.defvjp(_chosen_once_forward, _chosen_once_backward, symbolic_zeros=True)
