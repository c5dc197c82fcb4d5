"""The parts of a layer: masks as pictures, norms, rotations and attention against their twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import reference_gelu, reference_norm, reference_rope, reference_softmax

from gemma_cot.model import layers
from gemma_cot.model.kernels.gradients import (
    MASKED,
    adapted_product,
    lora_axes,
    lora_product,
    merged_product,
)
from gemma_cot.model.layers import (
    apply_rope,
    attention,
    causal_mask,
    linear,
    mlp,
    rms_norm,
    rotations,
)

# float32 against float64 on values near 1 and sums of at most 28 terms.
TWIN = dict(atol=2e-6, rtol=2e-6)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Return float32 normals from NumPy: nothing to compile."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def picture(*rows: str) -> np.ndarray:
    """Return the boolean matrix that the rows draw, 1 = True."""
    return np.array([[c == "1" for c in row.replace(" ", "")] for row in rows])


# -- masks


def test_mask_without_padding_window_3():
    """Row = query, column = key. A window of 3 counts the query itself."""
    local, wide = np.asarray(causal_mask(jnp.zeros((1,), jnp.int32), 5, 3))[:, 0]
    np.testing.assert_array_equal(
        wide,
        picture(
            "1 . . . .",
            "1 1 . . .",
            "1 1 1 . .",
            "1 1 1 1 .",
            "1 1 1 1 1",
        ),
    )
    np.testing.assert_array_equal(
        local,
        picture(
            "1 . . . .",
            "1 1 . . .",
            "1 1 1 . .",
            ". 1 1 1 .",
            ". . 1 1 1",
        ),
    )


def test_mask_of_left_padded_rows():
    """Start 2 and start 5 (all padding, which attends to nothing) beside each other, window 2."""
    masks = np.asarray(causal_mask(jnp.asarray([2, 5], jnp.int32), 5, 2))
    np.testing.assert_array_equal(
        masks[1, 0],
        picture(
            ". . . . .",
            ". . . . .",
            ". . 1 . .",
            ". . 1 1 .",
            ". . 1 1 1",
        ),
    )
    np.testing.assert_array_equal(
        masks[0, 0],
        picture(
            ". . . . .",
            ". . . . .",
            ". . 1 . .",
            ". . 1 1 .",
            ". . . 1 1",
        ),
    )
    assert not masks[:, 1].any()


def test_window_as_wide_as_the_row_is_global():
    local, wide = causal_mask(jnp.zeros((1,), jnp.int32), 6, 6)
    np.testing.assert_array_equal(local, wide)
    np.testing.assert_array_equal(wide[0], np.tril(np.ones((6, 6), bool)))


# -- norm


def test_rms_norm_equals_the_twin():
    x, w = normal(0, 2, 3, 7), normal(1, 7)
    got = rms_norm(jnp.asarray(x), jnp.asarray(w), 1e-6)
    want = np.apply_along_axis(reference_norm, -1, x.astype(np.float64), w, 1e-6)
    np.testing.assert_allclose(got, want, **TWIN)


def test_rms_norm_by_hand():
    # rms(3, 4) = sqrt(12.5) = 3.5355339; 3 / rms = 0.8485281, 4 / rms = 1.1313708; times (1 + w)
    got = rms_norm(jnp.asarray([3.0, 4.0]), jnp.asarray([0.0, 1.0]), 0.0)
    np.testing.assert_allclose(got, [0.8485281, 2.2627417], rtol=1e-6)


def test_rms_norm_of_zeros_is_zero_and_eps_is_inside_the_root():
    zero = rms_norm(jnp.zeros((4,)), jnp.zeros((4,)), 1e-6)
    np.testing.assert_array_equal(zero, np.zeros(4))
    # x² = 1e-6 = eps: 1e-3 / sqrt(2e-6) = 0.7071068
    small = rms_norm(jnp.full((4,), 1e-3), jnp.zeros((4,)), 1e-6)
    np.testing.assert_allclose(small, 0.7071068, rtol=1e-5)


def test_rms_norm_of_bfloat16_is_rounded_once():
    """Computed in float32 and rounded at the end: the float64 value's nearest bf16, every time."""
    x, w = (jnp.asarray(normal(seed, 3, 64)[0], jnp.bfloat16) for seed in (21, 22))
    got = rms_norm(x, w, 1e-6)
    want = reference_norm(np.asarray(x, np.float64), np.asarray(w, np.float64), 1e-6)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got), want.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 3, 4, 7)])
