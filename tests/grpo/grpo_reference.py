"""NumPy twins of grpo/loss: plain loops in float64, written from the papers, without our code.

DeepSeekMath (arXiv:2402.03300) eq. 3 and 4, DAPO (arXiv:2503.14476), Dr. GRPO (arXiv:2503.20783),
GSPO (arXiv:2507.18071) eq. 5 and 7, MiniMax-M1 (arXiv:2506.13585) eq. 4 and 5, RLOO
(arXiv:2402.14740), Schulman 2020 "Approximating KL divergence". No mask arithmetic: what is not
there is not visited.
"""

import math

import numpy as np


def reference_advantages(
    reward_PG, valid_PG, scale: str, epsilon: float, baseline: str = "mean"
) -> np.ndarray:
    """Return (r - baseline) / (std + epsilon), std with n - 1; 0 where nothing differs.

    baseline: the mean of the group, or of the group's other rewards.
    """
    reward_PG = np.asarray(reward_PG, np.float64)
    advantage_PG = np.zeros_like(reward_PG)
    everything = [r for row, ok in zip(reward_PG, valid_PG, strict=True) for r in row[ok]]
    for p, (row, ok) in enumerate(zip(reward_PG, valid_PG, strict=True)):
        group = list(row[ok])
        if not group or max(group) - min(group) <= 1e-6:
            continue
        divisor = {
            "group": sample_std(group) + epsilon,
            "batch": sample_std(everything) + epsilon,
            "none": 1.0,
        }[scale]
        for g in np.flatnonzero(ok):
            left_out = g if baseline == "leave_one_out" else None
            rest = [row[other] for other in np.flatnonzero(ok) if other != left_out]
            advantage_PG[p, g] = (row[g] - math.fsum(rest) / len(rest)) / divisor
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


def reference_kl_penalty(old_BT, ref_BT, mask_BT, kind: str) -> np.ndarray:
    """Return the sum of the KL estimates of every completion's tokens, taken at the rollout."""
    penalty_B = np.zeros(len(mask_BT))
    for b, t in np.argwhere(mask_BT):
        penalty_B[b] += reference_kl(float(ref_BT[b, t]), float(old_BT[b, t]), 1.0, kind)
    return penalty_B


def reference_objective(kind: str, ratios, logps, frozen_ratios, A: float, low, high) -> list:
    """Return what each token of one completion adds to the objective; lists over its tokens.

    frozen_ratios: where a stop-gradient stands, the ratios as they were before logps moved.
    """
    if kind == "cispo":
        return [min(w, 1.0 + high) * A * x for w, x in zip(frozen_ratios, logps, strict=True)]
    product = math.prod(ratios)
    ratios = {
        "grpo": ratios,
        "gspo": [product ** (1.0 / len(ratios))] * len(ratios),
        "rloo": [product] * len(ratios),
    }[kind]
    clipped = [min(max(ratio, 1.0 - low), 1.0 + high) for ratio in ratios]
    return [min(ratio * A, kept * A) for ratio, kept in zip(ratios, clipped, strict=True)]


def reference_loss(
    logp_BT, old_BT, ref_BT, advantage_B, weight_BT, epsilon_low, epsilon_high, beta, kind,
    objective="grpo", frozen_BT=None,
) -> float:  # fmt: skip
    """Return sum_bt w_bt (-objective + beta kl), row by row and token by token.

    frozen_BT: the log-probs that stop-gradients see, logp_BT by default.
    """
    logp_BT, old_BT = np.asarray(logp_BT, np.float64), np.asarray(old_BT, np.float64)
    frozen_BT = logp_BT if frozen_BT is None else np.asarray(frozen_BT, np.float64)
    total = 0.0
    for b, weight_T in enumerate(np.asarray(weight_BT, np.float64)):
        places = np.flatnonzero(weight_T > 0)
        if len(places) == 0:
            continue
        ratios = [math.exp(logp_BT[b, t] - old_BT[b, t]) for t in places]
        frozen = [math.exp(frozen_BT[b, t] - old_BT[b, t]) for t in places]
        logps = [logp_BT[b, t] for t in places]
        A = float(advantage_B[b])
        terms = reference_objective(objective, ratios, logps, frozen, A, epsilon_low, epsilon_high)
        for t, ratio, term in zip(places, ratios, terms, strict=True):
            kl = reference_kl(float(ref_BT[b, t]), logp_BT[b, t], ratio, kind) if beta else 0.0
            total += weight_T[t] * (beta * kl - term)
    return total


def reference_gradient(logp_BT, *arguments, **options) -> np.ndarray:
    """Return d reference_loss / d logp_BT by central differences.

    Step h = 1e-6 in float64: truncation h^2 and cancellation 1e-16 / h are both near 1e-10.
    """
    logp_BT = np.array(logp_BT, np.float64)
    options["frozen_BT"] = logp_BT.copy()
    gradient_BT = np.zeros_like(logp_BT)
    for at in np.ndindex(logp_BT.shape):
        values = []
        for h in (1e-6, -1e-6):
            moved_BT = logp_BT.copy()
            moved_BT[at] += h
            values.append(reference_loss(moved_BT, *arguments, **options))
        gradient_BT[at] = (values[0] - values[1]) / 2e-6
    return gradient_BT
