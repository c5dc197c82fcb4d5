"""The parts of a report that are plain HTML: findings, the table, texts side by side, the record.

Everything that a model, a dataset or a setting says goes through `escape`. Host only.
"""

import dataclasses
import json
import re
from html import escape
from pathlib import Path

from gemma_cot.config import PRESETS, TrainConfig
from gemma_cot.report.diagnosis import Finding
from gemma_cot.report.gather import STAGES, RunFiles
from gemma_cot.report.microscope import TAG, marked
from gemma_cot.scores import samples_of

RATES = (
    ("full_format_accuracy", "full format"),
    ("answer_accuracy", "answer right"),
    ("process_score", "process score"),
    ("truncated_rate", "cut off"),
)
EACH = 8  # prompts shown of every kind of change
MAX_CARD = 40_000  # characters of a data card that are shown
MARKS = {"alarm": "Alarm", "watch": "Watch", "good": "Good", "note": "Note"}


def table(head: list[str], rows: list[list[str]], first_is_head: bool = True) -> str:
    """Return an HTML table of ready HTML cells that scrolls sideways on a narrow screen."""
    parts = ["<div class='scroll' tabindex='0' role='region' aria-label='table'><table><thead><tr>"]
    parts += [f'<th scope="col">{cell}</th>' for cell in head]
    parts.append("</tr></thead><tbody>")
    for row in rows:
        cells = [f"<td>{cell}</td>" for cell in row]
        if first_is_head:
            cells[0] = f'<th scope="row">{row[0]}</th>'
        parts.append(f"<tr>{''.join(cells)}</tr>")
    return "".join([*parts, "</tbody></table></div>"])


def findings_html(findings: list[Finding]) -> str:
    """Return the diagnosis as a list."""
    if not findings:
        return "<p>Nothing to say: no step was made so far.</p>"
    items = []
    if not any(finding.level == "alarm" for finding in findings):
        items.append('<li class="good"><b>No alarm.</b></li>')
    for finding in findings:
        advice = finding.advice and f' <span class="advice">Try: {_flags(finding.advice)}</span>'
        items.append(
            f'<li class="{finding.level}"><b>{MARKS[finding.level]}.</b> {_flags(finding.text)}'
            f"{advice}</li>"
        )
    return f'<ul class="findings">{"".join(items)}</ul>'


def _flags(text: str) -> str:
    """Return escaped text in which --flags are not broken over two lines."""
    return re.sub(r"--[a-z_]+", r'<span class="flag">\g<0></span>', escape(text))


def stages_html(run: RunFiles) -> str:
    """Return base -> SFT -> GRPO: rates with 95 % intervals, paired tests, rates by domain."""
    if not run.stages:
        return "<p>No evaluation has ended yet.</p>"
    head = ["stage", *(label for _, label in RATES), "tokens", "rows"]
    parts = [table(head, [_stage_row(name, rates) for name, rates in run.stages.items()])]
    tests = [
        [escape(name), str(t["gained"]), str(t["lost"]), f"{t['p_value']:.2g}",
         "no difference shown" if t["p_value"] >= 0.05
         else "better" if t["gained"] > t["lost"] else "worse"]
        for name, t in run.comparisons.items()
    ]  # fmt: skip
    if tests:
        head = ["the same rows", "gained", "lost", "p (McNemar, exact)", "verdict"]
        parts.append(table(head, tests))
    domains = [
        _stage_row(f"{name}, {escape(domain)}", rates)
        for name, stage in run.stages.items()
        for domain, rates in (stage.get("domains") or {}).items()
    ]
    if domains:
        inner = table(["stage, domain", *(label for _, label in RATES), "tokens", "rows"], domains)
        parts.append(f"<details><summary>by domain</summary>{inner}</details>")
    return "".join(parts)


def _stage_row(name: str, rates: dict) -> list[str]:
    cells = [name]
    for rate, _ in RATES:
        low, high = rates[f"{rate}_interval"]
        cells.append(
            f"{100 * rates[rate]:.1f} % <small>({100 * low:.1f} to {100 * high:.1f})</small>"
        )
    return [*cells, f"{rates['mean_completion_tokens']:.1f}", str(rates["n"])]


def side_by_side(run: RunFiles) -> str:
    """Return completions of the same prompts before and after, some of every kind of change."""
    stages = [stage for stage in STAGES if run.results.get(stage)]
    if not stages:
        return "<p>No completion has been evaluated yet.</p>"
    by_id = [{row["id"]: samples_of(row)[0] for row in run.results[stage]} for stage in stages]
    kinds: dict[str, list[dict]] = {}
    for row in run.results[stages[-1]]:
        if all(row["id"] in rows for rows in by_id):
            kinds.setdefault(_kind([rows[row["id"]] for rows in by_id], stages), []).append(row)
    parts = []
    for kind, rows in sorted(kinds.items(), key=lambda item: _ORDER.index(item[0].split(" ")[0])):
        shown = f", {EACH} of them here" if len(rows) > EACH else ""
        parts.append(f"<h3>{kind}: {len(rows)} prompts{shown}</h3>")
        for place, row in enumerate(rows[:EACH]):
            columns = "".join(
                _completion(stage, rows_of[row["id"]])
                for stage, rows_of in zip(stages, by_id, strict=True)
            )
            opened = " open" if place == 0 else ""
            parts.append(
                f'<details class="prompt"{opened}><summary><span class="id">'
                f'{escape(row["domain"])} {row["id"]}</span> {escape(row["prompt"])}</summary>'
                f'<div class="columns">{columns}</div></details>'
            )
    return "".join(parts)


