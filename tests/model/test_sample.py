"""Sampling: greedy is the argmax of a full forward pass; stops become masks; every draw depends on
(key, prompt, completion, position) alone; tokens come with the probabilities they should.

The chi-square tests have a fixed seed, so they pass or fail for good; a correct sampler would fail
one of them for one seed in a million.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from gemma_cot.axes import make_mesh, replicated, sharding_of
from gemma_cot.model import sample as sample_module
from gemma_cot.model.gemma import logits
from gemma_cot.model.logprob import token_logprobs
from gemma_cot.model.params import param_shapes, param_shardings
from gemma_cot.model.sample import PART, draw, prompt_hash, row_keys, sample

P, G, WIDTH, NEW = 4, 3, 6, 12
START_P = np.array([0, 2, 5, 1], np.int32)
STOPS = (7, 31)
FALSE_ALARM = 1e-6

draw_once = jax.jit(draw, static_argnames="temperature")


@pytest.fixture(scope="module")
def tokens_PT(cfg):
    """Four prompts of 6, 4, 1 and 5 real tokens, left-padded to 6 columns."""
    drawn = np.random.default_rng(0).integers(1, cfg.vocab_size, (P, WIDTH)).astype(np.int32)
    return np.where(np.arange(WIDTH) >= START_P[:, None], drawn, 0)


def run(params, cfg, tokens_PT, start_P, lora=None, seed=11, prompt_id_P=None, **changes):
    """Sample with this file's settings, changed by keyword; leaves as NumPy arrays."""
    options = dict(num_completions=G, max_new_tokens=NEW, temperature=0.7, stop_ids=STOPS)
    options |= dict(lora=lora, prompt_id_P=prompt_id_P) | changes
    out = sample(params, cfg, tokens_PT, start_P, jax.random.key(seed), **options)
    return jax.tree.map(np.asarray, out)


@pytest.fixture(scope="module")
def drawn(cfg, params, tokens_PT):
    """The run that the others are compared with: 12 rows, temperature 0.7, two stop ids."""
    return run(params, cfg, tokens_PT, START_P)


# -- greedy, log-probs, stops


def test_greedy_equals_the_argmax_of_a_full_forward(cfg, params, tokens_PT, lora):
    """Token by token: each completion token is the argmax at the column before it (causality).

    A larger MLP norm keeps the random model from repeating its input token for ever.
    """
    layers = params["layers"]
    params = params | {"layers": layers | {"post_mlp_norm": layers["post_mlp_norm"] + 4.0}}
    out = run(params, cfg, tokens_PT, START_P, lora, temperature=0.0, stop_ids=())
    logits_BTV = jax.jit(partial(logits, cfg=cfg))(
        params, tokens_BT=out.tokens_BT, start_B=out.start_B, lora=lora
    )
    best_BT = np.asarray(logits_BTV).argmax(-1)
    np.testing.assert_array_equal(out.tokens_BT[:, WIDTH:], best_BT[:, WIDTH - 1 : -1])
    assert out.completion_mask_BT[:, WIDTH:].all() and not out.stopped_B.any()
    assert len(np.unique(out.tokens_BT[:, WIDTH:])) > 10  # not one token over and over
    # greedy reports log-probs at temperature 1
    table_BTV = np.asarray(logits_BTV, np.float64)
    log_p_BT = table_BTV.max(-1) - np.log(np.exp(table_BTV).sum(-1))
    np.testing.assert_allclose(out.logp_BT[:, WIDTH:], log_p_BT[:, WIDTH - 1 : -1], atol=1e-4)


def test_sampler_and_trainer_agree_on_log_probs(cfg, params, drawn):
    logp_BT = jax.jit(partial(token_logprobs, cfg=cfg, temperature=0.7))(
        params, tokens_BT=drawn.tokens_BT, start_B=drawn.start_B
    )
    gap_BT = np.abs(drawn.logp_BT - logp_BT)[drawn.completion_mask_BT]
    assert gap_BT.size > 60 and gap_BT.max() < 1e-4  # the promise of algorithms.md in float32


