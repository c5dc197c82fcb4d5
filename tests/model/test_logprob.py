"""Log-probs: log_softmax of the logits, shifted by one; blind to chunks and to first_column."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import reference_logits, reference_logprobs

from gemma_cot.model.gemma import logits
from gemma_cot.model.kernels.gradients import chosen_once
from gemma_cot.model.logprob import (
    by_chunks,
    chunk_of,
    logprobs_and_entropy,
    token_logprobs,
)

# float32 against float64 through three layers, as in test_gemma.
TWIN = dict(atol=3e-5, rtol=0)
START_B = np.array([0, 4], np.int32)

measure = jax.jit(logprobs_and_entropy, static_argnames=("cfg", "first_column", "remat", "chunk"))


@pytest.fixture(scope="module")
def tokens_BT(cfg):
    """Two rows of 11 tokens, the second left-padded by 4 (START_B)."""
    return np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 11)).astype(np.int32)


@pytest.fixture(scope="module")
def plain(cfg, params, tokens_BT):
    """(logp_BT, entropy_BT) with every option at its default, as NumPy."""
    return [np.asarray(x) for x in measure(params, cfg, tokens_BT, START_B, temperature=1.0)]


def test_logprobs_equal_the_twin(cfg, params, tokens_BT, plain):
    logp_BT, _ = plain
    assert logp_BT.dtype == np.float32 and logp_BT.shape == (2, 11)
    for b, start in enumerate(START_B):
        row_T = tokens_BT[b, start:]
        want = reference_logprobs(reference_logits(params, cfg, row_T), row_T)
        # The first real column is predicted by padding: no caller may use it, no test claims it.
        np.testing.assert_allclose(logp_BT[b, start + 1 :], want[1:], **TWIN)
    assert (logp_BT[:, 0] == 0).all() and (logp_BT[:, 1:] < 0).all()


def test_logprobs_are_the_shifted_log_softmax(cfg, params, tokens_BT, plain):
    logits_BTV = jax.jit(partial(logits, cfg=cfg))(params, tokens_BT=tokens_BT, start_B=START_B)
    table_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    for b, t in np.ndindex(2, 10):
        assert plain[0][b, t + 1] == pytest.approx(table_BTV[b, t, tokens_BT[b, t + 1]], abs=1e-5)


def test_entropy_equals_minus_sum_p_log_p(cfg, params, tokens_BT, plain):
    logits_TV = reference_logits(params, cfg, tokens_BT[0])
    p_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(-1, keepdims=True)
    want_T = -(p_TV * np.log(p_TV)).sum(-1)
    np.testing.assert_allclose(plain[1][0, 1:], want_T[:-1], **TWIN)
    assert plain[1][0, 0] == 0 and want_T.max() < np.log(cfg.vocab_size)


def test_temperature_divides_the_logits(cfg, params, tokens_BT):
    logp_BT, entropy_BT = measure(params, cfg, tokens_BT, START_B, temperature=0.5)
    logits_TV = reference_logits(params, cfg, tokens_BT[0])
    want_T = reference_logprobs(logits_TV, tokens_BT[0], 0.5)
    np.testing.assert_allclose(logp_BT[0], want_T, **TWIN)
    p_TV = np.exp(2 * logits_TV) / np.exp(2 * logits_TV).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        entropy_BT[0, 1:], -(p_TV * np.log(p_TV)).sum(-1)[:-1], atol=1e-4
    )  # twice the logits, twice the error


def test_token_logprobs_takes_lora_and_temperature(cfg, params, tokens_BT, lora):
    one = jax.jit(token_logprobs, static_argnames=("cfg", "temperature"))
    want_T = reference_logprobs(
        reference_logits(params, cfg, tokens_BT[0], lora.layers, lora.scale), tokens_BT[0], 1.3
    )
    got_BT = one(params, cfg, tokens_BT, START_B, lora, 1.3)
    np.testing.assert_allclose(got_BT[0], want_T, **TWIN)


def test_first_column_leaves_out_the_prompt_and_nothing_else(cfg, params, tokens_BT, plain):
    """2 rows of 5 wanted columns, in chunks of 3: the last chunk has two columns of padding."""
    late = measure(params, cfg, tokens_BT, START_B, first_column=6, chunk=3)
    for got, want in zip(late, plain, strict=True):
        assert (np.asarray(got)[:, :6] == 0).all()
        np.testing.assert_allclose(got[:, 6:], want[:, 6:], atol=1e-5)


def test_no_completion_columns_give_zeros(cfg, params, tokens_BT):
    """A row of one token has nothing to predict."""
    logp_BT, entropy_BT = measure(params, cfg, tokens_BT[:, :1])
    assert logp_BT.shape == entropy_BT.shape == (2, 1)
    assert (np.asarray(logp_BT) == 0).all() and (np.asarray(entropy_BT) == 0).all()


def test_chunk_and_remat_change_neither_value_nor_gradient(cfg, params, tokens_BT):
    """20 predicted tokens at once; and in 3 chunks of 7, the last with a column of padding."""
    weight_BT = np.random.default_rng(1).normal(size=(2, 11)).astype(np.float32)

    @partial(jax.jit, static_argnums=(1, 2))
    def value_and_gradient(table_VD, chunk, remat):
        def loss(table_VD):
            logp_BT, _ = logprobs_and_entropy(
                params | {"embed": table_VD}, cfg, tokens_BT, START_B, chunk=chunk, remat=remat
            )
            return (weight_BT * logp_BT).sum()

        return jax.value_and_grad(loss)(table_VD)

    value, slope_VD = value_and_gradient(params["embed"], 1024, "none")
    got_value, got_slope_VD = value_and_gradient(params["embed"], 7, "all")
    assert got_value == pytest.approx(float(value), abs=1e-4)  # a sum of 20 terms of about 4
    assert np.abs(slope_VD).max() > 0.1
    # Gradients of a few units, float32 sums of 20 terms in another order.
    np.testing.assert_allclose(got_slope_VD, slope_VD, atol=5e-5, rtol=1e-5)


# One position's scores, given the hidden state and the table that the logits come from.
score = jax.jit(chosen_once)


def test_uniform_model_by_hand():
    """All logits equal: every token has log-prob -ln 50, entropy is ln 50 = 3.912023."""
    table_VD, x_CD = np.zeros((50, 20), np.float32), np.ones((2, 20), np.float32)
    logp_C, entropy_C = score(table_VD, x_CD, np.array([7, 8]), 0.7)
    np.testing.assert_allclose(logp_C, -3.912023, rtol=1e-6)
    np.testing.assert_allclose(entropy_C, 3.912023, rtol=1e-6)


def test_sure_model_has_zero_entropy():
    """One logit 1000 above the rest: probability 1 in float32, and no NaN from 0 · log 0."""
    table_VD, x_CD = np.zeros((50, 20), np.float32), np.ones((2, 20), np.float32)
    table_VD[7] = 50.0  # 20 · 50 = 1000
    logp_C, entropy_C = score(table_VD, x_CD, np.array([7, 8]), 1.0)
    np.testing.assert_array_equal(logp_C, [0.0, -1000.0])
    np.testing.assert_array_equal(entropy_C, [0.0, 0.0])


@pytest.mark.parametrize(
    ("vocab_size", "rows", "chunk"),
    [(8192, 4, 64), (262_144, 4, 48), (8192, 300, 1)],
)
def test_chunk_bounds_positions_and_bytes(cfg, vocab_size, rows, chunk):
    """256 positions of all rows; 192 MiB / (4 * 262,144) = 192 of Gemma's; never less than 1."""
    assert chunk_of(dataclasses.replace(cfg, vocab_size=vocab_size), rows) == chunk


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)], ids=["embedding", "x", "both"])
@pytest.mark.parametrize("chunk", [3, 7])
def test_value_and_gradient_taken_together_are_those_of_the_log_softmax(chunk, trained):
    """2 rows of 7 positions; the embedding frozen, as with LoRA, or trained too."""
    rng = np.random.default_rng(3)
    table_VD, x_BTD = rng.normal(size=(50, 8)), rng.normal(size=(2, 7, 8))
    table_VD, x_BTD = table_VD.astype(np.float32), x_BTD.astype(np.float32)
    target_BT, weight_BT = rng.integers(0, 50, (2, 7)), rng.normal(size=(2, 7)).astype(np.float32)
    chosen_BTV = weight_BT[..., None] * np.eye(50, dtype=np.float32)[target_BT]

    def ours(table_VD, x_BTD):
        logp_BT, _ = by_chunks({"embed": table_VD}, x_BTD, target_BT, 0.7, chunk)
        return (weight_BT * logp_BT).sum()

    def plain(table_VD, x_BTD):
        table_BTV = jax.nn.log_softmax(x_BTD @ table_VD.T / 0.7)
        return (chosen_BTV * table_BTV).sum()

    (value, got), (wanted, want) = (
        jax.jit(jax.value_and_grad(f, trained))(table_VD, x_BTD) for f in (ours, plain)
    )
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_small_gradient_of_a_sure_model_survives_bfloat16():
    """p(target) = 1 - 1/1025: in bfloat16 that is 1, but the gradient is not 0."""
    table_VD = jnp.array([[0.0], [1.0]], jnp.bfloat16)
    x_BTD = jnp.full((1, 1, 1), np.log(1024), jnp.bfloat16)
    target_BT = np.array([[1]])
    d_x_BTD = jax.grad(lambda x: by_chunks({"embed": table_VD}, x, target_BT, 1.0, 1)[0].sum())
    assert float(d_x_BTD(x_BTD)[0, 0, 0]) == pytest.approx(1 / 1025, rel=0.02)