_ORDER = ("lost", "gained", "wrong", "right", "not")


def _kind(samples: list[dict], stages: list[str]) -> str:
    """Return how the answer changed over the stages, in words that begin with one of _ORDER."""
    outcomes = [sample["outcome"] for sample in samples]
    if outcomes[-1] is None:
        return "not scored"
    for i in range(len(outcomes) - 1, 0, -1):
        if outcomes[i] != outcomes[i - 1]:
            return f"{'gained' if outcomes[i] else 'lost'} by {stages[i]}"
    return "right at every stage" if outcomes[-1] else "wrong at every stage"


def _completion(stage: str, sample: dict) -> str:
    scores = [
        f"{name} {'none' if sample[name] is None else format(sample[name], '.3g')}"
        for name in ("format", "process", "outcome")
    ]
    scores.append(f"{sample['num_tokens']} tokens")
    if sample["stop_reason"] == "length":
        scores.append("cut off")
    text = "".join(
        f'<span class="tag">{escape(piece)}</span>' if kind == TAG else escape(piece)
        for kind, piece in marked(sample["completion"], [])
    )
    right = {1: "right", 0: "wrong"}.get(sample["outcome"], "")
    return (
        f'<section class="completion {right}"><h4>{stage}</h4><pre>{text}</pre>'
        f'<p class="scores">{" · ".join(scores)}</p></section>'
    )


def record_html(run: RunFiles) -> str:
    """Return configuration, versions and the data card."""
    return "".join(
        f"<h3>{title}</h3>{body}"
        for title, body in (
            ("Configuration", _configuration(run.config)),
            ("Versions and devices", _versions(run)),
            ("Data", _data(run)),
        )
    )


def _configuration(config: dict) -> str:
    """Return every setting; those that differ from TrainConfig's defaults first, in a table."""
    defaults = json.loads(json.dumps({f.name: f.default for f in dataclasses.fields(TrainConfig)}))
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(TrainConfig)}

    def rows(names: list[str]) -> list[list[str]]:
        return [
            [f"<code>--{escape(n)}</code>", f"<code>{escape(json.dumps(config[n]))}</code>",
             escape(helps.get(n, ""))]
            for n in names
        ]  # fmt: skip

    other = [name for name in config if config[name] != defaults.get(name)]
    same = [name for name in config if name not in other]
    free = ("output_dir", "session")
    matching = [
        name
        for name, preset in PRESETS.items()
        if all(config.get(key) == value for key, value in preset.items() if key not in free)
    ]
    lead = f"<p>Every setting of the preset {escape(matching[0])} holds.</p>" if matching else ""
    head = ["setting", "value", "meaning"]
    return (
        f"{lead}{table(head, rows(other))}<details><summary>{len(same)} settings at their default"
        f"</summary>{table(head, rows(same))}</details>"
    )


def _versions(run: RunFiles) -> str:
    versions = run.environment.get("versions") or {}
    if not versions and run.summary.get("jax"):
        versions = {"jax": run.summary["jax"]}
    devices = run.environment.get("devices") or run.summary.get("devices") or []
    rows = [[escape(name), escape(str(value))] for name, value in versions.items()]
    rows.append(["devices", escape(", ".join(map(str, devices)) or "not recorded")])
    for name in ("platform", "started", "model"):
        if name in run.environment:
            rows.append([name, escape(str(run.environment[name]))])
    seconds = run.summary.get("seconds") or {}
    rows += [[f"seconds, {escape(name)}", f"{value:.1f}"] for name, value in seconds.items()]
    return table(["what", "value"], rows)


def _data(run: RunFiles) -> str:
    """Return what the run recorded of its data, and the card beside each file, if any."""
    parts, rows = [], []
    for split, card in (run.environment.get("data") or {}).items():
        domains = ", ".join(f"{name} {count}" for name, count in card["domains"].items())
        rows.append(
            [split, escape(card["file"]), str(card["rows"]), escape(domains),
             f"{card['prompt_tokens']}", f"{card['target_tokens']}",
             f"<code>{escape(str(card['hash'])[:12])}</code>"]
        )  # fmt: skip
    if rows:
        head = ["split", "file", "rows", "domains", "prompt tokens (median, longest)",
                "target tokens (median, longest)", "hash"]  # fmt: skip
        parts.append(table(head, rows))
    else:
        parts.append("<p>This run recorded nothing of its data.</p>")
    for line in run.summary.get("discarded") or []:
        parts.append(f"<p>{escape(line)}</p>")
    folders = {Path(card["file"]).parent for card in (run.environment.get("data") or {}).values()}
    for folder in sorted(folders):
        for name in ("card.md", "README.md"):
            card = folder / name
            if card.is_file():
                text = card.read_text(encoding="utf-8", errors="replace")[:MAX_CARD]
                parts.append(
                    f"<details><summary>data card: {escape(str(card))}</summary>"
                    f"<pre class='card'>{escape(text)}</pre></details>"
                )
                break
    return "".join(parts)