def test_rms_norm_has_the_gradient_of_its_formula(shape):
    """That of x / rms(x) (1 + w) by automatic differentiation, for x and for w."""
    x, w, weight = (jnp.asarray(normal(*args)) for args in ((23, *shape), (24, 7), (25, *shape)))

    def plain(x, w):
        rms = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-2)
        return (weight * (x / rms * jnp.expand_dims(1.0 + w, tuple(range(x.ndim - 1))))).sum()

    got = jax.grad(lambda x, w: (weight * rms_norm(x, w, 1e-2)).sum(), (0, 1))(x, w)
    want = jax.grad(plain, (0, 1))(x, w)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


def test_rms_norm_of_bfloat16_has_gradients_in_bfloat16():
    x, w = (jnp.asarray(normal(seed, 64), jnp.bfloat16) for seed in (26, 27))
    x32, w32 = x.astype(jnp.float32), w.astype(jnp.float32)
    got = jax.grad(lambda x, w: rms_norm(x, w, 1e-6).astype(jnp.float32).sum(), (0, 1))(x, w)
    want = jax.grad(lambda x, w: rms_norm(x, w, 1e-6).sum(), (0, 1))(x32, w32)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs.astype(jnp.bfloat16)))


# -- rotary embedding


def test_rotations_by_hand(cfg):
    """H = 8: exponents 0, 1/4, 1/2, 3/4; bases 1e4 and 1e6; global positions divided by 2."""
    local, wide = np.asarray(rotations(cfg, jnp.asarray([[0, 6]], jnp.int32)))[:, 0]
    np.testing.assert_array_equal(local[0], [np.ones(4), np.zeros(4)])
    near = np.array([6.0, 0.6, 0.06, 0.006])
    # 1e6^(1/4) = 31.622777, ^(1/2) = 1000, ^(3/4) = 31622.777
    far = np.array([3.0, 3 / 31.622777, 0.003, 3 / 31622.777])
    for turn, angle in ((local[1], near), (wide[1], far)):
        np.testing.assert_allclose(turn[0], np.cos(angle), atol=1e-6)
        np.testing.assert_allclose(turn[1], np.sin(angle), rtol=1e-5)


def test_rope_equals_the_twin(cfg):
    x_BTNH = normal(2, 2, 3, 2, 8)
    position_BT = np.array([[0, 1, 2], [5, 300, 30_000]], np.int32)
    turn_2BT2h = rotations(cfg, jnp.asarray(position_BT))
    for row, base, slower in ((0, cfg.rope_base_local, 1.0), (1, cfg.rope_base_global, 2.0)):
        got = np.asarray(apply_rope(jnp.asarray(x_BTNH), turn_2BT2h[row]))
        for b, t, n in np.ndindex(2, 3, 2):
            want = reference_rope(x_BTNH[b, t, n], position_BT[b, t] / slower, base)
            # float32 angles: 30,000 rad is known to 2^-10 rad, 300 rad to 2^-16
            atol = 3e-3 if position_BT[b, t] == 30_000 else 3e-5
            np.testing.assert_allclose(got[b, t, n], want, atol=atol)


