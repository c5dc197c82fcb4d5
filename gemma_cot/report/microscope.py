"""The step microscope: a trace as the page shows it, group by group and token by token.

Texts are cut into tags, checkpoint hits and the rest; advantages come with their formula filled in;
token numbers become small integers. Everything here ends up in a JSON block, shown by page.js as
text, never as markup. Host only.
"""

import json
import re
from pathlib import Path

from gemma_cot.grpo.reward import TAGS, checkpoint_hits, normalise, split_blocks
from gemma_cot.traces import read_trace

EPSILON = 1e-4  # group_advantages' own
PLAIN, TAG, HIT = 0, 1, 2
MAX_STEPS = 150  # traced steps in a report, evenly spread
# Decimals that token numbers keep; the page divides by 10 ** decimals.
DECIMALS = {"logp": 3, "logp_old": 3, "logp_ref": 3, "logp_sampler": 5, "ratio": 4, "kl": 5,
            "entropy": 3, "weight": 7}  # fmt: skip


def weights_of(config: dict) -> dict[str, float]:
    """Return the weight of every reward that a run may have, by name."""
    weights = {name.removesuffix("_weight"): value for name, value in config.items()
               if name.endswith("_weight")}  # fmt: skip
    for spec in config.get("reward") or []:
        path, _, weight = spec.strip().partition("=")
        weights[path.rpartition(":")[2].strip()] = float(weight or 1)
    return weights


def view_of(trace: dict, config: dict, limit: int | None = None) -> dict:
    """Return a trace as the page shows it; limit: bytes of groups, those with signal first.

    Keys: step, groups, of (how many groups the update had).
    """
    order = list(range(len(trace["groups"])))
    if limit is not None:  # stable: of those with signal, the first ones
        order.sort(key=lambda i: not any(c["advantage"] for c in trace["groups"][i]["completions"]))
    groups, size = [], 0
    for i in order:
        group = group_view(trace["groups"][i], config) | {"number": i + 1}
        size += _bytes(group)
        if limit is not None and groups and size > limit:
            break
        groups.append(group)
    groups.sort(key=lambda group: group["number"])
    return {"step": trace["step"], "of": len(trace["groups"]), "groups": groups}


