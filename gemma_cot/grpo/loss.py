"""GRPO and its family on arrays: advantages, token weights, objectives, KL, loss. Imports nothing
of ours. Which combination is which paper: docs/algorithms.md.

Where this differs from GRPO as published (DeepSeekMath, arXiv:2402.03300, eq. 3 and 4), and why:
1. The KL term is multiplied by the probability ratio and differentiated through it ("ratio_k3").
   The paper's k3 alone has the gradient of the forward KL, and k1 has none in expectation.
2. Every normaliser (1/G, 1/|o_i|) is a weight per token, computed once on the whole batch, so that
   every later reduction is a plain sum and micro-batches cannot change the gradient.
3. A group whose rewards are equal has advantage exactly 0, not float noise divided by epsilon.
4. The log-ratio is clamped to +-20 and log pi_ref - log pi to +-10 before exp, and masked before
   exp, as inf * 0 is NaN.
5. RLOO's paper samples anew for every update; where a rollout feeds several, its log pi(o_i) is
   the clipped ratio of the whole completion instead. On-policy the gradient is the same.

The stop token is part of the completion: it carries weight, advantage and KL like any other token.
"""

import jax
import jax.numpy as jnp

MAX_LOG_RATIO = 20.0
MAX_LOG_REFERENCE_RATIO = 10.0


def group_advantages(
    reward_PG: jax.Array,
    valid_PG: jax.Array | None = None,
    *,
    scale: str = "group",
    baseline: str = "mean",
    epsilon: float = 1e-4,
    tolerance: float = 1e-6,
) -> jax.Array:
    """Return float32 `advantage_PG` = (r - mean of the group) / (std + epsilon).

    DeepSeekMath (arXiv:2402.03300) section 4.1.2; std with G - 1 in the denominator. scale:
    "group", "batch" (one std over all valid rewards) or "none" (r - mean: Dr. GRPO, 2503.20783).
    baseline: "mean", or "leave_one_out", the mean of the others (RLOO, arXiv:2402.14740), which
    makes r - baseline G/(G - 1) times as large. valid_PG: False where a reward does not apply; such
    a completion is left out of mean and std and has advantage 0. A group whose valid rewards differ
    by at most `tolerance` has advantage 0. Raises ValueError for another scale or baseline.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: must be group, batch or none, got {scale!r}; set one of them")
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"baseline: must be mean or leave_one_out, got {baseline!r}; set one")
    reward_PG = reward_PG.astype(jnp.float32)
    valid_PG = jnp.ones(reward_PG.shape, bool) if valid_PG is None else valid_PG
    reward_PG = jnp.where(valid_PG, reward_PG, 0.0)
    count_P1 = valid_PG.sum(axis=1, keepdims=True).astype(jnp.float32)
    mean_P1 = reward_PG.sum(axis=1, keepdims=True) / jnp.maximum(count_P1, 1.0)
    centred_PG = jnp.where(valid_PG, reward_PG - mean_P1, 0.0)
    others_P1 = jnp.maximum(count_P1 - 1.0, 1.0)
    advantage_PG = centred_PG * (count_P1 / others_P1) if baseline != "mean" else centred_PG
    if scale == "group":
        variance_P1 = jnp.square(centred_PG).sum(axis=1, keepdims=True) / others_P1
        advantage_PG = advantage_PG / (jnp.sqrt(variance_P1) + epsilon)
    elif scale == "batch":
        count = valid_PG.sum().astype(jnp.float32)
        mean = reward_PG.sum() / jnp.maximum(count, 1.0)
        squares = jnp.where(valid_PG, jnp.square(reward_PG - mean), 0.0).sum()
        advantage_PG = advantage_PG / (jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0)) + epsilon)
    return jnp.where(has_signal(reward_PG, valid_PG, tolerance)[:, None], advantage_PG, 0.0)


def has_signal(reward_PG: jax.Array, valid_PG: jax.Array, tolerance: float = 1e-6) -> jax.Array:
    """Return `signal_P`: whether the valid rewards of a group differ by more than `tolerance`."""
    high_P = jnp.where(valid_PG, reward_PG, -jnp.inf).max(axis=1)
    low_P = jnp.where(valid_PG, reward_PG, jnp.inf).min(axis=1)
    return jnp.where(valid_PG.any(axis=1), high_P > low_P + tolerance, False)


def token_weights(
    mask_BT: jax.Array, aggregation: str = "grpo", max_completion_tokens: int | None = None
) -> jax.Array:
    """Return float32 `weight_BT` of the whole optimiser batch, 0 outside `mask_BT`.

    With n_i completion tokens in row i of B: "grpo" 1/(B n_i) (mean of sequence means,
    arXiv:2402.03300), "dapo" 1/sum n (token mean, DAPO, arXiv:2503.14476), "dr_grpo"
    1/(B max_completion_tokens) (arXiv:2503.20783). Raises ValueError for another name, or when
    dr_grpo is not told its constant.
    """
    mask_BT = mask_BT.astype(jnp.float32)
    B = mask_BT.shape[0]
    n_B1 = mask_BT.sum(axis=1, keepdims=True)
    if aggregation == "grpo":
        return mask_BT / (B * jnp.maximum(n_B1, 1.0))
    if aggregation == "dapo":
        return mask_BT / jnp.maximum(n_B1.sum(), 1.0)
    if aggregation == "dr_grpo" and max_completion_tokens:
        return mask_BT / (B * max_completion_tokens)
    raise ValueError(
        "aggregation: must be grpo, dapo, or dr_grpo with max_completion_tokens, got "
        f"{aggregation!r} with {max_completion_tokens}; set one of them"
    )


def clipped_objective(
    ratio_BT: jax.Array, advantage_B1: jax.Array, epsilon_low: float, epsilon_high: float
) -> jax.Array:
    """Return min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A), DeepSeekMath eq. 3; two
    bounds: DAPO's clip-higher (arXiv:2503.14476)."""
    clipped_BT = jnp.clip(ratio_BT, 1 - epsilon_low, 1 + epsilon_high)
    return jnp.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)


