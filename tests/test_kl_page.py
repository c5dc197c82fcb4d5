"""docs/kl.md says what experiments/kl.py measures today, and measures what it says it does."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "kl.md").read_text()
STORED = json.loads((ROOT / "docs" / "kl.json").read_text())


@pytest.fixture(scope="module")
def kl():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("kl_laboratory", ROOT / "experiments" / "kl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_and_the_plot_hold_the_stored_numbers(kl):
    assert kl.table(STORED, "on") in PAGE and kl.table(STORED, "off") in PAGE
    assert kl.draw(STORED) == (ROOT / "docs" / "kl.svg").read_text()
    left = {(row["place"], row["estimator"]): row["kl_left"] for row in STORED["rows"]}
    told = re.search(r"from a KL of (\d\.\d+) to (\d\.\d+) and\s(\d\.\d+)", PAGE)
    numbers = (STORED["kl"], left["reward", "k2"], left["reward", "k3"])
    assert told.groups() == tuple(f"{number:.3f}" for number in numbers)


def test_the_stored_numbers_are_measured_again(kl):
    """float32 sums of five terms: 1e-5; a hundred steps of descent let it grow to 1e-3."""
    fresh = kl.measure()
    np.testing.assert_allclose(fresh["true_gradient"], STORED["true_gradient"], atol=1e-5)
    assert fresh["kl"] == pytest.approx(STORED["kl"], abs=1e-5)
    for now, then in zip(fresh["rows"], STORED["rows"], strict=True):
        assert (now["place"], now["estimator"]) == (then["place"], then["estimator"])
        assert now["kl_left"] == pytest.approx(then["kl_left"], rel=1e-3, abs=1e-5)
        for policy in ("on", "off"):
            gradient = now[policy]["gradient"]
            np.testing.assert_allclose(gradient, then[policy]["gradient"], atol=1e-5)
            for number in ("error", "noise"):
                assert now[policy][number] == pytest.approx(then[policy][number], abs=1e-4)


def test_what_the_page_claims():
    error = {(row["place"], row["estimator"], policy): row[policy]["error"]
             for row in STORED["rows"] for policy in ("on", "off")}  # fmt: skip
    right = {row for row, value in error.items() if value < 1e-4}
    assert right == {("loss", "k2", "on"), ("loss", "ratio_k3", "on"), ("loss", "ratio_k3", "off"),
                     ("reward", "k1", "on")}  # fmt: skip
    (k1,) = (row for row in STORED["rows"] if (row["place"], row["estimator"]) == ("loss", "k1"))
    assert max(map(abs, k1["on"]["gradient"])) < 1e-6 and k1["on"]["noise"] > 0.5
    assert k1["kl_left"] == STORED["kl"]
    true_A = np.array(STORED["true_gradient"])
    assert np.dot(k1["off"]["gradient"], true_A) < 0  # "it even points away"


def test_k3_in_the_reward_is_the_difference_of_two_divergences(kl):
    """grad KL(pi || ref) - grad KL(ref || pi); the latter is pi - ref, by the logits."""
    theta_A = jnp.asarray(kl.POLICY)
    forward_A = kl.probabilities(theta_A) - kl.probabilities(kl.REFERENCE)
    gradient_A, _ = kl.expected_gradient(theta_A, theta_A, "reward", "k3")
    expected_A = jax.grad(kl.divergence)(theta_A) - forward_A
    np.testing.assert_allclose(gradient_A, expected_A, atol=1e-6)
    assert float(jnp.abs(forward_A).max()) > 0.1
