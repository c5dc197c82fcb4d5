"""The forward pass: equal to the NumPy twin, causal, blind to padding, the base at LoRA b = 0."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import reference_logits

from gemma_cot.config import ModelConfig
from gemma_cot.model.gemma import embed, hidden_states, logits, positions

# float32 against float64: 3 layers of sums over at most 48 terms, values near 1, give 1e-6 to
# 1e-5 (a norm of a short vector amplifies); a wrong position, head or mask gives 1e-2 and more.
TWIN = dict(atol=2e-5, rtol=0)

run = jax.jit(logits, static_argnames="cfg")


@pytest.fixture(scope="module")
def tokens_BT(cfg):
    """Three rows of 13 tokens, longer than twice the window of 5; ids drawn once."""
    return jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (3, 13)), jnp.int32)


def test_logits_equal_the_twin(cfg, params, tokens_BT):
    got = run(params, cfg, tokens_BT)
    assert got.dtype == jnp.float32 and got.shape == (3, 13, cfg.vocab_size)
    want = np.stack([reference_logits(params, cfg, row) for row in tokens_BT])
    assert np.abs(want).max() > 1.0  # the comparison below is not one of zeros
    np.testing.assert_allclose(got, want, **TWIN)


def test_logits_with_lora_equal_the_twin(cfg, params, tokens_BT, lora):
    got = run(params, cfg, tokens_BT, lora=lora)
    want = reference_logits(params, cfg, tokens_BT[0], lora.layers, lora.scale)
    assert np.abs(want - reference_logits(params, cfg, tokens_BT[0])).max() > 0.1
    np.testing.assert_allclose(got[0], want, **TWIN)


def test_fresh_lora_changes_nothing(cfg, params, tokens_BT, fresh_lora):
    """b starts at zero: x + scale * 0 is x, whatever a is."""
    got = run(params, cfg, tokens_BT, lora=fresh_lora)
    np.testing.assert_allclose(got, run(params, cfg, tokens_BT), **TWIN)


@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("filler", [0, 7])
def test_left_padding_changes_nothing(cfg, params, tokens_BT, k, filler):
    """k columns of any token before the row, and start = k: the same logits at the real columns."""
    plain = run(params, cfg, tokens_BT)
    padded_BT = np.pad(tokens_BT, ((0, 0), (k, 0)), constant_values=filler)[:, :13]
    got = run(params, cfg, padded_BT, np.full((3,), k, np.int32))
    np.testing.assert_allclose(got[:, k:], plain[:, : 13 - k], **TWIN)
    assert np.isfinite(got).all()  # padding columns attend to nothing and still are no NaN


def test_rows_of_different_start_do_not_meet(cfg, params, tokens_BT):
    got = run(params, cfg, tokens_BT, np.asarray([0, 4, 12], np.int32))
    for b, start in enumerate([0, 4, 12]):
        want = reference_logits(params, cfg, tokens_BT[b, start:])
        np.testing.assert_allclose(got[b, start:], want, **TWIN)


def test_positions_count_from_the_first_real_column():
    np.testing.assert_array_equal(
        positions(jnp.asarray([0, 2, 4], jnp.int32), 5),
        [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 0, 0, 0, 0]],
    )


@partial(jax.jit, static_argnames="cfg")
def slopes(params, cfg, tokens_BT, start_B):
    """Return d(one number per position) / d(embedding) as [T, V, D]."""
    probe_D = jnp.cos(jnp.arange(cfg.embed_dim, dtype=jnp.float32))

    def outputs(table_VD):
        x_BTD, _ = hidden_states(params | {"embed": table_VD}, cfg, tokens_BT, start_B)
        return x_BTD[0] @ probe_D

    return jax.jacrev(outputs)(params["embed"])


def reach(params, cfg, start: int = 0) -> list[str]:
    """Picture of which position (column) the output at each position (row) depends on, by gradient.

    Position t holds token t, so that row t of the embedding's gradient belongs to position t alone.
    """
    tokens_BT = np.arange(9, dtype=np.int32)[None]
    slope_TVD = np.asarray(slopes(params, cfg, tokens_BT, np.asarray([start], np.int32)))
    touched_TT = (slope_TVD != 0).any(-1)[:, :9]
    return ["".join(".1"[int(cell)] for cell in row) for row in touched_TT]


def test_causality_by_gradient_is_exact(cfg, params):
    """Everything after t has gradient exactly 0, everything up to t has one (a layer is global)."""
    assert reach(params, cfg) == ["1" * (t + 1) + "." * (8 - t) for t in range(9)]


def test_local_layers_reach_window_minus_one_back_each(cfg, params):
    """3 local layers of window 2 see 3 * (2 - 1) = 3 positions back, and not a fourth."""
    local = dataclasses.replace(cfg, window=2, global_layers=(False,) * 3)
    assert reach(params, local) == [
        "1........",
        "11.......",
        "111......",
        "1111.....",
        ".1111....",
        "..1111...",
        "...1111..",
        "....1111.",
        ".....1111",
    ]


def test_no_gradient_flows_from_real_columns_to_padding(cfg, params):
    picture = reach(params, cfg, start=4)
    assert picture[4:] == ["....1....", "....11...", "....111..", "....1111.", "....11111"]


def test_remat_is_in_the_program_when_asked_for(cfg, params, tokens_BT, lora):
    """That it leaves the gradient as it is, test_logprob shows."""
    for remat in ("none", "products", "all"):
        run_layers = partial(hidden_states, cfg=cfg, tokens_BT=tokens_BT, remat=remat)
        program = jax.make_jaxpr(lambda w, f=run_layers: f(w, lora=lora)[0])(params)
        assert ("remat" in str(program)) == (remat != "none")


def test_bfloat16_runs_and_stays_near_float32(cfg, params, tokens_BT, lora, in_bf16):
    half = in_bf16(params)
    x_BTD, _ = jax.eval_shape(partial(hidden_states, cfg=cfg), half, tokens_BT=tokens_BT, lora=lora)
    assert x_BTD.dtype == jnp.bfloat16
    got = run(half, cfg, tokens_BT, lora=lora)
    assert got.dtype == jnp.float32
    # bf16 keeps 8 bits: 2^-9 relative per rounding, dozens of roundings, logits up to about 4.
    np.testing.assert_allclose(got, run(params, cfg, tokens_BT, lora=lora), atol=0.3)


@pytest.mark.parametrize(
    ("width", "dtype", "factor"),
    [
        (1152, "bfloat16", 34.0),  # sqrt(1152) = 33.94; bf16 has steps of 0.25 there: 34.0
        (640, "bfloat16", 25.25),  # sqrt(640) = 25.298; steps of 0.125: 25.25
        (1152, "float32", 33.941126),  # sqrt(1152) = 24 sqrt(2)
    ],
)
def test_embedding_factor_is_rounded_to_the_weights_dtype(cfg, width, dtype, factor):
    wide = dataclasses.replace(cfg, embed_dim=width)
    x_BTD = embed({"embed": jnp.ones((4, width), dtype)}, wide, jnp.asarray([[3, 0]], jnp.int32))
    assert x_BTD.shape == (1, 2, width) and x_BTD.dtype == dtype
    np.testing.assert_allclose(x_BTD.astype(jnp.float32), factor, rtol=1e-7)


def test_single_key_value_head_equals_the_twin(cfg, draw_params):
    """The 1B shape: all query heads share one key/value head."""
    one = dataclasses.replace(cfg, num_heads=4, num_kv_heads=1, global_layers=(False, False, True))
    weights = draw_params(one, 3)
    tokens_T = np.arange(8, dtype=np.int32) * 3 % 50
    got = run(weights, one, tokens_T[None])[0]
    np.testing.assert_allclose(got, reference_logits(weights, one, tokens_T), **TWIN)


def test_position_512_is_the_first_that_does_not_see_position_0(draw_params):
    """Gemma 3 1B's window of 512 counts the position itself: 511 sees 0, 512 sees 1..512."""
    one_layer = ModelConfig(1, 4, 1, 1, 4, 4, 30, window=512, global_layers=(False,))
    weights = draw_params(one_layer, 4)
    tokens_BT = np.stack([np.random.default_rng(1).integers(1, 30, 514)] * 2).astype(np.int32)
    tokens_BT[1, 0] = 0
    got = run(weights, one_layer, tokens_BT)
    same_T = np.asarray((got[0] == got[1]).all(-1))
    assert not same_T[511] and same_T[512:].all()
    # One head, one layer: the twin of 514 positions runs in a second.
    np.testing.assert_allclose(got[0], reference_logits(weights, one_layer, tokens_BT[0]), **TWIN)