def grpo_objective(log_ratio_BT, logp_BT, n_B1, advantage_B1, epsilon_low, epsilon_high):
    """Clip the ratio of every token, rho_it = pi(o_it) / pi_old(o_it): GRPO, Dr. GRPO, DAPO.

    This and the next three return (what is maximised, the ratio, whether it was clipped), all BT.
    """
    ratio_BT = jnp.exp(log_ratio_BT)
    objective_BT = clipped_objective(ratio_BT, advantage_B1, epsilon_low, epsilon_high)
    return objective_BT, ratio_BT, objective_BT < ratio_BT * advantage_B1


def gspo_objective(log_ratio_BT, logp_BT, n_B1, *rest):
    """Clip the geometric mean of the ratios of a completion, the same for each of its tokens:
    s_i = (pi(o_i) / pi_old(o_i))^(1/n_i). GSPO (arXiv:2507.18071) eq. 5 and 7."""
    mean_B1 = log_ratio_BT.sum(axis=1, keepdims=True) / n_B1
    return grpo_objective(jnp.broadcast_to(mean_B1, log_ratio_BT.shape), logp_BT, n_B1, *rest)


def rloo_objective(log_ratio_BT, logp_BT, n_B1, *rest):
    """Clip the ratio of the whole completion as one action, pi(o_i) / pi_old(o_i): its gradient
    on-policy is A_i grad log pi(o_i), REINFORCE's. RLOO (arXiv:2402.14740)."""
    sum_B1 = log_ratio_BT.sum(axis=1, keepdims=True)
    sum_B1 = jnp.clip(sum_B1, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return grpo_objective(jnp.broadcast_to(sum_B1, log_ratio_BT.shape), logp_BT, n_B1, *rest)


def cispo_objective(log_ratio_BT, logp_BT, n_B1, advantage_B1, epsilon_low, epsilon_high):
    """Clip the weight and not the update: sg(min(rho, 1 + epsilon_high)) A log pi, so that every
    token keeps a gradient. CISPO (MiniMax-M1, arXiv:2506.13585) eq. 4 and 5, no lower bound."""
    ratio_BT = jnp.exp(log_ratio_BT)
    kept_BT = jax.lax.stop_gradient(jnp.minimum(ratio_BT, 1 + epsilon_high))
    return kept_BT * advantage_B1 * logp_BT, ratio_BT, ratio_BT > 1 + epsilon_high


OBJECTIVES = dict(
    grpo=grpo_objective, gspo=gspo_objective, cispo=cispo_objective, rloo=rloo_objective
)


def kl_per_token(
    log_reference_ratio_BT: jax.Array, ratio_BT: jax.Array, kind: str = "ratio_k3"
) -> jax.Array:
    """Return an estimate of KL(pi || pi_ref) per token from d = log pi_ref - log pi.

    Schulman 2020, "Approximating KL divergence": k1 = -d, k2 = d^2/2, k3 = e^d - d - 1;
    "ratio_k3" is pi/pi_old * k3. On samples of pi_old the expected gradient of ratio_k3 is that of
    KL(pi || pi_ref) exactly; on-policy that of k2 is too, that of k3 is the forward KL's, and that
    of k1 is 0. Raises ValueError for another kind.
    """
    d = log_reference_ratio_BT
    if kind == "k1":
        return -d
    if kind == "k2":
        return jnp.square(d) / 2
    k3 = jnp.expm1(d) - d
    if kind == "k3":
        return k3
    if kind == "ratio_k3":
        return ratio_BT * k3
    raise ValueError(f"kl: must be k1, k2, k3 or ratio_k3, got {kind!r}; set one of them")


def kl_penalty(
    logp_old: jax.Array, logp_ref: jax.Array, in_loss: jax.Array, kind: str = "k1"
) -> jax.Array:
    """Return KL_i, the sum of a completion's KL estimates; arrays [..., T] -> [...].

    r_i - beta KL_i is the KL in the reward (Ziegler et al. 2019, arXiv:1909.08593; so in RLOO).
    There the expected gradient of k1 is that of KL(pi || pi_ref); of k2 and k3 it is not.
    """
    d = jnp.clip(logp_ref - logp_old, -MAX_LOG_REFERENCE_RATIO, MAX_LOG_REFERENCE_RATIO)
    d = jnp.where(in_loss, d, 0.0)
    return kl_per_token(d, jnp.ones_like(d), kind).sum(axis=-1)


@jax.named_scope("grpo_loss")
def grpo_loss(
    logp_BT: jax.Array,
    logp_old_BT: jax.Array | None,
    logp_ref_BT: jax.Array | None,
    advantage_B: jax.Array,
    weight_BT: jax.Array,
    *,
    objective: str = "grpo",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    kl: str = "ratio_k3",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (loss, metrics) of some rows of a batch: plain sums, additive over rows.

    loss = sum_bt w_bt (-objective_bt + beta kl_bt), the objective one of OBJECTIVES; GRPO's is
    min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A), rho = pi / pi_old.
    logp_old_BT: None means pi_old = pi as it is now (on-policy), so that rho is 1 and only its
    gradient counts. logp_ref_BT may be None when beta is 0. Metrics: clip_share and, with a
    reference, kl (k3) as sums over tokens; ratio_max. Raises ValueError when beta has no reference,
    for another objective.
    """
    if beta and logp_ref_BT is None:
        raise ValueError(f"beta: {beta} needs logp_ref_BT, got None; pass it or set beta to 0")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    in_loss_BT = weight_BT > 0
    old_BT = jax.lax.stop_gradient(logp_BT) if logp_old_BT is None else logp_old_BT
    log_ratio_BT = jnp.clip(logp_BT - old_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_ratio_BT = jnp.where(in_loss_BT, log_ratio_BT, 0.0)
    n_B1 = jnp.maximum(in_loss_BT.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
    objective_BT, ratio_BT, clipped_BT = OBJECTIVES[objective](
        log_ratio_BT, jnp.where(in_loss_BT, logp_BT, 0.0), n_B1, advantage_B[:, None],
        epsilon_low, epsilon_high,
    )  # fmt: skip
    per_token_BT = -objective_BT
    metrics = {
        "clip_share": (in_loss_BT & clipped_BT).sum().astype(jnp.float32),
        "ratio_max": ratio_BT.max(),
    }
    if logp_ref_BT is not None:
        d_BT = jnp.clip(logp_ref_BT - logp_BT, -MAX_LOG_REFERENCE_RATIO, MAX_LOG_REFERENCE_RATIO)
        d_BT = jnp.where(in_loss_BT, d_BT, 0.0)
        token_ratio_BT = jnp.exp(log_ratio_BT)
        per_token_BT = per_token_BT + beta * kl_per_token(d_BT, token_ratio_BT, kl)
        metrics["kl"] = kl_per_token(d_BT, token_ratio_BT, "k3").sum()
    return (weight_BT * per_token_BT).sum(), jax.lax.stop_gradient(metrics)
