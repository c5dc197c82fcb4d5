"""The bench catches planted bugs, and reports what a stranger's kernel does instead of raising."""

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import pytest

from gemma_cot.model.kernels import reference
from gemma_cot.model.kernels.gradients import logits_of
from gemma_cot.testing import OPERATIONS, check_kernel, report
from gemma_cot.testing import kernels as bench


def failed_cases(outcomes) -> set[str]:
    return {o.case for o in outcomes if not o.passed}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_passes_its_own_bench(name):
    outcomes = check_kernel(name, OPERATIONS[name].reference)
    assert not failed_cases(outcomes), report(outcomes)
    assert all(o.error < 1e-6 for o in outcomes if o.dtype == "float32")


def test_a_window_off_by_one_is_caught():
    def attention(q, k, v, start_B, window):
        return reference.prefill_attention(q, k, v, start_B, window and window + 1)

    caught = failed_cases(check_kernel("prefill_attention", attention, gradients=False))
    assert len(caught) == 4, "windows 5, 16, 1 and 200; 33 of 33 columns and None hide nothing"

    def decode(*arguments):
        arrays, (window, *began) = arguments[:7], arguments[7:]
        return reference.decode_attention(*arrays, window and window - 1, *began)

    assert len(failed_cases(check_kernel("decode_attention", decode))) == 3


def test_a_decode_kernel_that_takes_every_row_to_begin_at_clock_0_is_caught():
    def decode(*arguments):
        return reference.decode_attention(*arguments[:8])

    caught = failed_cases(check_kernel("decode_attention", decode))
    assert len(caught) == 2 and all("began" in case for case in caught)


def test_a_missing_temperature_and_a_missing_scale_are_caught():
    def forgets(x_CD, embed_VD, target_C, temperature):
        return reference.chosen_logprob(x_CD, embed_VD, target_C, 1.0)

    caught = failed_cases(check_kernel("chosen_logprob", forgets, gradients=False))
    assert len(caught) == 4, "all but the case of temperature 1"

    def scales_again(q, *rest):
        return reference.prefill_attention(q * q.shape[-1] ** -0.5, *rest)

    caught = failed_cases(check_kernel("prefill_attention", scales_again, gradients=False))
    assert len(caught) == 5, "with a window of 1 there is one key to see, whatever its score"


def test_a_mask_without_padding_is_caught():
    def attention(q, k, v, start_B, window):
        return reference.prefill_attention(q, k, v, jnp.zeros_like(start_B), window)

    caught = failed_cases(check_kernel("prefill_attention", attention, gradients=False))
    assert len(caught) == 5, "with a window of 1 padding is out of sight anyway"


def test_tiles_that_are_not_rescaled_are_caught_by_the_long_case():
    def tiled(x_CD, embed_VD, target_C, temperature):
        tiles = [embed_VD[i : i + 2048] for i in range(0, len(embed_VD), 2048)]
        logits = [logits_of(tile, x_CD) / temperature for tile in tiles]
        total_C = sum(jnp.exp(tile - tile.max(-1, keepdims=True)).sum(-1) for tile in logits)
        logits_CV = jnp.concatenate(logits, axis=-1)
        chosen_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]
        _, entropy_C = reference.chosen_logprob(x_CD, embed_VD, target_C, temperature)
        return chosen_C - logits_CV.max(-1) - jnp.log(total_C), entropy_C

    outcomes = check_kernel("chosen_logprob", tiled, gradients=False)
    assert {(o.case, o.what) for o in outcomes if not o.passed} == {
        ("C 5  D 16  V 4500  temperature 0.9", "value")
    }


def test_fewer_bits_than_the_reference_gives_are_caught_and_more_are_not():
    def narrow(*arguments):
        return tuple(x.astype(arguments[0].dtype) for x in reference.chosen_logprob(*arguments))

    failed = [o for o in check_kernel("chosen_logprob", narrow, gradients=False) if not o.passed]
    assert {o.dtype for o in failed} == {"bfloat16"} and len(failed) == 2 * 5
    assert {o.message for o in failed} == {"must be float32, got bfloat16"}

    def rounded(*arguments):  # float32 to look at, no better than bfloat16
        return tuple(x.astype("float32") for x in narrow(*arguments))

    failed = [o for o in check_kernel("chosen_logprob", rounded, gradients=False) if not o.passed]
    assert {(o.dtype, o.what) for o in failed} == {("bfloat16", "value"), ("bfloat16", "value 2")}

    def wide(*arguments):
        return reference.prefill_attention(*arguments).astype("float32")

    assert not failed_cases(check_kernel("prefill_attention", wide, gradients=False))


def test_cases_of_ones_own():
    case = dataclasses.replace(OPERATIONS["chosen_logprob"].cases[0], static=0.5)
    outcomes = check_kernel("chosen_logprob", reference.chosen_logprob, False, [case])
    assert [o.case for o in outcomes] == ["C 7  D 20  V 50  temperature 0.5"] * 4


def test_a_wrong_gradient_is_caught_though_the_value_is_right():
    def frozen(x_CD, embed_VD, target_C, temperature):
        x_CD = jax.lax.stop_gradient(x_CD)
        return reference.chosen_logprob(x_CD, embed_VD, target_C, temperature)

    outcomes = check_kernel("chosen_logprob", frozen)
    assert {o.what for o in outcomes if not o.passed} == {"d x_CD"}


def test_exceptions_shapes_and_nan_become_failed_rows():
    def raises(*_):
        raise RuntimeError("no such luck\nsecond line")

    def one_value(*arguments):
        return reference.chosen_logprob(*arguments)[0]

    def nan(*arguments):
        return reference.prefill_attention(*arguments) * jnp.nan

    outcomes = check_kernel("chosen_logprob", raises)
    assert {o.message for o in outcomes} == {"RuntimeError: no such luck"}
    assert "failed RuntimeError: no such luck" in report(outcomes)
    def whole_numbers(*arguments):
        return reference.prefill_attention(*arguments).astype("int32")

    outcomes = check_kernel("prefill_attention", whole_numbers, gradients=False)
    assert {o.message for o in outcomes} == {"must be floating, got int32"}
    outcomes = check_kernel("chosen_logprob", one_value, gradients=False)
    assert {o.what for o in outcomes if not o.passed} == {"value 2"}
    assert "must be (7,), got nothing" in report(outcomes)
    outcomes = check_kernel("prefill_attention", nan, gradients=False)
    assert {o.message for o in outcomes} == {"not finite everywhere"}


def test_an_unknown_operation_is_named():
    with pytest.raises(KeyError, match="prefill_attention, decode_attention, chosen_logprob"):
        check_kernel("softmax", jax.nn.softmax)


def test_the_example_in_the_docstring_runs():
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    (example,) = doctest.DocTestFinder(recurse=False).find(bench, "bench", globs={})
    assert runner.run(example) == (0, 5)