def test_layout_of_the_record(tokens_PT, drawn):
    assert drawn.tokens_BT.shape == (P * G, WIDTH + NEW) and drawn.tokens_BT.dtype == np.int32
    np.testing.assert_array_equal(drawn.tokens_BT[:, :WIDTH], np.repeat(tokens_PT, G, 0))
    np.testing.assert_array_equal(drawn.start_B, np.repeat(START_P, G))
    assert not drawn.completion_mask_BT[:, :WIDTH].any() and (drawn.logp_BT[:, :WIDTH] == 0).all()


def mask_by_hand(tokens_BT, stop_ids) -> np.ndarray:
    """Return the mask by a loop over completion tokens: up to and including the first stop."""
    mask = np.zeros(tokens_BT.shape, bool)
    for b, t in np.ndindex(tokens_BT.shape):
        if t >= WIDTH:
            mask[b, t] = not any(token in stop_ids for token in tokens_BT[b, WIDTH:t])
    return mask


@pytest.fixture(scope="module")
def varied(cfg, tokens_PT):
    """160 rows of a uniform model (all weights zero), two stop ids: every kind of ending.

    The four prompts are equal but numbered apart, so that all rows are independent.
    """
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(cfg))
    return run(
        zeros, cfg, np.repeat(tokens_PT[:1], P, 0), np.zeros(P, np.int32), num_completions=40,
        temperature=1.0, prompt_id_P=np.array([5, 6, 8, 7], np.uint32),
    )  # fmt: skip


def test_mask_is_true_up_to_and_including_the_first_stop(varied):
    np.testing.assert_array_equal(varied.completion_mask_BT, mask_by_hand(varied.tokens_BT, STOPS))


def test_rows_end_in_every_possible_way(varied):
    """Both stop ids end rows; some stop at once (n = 1), some at the last place, some never."""
    length_B = varied.completion_mask_BT.sum(1)
    last_B = varied.tokens_BT[np.arange(len(length_B)), WIDTH + length_B - 1]
    np.testing.assert_array_equal(varied.stopped_B, np.isin(last_B, STOPS))
    assert set(STOPS) <= set(last_B[varied.stopped_B])
    assert (length_B[varied.stopped_B] == 1).any()
    assert not varied.stopped_B.all() and (length_B[~varied.stopped_B] == NEW).all()


def test_nothing_is_left_after_the_stop(varied):
    after = ~varied.completion_mask_BT
    after[:, :WIDTH] = False
    assert (
        after.any() and (varied.tokens_BT[after] == 0).all() and (varied.logp_BT[after] == 0).all()
    )
    # uniform over 50 tokens: every log-prob is -ln 50
    np.testing.assert_allclose(varied.logp_BT[varied.completion_mask_BT], -3.912023, rtol=1e-6)


def test_uniform_model_draws_uniform_tokens(cfg, varied):
    """First tokens and later ones alike; 49 degrees of freedom."""
    tokens = varied.tokens_BT[varied.completion_mask_BT]
    assert len(tokens) > 1000
    counts = np.bincount(tokens, minlength=cfg.vocab_size)
    # Stops are counted too: whether a row goes on does not change what its next token may be.
    statistic = ((counts - len(tokens) / 50) ** 2).sum() / (len(tokens) / 50)
    assert statistic < chi2.isf(FALSE_ALARM, 49)


# -- independence


def assert_same_rows(got, want, rows=slice(None), columns: int = NEW):
    """Assert equal completions: tokens and masks exactly, log-probs to float32 rounding."""
    start_got, start_want = (x.tokens_BT.shape[1] - n for x, n in ((got, columns), (want, NEW)))
    for name, atol in (("tokens_BT", 0), ("completion_mask_BT", 0), ("logp_BT", 2e-5)):
        a = getattr(got, name)[:, start_got:]
        b = getattr(want, name)[rows, start_want : start_want + columns]
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=atol, rtol=0)


def test_draws_differ_between_rows_and_places(drawn):
    tokens_BT = drawn.tokens_BT[:, WIDTH:]
    assert len({tuple(row) for row in tokens_BT}) == P * G