def test_rope_scores_depend_on_distance_only(cfg):
    q, k = (jnp.asarray(np.broadcast_to(normal(s, 8), (1, 4, 1, 8))) for s in (3, 4))
    near = rotations(cfg, jnp.asarray([[0, 3, 10, 13]], jnp.int32))[0]
    q, k = (np.asarray(apply_rope(x, near))[0, :, 0] for x in (q, k))
    assert q[1] @ k[0] == pytest.approx(q[3] @ k[2], abs=1e-5)  # distance 3 both times
    assert abs(q[1] @ k[0] - q[0] @ k[0]) > 1e-2
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), np.linalg.norm(q[0]), rtol=1e-5)


# -- linear and LoRA


@pytest.mark.parametrize(
    ("einsum", "axes"),
    [
        ("BTD,DNH->BTNH", ("BTD", "BTR", "BTNH", "D", "NH")),  # q
        ("BTD,DKH->BTKH", ("BTD", "BTR", "BTKH", "D", "KH")),  # k, v
        ("BTNH,NHD->BTD", ("BTNH", "BTR", "BTD", "NH", "D")),  # o
        ("BTD,DF->BTF", ("BTD", "BTR", "BTF", "D", "F")),  # gate, up
        ("BTF,FD->BTD", ("BTF", "BTR", "BTD", "F", "D")),  # down
    ],
)
def test_lora_axes_split_through_the_rank(einsum, axes):
    assert lora_axes(einsum) == axes


@pytest.mark.parametrize(
    ("einsum", "x", "a", "b", "plain"),
    [
        ("BTD,DNH->BTNH", (2, 3, 4), (4, 2), (2, 5, 6), "BTD,DR,RNH->BTNH"),
        ("BTNH,NHD->BTD", (2, 3, 5, 6), (5, 6, 2), (2, 4), "BTNH,NHR,RD->BTD"),
    ],
)
def test_lora_product_has_the_gradient_of_the_plain_product(einsum, x, a, b, plain):
    x, a, b = (jnp.asarray(normal(seed, *shape)) for seed, shape in enumerate((x, a, b)))
    weight = jnp.asarray(normal(3, *jnp.einsum(plain, x, a, b).shape))

    def ours(*factors):
        return (weight * lora_product(einsum, *factors)).sum()

    def theirs(*factors):
        return (weight * jnp.einsum(plain, *factors)).sum()

    for got, want in zip(
        *(jax.value_and_grad(f, (0, 1, 2))(x, a, b) for f in (ours, theirs)), strict=True
    ):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize(
    ("einsum", "x", "w", "a", "b", "plain"),
    [
        ("BTD,DNH->BTNH", (2, 3, 4), (4, 5, 6), (4, 2), (2, 5, 6), "DR,RNH->DNH"),
        ("BTNH,NHD->BTD", (2, 3, 5, 6), (5, 6, 4), (5, 6, 2), (2, 4), "NHR,RD->NHD"),
    ],
)
def test_merged_product_is_that_of_the_sum_with_its_gradients(einsum, x, w, a, b, plain):
    factors = [jnp.asarray(normal(seed, *shape)) for seed, shape in enumerate((x, w, a, b))]
    weight = jnp.asarray(normal(4, *jnp.einsum(einsum, *factors[:2]).shape))

    def ours(*factors):
        return (weight * merged_product(einsum, *factors, 0.5)).sum()

    def theirs(x, w, a, b):
        return (weight * jnp.einsum(einsum, x, w + 0.5 * jnp.einsum(plain, a, b))).sum()

    everything = (0, 1, 2, 3)
    got, want = (jax.value_and_grad(f, everything)(*factors) for f in (ours, theirs))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=2e-5), got, want)


