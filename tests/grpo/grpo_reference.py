"""NumPy twins of grpo/loss: plain loops in float64, written from the papers, without our code.

DeepSeekMath (arXiv:2402.03300) eq. 3 and 4, DAPO (arXiv:2503.14476), Dr. GRPO (arXiv:2503.20783),
Schulman 2020 "Approximating KL divergence". No mask arithmetic: what is not there is not visited.
"""

import math

import numpy as np


def reference_advantages(reward_PG, valid_PG, scale: str, epsilon: float) -> np.ndarray:
    """Return (r - mean of the group) / (std + epsilon), std with n - 1; 0 where nothing differs."""
    reward_PG = np.asarray(reward_PG, np.float64)
    advantage_PG = np.zeros_like(reward_PG)
    everything = [r for row, ok in zip(reward_PG, valid_PG, strict=True) for r in row[ok]]
    for p, (row, ok) in enumerate(zip(reward_PG, valid_PG, strict=True)):
        group = list(row[ok])
        if not group or max(group) - min(group) <= 1e-6:
            continue
        mean = math.fsum(group) / len(group)
        divisor = {
            "group": sample_std(group) + epsilon,
            "batch": sample_std(everything) + epsilon,
            "none": 1.0,
        }[scale]
        for g in np.flatnonzero(ok):
            advantage_PG[p, g] = (row[g] - mean) / divisor
    return advantage_PG


def sample_std(values: list[float]) -> float:
    """Return the standard deviation with n - 1 in the denominator, 0 for a single value."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))


def reference_weights(mask_BT, aggregation: str, max_completion_tokens: int) -> np.ndarray:
    """Return the weight of every completion token; one token at a time."""
    mask_BT = np.asarray(mask_BT, bool)
    weight_BT = np.zeros(mask_BT.shape)
    B = len(mask_BT)
    for b, t in np.argwhere(mask_BT):
        weight_BT[b, t] = {
            "grpo": 1.0 / (B * int(mask_BT[b].sum())),
            "dapo": 1.0 / int(mask_BT.sum()),
            "dr_grpo": 1.0 / (B * max_completion_tokens),
        }[aggregation]
    return weight_BT


def reference_kl(log_ref: float, logp: float, ratio: float, kind: str) -> float:
    """Return one token's KL estimate; d = log pi_ref - log pi."""
    d = log_ref - logp
    k3 = math.exp(d) - d - 1.0
    return {"k1": -d, "k2": d * d / 2.0, "k3": k3, "ratio_k3": ratio * k3}[kind]


def reference_loss(
    logp_BT, old_BT, ref_BT, advantage_B, weight_BT, epsilon_low, epsilon_high, beta, kind
) -> float:
    """Return sum_bt w_bt (-min(rho A, clip(rho) A) + beta kl), token by token."""
    total = 0.0
    for b, t in np.argwhere(np.asarray(weight_BT) > 0):
        A = float(advantage_B[b])
        ratio = math.exp(float(logp_BT[b, t]) - float(old_BT[b, t]))
        clipped = min(max(ratio, 1.0 - epsilon_low), 1.0 + epsilon_high)
        token = -min(ratio * A, clipped * A)
        if beta:
            token += beta * reference_kl(float(ref_BT[b, t]), float(logp_BT[b, t]), ratio, kind)
        total += float(weight_BT[b, t]) * token
    return total


def reference_gradient(logp_BT, *arguments) -> np.ndarray:
    """Return d reference_loss / d logp_BT by central differences.

    Step h = 1e-6 in float64: truncation h^2 and cancellation 1e-16 / h are both near 1e-10.
    """
    logp_BT = np.array(logp_BT, np.float64)
    gradient_BT = np.zeros_like(logp_BT)
    for at in np.ndindex(logp_BT.shape):
        values = []
        for h in (1e-6, -1e-6):
            moved_BT = logp_BT.copy()
            moved_BT[at] += h
            values.append(reference_loss(moved_BT, *arguments))
        gradient_BT[at] = (values[0] - values[1]) / 2e-6
    return gradient_BT
