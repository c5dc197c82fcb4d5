"""The bench catches planted bugs, and reports what a stranger's kernel does instead of raising."""

import doctest

import jax
import jax.numpy as jnp
import pytest

from gemma_cot.model.kernels import reference
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
    assert len(caught) == 3, "windows 5, 16 and 1; 33 of 33 columns and None hide nothing"

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
    assert len(caught) == 3, "all but the case of temperature 1"

    def scales_again(q, *rest):
        return reference.prefill_attention(q * q.shape[-1] ** -0.5, *rest)

    caught = failed_cases(check_kernel("prefill_attention", scales_again, gradients=False))
    assert len(caught) == 4, "with a window of 1 there is one key to see, whatever its score"


def test_a_mask_without_padding_is_caught():
    def attention(q, k, v, start_B, window):
        return reference.prefill_attention(q, k, v, jnp.zeros_like(start_B), window)

    caught = failed_cases(check_kernel("prefill_attention", attention, gradients=False))
    assert len(caught) == 4, "with a window of 1 padding is out of sight anyway"


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