def test_entropy_is_for_the_log_and_carries_no_gradient(cfg, params, lora, tokens_BT):
    entropy = jax.jit(
        jax.grad(lambda lora: logprobs_and_entropy(params, cfg, tokens_BT, START_B, lora)[1].sum())
    )
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(entropy(lora)))


@pytest.mark.parametrize("remat", ["none", "products", "all"])
def test_a_prompt_run_once_for_its_group_changes_neither_value_nor_gradient(
    cfg, params, lora, remat
):
    """2 prompts of 6 columns (one left-padded by 4) with 3 completions each, twice the window."""
    rng = np.random.default_rng(4)
    prompt_BT = np.repeat(rng.integers(0, cfg.vocab_size, (2, 6)), 3, axis=0)
    tokens_BT = np.concatenate([prompt_BT, rng.integers(0, cfg.vocab_size, (6, 9))], axis=1)
    start_B = np.repeat(START_B, 3)
    weight_BT = rng.normal(size=(6, 15)).astype(np.float32)

    def value_and_gradient(group):
        def loss(lora):
            logp_BT, entropy_BT = logprobs_and_entropy(
                params, cfg, tokens_BT.astype(np.int32), start_B, lora, 0.8,
                first_column=6, group=group, remat=remat,
            )  # fmt: skip
            return (weight_BT * logp_BT).sum(), (logp_BT, entropy_BT)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(lora)

    (_, alone), gradient = value_and_gradient(1)
    (_, shared), shared_gradient = value_and_gradient(3)
    for ours, want in zip(shared, alone, strict=True):
        np.testing.assert_allclose(ours, want, atol=2e-5)
    leaves = zip(*map(jax.tree.leaves, (shared_gradient, gradient)), strict=True)
    for ours, want in leaves:  # float32 sums in another order
        np.testing.assert_allclose(ours, want, atol=2e-5 * float(np.abs(want).max()))
