"""What a run's numbers say, in plain words: rules over metrics, evaluations and canaries.

Each rule gives findings: what is seen, with its numbers, and what to try. A rule of thumb says so.
Alarms that a run prints itself are repeated here in the same words. Host only.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from gemma_cot import alarms, evaluation
from gemma_cot.guard import canaries
from gemma_cot.report.gather import RunFiles

LEVELS = ("alarm", "watch", "good", "note")
SURE = 0.05  # p-values below it count as a difference


@dataclass(frozen=True)
class Finding:
    """One thing that was seen."""

    level: str  # one of LEVELS
    text: str  # what, with its numbers
    advice: str = ""  # what to try


def diagnose(run: RunFiles) -> list[Finding]:
    """Return all findings, the most pressing first."""
    found = [finding for rule in RULES for finding in rule(run)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def ends(values: list[float]) -> tuple[float, float]:
    """Return the mean over the first and over the last tenth of a metric's values."""
    n = max(1, len(values) // 10)
    return sum(values[:n]) / n, sum(values[-n:]) / n


def percent(share: float) -> str:
    """Return 12.3 %."""
    return f"{100 * share:.1f} %"


def stages_differ(run: RunFiles) -> list[Finding]:
    """Say of each stage whether answers and format changed more than chance would have it."""
    found = []
    names = {"full format": "full_format_accuracy", "answer": "answer_accuracy"}
    for name, test in run.comparisons.items():
        pair, _, score = name.partition(", ")
        before, after = (run.stages.get(stage, {}) for stage in pair.split(" -> "))
        if score not in names or not before or not after:
            continue
        old, new = before[names[score]], after[names[score]]
        text = (
            f"{pair}, {score}: {percent(old)} to {percent(new)}; {test['gained']} rows gained, "
            f"{test['lost']} lost, exact McNemar p = {test['p_value']:.2g}."
        )
        if test["p_value"] >= SURE:
            low, high = after[f"{names[score]}_interval"]
            found.append(
                Finding(
                    "note",
                    f"No difference shown. {text} The interval on {after['n']} rows is "
                    f"{percent(low)} to {percent(high)}.",
                    "More evaluation rows show smaller differences (--eval_limit=0 takes all).",
                )
            )
        elif test["gained"] > test["lost"]:
            found.append(Finding("good", f"Better. {text}"))
        else:
            advice = "Fewer steps, a lower learning rate, or a higher --beta; read what was lost."
            found.append(Finding("alarm", f"Worse. {text}", advice))
    return found


def known_alarms(run: RunFiles) -> list[Finding]:
    """Repeat the alarms of training, evaluation and canaries, and count rewards that raised."""
    lines = evaluation.alarms(run.comparisons)
    earned = run.summary.get("canaries") or {}
    if earned:
        lines += canaries.alarms(list(earned.values())[-1])
    found = [Finding("alarm", line.removeprefix("ALARM: ")) for line in lines]
    told: dict[str, list[dict]] = {}  # the same alarm with other numbers in it counts as the same
    for one in alarms.onsets(run.metrics):
        kind = f"{one['stage']} {re.sub(r'[0-9.e%+-]+', '#', one['alarm'])}"
        told.setdefault(kind, []).append(one)
    for same in told.values():
        first, more = same[0], len(same) - 1
        times = f"{more} times, the last " if more > 1 else ""
        again = f" (again {times}at step {same[-1]['step']})" if more else ""
        found.append(
            Finding("alarm", f"{first['stage']} step {first['step']}{again}: {first['alarm']}.")
        )
    if run.summary.get("reward_errors"):
        found.append(
            Finding(
                "alarm",
                f"Rewards raised on {run.summary['reward_errors']} rows, which were left unscored.",
                "Read reward_errors.jsonl; test the function with "
                "python -m gemma_cot.doctor --reward=package.module:function.",
            )
        )
    return found


def signal(run: RunFiles) -> list[Finding]:
    """Say when most groups teach nothing, and whether prompts are too easy or too hard."""
    values = run.series("signal_share")
    if not values:
        return []
    first, last = ends(values)
    if not alarms.SIGNAL_LOW <= last < 0.3:  # below, there is an alarm
        return []
    right = run.series("reward_outcome")
    right = ends(right)[1] if right else 0.5
    why = "too easy" if right > 0.8 else "too hard" if right < 0.2 else "answered alike"
    advice = (
        "Train on prompts that are answered sometimes (evaluate --num_completions, then prepare "
        "--pass_rates), or raise --num_generations or --temperature"
    )
    if run.config.get("dynamic_sampling") is False:
        advice += ", or set --dynamic_sampling"
    return [
        Finding(
            "watch",
            f"Only {percent(last)} of groups had rewards that differ at the end ({percent(first)} "
            f"at the start); the others have advantage 0. Most prompts are {why}: "
            f"{percent(right)} of completions were right.",
            advice + ".",
        )
    ]


def divergence(run: RunFiles) -> list[Finding]:
    """Say when the KL divergence rises without the reward, or leaps."""
    kl, reward = run.series("kl"), run.series("reward")
    if len(kl) < 10 or len(reward) < 10:
        return []
    half, last = ends(kl[len(kl) // 2 :])
    reward_half, reward_last = ends(reward[len(reward) // 2 :])
    found = []
    if last > 0.05 and last > 1.5 * half and reward_last <= reward_half + 0.01:
        found.append(
            Finding(
                "watch",
                f"KL to the reference rose from {half:.3g} to {last:.3g} nats a token in the "
                f"second half while the reward did not ({reward_half:.2f} to {reward_last:.2f}).",
                "A higher --beta, a lower --learning_rate, or fewer --grpo_steps.",
            )
        )
    middle = sorted(kl)[len(kl) // 2]
    if max(kl) > 0.5 and max(kl) > 10 * middle:
        step = next(row["step"] for row in run.rows("grpo") if row.get("kl") == max(kl))
        found.append(
            Finding(
                "watch",
                f"KL leapt to {max(kl):.3g} nats a token at step {step} (median {middle:.3g}).",
                "Look at that step; a lower --max_grad_norm or --learning_rate keeps steps small.",
            )
        )
    return found


def lengths(run: RunFiles) -> list[Finding]:
    """Say when completions are cut off, run on, repeat themselves, or shrink to nothing."""
    found = []
    cut, tokens = run.series("truncated_rate"), run.series("completion_tokens")
    repeats = run.series("repetition")
    if cut and 0.05 < ends(cut)[1] <= alarms.TRUNCATED_HIGH:  # above, there is an alarm
        first, last = ends(cut)
        found.append(
            Finding(
                "watch",
                f"{percent(last)} of completions were cut off at the length limit at the end "
                f"({percent(first)} at the start); they can hold no answer.",
                "Raise --max_completion_tokens, or set --length_weight; where the text repeats "
                "itself, --repetition_weight.",
            )
        )
    if tokens and not 0.5 <= ends(tokens)[1] / max(ends(tokens)[0], 1e-9) <= 2:
        first, last = ends(tokens)
        found.append(
            Finding(
                "watch",
                f"Completions went from {first:.0f} to {last:.0f} tokens.",
                "Read some before and after: longer is worth it only where answers improve; very "
                "short ones leave the reasoning out.",
            )
        )
    if repeats and ends(repeats)[1] > 0.1:
        found.append(
            Finding(
                "watch",
                f"{percent(ends(repeats)[1])} of runs of 8 tokens repeat an earlier one at the end "
                f"({percent(ends(repeats)[0])} at the start).",
                "Set --repetition_weight, and look for a reward that pays repetition.",
            )
        )
    return found


def exploration(run: RunFiles) -> list[Finding]:
    """Say when the policy has become nearly certain of every token."""
    values = run.series("entropy")
    if not values:
        return []
    first, last = ends(values)
    if last >= 0.25 * first or not alarms.ENTROPY_LOW <= last < 0.1:
        return []
    return [
        Finding(
            "watch",
            f"Entropy fell from {first:.3g} to {last:.3g} nats a token: completions of a prompt "
            "become the same, and the same completions teach nothing.",
            "A higher --epsilon_high (clip-higher), --temperature or --beta, or an earlier end.",
        )
    ]


def updates(run: RunFiles) -> list[Finding]:
    """Say when updates are clipped a lot, or sampler and trainer disagree."""
    found = []
    clipped, drift = run.series("clip_share"), run.series("logp_drift_mean")
    if clipped and ends(clipped)[1] > 0.2:
        found.append(
            Finding(
                "watch",
                f"{percent(ends(clipped)[1])} of tokens were clipped (but for CISPO: unmoved).",
                "A lower --learning_rate, or fewer updates a rollout (--prompts_per_rollout / "
                "--mini_batch).",
            )
        )
    if drift and _in_float32(run) and max(drift) > 1e-4:
        found.append(
            Finding(
                "watch",
                f"Log-probs of sampler and trainer differ by up to {max(drift):.2g} a token on "
                "average, above 0.0001, in float32: that is no rounding.",
                "Run python -m gemma_cot.doctor.",
            )
        )
    return found


def _in_float32(run: RunFiles) -> bool:
    devices = run.environment.get("devices") or run.summary.get("devices") or []
    on_cpu = any("cpu" in str(device).lower() for device in devices)
    return {"auto": on_cpu, "float32": True}.get(run.config.get("dtype", "auto"), False)


def rewards(run: RunFiles) -> list[Finding]:
    """Say which reward is never earned, earned always, or does not apply."""
    found = []
    names = sorted({name for row in run.rows("grpo") for name in row})
    for name in (n for n in names if n.startswith("reward_") and n != "reward_std"):
        values, part = run.series(name), name.removeprefix("reward_")
        if not values or part not in ("format", "process", "outcome", "code"):
            continue
        if max(values) <= 0:
            advice = "Train SFT longer, or give easier rows first: what is never seen teaches not."
            found.append(Finding("watch", f"The reward {part} was never earned.", advice))
        elif min(ends(values)) > 0.98:
            found.append(
                Finding("note", f"The reward {part} was earned nearly always, from the start: it "
                        "keeps what is there and teaches nothing new.")
            )  # fmt: skip
    for name in (n for n in names if n.startswith("none_")):
        values = run.series(name)
        if values:
            found.append(
                Finding(
                    "watch",
                    f"The reward {name.removeprefix('none_')} did not apply to "
                    f"{percent(sum(values) / max(1, len(run.rows('grpo'))))} of completions.",
                    "Complete the rows' metadata, or leave such rows out.",
                )
            )
    return found


def course(run: RunFiles) -> list[Finding]:
    """Say where time went, what was left out, and whether the run came to its end."""
    found, steps = [], len(run.rows("grpo"))
    planned = run.config.get("grpo_steps", 0)
    if run.finished and steps < planned:
        found.append(
            Finding("note", f"GRPO ended after {steps} of {planned} steps: its time was up.",
                    "--resume with a longer --session goes on.")
        )  # fmt: skip
    phases = {n: sum(run.series(f"seconds_{n}")) for n in ("rollout", "reward", "update")}
    whole = sum(phases.values())
    if whole:
        parts = ", ".join(f"{name} {percent(value / whole)}" for name, value in phases.items())
        found.append(Finding("note", f"GRPO spent its time on: {parts}."))
    if whole and phases["reward"] > 0.2 * whole:
        found.append(
            Finding("watch", "Scoring takes a fifth of the time or more, and devices wait for it.",
                    "Make the slow reward faster (doctor --reward times it).")
        )  # fmt: skip
    useful = run.series("decode_useful")
    if useful and ends(useful)[1] < 0.5:
        found.append(
            Finding("note", f"{percent(1 - ends(useful)[1])} of decode steps went into completions "
                    "that had ended already.",
                    "--rollout_slots lets a waiting completion take such a place.")
        )  # fmt: skip
    for line in run.summary.get("discarded") or []:
        found.append(Finding("note", line[0].upper() + line[1:] + "."))
    return found


RULES: tuple[Callable[[RunFiles], list[Finding]], ...] = (
    known_alarms, stages_differ, signal, divergence, lengths, exploration, updates,
    rewards, course,
)  # fmt: skip
