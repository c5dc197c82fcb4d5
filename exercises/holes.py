"""Eight holes to fill; `pytest exercises` says which are right. Read README.md first."""


def group_advantages(reward_PG):
    """Return the advantages A [P, G] of P prompts with G completions each.

    A_pg = (r_pg - mean_p) / (std_p + 1e-4), mean and standard deviation over the G completions of
    prompt p, the standard deviation with G - 1 in the denominator. Where the rewards of a prompt
    differ by at most 1e-6 there is nothing to learn: A is exactly 0.
    """
    raise NotImplementedError


def token_weights(mask_BT, aggregation, max_completion_tokens):
    """Return the weight [B, T] of every token in the loss; 0 where mask_BT is False.

    With n_i completion tokens (True in mask_BT) in row i of B:
    "grpo"     1 / (B n_i)                      every completion counts the same
    "dapo"     1 / (n_1 + ... + n_B)            every token counts the same
    "dr_grpo"  1 / (B max_completion_tokens)    every token counts the same in every batch
    A row may have no completion token at all.
    """
    raise NotImplementedError


def clipped_objective(ratio_BT, advantage_B1, epsilon_low, epsilon_high):
    """Return what GRPO maximises [B, T].

    min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A), token by token.
    ratio_BT: rho = pi / pi_old of every token; advantage_B1: A of every row, [B, 1].
    """
    raise NotImplementedError


def k3(log_reference_ratio_BT):
    """Return the estimate e^d - d - 1 of KL(pi || pi_ref), from d = log pi_ref - log pi [B, T]."""
    raise NotImplementedError


def sliding_window_mask(start_B, num_positions, window):
    """Return mask_BTS: True where query position t may attend to key position s.

    A position sees `window` positions: itself and those just before it. Nothing sees the future,
    nothing sees the padding on the left, which is every position before start_B[b]. A row of 5
    with start 1 and window 2 (down: the query t, across: the key s):
        . . . . .
        . 1 . . .
        . 1 1 . .
        . . 1 1 .
        . . . 1 1
    """
    raise NotImplementedError


def lora_merge(w_DF, a_DR, b_RF, alpha):
    """Return W + (alpha / r) A B, r the rank, with the dtype of W."""
    raise NotImplementedError


def stop_token_mask(tokens_BT, stop_ids):
    """Return mask_BT: True on every token up to and including the row's first stop token.

    stop_ids: a tuple of token ids, each of which ends a completion (jax.numpy wants
    jnp.array(stop_ids)). A row without any is True throughout.
    """
    raise NotImplementedError


def process_reward(prompts, completions, *, metadata=None, **columns):
    """Return a score or None for every completion: 0.2 a checkpoint found, at most 1.0.

    metadata[i]["checkpoints"] is a list of texts. A checkpoint counts once, however often it is
    listed, when it stands in the reasoning block of completion i. No reasoning block: 0.0. No
    checkpoints to look for: None, which means "does not apply".
    `from gemma_cot.grpo.reward import split_blocks` gives (reasoning or None, answer or None).
    """
    raise NotImplementedError