@pytest.mark.parametrize(
    ("tokens", "dtype", "is_merged"),
    [(171, "float32", True), (170, "float32", False), (171, "bfloat16", False)],
)
def test_an_adapter_is_merged_for_many_tokens_in_float32(tokens, dtype, is_merged):
    """D 256, F 512: the adapter costs a token 768 R products, a·b costs 131,072 R: 170.7 tokens."""
    shapes = ((1, tokens, 256), (256, 512), (256, 8), (8, 512))
    factors = [jnp.asarray(normal(seed, *s), dtype) for seed, s in enumerate(shapes)]

    def product(*factors):
        return adapted_product("BTD,DF->BTF", *factors, 0.5)

    apart, together = 2 * tokens * 8 * 768, 2 * 8 * 256 * 512  # FLOPs beside those of x·w
    flops = jax.jit(product).lower(*factors).cost_analysis()["flops"] - 2 * tokens * 256 * 512
    assert flops == pytest.approx(together if is_merged else apart, rel=0.15)
    x, w, a, b = (np.asarray(f, np.float64) for f in factors)
    want, near = x @ w + 0.5 * x @ a @ b, 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(product(*factors), want, rtol=near, atol=40 * near)



def test_linear_adds_the_scaled_low_rank_product():
    x, w, a, b = normal(5, 1, 2, 3, 4), normal(6, 3, 4, 5), normal(7, 3, 4, 2), normal(8, 2, 5)
    layer, lora = {"o": jnp.asarray(w)}, {"o": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}
    plain = linear("BTNH,NHD->BTD", jnp.asarray(x), layer, "o", None, 0.0)
    np.testing.assert_allclose(plain, np.tensordot(x, w, 2), **TWIN)
    adapted = linear("BTNH,NHD->BTD", jnp.asarray(x), layer, "o", lora, 0.5)
    merged = w + 0.5 * np.tensordot(a, b, 1)
    np.testing.assert_allclose(adapted, np.tensordot(x, merged, 2), rtol=1e-5, atol=1e-5)
    other = linear("BTNH,NHD->BTD", jnp.asarray(x), layer, "o", {"q": lora["o"]}, 0.5)
    np.testing.assert_array_equal(other, plain)


def test_linear_keeps_bfloat16_beside_a_float32_adapter():
    half = jnp.bfloat16
    lora = {"up": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 4))}}
    x, w = jnp.ones((1, 1, 3), half), jnp.ones((3, 4), half)
    got = linear("BTD,DF->BTF", x, {"up": w}, "up", lora, 0.5)
    assert got.dtype == half
    np.testing.assert_array_equal(got, np.full((1, 1, 4), 3 + 0.5 * 6))  # exact in bf16


# -- attention and MLP