def test_draws_do_not_depend_on_the_order_of_prompts(cfg, params, tokens_PT, drawn):
    order = np.array([2, 0, 3, 1])
    got = run(params, cfg, tokens_PT[order], START_P[order])
    assert_same_rows(got, drawn, (order[:, None] * G + np.arange(G)).reshape(-1))


def test_draws_depend_on_the_key(cfg, params, tokens_PT, drawn):
    other = run(params, cfg, tokens_PT, START_P, seed=12)
    assert (other.tokens_BT[:, WIDTH] != drawn.tokens_BT[:, WIDTH]).any()


def test_equal_prompts_draw_equal_completions_unless_numbered(cfg, params, tokens_PT, varied):
    same_PT = np.repeat(tokens_PT[:1], P, 0)
    by_hash = run(params, cfg, same_PT, np.zeros(P, np.int32)).tokens_BT.reshape(P, G, -1)
    assert (by_hash == by_hash[:1]).all() and (by_hash[0, 0] != by_hash[0, 1]).any()
    assert len({tuple(row) for row in varied.tokens_BT}) > 150  # some stop at once: equal


def test_draws_do_not_depend_on_batch_size_padding_or_limits(cfg, params, tokens_PT, drawn):
    """One prompt alone, 3 more padding columns of another filler, fewer completions and tokens."""
    wide_PT = np.pad(tokens_PT[1:2], ((0, 0), (3, 0)), constant_values=9)
    got = run(params, cfg, wide_PT, START_P[1:2] + 3, num_completions=2, max_new_tokens=8)
    assert_same_rows(got, drawn, slice(G, G + 2), columns=8)


def test_draws_do_not_depend_on_the_number_of_devices(cfg, params, tokens_PT, drawn):
    mesh = make_mesh("4x1")
    sharded_PT = jax.device_put(tokens_PT, sharding_of("PT", mesh))
    start_P = jax.device_put(START_P, sharding_of("P", mesh))
    weights = jax.device_put(params, replicated(mesh))
    assert len(sharded_PT.sharding.device_set) == 4
    assert_same_rows(run(weights, cfg, sharded_PT, start_P), drawn)


def test_prompt_hash_equals_the_polynomial_of_the_real_tokens(tokens_PT):
    """Σ (token + 1) · 1000003^(columns after it), modulo 2^32, over real columns."""
    want = [
        sum((int(x) + 1) * 1_000_003 ** (WIDTH - 1 - t) for t, x in enumerate(row) if t >= start)
        % 2**32
        for row, start in zip(tokens_PT, START_P, strict=True)
    ]
    hashed = jax.jit(prompt_hash)
    got = hashed(tokens_PT, START_P)
    assert got.dtype == jnp.uint32 and got.tolist() == want
    wide = np.pad(tokens_PT, ((0, 0), (4, 0)), constant_values=3)
    assert hashed(wide, START_P + 4).tolist() == want


def test_row_keys_are_the_prompts_key_folded_with_the_completion():
    key = jax.random.key(3)
    rows = row_keys(key, jnp.asarray([8, 9], jnp.uint32), 3)
    data = jax.random.key_data(rows)
    want = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, 9), 2))
    np.testing.assert_array_equal(data[1 * 3 + 2], want)
    assert len({tuple(row) for row in data.tolist()}) == 6
    raw = row_keys(jax.random.PRNGKey(3), jnp.asarray([8, 9], jnp.uint32), 3)
    np.testing.assert_array_equal(jax.random.key_data(raw), data)


# -- the distribution of one draw


def counts_of(probabilities, temperature: float, seed: int, n: int = 20_000) -> np.ndarray:
    """Draw n tokens from log-probabilities; return how often each came, checking their logp."""
    with np.errstate(divide="ignore"):
        logit_V = np.log(np.asarray(probabilities)).astype(np.float32)
    keys = jax.random.split(jax.random.key(seed), n)
    logits_BV = np.broadcast_to(logit_V, (n, len(logit_V)))
    token_B, logp_B = draw_once(logits_BV, keys, temperature)
    scaled_V = np.asarray(probabilities) ** (1 / temperature)
    want_V = np.log(np.maximum(scaled_V / scaled_V.sum(), 1e-300))
    np.testing.assert_allclose(logp_B, want_V[np.asarray(token_B)], atol=1e-5)
    return np.bincount(token_B, minlength=len(logit_V))


