"""--attention=pallas and --logprob=pallas: the model with kernels is the model, on one device and
on several, in value, gradient and samples."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.axes import make_mesh, replicated, sharding_of
from gemma_cot.model.gemma import logits
from gemma_cot.model.logprob import logprobs_and_entropy
from gemma_cot.model.sample import sample

START_B = np.asarray([0, 3, 7, 1], np.int32)
CLOSE = dict(rtol=0, atol=2e-5)  # float32 sums in another order, logits of size 1


@pytest.fixture(scope="module")
def pallas(cfg):
    return dataclasses.replace(cfg, attention="pallas", logprob="pallas")


@pytest.fixture(scope="module")
def tokens_BT(cfg):
    """Rows longer than twice the window of 5, so that local layers hide something."""
    return np.random.default_rng(5).integers(0, cfg.vocab_size, (4, 13)).astype(np.int32)


def test_logits_are_those_of_the_reference(cfg, pallas, params, lora, tokens_BT):
    run = jax.jit(logits, static_argnums=1)
    want, got = (run(params, c, tokens_BT, START_B, lora) for c in (cfg, pallas))
    real_BT = np.arange(13) >= START_B[:, None]
    np.testing.assert_allclose(got[real_BT], want[real_BT], **CLOSE)


def value_and_gradient(params, cfg, lora, tokens_BT, start_B):
    def loss(lora):
        logp_BT, entropy_BT = logprobs_and_entropy(
            params, cfg, tokens_BT, start_B, lora, 0.7, first_column=8
        )
        weight_BT = jnp.cos(jnp.arange(logp_BT.size, dtype=jnp.float32)).reshape(logp_BT.shape)
        return (weight_BT * logp_BT).sum(), (logp_BT, entropy_BT)

    (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(lora)
    return values, gradient


@pytest.mark.parametrize("mesh_text", [None, "4x1", "2x2"])
def test_logprobs_and_gradients_are_those_of_the_reference(
    cfg, pallas, params, lora, tokens_BT, mesh_text
):
    run = jax.jit(value_and_gradient, static_argnums=1)
    want = run(params, cfg, lora, tokens_BT, START_B)
    if mesh_text is None:
        got = run(params, pallas, lora, tokens_BT, START_B)
    else:
        mesh = make_mesh(mesh_text)
        whole = jax.device_put((params, lora), replicated(mesh))
        rows = [
            jax.device_put(tokens_BT, sharding_of("BT", mesh)),
            jax.device_put(START_B, sharding_of("B", mesh)),
        ]
        with jax.set_mesh(mesh):
            compiled = run.lower(whole[0], pallas, whole[1], *rows).compile()
            assert "all-gather" not in compiled.as_text(), "each device runs its own rows"
            got = run(whole[0], pallas, whole[1], *rows)
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), got[0], want[0])
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("mesh_text", [None, "2x2"])
def test_samples_are_those_of_the_reference(cfg, pallas, params, lora, tokens_BT, mesh_text):
    draw = partial(sample, num_completions=3, max_new_tokens=9, temperature=0.8, stop_ids=(1,))
    start_P, key = START_B, jax.random.key(4)
    want = draw(params, cfg, tokens_BT, start_P, key, lora=lora)
    if mesh_text is None:
        got = draw(params, pallas, tokens_BT, start_P, key, lora=lora)
    else:
        mesh = make_mesh(mesh_text)
        whole = jax.device_put((params, lora), replicated(mesh))
        with jax.set_mesh(mesh):
            got = draw(
                whole[0], pallas, jax.device_put(tokens_BT, sharding_of("PT", mesh)),
                jax.device_put(start_P, sharding_of("P", mesh)), key, lora=whole[1],
            )  # fmt: skip
    np.testing.assert_array_equal(got.tokens_BT, want.tokens_BT)
    np.testing.assert_array_equal(got.completion_mask_BT, want.completion_mask_BT)
    np.testing.assert_allclose(got.logp_BT, want.logp_BT, **CLOSE)