def twin_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    """Return the mix of each head by loops over rows, queries and heads; visible keys only."""
    out = np.zeros(q_BTNH.shape)
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    for b, t, n in np.ndindex(q_BTNH.shape[:3]):
        seen = np.flatnonzero(mask_BTS[b, t])
        weights = reference_softmax([q_BTNH[b, t, n] @ k_BSKH[b, s, n // group] for s in seen])
        out[b, t, n] = sum(w * v_BSKH[b, s, n // group] for w, s in zip(weights, seen, strict=True))
    return out


def test_attention_equals_the_twin():
    """N = 6 query heads, K = 2: query heads 0..2 read key/value head 0, heads 3..5 head 1."""
    q, k, v = normal(9, 2, 4, 6, 8), normal(10, 2, 5, 2, 8), normal(11, 2, 5, 2, 8)
    mask = np.random.default_rng(12).random((2, 4, 5)) < 0.5
    mask[..., 0] = True
    got = attention(*(jnp.asarray(x) for x in (q, k, v, mask)))
    np.testing.assert_allclose(got, twin_attention(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("T", [7, 4])
def test_attention_by_blocks_has_the_value_and_gradient_of_plain_attention(monkeypatch, block, T):
    """7 keys, the queries the last T of their columns; 2 query heads to each of 2 key heads."""
    monkeypatch.setattr(layers, "QUERY_BLOCK", block)
    q, k, v = normal(1, 2, T, 4, 5), normal(2, 2, 7, 2, 5), normal(3, 2, 7, 2, 5)
    q, k, v = map(jnp.asarray, (q, k, v))
    weight = jnp.asarray(normal(4, 2, T, 4, 5))
    mask_BTS = causal_mask(jnp.array([0, 2]), 7, 3)[0, :, 7 - T :]
    real_BT11 = mask_BTS.any(-1)[:, :, None, None].astype("float32")  # others are in no contract

    def plain(q_BTNH, k_BSKH, v_BSKH):
        k_BSNH, v_BSNH = (jnp.repeat(x, 2, axis=2) for x in (k_BSKH, v_BSKH))
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
        w_BNTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS, MASKED), axis=-1)
        return (real_BT11 * weight * jnp.einsum("BNTS,BSNH->BTNH", w_BNTS, v_BSNH)).sum()

    def ours(q_BTNH, k_BSKH, v_BSKH):
        return (real_BT11 * weight * attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS)).sum()

    got, want = (jax.value_and_grad(f, (0, 1, 2))(q, k, v) for f in (ours, plain))
    assert got[0] == pytest.approx(float(want[0]), abs=1e-5)
    for g, w in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)
    assert np.abs(want[1][1]).max() > 0.1


def test_attention_to_nothing_is_the_plain_mean():
    """An all-padding row: uniform weights over everything, finite, never NaN."""
    q, k, v = normal(13, 1, 2, 2, 4), normal(14, 1, 3, 1, 4), normal(15, 1, 3, 1, 4)
    got = np.asarray(attention(*map(jnp.asarray, (q, k, v)), jnp.zeros((1, 2, 3), bool)))
    want = np.broadcast_to(v.mean(1, keepdims=True), (1, 2, 2, 4))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_masked_keys_have_no_weight_however_large():
    q, k, v = np.ones((1, 1, 1, 4)), np.ones((1, 3, 1, 4)), normal(16, 1, 3, 1, 4)
    k[:, 1] = 1e6
    mask = np.array([[[True, False, True]]])
    got = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(mask))
    np.testing.assert_allclose(got[0, 0, 0], (v[0, 0, 0] + v[0, 2, 0]) / 2, rtol=1e-6)


def test_weights_of_bfloat16_are_summed_in_float32():
    """257 equal weights: their sum in bfloat16 is 256, and 257 / 256 of 129 / 128 rounds up."""
    q, k, v = np.zeros((1, 1, 1, 4)), normal(16, 1, 257, 1, 4), np.full((1, 257, 1, 4), 129 / 128)
    q, k, v = (jnp.asarray(part, jnp.bfloat16) for part in (q, k, v))
    mix = attention(q, k, v, jnp.ones((1, 1, 257), bool))
    assert mix.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mix.astype(jnp.float32), np.full((1, 1, 1, 4), 129 / 128))


def test_a_query_that_sees_one_key_has_no_gradient():
    """Its weight is 1 whatever the scores: the gradients of q and k are 0 to the bit."""
    q, k, v = normal(23, 1, 9, 2, 8), normal(24, 1, 9, 1, 8), normal(25, 1, 9, 1, 8)
    mask_BTS, weight = causal_mask(jnp.array([0]), 9, 1)[0], normal(26, 1, 9, 2, 8)

    def loss(q_BTNH, k_BSKH):
        return (weight * attention(q_BTNH, k_BSKH, jnp.asarray(v), mask_BTS)).sum()

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(q), jnp.asarray(k)):
        np.testing.assert_array_equal(gradient, 0.0)


def test_mlp_equals_the_twin():
    x, gate, up, down = normal(17, 1, 3, 4), normal(18, 4, 6), normal(19, 4, 6), normal(20, 6, 4)
    layer = {"gate": jnp.asarray(gate), "up": jnp.asarray(up), "down": jnp.asarray(down)}
    got = mlp(jnp.asarray(x), layer, None, 0.0)
    want = (np.vectorize(reference_gelu)(x @ gate) * (x @ up)) @ down
    # float32 sums of 6 products of values up to ~10; the exact (erf) GELU would be 5e-4 away
    np.testing.assert_allclose(got, want, atol=2e-5)
