"""An adapter starts as nothing, is what its letters say, merges, and alone gets a gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.axes import shape_of
from gemma_cot.lora import TARGETS, Lora, init_lora, merge
from gemma_cot.model.gemma import logits
from gemma_cot.model.kernels.gradients import lora_axes
from gemma_cot.model.layers import PRODUCTS, linear
from gemma_cot.model.params import LAYER_TABLE

RANK, ALPHA = 4, 10.0
BT = {"B": 2, "T": 9}  # 9 > window 5

forward = jax.jit(logits, static_argnames="cfg")


def random_lora(cfg, targets=TARGETS, seed=3) -> Lora:
    """Return an adapter whose b is not 0 either: entries of B A x about a third of those of W x."""
    lora = init_lora(jax.random.key(seed), cfg, RANK, ALPHA, targets)
    leaves, structure = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        x + 0.07 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


@pytest.fixture(scope="module")
def tokens_BT(cfg):
    return jax.random.randint(jax.random.key(5), (BT["B"], BT["T"]), 0, cfg.vocab_size)


# ---- letters ------------------------------------------------------------------------------------


def test_letters_of_every_target():
    # a: L, the axes the weight sums over, R.  b: L, R, the axes it produces.
    assert {target: LAYER_TABLE[target].adapter_letters for target in TARGETS} == {
        "q": ("LDR", "LRNH"),
        "k": ("LDR", "LRKH"),
        "v": ("LDR", "LRKH"),
        "o": ("LNHR", "LRD"),
        "gate": ("LDR", "LRF"),
        "up": ("LDR", "LRF"),
        "down": ("LFR", "LRD"),
    }


@pytest.mark.parametrize("target", TARGETS)
def test_letters_are_those_that_the_forward_pass_contracts(target):
    """The pair that init makes is the pair that `layers.linear` multiplies by."""
    _, _, _, summed, kept = lora_axes(PRODUCTS[target])
    assert LAYER_TABLE[target].adapter_letters == (f"L{summed}R", f"LR{kept}")


# ---- init ---------------------------------------------------------------------------------------


def test_shapes_dtype_rank_and_scale(cfg):
    lora = init_lora(jax.random.key(0), cfg, RANK, ALPHA)
    # L 3, D 20, N 6, K 2, H 8, F 28, R 4
    assert {t: (ab["a"].shape, ab["b"].shape) for t, ab in lora.layers.items()} == {
        "q": ((3, 20, 4), (3, 4, 6, 8)),
        "k": ((3, 20, 4), (3, 4, 2, 8)),
        "v": ((3, 20, 4), (3, 4, 2, 8)),
        "o": ((3, 6, 8, 4), (3, 4, 20)),
        "gate": ((3, 20, 4), (3, 4, 28)),
        "up": ((3, 20, 4), (3, 4, 28)),
        "down": ((3, 28, 4), (3, 4, 20)),
    }
    assert {x.dtype for x in jax.tree.leaves(lora)} == {jnp.dtype("float32")}
    assert lora.rank == 4
    assert lora.scale == 2.5  # 10 / 4
    assert len(jax.tree.leaves(lora)) == 14  # scale is a constant, not a leaf: 7 pairs only


@pytest.mark.parametrize("target", TARGETS)
def test_a_fresh_pair_changes_no_bit(cfg, params, target):
    pair = init_lora(jax.random.key(0), cfg, RANK, ALPHA).layers[target]
    layer = {target: params["layers"][target][1]}
    lora = {target: {"a": pair["a"][1], "b": pair["b"][1]}}
    einsum = PRODUCTS[target]
    x = jax.random.normal(jax.random.key(2), shape_of(einsum.split(",")[0], cfg.sizes | BT))
    base = linear(einsum, x, layer, target, None, 0.0)
    assert jnp.array_equal(linear(einsum, x, layer, target, lora, 2.5), base)
    assert jnp.array_equal(linear(einsum, x, layer, target, {}, 2.5), base)  # no pair of it


def test_a_fresh_adapter_is_the_base(cfg, params, tokens_BT):
    lora = init_lora(jax.random.key(0), cfg, RANK, ALPHA)
    merged = merge(params, lora)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, merged, params)))
    # The term added is exactly 0 (above), but XLA fuses the two programs differently: rounding of
    # float32. Measured 1.5e-6 on logits up to 5.
    adapter = forward(params, cfg, tokens_BT, lora=lora)
    np.testing.assert_allclose(adapter, forward(params, cfg, tokens_BT), atol=1e-5, rtol=0)


def test_a_has_variance_one_over_fan_in(cfg):
    wide = dataclasses.replace(cfg, embed_dim=96, mlp_dim=160, num_heads=10)
    lora = init_lora(jax.random.key(1), wide, 32, 1.0)
    for target in TARGETS:
        fan_in = {"o": 80, "down": 160}.get(target, 96)  # N H = 10 * 8, F, D
        a = np.asarray(lora.layers[target]["a"], np.float64)
        n = a.size  # 3 layers * fan-in * 32, at least 7,680
        # five standard errors: of a mean 1 / sqrt(n fan_in), of a variance sqrt(2 / n) / fan_in
        assert abs(a.mean()) < 5 / np.sqrt(n * fan_in), target
        assert abs(a.var() * fan_in - 1) < 5 * np.sqrt(2 / n), target
        # normal, not uniform: the share beyond one standard deviation is 0.317 (uniform: 0.423)
        beyond = np.mean(np.abs(a) > fan_in**-0.5)
        assert abs(beyond - 0.3173) < 5 * np.sqrt(0.3173 * 0.6827 / n), target


@pytest.mark.parametrize("targets", [("q",), ("down", "k"), ("up", "gate", "v", "o")])
def test_draws_of_a_target_do_not_depend_on_the_others(cfg, targets):
    key = jax.random.key(7)
    every = init_lora(key, cfg, RANK, ALPHA)
    some = init_lora(key, cfg, RANK, ALPHA, targets)
    assert set(some.layers) == set(targets)
    for target in targets:
        assert jnp.array_equal(some.layers[target]["a"], every.layers[target]["a"])


def test_targets_and_layers_and_keys_differ(cfg):
    lora = init_lora(jax.random.key(7), cfg, RANK, ALPHA)
    other = init_lora(jax.random.key(8), cfg, RANK, ALPHA)
    assert not jnp.array_equal(lora.layers["k"]["a"], lora.layers["v"]["a"])  # same shape
    assert not jnp.array_equal(lora.layers["q"]["a"][0], lora.layers["q"]["a"][1])
    assert not jnp.array_equal(lora.layers["q"]["a"], other.layers["q"]["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("q", "q_norm")}, r"LoRA targets: must be .*q, k, v, o.*got \['q_norm'\]; .*"),
        ({"targets": ("q_proj",)}, r"LoRA targets: must be .*got \['q_proj'\]; correct"),
        ({"targets": ()}, "LoRA targets: must be .*got none; correct the list"),
        ({"rank": 0}, "LoRA rank: must be at least 1, got 0; set --lora_rank=32"),
        ({"rank": -2}, "LoRA rank: must be at least 1, got -2; "),
    ],
)
def test_refusals(cfg, change, message):
    with pytest.raises(ValueError, match=message):
        init_lora(**{"key": jax.random.key(0), "cfg": cfg, "rank": 4, "alpha": 8.0} | change)


# ---- merge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [*((t,) for t in TARGETS), ("q", "down"), TARGETS])
def test_merged_equals_adapter(cfg, params, tokens_BT, targets):
    lora = random_lora(cfg, targets)
    # b = 0 in the other targets: one adapter structure, one compilation for all cases
    lora = lora.replace(layers=init_lora(jax.random.key(4), cfg, RANK, 1.0).layers | lora.layers)
    start_B = jnp.array([0, 3], jnp.int32)
    adapter = forward(params, cfg, tokens_BT, start_B, lora)
    merged = forward(merge(params, lora), cfg, tokens_BT, start_B)
    real = np.arange(9)[None, :] >= np.array([0, 3])[:, None]
    # The two round differently: 6e-8 relative an operation, sums of at most 48 terms, 3 layers with
    # norms that bring values back to about 1. Measured below 3.5e-6 on logits up to 5.
    np.testing.assert_allclose(merged[real], adapter[real], atol=2e-5, rtol=0)
    base = forward(params, cfg, tokens_BT, start_B)
    assert np.abs(adapter - base)[real].max() > 0.01  # 500 times the tolerance: it does something


def test_an_adapter_of_two_targets_is_one_of_all_with_zeros(cfg, params, tokens_BT):
    some = random_lora(cfg, ("q", "down"))
    every = some.replace(layers=init_lora(jax.random.key(4), cfg, RANK, 1.0).layers | some.layers)
    assert set(some.layers) == {"q", "down"}
    # rounding of float32 only, as above
    np.testing.assert_allclose(
        forward(params, cfg, tokens_BT, lora=some),
        forward(params, cfg, tokens_BT, lora=every),
        atol=2e-5,
        rtol=0,
    )


def test_merge_is_w_plus_scale_a_b_in_numpy(cfg, params):
    lora = random_lora(cfg)
    merged = merge(params, lora)["layers"]
    sizes = cfg.sizes | {"R": RANK}
    for target in TARGETS:
        letters_a, letters_b = LAYER_TABLE[target].adapter_letters
        w = np.asarray(params["layers"][target], np.float64)
        for i in range(cfg.num_layers):
            a = np.asarray(lora.layers[target]["a"][i], np.float64).reshape(-1, RANK)
            b = np.asarray(lora.layers[target]["b"][i], np.float64).reshape(RANK, -1)
            kept = shape_of(letters_a[1:-1] + letters_b[2:], sizes)
            expected = w[i] + 2.5 * (a @ b).reshape(kept)  # our weights are [inputs, outputs]
            # float32 sum of 4 products of about 0.1 each: rounding of at most 1e-7
            np.testing.assert_allclose(merged[target][i], expected, atol=1e-6, rtol=0)


def test_merge_leaves_the_rest_alone(cfg, params):
    before = jax.tree.map(np.array, params)
    merged = merge(params, random_lora(cfg, ("q", "down")))
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, same in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(np.array_equal, before, merged)
        )
        if not same
    }
    assert changed == {"layers/q", "layers/down"}
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, params)))  # not in place
    assert merge(params, None) is params


def test_merge_keeps_the_dtype_and_sums_in_float32(cfg, params):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    lora = random_lora(cfg)
    merged = merge(low, lora)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    exact = merge(jax.tree.map(lambda x: x.astype(jnp.float32), low), lora)
    # one rounding, of the float32 sum; a sum in bfloat16 would round B A first and differ
    same = jax.tree.map(lambda x, y: jnp.array_equal(x, y.astype(jnp.bfloat16)), merged, exact)
    assert all(jax.tree.leaves(same))


def test_scale_multiplies_like_b(cfg, params, tokens_BT):
    lora = random_lora(cfg)
    layers = {t: {"a": ab["a"], "b": 2.0 * ab["b"]} for t, ab in lora.layers.items()}
    twice = forward(params, cfg, tokens_BT, lora=lora.replace(scale=2 * lora.scale))
    # a factor of 2 is exact in binary wherever it is applied, but for XLA's fusions
    doubled = forward(params, cfg, tokens_BT, lora=lora.replace(layers=layers))
    np.testing.assert_allclose(twice, doubled, atol=1e-5, rtol=0)


# ---- gradient -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradients(cfg, tokens_BT):
    """Return the compiled gradient of a loss by (params, lora)."""

    def loss(params, lora):
        return jnp.mean(jnp.square(logits(params, cfg, tokens_BT, lora=lora)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def test_gradient_of_a_fresh_adapter_reaches_b_only(cfg, params, gradients):
    lora = init_lora(jax.random.key(0), cfg, RANK, ALPHA)
    _, grads = gradients(params, lora)
    assert jax.tree.structure(grads) == jax.tree.structure(lora)  # pairs, nothing of the base
    for target in TARGETS:
        assert not grads.layers[target]["a"].any()  # dL/da = ... b^T, and b = 0
        assert all(grads.layers[target]["b"][i].any() for i in range(cfg.num_layers))


def test_gradient_is_that_of_the_merged_weight_by_the_chain_rule(cfg, params, gradients):
    """W' = W + s a b gives dL/da = s (dL/dW') b^T and dL/db = s a^T (dL/dW')."""
    lora = random_lora(cfg)
    grads = gradients(params, lora)[1]
    nothing = init_lora(jax.random.key(0), cfg, RANK, ALPHA)
    grad_w = gradients(merge(params, lora), nothing)[0]["layers"]
    for target in TARGETS:
        for i in range(cfg.num_layers):
            a = np.asarray(lora.layers[target]["a"][i]).reshape(-1, RANK)
            b = np.asarray(lora.layers[target]["b"][i]).reshape(RANK, -1)
            w = np.asarray(grad_w[target][i]).reshape(len(a), -1)
            for part, expected in (("a", 2.5 * w @ b.T), ("b", 2.5 * a.T @ w)):
                got = np.asarray(grads.layers[target][part][i]).reshape(expected.shape)
                # float32 through 3 layers and back; relative to the leaf's largest entry
                error = np.abs(got - expected).max() / np.abs(expected).max()
                assert error < 1e-4, (target, part, i, error)