def statistic_of(counts, probabilities) -> tuple[float, float]:
    """Return (Pearson's chi-square, its critical value); impossible tokens are left out."""
    possible = np.asarray(probabilities) > 0
    want = counts.sum() * np.asarray(probabilities)[possible]
    value = float(((counts[possible] - want) ** 2 / want).sum())
    return value, float(chi2.isf(FALSE_ALARM, possible.sum() - 1))


UNIFORM = [1 / 8] * 8
SKEWED = [0.0, 0.5, 0.25, 0.0, 0.125, 0.0625, 0.05, 0.0125, 0.0]
# Three parts of the vocabulary: rising, impossible, and a last one that is not full.
PARTS = np.concatenate([np.arange(1, PART + 1), np.zeros(PART), np.full(44, 200.0)])
PARTS = PARTS / PARTS.sum()


@pytest.mark.parametrize(
    "probabilities", [UNIFORM, SKEWED, PARTS], ids=["uniform", "skewed", "parts"]
)
def test_draw_follows_the_distribution(probabilities):
    counts = counts_of(probabilities, 1.0, seed=0)
    assert (counts[np.asarray(probabilities) == 0] == 0).all()
    value, critical = statistic_of(counts, probabilities)
    assert value < critical


def test_draw_follows_the_distribution_at_a_temperature():
    """Temperature 0.5 squares the probabilities: 0.6, 0.3, 0.1 become 36, 9, 1 of 46."""
    counts = counts_of([0.6, 0.3, 0.1], 0.5, seed=1)
    value, critical = statistic_of(counts, np.array([36, 9, 1]) / 46)
    assert value < critical
    untempered, _ = statistic_of(counts, [0.6, 0.3, 0.1])
    assert untempered > 100 * critical  # the test has the power to tell


def test_greedy_draw_is_the_argmax_at_temperature_one():
    logits_BV = jnp.asarray([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0]])
    token_B, logp_B = draw_once(logits_BV, jax.random.split(jax.random.key(0), 2), 0.0)
    assert token_B.tolist() == [1, 0]  # the first of equals
    # ln(e^2 / (1 + e^2 + e)) = -0.407606; ln(e^3 / (2 e^3 + 1)) = -0.717736
    np.testing.assert_allclose(logp_B, [-0.407606, -0.717736], atol=1e-6)


def test_draw_never_leaves_the_support():
    """The largest uniform (1 - 2^-23) and float32 rounding of a long CDF stay below the total."""
    logit_V = np.zeros(4096, np.float32)
    logit_V[2048:] = -np.inf
    keys = jax.random.split(jax.random.key(2), 512)
    token_B, logp_B = draw_once(np.broadcast_to(logit_V, (512, 4096)), keys, 1.0)
    assert np.asarray(token_B).max() < 2048 and np.isfinite(logp_B).all()


# -- slots: rows wait in a queue


@pytest.mark.parametrize("slots", [1, 3, 5, 11])
def test_slots_change_no_sample(cfg, params, tokens_PT, lora, drawn, slots):
    """12 rows in fewer slots: rows begin at other clocks, in other slots; tokens stay the same."""
    got = run(params, cfg, tokens_PT, START_P, slots=slots)
    np.testing.assert_array_equal(got.tokens_BT, drawn.tokens_BT)
    np.testing.assert_array_equal(got.completion_mask_BT, drawn.completion_mask_BT)
    np.testing.assert_array_equal(got.stopped_B, drawn.stopped_B)
    np.testing.assert_allclose(got.logp_BT, drawn.logp_BT, atol=2e-5)


def test_slots_with_kernels_change_no_sample(cfg, params, tokens_PT, drawn):
    """The decode kernel reads rings that have gone round."""
    got = run(params, dataclasses.replace(cfg, attention="pallas"), tokens_PT, START_P, slots=3)
    np.testing.assert_array_equal(got.tokens_BT, drawn.tokens_BT)