def views_within(run: Path, steps: list[int], config: dict, budget: int) -> list[dict]:
    """Return views of traced steps, evenly spread, that take about `budget` bytes in all."""
    if not steps:
        return []
    first = view_of(read_trace(run, steps[0]), config, limit=1)  # a step's smallest view
    fits = max(2, int(budget / (1.2 * _bytes(first))))
    chosen = spread(steps, min(fits, MAX_STEPS))
    return [view_of(read_trace(run, step), config, budget // len(chosen)) for step in chosen]


def _bytes(view: dict) -> int:
    return len(json.dumps(view, separators=(",", ":")))


def spread(steps: list[int], count: int) -> list[int]:
    """Return at most `count` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= count:
        return steps
    if count == 1:
        return steps[-1:]
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def group_view(group: dict, config: dict) -> dict:
    """Return a group as the page shows it."""
    checkpoints = list(dict.fromkeys(c for c in group["metadata"].get("checkpoints", []) if c))
    matcher = config.get("process_matcher", "normalised")
    members = group["completions"]
    statistics, formulas = advantage_texts(members, config)
    return {
        "row": group["row"],
        "rollout": group["sampled_in"],
        "domain": group["domain"],
        "prompt": group["prompt"],
        "pieces": group["prompt_pieces"],
        "gold": group["metadata"].get("final_answer"),
        "checkpoints": checkpoints,
        "statistics": statistics,
        "completions": [
            completion_view(member, checkpoints, matcher, config) | {"formula": formula}
            for member, formula in zip(members, formulas, strict=True)
        ],
    }


def completion_view(member: dict, checkpoints: list[str], matcher: str, config: dict) -> dict:
    """Return a completion as the page shows it: marked text, sum of rewards, token numbers."""
    reasoning = split_blocks(member["text"])[0] or ""
    hits = [checkpoint_hits(reasoning, [c], matcher)[0] > 0 for c in checkpoints]
    found = [c for c, hit in zip(checkpoints, hits, strict=True) if hit]
    tokens = {name: whole(member[name], DECIMALS[name]) for name in DECIMALS if name in member}
    return {
        "text": marked(member["text"], found),
        "hits": hits,
        "stopped": member["stopped"],
        "scores": member["scores"],
        "sum": sum_text(member, weights_of(config)),
        "reward": member["reward"],
        "advantage": member["advantage"],
        "pieces": member["pieces"],
        "clipped": [i for i, is_clipped in enumerate(member["clipped"]) if is_clipped],
        "tokens": tokens,
    }


def whole(values: list[float | None], decimals: int) -> list[int | None] | int | None:
    """Return the values times 10 ** decimals as integers; a single one where all are the same."""
    scaled = [None if v is None else round(v * 10**decimals) for v in values]
    return scaled[0] if scaled and len(set(scaled)) == 1 else scaled


def marked(text: str, hits: list[str]) -> list[list]:
    """Cut a completion into [kind, text] pieces: PLAIN, TAG, HIT (a checkpoint that was found)."""
    marks = [(m.start(), m.end(), TAG) for m in re.finditer("|".join(map(re.escape, TAGS)), text)]
    reasoning = split_blocks(text)[0]
    if reasoning is not None:
        offset = text.find(TAGS[0]) + len(TAGS[0])
        for checkpoint in hits:
            place = locate(reasoning, checkpoint)
            if place:
                marks.append((offset + place[0], offset + place[1], HIT))
    pieces, at = [], 0
    for start, end, kind in sorted(marks):
        if start < at:
            continue  # inside a mark that began earlier
        pieces += [[PLAIN, text[at:start]]] * (start > at) + [[kind, text[start:end]]]
        at = end
    return pieces + [[PLAIN, text[at:]]] * (at < len(text))


def locate(reasoning: str, checkpoint: str) -> tuple[int, int] | None:
    """Return where a checkpoint that `checkpoint_hits` found stands, None where that is not clear.

    As written, else with white space and typographic operators as the normalised matcher reads
    them; a place that continues a longer number is passed over.
    """
    pattern = r"\s*".join(
        "".join(r"\s+" if c == " " else re.escape(c) for c in part)
        for part in re.split(r"(?<=[-+*/=^<>%()])|(?=[-+*/=^<>%()])", normalise(checkpoint))
        if part
    )
    same_length = "".join(n if len(n := normalise(c)) == 1 else c for c in reasoning)
    for match in re.finditer(pattern, same_length, re.IGNORECASE):
        start, end = match.span()
        around = reasoning[max(0, start - 3) : end + 3]
        if checkpoint_hits(around, [checkpoint])[0]:
            return start, end
    return None


def sum_text(member: dict, weights: dict[str, float]) -> str:
    """Return how a completion's reward adds up: `1·format 1 + 1·process 0.4 = 1.4`."""
    if not member["valid"]:
        return "no total: a reward does not apply to it but to others of its group"
    parts = [
        f"{weights.get(name, 1):g}·{name} {'none' if score is None else f'{score:.3g}'}"
        for name, score in member["scores"].items()
    ]
    text = f"{' + '.join(parts)} = {member['reward']:.4g}"
    if member.get("kl_penalty") is not None:
        text += f", less beta·KL {member['kl_penalty']:.4g}"
    return text


def advantage_texts(members: list[dict], config: dict) -> tuple[str, list[str]]:
    """Return (mean and std of a group, each completion's advantage) as formulas with its numbers.

    The formula is that of grpo.loss.group_advantages under the run's baseline and scale; the result
    is what the update was given.
    """
    scale = config.get("advantage_scale", "group")
    leave_one_out = config.get("baseline", "mean") == "leave_one_out"
    rewards = [m["reward"] - (m.get("kl_penalty") or 0.0) for m in members if m["valid"]]
    if not rewards:
        return "no completion of this group has a total", ["A = 0: no total"] * len(members)
    n = len(rewards)
    mean = sum(rewards) / n
    std = (sum((r - mean) ** 2 for r in rewards) / max(1, n - 1)) ** 0.5
    statistics = (
        f"mean = ({' + '.join(f'{r:.4g}' for r in rewards)}) / {n} = {mean:.4g}; "
        f"std with n - 1 = {std:.4g}"
    )
    if not any(m["advantage"] for m in members):
        statistics += "; all rewards are equal: no signal, every advantage is 0"
    formulas = []
    for member in members:
        advantage = member["advantage"]
        reward = member["reward"] - (member.get("kl_penalty") or 0.0)
        if not member["valid"]:
            formulas.append("A = 0: no total, left out of mean and std")
            continue
        if not any(m["advantage"] for m in members):
            formulas.append("A = 0: all rewards of the group are equal")
            continue
        base = (sum(rewards) - reward) / max(1, n - 1) if leave_one_out else mean
        name = "mean of the others" if leave_one_out else "mean"
        top, filled = f"r − {name}", f"{reward:.4g} − {base:.4g}"
        if scale == "group":
            formulas.append(f"A = ({top}) / (std + ε) = ({filled}) / ({std:.4g} + {EPSILON:g}) = "
                            f"{advantage:.4g}")  # fmt: skip
        elif scale == "batch":
            over = (reward - base) / advantage if advantage else 0.0
            formulas.append(f"A = ({top}) / (std of all rewards + ε) = ({filled}) / {over:.4g} = "
                            f"{advantage:.4g}")  # fmt: skip
        else:
            formulas.append(f"A = {top} = {filled} = {advantage:.4g}")
    return statistics, formulas
