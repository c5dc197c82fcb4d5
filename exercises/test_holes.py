"""`pytest exercises`: is each hole filled rightly, and if not, which usual mistake is it?"""

import traceback

import holes
import numpy as np
import pytest

CLOSE = dict(rtol=1e-4, atol=1e-6)


def tell(name: str, message: str):
    """Fail with one message and no traceback."""
    pytest.fail(f"{name}: {message}", pytrace=False)


def ask(name: str, *arguments, **columns):
    """Return what the hole answers."""
    try:
        return getattr(holes, name)(*arguments, **columns)
    except NotImplementedError:
        problem = "the hole is empty; fill it in exercises/holes.py"
    except Exception as error:
        calls = traceback.extract_tb(error.__traceback__)
        own = [call for call in calls if call.filename == holes.__file__] or calls
        problem = f"line {own[-1].lineno} of exercises/holes.py: {type(error).__name__}: {error}"
        if "broadcast" in str(error):
            problem += ". With keepdims=True a mean or sum keeps its axis, with size 1."
    return tell(name, problem)


def compare(name: str, got, want, mistakes: dict[str, object], hint: str) -> None:
    """Fail unless got is want. mistakes: what to say -> the array that one gets by it."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        tell(name, f"the answer must have the shape {want.shape}, got {got.shape}. {hint}")
    if np.allclose(got, want, **CLOSE):
        return
    for message, wrong in mistakes.items():
        if np.allclose(got, np.asarray(wrong, np.float64), **CLOSE):
            tell(name, message)
    if np.isnan(got).any():
        tell(name, f"not a number at {np.argwhere(np.isnan(got)).tolist()}. {hint}")
    tell(name, f"{hint}\nwanted\n{want}\ngot\n{got}")


# ---- group advantages ---------------------------------------------------------------------------

REWARD_PG = np.array([[0.0, 1.0, 0.0, 0.0], [2.0, 0.0, 1.0, 3.0]], np.float32)


def test_group_advantages():
    mean, std = REWARD_PG.mean(axis=1, keepdims=True), REWARD_PG.std(axis=1, ddof=1, keepdims=True)
    compare(
        "group_advantages", ask("group_advantages", REWARD_PG), (REWARD_PG - mean) / (std + 1e-4),
        {
            "the standard deviation has G in the denominator; with G - 1 (ddof=1) one right "
            "completion of four gets +1.5, with G it gets +1.73. At G = 4 every step would be 15 % "
            "larger.": (REWARD_PG - mean) / (REWARD_PG.std(axis=1, keepdims=True) + 1e-4),
            "the 1e-4 in the denominator is missing: add it to the standard deviation.":
                (REWARD_PG - mean) / std,
            "the standard deviation has G in the denominator, and the 1e-4 is missing: use G - 1 "
            "(ddof=1), then add 1e-4.": (REWARD_PG - mean) / REWARD_PG.std(axis=1, keepdims=True),
            "you divide by the standard deviation of the whole batch; GRPO takes each group's own, "
            "so that an easy prompt and a hard one weigh the same.":
                (REWARD_PG - mean) / (REWARD_PG.std(ddof=1) + 1e-4),
            "mean and standard deviation run over the whole batch; a completion competes with its "
            "own group only: take them along the last axis.":
                (REWARD_PG - REWARD_PG.mean()) / (REWARD_PG.std(ddof=1) + 1e-4),
            "the division by the standard deviation is missing (that is Dr. GRPO's advantage).":
                REWARD_PG - mean,
            "mean and standard deviation run over the whole batch, and the latter not with G - 1; "
            "a completion competes with its own group only: axis=1, ddof=1.":
                (REWARD_PG - REWARD_PG.mean()) / (REWARD_PG.std() + 1e-4),
            "mean and standard deviation run over prompts; a group is a row: use axis=1.":
                (REWARD_PG - REWARD_PG.mean(axis=0)) / (REWARD_PG.std(axis=0, ddof=1) + 1e-4),
        },
        "A = (r - mean of the row) / (std of the row + 1e-4).",
    )  # fmt: skip


def test_group_advantages_of_equal_rewards():
    noise = np.nextafter(np.float32(0.3), np.float32(1))  # the next number, 3e-8 above
    reward_PG = np.array([[1.0, 1.0, 1.0], [0.3, noise, 0.3]], np.float32)
    got = np.asarray(ask("group_advantages", reward_PG), np.float64)
    if np.isnan(got).any():
        tell("group_advantages", "0 / 0 in a group whose rewards are equal: one NaN and the whole "
             "model is NaN. Such a group has advantage 0.")  # fmt: skip
    if (got != 0).any():
        tell("group_advantages", "a group whose rewards are equal up to float noise (1e-6) must "
             f"give exactly 0, got {np.abs(got).max():.1e}. Divided by a tiny std, noise becomes a "
             "training signal.")  # fmt: skip


# ---- token weights ------------------------------------------------------------------------------

MASK_BT = np.array([[0, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]], bool)
N_B1 = MASK_BT.sum(axis=1, keepdims=True)
L_MAX = 8


def weights_of(aggregation: str):
    return ask("token_weights", MASK_BT, aggregation, L_MAX)


def test_token_weights_grpo():
    n_B1 = np.maximum(N_B1, 1)
    compare(
        "token_weights", weights_of("grpo"), MASK_BT / (4 * n_B1),
        {
            "you divide each row by the longest possible (or the padded) length; GRPO's 1/n_i is "
            "the completion's own length. Yours makes long completions weigh more.":
                MASK_BT / (4 * MASK_BT.shape[1]),
            "you divide each row by max_completion_tokens; that is Dr. GRPO.":
                MASK_BT / (4 * L_MAX),
            "the 1/B is missing: the gradient would grow with the batch.": MASK_BT / n_B1,
            "rows without a completion token are left out of B; B counts all rows.":
                MASK_BT / (3 * n_B1),
        },
        "\"grpo\": 1 / (B n_i) on the n_i tokens of row i; a row without tokens has weights 0, "
        "so do not divide by 0.",
    )  # fmt: skip


def test_token_weights_dapo():
    compare(
        "token_weights", weights_of("dapo"), MASK_BT / MASK_BT.sum(),
        {
            "that is the mean of the completions' means (GRPO); the token mean has one divisor for "
            "all: the number of completion tokens in the batch.":
                MASK_BT / (4 * np.maximum(N_B1, 1)),
            "padding is counted too: the divisor is the number of completion tokens, not of "
            "columns times rows.": MASK_BT / MASK_BT.size,
        },
        "\"dapo\": 1 / (sum of all n_i), the same for every completion token of the batch.",
    )  # fmt: skip


def test_token_weights_dr_grpo():
    compare(
        "token_weights", weights_of("dr_grpo"), MASK_BT / (4 * L_MAX),
        {
            "you divide by the longest completion of this batch; the point of Dr. GRPO is a "
            "constant: max_completion_tokens.": MASK_BT / (4 * N_B1.max()),
            "you divide by the columns of this batch; the point of Dr. GRPO is a constant: "
            "max_completion_tokens.": MASK_BT / (4 * MASK_BT.shape[1]),
            "the 1/B is missing.": MASK_BT / L_MAX,
        },
        "\"dr_grpo\": 1 / (B max_completion_tokens) on every completion token.",
    )  # fmt: skip


# ---- clipped objective --------------------------------------------------------------------------


def test_clipped_objective():
    ratio_BT = np.array([[0.5, 0.9, 1.0, 1.25, 2.0]] * 2, np.float32)
    advantage_B1 = np.array([[1.0], [-1.0]], np.float32)
    low, high = 0.2, 0.3
    free_BT = ratio_BT * advantage_B1
    clipped_BT = np.clip(ratio_BT, 1 - low, 1 + high) * advantage_B1
    swapped_BT = np.clip(ratio_BT, 1 - high, 1 + low) * advantage_B1
    compare(
        "clipped_objective", ask("clipped_objective", ratio_BT, advantage_B1, low, high),
        np.minimum(free_BT, clipped_BT),
        {
            "min and max are swapped. The objective is the lower one of the two: a good token that "
            "has risen enough gets no more, a good token that fell may always come back.":
                np.maximum(free_BT, clipped_BT),
            "the min is missing: with the clip alone, a good token whose ratio fell below 1 - "
            "epsilon_low has no gradient and never comes back.": clipped_BT,
            "the clip is missing.": free_BT,
            "epsilon_low and epsilon_high are swapped; clip-higher lets good tokens rise further.":
                np.minimum(free_BT, swapped_BT),
            "the sign is that of a loss; the objective is maximised.":
                -np.minimum(free_BT, clipped_BT),
            "clip first, then multiply by A, then take the min: for A < 0 the min of the ratios is "
            "not the min of the products.":
                np.minimum(ratio_BT, np.clip(ratio_BT, 1 - low, 1 + high)) * advantage_B1,
        },
        "min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A), token by token.",
    )  # fmt: skip


# ---- k3 -----------------------------------------------------------------------------------------


def test_k3():
    d_BT = np.array([[-2.0, -0.1, 0.0], [0.1, 1.0, 3.0]], np.float32)
    compare(
        "k3", ask("k3", d_BT), np.exp(d_BT) - d_BT - 1,
        {
            "that is k1 = -d: right on average, but negative for single tokens, and without "
            "gradient in a loss (docs/kl.md).": -d_BT,
            "that is k2 = d^2 / 2.": d_BT**2 / 2,
            "the sign of d is turned round: d = log pi_ref - log pi, so e^d = pi_ref / pi.":
                np.exp(-d_BT) + d_BT - 1,
            "the 1 is missing: at pi = pi_ref (d = 0) the divergence is 0.": np.exp(d_BT) - d_BT,
        },
        "e^d - d - 1.",
    )  # fmt: skip


# ---- sliding-window mask ------------------------------------------------------------------------


def test_sliding_window_mask():
    start_B, T, window = np.array([0, 2]), 6, 3
    distance_TS = np.arange(T)[:, None] - np.arange(T)[None, :]
    real_B1S = np.arange(T) >= start_B[:, None, None]
    causal_BTS = (distance_TS >= 0) & real_B1S
    want = causal_BTS & (distance_TS < window)
    compare(
        "sliding_window_mask", ask("sliding_window_mask", start_B, T, window), want,
        {
            "off by one: a position sees window + 1 positions. The window counts the position "
            "itself: t - s < window.": causal_BTS & (distance_TS <= window),
            "off by one: a position sees window - 1 positions. The window counts the position "
            "itself: t - s < window.": causal_BTS & (distance_TS < window - 1),
            "the position itself is left out: s = t is allowed.":
                want & (distance_TS > 0),
            "the padding on the left is visible: key s of row b is real from start_B[b] on.":
                np.broadcast_to((distance_TS >= 0) & (distance_TS < window), want.shape),
            "the future is visible: a query sees s <= t only.":
                (np.abs(distance_TS) < window) & real_B1S,
            "the window is missing: that is a global layer.": causal_BTS,
            "queries and keys are swapped: the second axis is the query, the third the key.":
                want.transpose(0, 2, 1),
        },
        "True where start_B[b] <= s <= t and t - s < window.",
    )  # fmt: skip


# ---- LoRA merge ---------------------------------------------------------------------------------


def test_lora_merge():
    rng = np.random.default_rng(0)
    shapes = ((5, 7), (5, 4), (4, 7))
    w_DF, a_DR, b_RF = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    product_DF, alpha = a_DR @ b_RF, 3.0
    compare(
        "lora_merge", ask("lora_merge", w_DF, a_DR, b_RF, alpha), w_DF + alpha / 4 * product_DF,
        {
            "the factor alpha / r is missing: a merged model would be another one than the adapter "
            "was trained as.": w_DF + product_DF,
            "alpha is there, the division by the rank is not.": w_DF + alpha * product_DF,
            "alpha is missing: the factor is alpha / r, not 1 / r.": w_DF + product_DF / 4,
            "the factor is turned round: alpha / r, not r / alpha.": w_DF + 4 / alpha * product_DF,
            "W is missing: that is the adapter's part alone.": alpha / 4 * product_DF,
            "r is the rank, the axis that A and B share (4 here).": w_DF + alpha / 5 * product_DF,
        },
        "W + (alpha / r) A B, r = a_DR.shape[1].",
    )  # fmt: skip


def test_lora_merge_keeps_the_dtype():
    a_DR, b_RF = np.ones((2, 1), np.float32), np.ones((1, 3), np.float32)
    got = ask("lora_merge", np.ones((2, 3), np.float16), a_DR, b_RF, 1.0)
    if got.dtype != np.float16:
        tell("lora_merge", f"the result must have the dtype of W, float16 here, got {got.dtype}: a "
             "model in half precision would double in size.")  # fmt: skip


# ---- stop-token mask ----------------------------------------------------------------------------


def test_stop_token_mask():
    rows = [[5, 6, 1, 5, 1], [106, 5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 106, 1, 5, 5]]
    tokens_BT = np.array(rows, np.int32)
    want = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    compare(
        "stop_token_mask", ask("stop_token_mask", tokens_BT, (1, 106)), want,
        {
            "the stop token itself is lost: without it in the loss nothing teaches the model to "
            "stop. The mask includes the first stop token.":
                [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
            "the mask goes on to the last stop token; the completion ends at the first.":
                [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
            "what follows the first stop token is kept up to the second: count the stop tokens "
            "before a position, itself left out.":
                [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
            "only the first id of stop_ids ends a completion here; Gemma's instruction-tuned "
            "models stop at <eos> (1) and at <end_of_turn> (106).":
                [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
            "stop tokens are cut out wherever they stand, but what follows the first of them is "
            "not part of the completion either.": ~np.isin(tokens_BT, (1, 106)),
        },
        "True up to and including the first token that is in stop_ids.",
    )  # fmt: skip


# ---- process reward -----------------------------------------------------------------------------


def test_process_reward():
    steps = ["2 + 2 = 4", "4 * 3 = 12", "12 - 1 = 11", "11 + 5 = 16", "16 / 2 = 8", "8 + 1 = 9"]

    def score(reasoning: str, checkpoints, answer: str = "9"):
        text = f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"
        got = ask("process_reward", ["q"], [text], metadata=[{"checkpoints": checkpoints}])
        if not isinstance(got, list) or len(got) != 1:
            tell("process_reward", f"one completion, one score, in a list; got {got!r}")
        return got[0]

    def want(got, expected, *because: tuple[object, str]) -> None:
        if got is not None and expected is not None and abs(got - expected) < 1e-6:
            return
        if got is None and expected is None:
            return
        for wrong, message in because:
            if got == wrong or (None not in (got, wrong) and abs(got - wrong) < 1e-6):
                tell("process_reward", message)
        tell("process_reward", f"0.2 a distinct checkpoint in the reasoning, at most 1.0: wanted "
             f"{expected}, got {got}")  # fmt: skip

    two = f"First {steps[0]}, then {steps[1]}."
    want(
        score(two, steps[:3]), 0.4,
        (2 / 3, "0.2 each, not the share of the checkpoints: a problem of two steps is worth less "
                "than one of five."),
        (1.0, "one checkpoint found is not all of them: 0.2 for each."),
    )  # fmt: skip
    want(
        score(two, [steps[0]] * 4), 0.2,
        (0.8, "a checkpoint that is listed twice counts twice: distinct ones only, or a careless "
              "row of data pays the same step again and again."),
    )  # fmt: skip
    want(
        score(f"{steps[0]} {steps[0]} {steps[0]}", steps[:2]), 0.2,
        (0.6, "a step that is written three times counts three times: the model would learn to "
              "repeat itself."),
    )  # fmt: skip
    want(
        score(" ".join(steps), steps), 1.0,
        (1.2, "more than five checkpoints give more than 1.0: cap it."),
    )  # fmt: skip
    want(
        score("I just know.", steps, answer=" ".join(steps)), 0.0,
        (1.0, "steps in the answer block are paid; look into the reasoning block only."),
        (1.2, "steps in the answer block are paid; look into the reasoning block only."),
        (None, "the checkpoints apply, they are just not there: 0.0, not None."),
    )  # fmt: skip
    want(
        score(two, []), None,
        (0.0, "no checkpoints to look for: None, \"does not apply\". A 0 would punish completions "
              "for a row of data without checkpoints."),
        (1.0, "no checkpoints to look for: None, not full marks for nothing."),
    )  # fmt: skip
    got = ask("process_reward", ["q"], [two], metadata=[{"checkpoints": steps}])[0]
    want(
        got, 0.0,
        (0.4, "without a <reasoning> block there is nothing to look into: 0.0."),
        (None, "without a <reasoning> block there is nothing to look into: 0.0, not None."),
    )  # fmt: skip
