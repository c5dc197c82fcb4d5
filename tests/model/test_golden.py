"""The model equals transformers on a stored tiny Gemma 3: logits, loss, every gradient by name.

The set is written by tests/golden/make_golden.py; its model has both kinds of layers, window 5,
scaled RoPE; its rows have 16 columns and start at columns 0, 4 and 9.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_cot.config import ModelConfig
from gemma_cot.model.gemma import logits
from gemma_cot.model.load import load_pretrained, stored_tensors
from gemma_cot.model.logprob import token_logprobs

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def model():
    return load_pretrained(GOLDEN / "tiny_hf", "float32")


@pytest.fixture(scope="module")
def real(golden):
    """Which columns hold tokens, [B, T]."""
    return np.arange(golden["tokens"].shape[1])[None, :] >= golden["start"][:, None]


@pytest.fixture(scope="module")
def loss_and_gradients(golden, model, real):
    """Return (mean negative log-likelihood, {Hugging Face name: gradient in stored layout})."""
    cfg, params = model
    predicted = real & np.pad(real, ((0, 0), (1, 0)))[:, :-1]  # real, after a real one

    def loss(params):
        logp_BT = token_logprobs(params, cfg, golden["tokens"], golden["start"])
        return -jnp.sum(jnp.where(predicted, logp_BT, 0.0)) / float(predicted.sum())

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), dict(stored_tensors(cfg, grads))


def test_the_config_that_transformers_wrote(model):
    assert model[0] == ModelConfig(  # the literals of make_golden.CONFIG
        num_layers=4,
        embed_dim=24,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=28,
        vocab_size=50,
        window=5,
        global_layers=(False, True, False, True),
        query_scalar=9.0,
        rope_scale_global=8.0,
        max_positions=64,
    )


def test_weights_survive_there_and_back(model):
    stored = load_file(GOLDEN / "tiny_hf" / "model.safetensors")
    ours = dict(stored_tensors(*model))
    assert ours.keys() == stored.keys()
    for name, array in stored.items():
        assert np.array_equal(ours[name], array), name


def test_logits(golden, model, real):
    cfg, params = model
    ours = jax.jit(logits, static_argnames="cfg")(params, cfg, golden["tokens"], golden["start"])
    assert np.abs(golden["logits"][real]).max() > 3
    # float32 sums in another order; measured 3e-6
    np.testing.assert_allclose(ours[real], golden["logits"][real], atol=1e-4, rtol=0)


def test_loss(golden, loss_and_gradients):
    # a mean over 32 tokens ((16 + 12 + 7) real ones, less the first of each row) near 5
    assert abs(loss_and_gradients[0] - golden["loss"]) < 1e-5


def test_every_gradient_by_name(golden, loss_and_gradients):
    expected = {k.removeprefix("grad."): x for k, x in golden.items() if k.startswith("grad.")}
    assert loss_and_gradients[1].keys() == expected.keys()
    assert len(expected) == 2 + 4 * 13  # embedding, final norm, 13 a layer
    for name, grad in expected.items():
        # of the tensor's largest entry; measured below 1e-5
        error = np.abs(loss_and_gradients[1][name] - grad).max() / np.abs(grad).max()
        assert error < 1e-3, (name, error)
