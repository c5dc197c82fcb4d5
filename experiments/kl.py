"""KL laboratory: the expected gradient of every estimator in every place, summed over all actions.

    python experiments/kl.py        # seconds on a CPU; writes docs/kl.json and docs/kl.svg

A policy of five actions is small enough to enumerate: an expectation is a sum of five terms, each
computed by the trainer's own `grpo_loss` and `kl_penalty`. docs/kl.md discusses the numbers.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gemma_cot.grpo.loss import grpo_loss, kl_penalty

DOCS = Path(__file__).parents[1] / "docs"
# Logits of the policy, of the one that sampled (off-policy), and of the reference.
POLICY = np.array([0.3, -1.0, 0.8, 0.0, -0.4], np.float32)
OLD = np.array([0.1, -0.6, 0.5, 0.2, -0.9], np.float32)
REFERENCE = np.array([-0.5, 0.4, 0.2, 0.9, -0.7], np.float32)
ROWS = [("loss", "k1"), ("loss", "k2"), ("loss", "k3"), ("loss", "ratio_k3"),
        ("reward", "k1"), ("reward", "k2"), ("reward", "k3")]  # fmt: skip
STEPS, RATE = 100, 1.0
RIGHT = 1e-4  # an error below it is float32 noise


def probabilities(theta_A):
    """Return pi of every action."""
    return jax.nn.softmax(jnp.asarray(theta_A))


def divergence(theta_A):
    """Return KL(pi || pi_ref) = sum_a pi(a) log(pi(a) / pi_ref(a))."""
    log_ratio_A = jax.nn.log_softmax(theta_A) - jax.nn.log_softmax(jnp.asarray(REFERENCE))
    return (probabilities(theta_A) * log_ratio_A).sum()


def gradients_by_action(theta_A, old_A, place: str, kind: str):
    """Return `gradient_AA`: for each action, had it been sampled, the gradient of the KL term.

    place "loss": beta 1 times the estimate. "reward": minus the estimate is the reward; less its
    mean (what a large group subtracts) it is the advantage. No ratio is clipped.
    """
    A = len(theta_A)
    old_BT = jax.nn.log_softmax(old_A)[:, None]
    ref_BT = jax.nn.log_softmax(jnp.asarray(REFERENCE))[:, None]
    advantage_A = jnp.zeros(A)
    if place == "reward":
        reward_A = -kl_penalty(old_BT, ref_BT, jnp.ones((A, 1), bool), kind)
        advantage_A = reward_A - (probabilities(old_A) * reward_A).sum()

    def losses(theta_A):
        logp_BT = jax.nn.log_softmax(theta_A)[:, None]
        given = logp_BT, old_BT, ref_BT, advantage_A
        one = partial(grpo_loss, epsilon_low=1.0, epsilon_high=1e6,
                      beta=float(place == "loss"), kl=kind)  # fmt: skip
        return jax.vmap(lambda weight_A: one(*given, weight_A[:, None])[0])(jnp.eye(A))

    return jax.jacobian(losses)(theta_A)


@partial(jax.jit, static_argnames=("place", "kind"))
def expected_gradient(theta_A, old_A, place: str, kind: str):
    """Return (the expected gradient on samples of pi_old, its noise).

    Noise: the root of the expected squared distance of one sample's gradient from it.
    """
    gradient_AA = gradients_by_action(theta_A, old_A, place, kind)
    p_A = probabilities(old_A)
    mean_A = p_A @ gradient_AA
    return mean_A, jnp.sqrt((p_A * jnp.square(gradient_AA - mean_A[None]).sum(axis=1)).sum())


def descend(place: str, kind: str) -> float:
    """Return the KL left after STEPS steps of on-policy descent along the expected gradient."""
    theta_A = jnp.asarray(POLICY)
    for _ in range(STEPS):
        theta_A = theta_A - RATE * expected_gradient(theta_A, theta_A, place, kind)[0]
    return float(divergence(theta_A))


def measure() -> dict:
    """Return every number of the page."""
    theta_A = jnp.asarray(POLICY)
    true_A = np.asarray(jax.grad(divergence)(theta_A))
    rows = []
    for place, kind in ROWS:
        row = {"place": place, "estimator": kind, "kl_left": round(descend(place, kind), 6)}
        for policy, old_A in (("on", POLICY), ("off", OLD)):
            mean_A, noise = expected_gradient(theta_A, old_A, place, kind)
            error = np.linalg.norm(np.asarray(mean_A) - true_A) / np.linalg.norm(true_A)
            row[policy] = {
                "gradient": [round(float(x), 6) for x in mean_A],
                "error": round(float(error), 6),
                "noise": round(float(noise), 6),
            }
        rows.append(row)
    return {
        "kl": round(float(divergence(theta_A)), 6),
        "true_gradient": [round(float(x), 6) for x in true_A],
        "rows": rows,
    }


def table(result: dict, policy: str) -> str:
    """Return the table of docs/kl.md, "on" or "off" policy."""
    left = " KL left |" if policy == "on" else ""
    lines = [
        f"| where | estimator | expected gradient by θ₁ … θ₅ | error | noise |{left}",
        "|---|---|---|---|---|" + "---|" * (policy == "on"),
        f"| | the true one | {_numbers(result['true_gradient'])} | | |{' |' * (policy == 'on')}",
    ]
    for row in result["rows"]:
        one = row[policy]
        error = "0" if one["error"] < RIGHT else f"{100 * one['error']:.0f} %"
        left = f" {abs(row['kl_left']):.3f} |" if policy == "on" else ""
        lines.append(f"| {row['place']} | `{row['estimator']}` | {_numbers(one['gradient'])} | "
                     f"{error} | {one['noise']:.2f} |{left}")  # fmt: skip
    return "\n".join(lines)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value + 0.0:+.3f}".replace("-", "−") for value in values)


def draw(result: dict) -> str:
    """Return the plot: the true gradient in grey, beside it each expected one, blue where equal."""
    width, high, left, top = 300, 62, 110, 56
    parts = [_text(left + i * width, 40, text) for i, text in
             enumerate(("samples of the policy itself", "samples of an older policy"))]  # fmt: skip
    for i, row in enumerate(result["rows"]):
        middle = top + high * i + high / 2
        parts.append(_text(12, middle + 4, f"{row['estimator']} in the {row['place']}"))
        for j, policy in enumerate(("on", "off")):
            colour = "#0072b2" if row[policy]["error"] < RIGHT else "#d55e00"
            x = left + 30 + j * width
            parts.append(f'<path d="M{x} {middle:.1f}h{width - 60}" stroke="#888888"/>')
            pairs = zip(result["true_gradient"], row[policy]["gradient"], strict=True)
            for k, pair in enumerate(pairs):
                for shift, value, fill in zip((0, 15), pair, ("#bbbbbb", colour), strict=True):
                    size = 90 * abs(value)
                    y = middle - size if value > 0 else middle
                    parts.append(f'<rect x="{x + 6 + 47 * k + shift}" y="{y:.1f}" width="14" '
                                 f'height="{size:.1f}" fill="{fill}"/>')  # fmt: skip
    wide, tall = left + 2 * width, top + high * len(result["rows"]) + 10
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" width="{wide}" '
            f'height="{tall}" font-family="Helvetica, Arial, sans-serif" font-size="11">\n'
            "<title>Expected gradients of KL estimators</title>\n"
            f'<rect width="{wide}" height="{tall}" fill="#ffffff"/>\n')  # fmt: skip
    title = _text(12, 20, "Expected gradient by θ₁ … θ₅. Grey: of KL(π‖π_ref). Blue: equal to it; "
                          "orange: not.")  # fmt: skip
    return head + "\n".join([title, *parts]) + "\n</svg>\n"


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x}" y="{y:.1f}">{text}</text>'


def main() -> None:
    """Measure, write docs/kl.json and docs/kl.svg, print the tables."""
    result = measure()
    (DOCS / "kl.json").write_text(json.dumps(result, indent=1) + "\n")
    (DOCS / "kl.svg").write_text(draw(result), encoding="utf-8")
    sys.stdout.write(table(result, "on") + "\n\n" + table(result, "off") + "\n")


if __name__ == "__main__":
    main()
