"""Other orders in memory give the numbers of the plain einsums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.model.kernels.layout import (
    lengthen,
    mix_of,
    scores_of,
    stored,
    summed_last,
    weight_first,
    write,
)

B, S, K, R, H, L = 3, 5, 2, 4, 6, 2
PRODUCTS = {"q": "BTD,DNH->BTNH", "v": "BTD,DKH->BTKH", "o": "BTNH,NHD->BTD", "up": "BTD,DF->BTF",
            "down": "BTF,FD->BTD"}  # fmt: skip


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", PRODUCTS)
def test_weight_first_is_the_einsum(cfg, params, name):
    sizes = cfg.sizes | {"B": 3, "T": 1}
    x = draw(0, *(sizes[letter] for letter in PRODUCTS[name].split(",")[0]))
    turned = summed_last(params["layers"])[name][1]
    got = weight_first(PRODUCTS[name], x, turned)
    want = jnp.einsum(PRODUCTS[name], x, params["layers"][name][1])
    np.testing.assert_allclose(got, want, atol=1e-5)  # sums of float32 in another order


def test_a_cache_by_layers_holds_what_a_stack_holds(cfg):
    """Written at column 6 of tails grown from 5 to 7, read by scores and by the mix."""
    k_LBSKH, v_LBSKH = draw(1, L, B, S, K, H), draw(2, L, B, S, K, H)
    new_k, new_v, q_BKRH = draw(3, B, 1, K, H), draw(4, B, 1, K, H), draw(5, B, K, R, H)
    column, layer = jnp.int32(6), 1
    k, v = (x[layer] for x in stored(cfg, (k_LBSKH, v_LBSKH)))
    assert k.shape == (B * K, H, S) and v.shape == (B * K, S, H)
    k, v = write(*lengthen(k, v, 2), new_k, new_v, column, layer)
    stack = write(*lengthen(k_LBSKH, v_LBSKH, 2), new_k, new_v, column, layer)
    k_BSKH, v_BSKH = (x[layer] for x in stack)
    np.testing.assert_array_equal(k_BSKH[:, 6], new_k[:, 0])
    np.testing.assert_array_equal(v_BSKH[:, 5], 0)
    w_BKRS = scores_of(q_BKRH, k_BSKH)
    np.testing.assert_allclose(scores_of(q_BKRH, k), w_BKRS, atol=1e-5)
    np.testing.assert_allclose(mix_of(w_BKRS, v), mix_of(w_BKRS, v_BSKH), atol=1e-4)
