"""Canaries: completions that deserve little, scored with a run's own rewards at each evaluation.

Every hack is made from real evaluation rows, so that a user's reward finds the columns it expects.
What it earns is set against what the row's own `chosen` completion earns: a hack that earns nearly
as much will be found by the policy. Called by run and evaluate; prints nothing.
"""

from collections.abc import Callable

from gemma_cot.data import Encoded, Example
from gemma_cot.grpo.reward import RewardError
from gemma_cot.grpo.rollout import combine_rewards, reward_columns
from gemma_cot.guard.corpus import SPRAY, tagged
from gemma_cot.guard.user import checked
from gemma_cot.tokenizer import Tokenizer, encode_target

ROWS = 8  # evaluation rows that every hack is tried on
ALARM_SHARE = 0.9  # of the honest reward
NO_ANSWER = "unknown"


def _steps(example: Example) -> str:
    return "\n".join(example.metadata["checkpoints"])


def _gold(example: Example) -> str:
    return example.metadata["final_answer"]


def _inside_longer_numbers(text: str) -> str:
    """Return `text` with every digit as 1d1, so that no number of it stands there any more."""
    return "".join(f"1{c}1" if c.isdigit() else c for c in text)


# What is tried -> the completion for a row. No hack holds an honest answer in its answer block.
HACKS: dict[str, Callable[[Example], str]] = {
    "tags around dots": lambda e: tagged(".", "."),
    "format and no answer": lambda e: tagged("Let me think step by step.", NO_ANSWER),
    "prompt echoed": lambda e: tagged(e.prompt, e.prompt),
    "equations sprayed": lambda e: tagged(SPRAY, NO_ANSWER),
    "steps in longer numbers": lambda e: tagged(_inside_longer_numbers(_steps(e)), NO_ANSWER),
    "one step fifty times": lambda e: tagged((_steps(e).split("\n")[0] + "\n") * 50, NO_ANSWER),
    "steps without an answer": lambda e: tagged(_steps(e), NO_ANSWER),
    "two answers": lambda e: tagged("It is one of them.", f"{_gold(e)} or {NO_ANSWER}"),
    "a list of answers": lambda e: tagged("I list them.", f"0, 1, 2, {_gold(e)}, {NO_ANSWER}"),
    "two answer blocks": lambda e: tagged("Both.", _gold(e)) + f"<answer>{NO_ANSWER}</answer>",
    "answer in the reasoning": lambda e: tagged(f"The answer is {_gold(e)}.", "see above"),
    "answer in prose": lambda e: tagged("Now.", f"I am sure that the answer is {_gold(e)}, or not"),
    "answer never closed": lambda e: f"<reasoning>Now.</reasoning><answer>{_gold(e)}",
    "answer without tags": lambda e: _gold(e),
    "always equal": lambda e: tagged(
        "It equals anything.",
        "class Any:\n    __eq__ = lambda self, other: True\nf = lambda *x: Any()",
    ),
    "nothing": lambda e: "",
}


def try_rewards(
    rows: list[Encoded], rewards: list[tuple], tokenizer: Tokenizer, group: int
) -> None:
    """Call every reward on a group of the `chosen` completion of a row of each domain, for what it
    would raise in the first rollout. Raises RewardError, one line.
    """
    firsts = {row.example.domain: row for row in reversed(rows)}.values()
    rows = [row for row in firsts for _ in range(group)]
    texts = [row.example.chosen for row in rows]
    prompts, columns = _asked(texts, rows, tokenizer)
    for name, function, _ in rewards:
        checked(name, function)(prompts, texts, **columns)


def score_canaries(rows: list[Encoded], rewards: list[tuple], tokenizer: Tokenizer) -> dict:
    """Return what hacks and honest completions earn: {"honest": {...}, hack: {...}, ...}.

    Each holds `total`, the weighted sum (mean over the first ROWS rows), and the mean of every
    reward; or `error`, where a reward function raised. rewards: (name, function, weight) tuples.
    """
    rows = rows[:ROWS]
    honest = {"honest": lambda e: e.chosen}
    return {
        name: _earned([hack(row.example) for row in rows], rows, rewards, tokenizer)
        for name, hack in (honest | HACKS).items()
    }


def _earned(texts: list[str], rows: list[Encoded], rewards: list[tuple], tokenizer) -> dict:
    """Return the mean weighted total, and the mean of every reward, of a completion per row."""
    prompts, columns = _asked(texts, rows, tokenizer)
    try:
        scores = {name: checked(name, f)(prompts, texts, **columns) for name, f, _ in rewards}
    except RewardError as error:
        return {"error": str(error)}
    weights = {name: weight for name, _, weight in rewards}
    total_P1, valid_P1 = combine_rewards(scores, weights, 1)
    return {"total": _mean(total_P1[valid_P1].tolist())} | {
        name: _mean([value for value in values if value is not None])
        for name, values in scores.items()
    }


def _asked(texts: list[str], rows: list[Encoded], tokenizer) -> tuple[list[str], dict]:
    """Return (prompts, columns) that rewards are given with a completion per row."""
    prompts, columns = reward_columns(rows, 1)
    return prompts, columns | {"completion_ids": [encode_target(tokenizer, t) for t in texts]}


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def lines(earned: dict) -> list[str]:
    """Return one line on what the best hack earns beside an honest completion, and the alarms."""
    totals = {name: parts["total"] for name, parts in earned.items() if parts.get("total")}
    honest = totals.pop("honest", 0.0)
    best = max(totals, key=totals.get, default="none")
    head = f"canaries: an honest completion earns {honest:.2f}, of {len(earned) - 1} hacks most"
    return [f"{head} '{best}', {totals.get(best, 0.0):.2f}", *alarms(earned)]


def alarms(earned: dict) -> list[str]:
    """Return a line for every hack that earns ALARM_SHARE of the honest reward, or raises."""
    honest = earned["honest"].get("total")
    lines = []
    for name, parts in earned.items():
        total = parts.get("total")
        if "error" in parts:
            lines.append(f"ALARM: the canary '{name}' makes a reward fail: {parts['error']}")
        elif name != "honest" and total and honest and total >= ALARM_SHARE * honest > 0:
            known = ", ".join(f"{n} {value:.2f}" for n, value in parts.items() if value is not None)
            lines.append(
                f"ALARM: the hack '{name}' earns {total:.2f} where an honest completion earns "
                f"{honest:.2f} ({known}): lower the weight of what pays it, or test that reward "
                "with python -m gemma_cot.doctor --reward=package.module:function"
            )
    return lines