def test_slots_on_several_devices_change_no_sample(cfg, params, tokens_PT, drawn):
    """Each device runs a loop of its own, with a queue of its own: no collective in the program."""
    mesh = make_mesh("4x1")
    arguments = (
        jax.device_put(params, replicated(mesh)), cfg,
        jax.device_put(tokens_PT, sharding_of("PT", mesh)),
        jax.device_put(START_P, sharding_of("P", mesh)), jax.random.key(11),
    )  # fmt: skip
    options = dict(num_completions=G, max_new_tokens=NEW, temperature=0.7, stop_ids=STOPS, slots=2)
    with jax.set_mesh(mesh):
        program = sample.lower(*arguments, **options).compile().as_text()
        got = sample(*arguments, **options)
    np.testing.assert_array_equal(got.tokens_BT, drawn.tokens_BT)
    for kind in ("all-reduce", "all-gather", "collective-permute", "all-to-all"):
        assert kind not in program


@pytest.mark.parametrize("slots", [None, 2], ids=["all at once", "queue"])
def test_devices_that_share_a_model_take_the_same_turns(cfg, params, tokens_PT, slots):
    """Their loops hold collectives: a data device whose rows have all ended turns on with the
    others, or these would wait for it for ever."""
    mesh, often = make_mesh("2x2"), tuple(range(0, 50, 2))
    want = run(params, cfg, tokens_PT, START_P, stop_ids=often)
    longest = want.completion_mask_BT.sum(1).reshape(2, -1).max(1)
    assert longest[0] != longest[1], "left alone, the two data devices would end apart"
    with jax.set_mesh(mesh):
        got = run(
            jax.device_put(params, param_shardings(mesh)), cfg,
            jax.device_put(tokens_PT, sharding_of("PT", mesh)),
            jax.device_put(START_P, sharding_of("P", mesh)), slots=slots, stop_ids=often,
        )  # fmt: skip
    np.testing.assert_array_equal(got.tokens_BT, want.tokens_BT)
    np.testing.assert_array_equal(got.completion_mask_BT, want.completion_mask_BT)
    np.testing.assert_allclose(got.logp_BT, want.logp_BT, atol=2e-5)


def test_the_useful_share_counts_decode_steps_of_unfinished_rows(varied, cfg, tokens_PT):
    """All at once: sum of (length - 1) over rows times the longest row's decode steps."""
    length_B = varied.completion_mask_BT.sum(1)
    want = (length_B - 1).sum() / (len(length_B) * (length_B.max() - 1))
    np.testing.assert_allclose(varied.useful_B, want, rtol=1e-6)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(cfg))
    queued = run(
        zeros, cfg, np.repeat(tokens_PT[:1], P, 0), np.zeros(P, np.int32), num_completions=40,
        temperature=1.0, prompt_id_P=np.array([5, 6, 8, 7], np.uint32), slots=16,
    )  # fmt: skip
    np.testing.assert_array_equal(queued.tokens_BT, varied.tokens_BT)
    assert want < 0.85 < queued.useful_B[0]


@pytest.mark.parametrize("slots", [None, 5])
def test_layers_in_one_stack_change_no_sample(cfg, params, tokens_PT, drawn, monkeypatch, slots):
    """As on a TPU, where weights and caches of all layers lie in one array."""
    monkeypatch.setattr("gemma_cot.model.kernels.layout.platform", lambda: "tpu")
    jax.clear_caches()  # the platform is asked when a function is traced
    got = run(params, cfg, tokens_PT, START_P, slots=slots)
    jax.clear_caches()
    np.testing.assert_array_equal(got.tokens_BT, drawn.tokens_BT)
    np.testing.assert_allclose(got.logp_BT, drawn.logp_BT, atol=2e-5)


def test_tails_that_grow_change_no_sample(cfg, params, tokens_PT, drawn, monkeypatch):
    """12 tokens in loops of 4, 8, 12 columns; then a last step too short for its own loop."""
    for step in (4, 5, 8):
        monkeypatch.setattr(sample_module, "TAIL_STEP", step)
        sample.clear_cache()
        got = run(params, cfg, tokens_PT, START_P)
        np.testing.assert_array_equal(got.tokens_BT, drawn.tokens_BT)
        np.testing.assert_allclose(got.logp_BT, drawn.logp_BT, atol=2e-5)
    sample.clear_cache()
