"""Other orders in memory give the numbers of the plain einsums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.axes import make_mesh
from gemma_cot.model.kernels.layout import (
    TOGETHER,
    all_at_once,
    by_layer,
    joined,
    lengthen,
    mix_of,
    scores_of,
    stored,
    write,
)
from gemma_cot.model.layers import PRODUCTS, each_by_itself

B, S, K, R, H, L = 3, 5, 2, 4, 6, 2


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("targets", [(), ("q", "v", "down"), PRODUCTS], ids=["none", "some", "all"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("names", TOGETHER, ids="".join)
def test_one_product_gives_what_each_by_itself_gives(
    cfg, params, lora, names, platform, targets, monkeypatch
):
    """Of layer 1, whether none, some or all of the weights have an adapter."""
    monkeypatch.setattr("gemma_cot.model.kernels.layout.platform", lambda: platform)
    adapters = {name: lora.layers[name] for name in targets}
    sizes = cfg.sizes | {"B": 3, "T": 1}
    x = draw(0, *(sizes[letter] for letter in PRODUCTS[names[0]].split(",")[0]))
    stack = params["layers"], adapters
    together, alone = (jax.tree.map(lambda x: x[1], tree) for tree in (joined(*stack), stack))
    got = all_at_once(cfg, *together, lora.scale, x, *names)
    want = each_by_itself(*alone, lora.scale, x, *names)
    assert len(got) == len(names)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)  # sums of float32 in another order


def test_weights_that_are_cut_over_devices_stay_in_one_stack(cfg):
    for mesh, expected in (("4x1", True), ("2x2", False)):
        with jax.set_mesh(make_mesh(mesh)):
            assert by_layer(cfg) == expected
    assert by_layer(cfg)  # no mesh


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
