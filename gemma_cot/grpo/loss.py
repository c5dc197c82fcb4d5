"""GRPO in four functions on arrays: advantages, token weights, KL, loss. Imports nothing of ours.

Where this differs from GRPO as published (DeepSeekMath, arXiv:2402.03300, eq. 3 and 4), and why:
1. The KL term is multiplied by the probability ratio and differentiated through it ("ratio_k3").
   The paper's k3 alone has the gradient of the forward KL, and k1 has none in expectation.
2. Every normaliser (1/G, 1/|o_i|) is a weight per token, computed once on the whole batch, so that
   every later reduction is a plain sum and micro-batches cannot change the gradient.
3. A group whose rewards are equal has advantage exactly 0, not float noise divided by epsilon.
4. The log-ratio is clamped to +-20 and log pi_ref - log pi to +-10 before exp, and masked before
   exp, as inf * 0 is NaN.

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
    epsilon: float = 1e-4,
    tolerance: float = 1e-6,
) -> jax.Array:
    """Return float32 `advantage_PG` = (r - mean of the group) / (std + epsilon).

    DeepSeekMath (arXiv:2402.03300) section 4.1.2; std with G - 1 in the denominator. scale:
    "group", "batch" (one std over all valid rewards) or "none" (r - mean: Dr. GRPO, 2503.20783).
    valid_PG: False where a reward does not apply; such a completion is left out of mean and std and
    has advantage 0. A group whose valid rewards differ by at most `tolerance` has advantage 0.
    Raises ValueError for another scale.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: must be group, batch or none, got {scale!r}; set one of them")
    reward_PG = reward_PG.astype(jnp.float32)
    valid_PG = jnp.ones(reward_PG.shape, bool) if valid_PG is None else valid_PG
    reward_PG = jnp.where(valid_PG, reward_PG, 0.0)
    count_P1 = valid_PG.sum(axis=1, keepdims=True).astype(jnp.float32)
    mean_P1 = reward_PG.sum(axis=1, keepdims=True) / jnp.maximum(count_P1, 1.0)
    centred_PG = jnp.where(valid_PG, reward_PG - mean_P1, 0.0)
    if scale == "group":
        variance_P1 = jnp.square(centred_PG).sum(axis=1, keepdims=True)
        std = jnp.sqrt(variance_P1 / jnp.maximum(count_P1 - 1.0, 1.0))
        advantage_PG = centred_PG / (std + epsilon)
    elif scale == "batch":
        count = valid_PG.sum().astype(jnp.float32)
        mean = reward_PG.sum() / jnp.maximum(count, 1.0)
        squares = jnp.where(valid_PG, jnp.square(reward_PG - mean), 0.0).sum()
        advantage_PG = centred_PG / (jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0)) + epsilon)
    else:
        advantage_PG = centred_PG
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


def grpo_loss(
    logp_BT: jax.Array,
    logp_old_BT: jax.Array | None,
    logp_ref_BT: jax.Array | None,
    advantage_B: jax.Array,
    weight_BT: jax.Array,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    kl: str = "ratio_k3",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (loss, metrics) of some rows of a batch: plain sums, additive over rows.

    loss = sum_bt w_bt (-min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A) + beta kl),
    rho = pi / pi_old (DeepSeekMath eq. 3; clip-higher from DAPO, arXiv:2503.14476).
    logp_old_BT: None means pi_old = pi as it is now (on-policy), so that rho is 1 and only its
    gradient counts. logp_ref_BT may be None when beta is 0. Metrics: kl (k3) and clip_share as sums
    over tokens, ratio_max. Raises ValueError when beta has no reference.
    """
    if beta and logp_ref_BT is None:
        raise ValueError(f"beta: {beta} needs logp_ref_BT, got None; pass it or set beta to 0")
    in_loss_BT = weight_BT > 0
    old_BT = jax.lax.stop_gradient(logp_BT) if logp_old_BT is None else logp_old_BT
    log_ratio_BT = jnp.clip(logp_BT - old_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_BT = jnp.exp(jnp.where(in_loss_BT, log_ratio_BT, 0.0))
    clipped_BT = jnp.clip(ratio_BT, 1 - epsilon_low, 1 + epsilon_high)
    advantage_B1 = advantage_B[:, None]
    surrogate_BT = jnp.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
    per_token_BT = -surrogate_BT
    count = jnp.float32(0.0)
    if logp_ref_BT is not None:
        d_BT = jnp.clip(logp_ref_BT - logp_BT, -MAX_LOG_REFERENCE_RATIO, MAX_LOG_REFERENCE_RATIO)
        d_BT = jnp.where(in_loss_BT, d_BT, 0.0)
        per_token_BT = per_token_BT + beta * kl_per_token(d_BT, ratio_BT, kl)
        count = kl_per_token(d_BT, ratio_BT, "k3").sum()
    is_clipped_BT = in_loss_BT & (surrogate_BT < ratio_BT * advantage_B1)
    metrics = {
        "kl": count,
        "clip_share": is_clipped_BT.sum().astype(jnp.float32),
        "ratio_max": ratio_BT.max(),
    }
    return (weight_BT * per_token_BT).sum(), jax.lax.stop_gradient(metrics)
