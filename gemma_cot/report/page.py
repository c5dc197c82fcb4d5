"""Put a report together: one HTML file that asks the network for nothing.

Data reach the page as a block of JSON in which "<" is written \\u003c, and page.js shows them as
text. A Content-Security-Policy lets no script run but that one, by its hash. Host only.
"""

import base64
import hashlib
import json
from datetime import datetime
from html import escape
from importlib.resources import files

from gemma_cot.report.diagnosis import diagnose
from gemma_cot.report.gather import STAGES, RunFiles
from gemma_cot.report.microscope import DECIMALS, view_of, views_within
from gemma_cot.report.panels import figures, readouts
from gemma_cot.report.sections import findings_html, record_html, side_by_side, stages_html
from gemma_cot.traces import read_trace

TRACE_BYTES = 2_500_000  # of a report that traces may take
RELOAD_SECONDS = 10


def report_html(run: RunFiles, live: bool = False) -> str:
    """Return the report of a run; live: the page loads itself anew now and then."""
    views = views_within(run.folder, run.traced, run.config, TRACE_BYTES)
    sections = [
        ("Diagnosis", findings_html(diagnose(run))),
        ("Base, SFT, GRPO", stages_html(run)),
        ("Curves", f'<div class="grid">{figures(run)}</div>'),
        ("The same prompts before and after", side_by_side(run)),
        ("Step microscope", microscope_html(run, views)),
        ("Record", record_html(run)),
    ]
    data = {"panels": readouts(run), **_microscope_data(run, views)}
    return _page(run, sections, data, live)


def step_html(run: RunFiles, step: int) -> str:
    """Return a page with the microscope alone, all groups of a traced step in it."""
    views = [view_of(read_trace(run.folder, step), run.config)]
    sections = [("Step microscope", microscope_html(run, views))]
    return _page(run, sections, _microscope_data(run, views), live=False)


def _microscope_data(run: RunFiles, views: list[dict]) -> dict:
    return {"steps": views, "decimals": DECIMALS, "run": str(run.folder)}


def embed(data: object) -> str:
    """Return JSON for a script block: nothing in it can end the block or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def microscope_html(run: RunFiles, views: list[dict]) -> str:
    """Return the controls of the microscope; page.js fills it."""
    if not views:
        return "<p>No step was traced (<code>--trace_every=20</code> traces every 20th).</p>"
    total = len(run.traced)
    note = f"{len(views)} of {total} traced GRPO steps are in this file."
    kinds = ("text", "log-prob", "ratio", "KL", "entropy", "clip", "mask")
    options = "".join(f'<option value="{kind}">{kind}</option>' for kind in kinds)
    steps = "".join(f"<option>{view['step']}</option>" for view in views)
    return (
        f"<p>What an update was given, as the trainer saw it before the update. {note}</p>"
        '<noscript><p>The microscope needs JavaScript.</p></noscript><div class="controls">'
        f'<label>step <select id="step">{steps}</select></label>'
        '<label>group <select id="group"></select></label>'
        f'<label>show <select id="kind">{options}</select></label>'
        '<button type="button" id="before">previous</button>'
        '<button type="button" id="after">next</button></div>'
        '<div id="microscope" aria-live="polite"></div>'
        '<div id="token" role="status" hidden></div>'
    )


def _page(run: RunFiles, sections: list[tuple[str, str]], data: dict, live: bool) -> str:
    """Return the whole page."""
    script, style = (
        files("gemma_cot.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.js", "page.css")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    names = [title for title, _ in sections]
    links = "".join(f'<li><a href="#s{i}">{escape(n)}</a></li>' for i, n in enumerate(names))
    body = "".join(
        f'<section id="s{i}" aria-labelledby="h{i}"><h2 id="h{i}">{escape(title)}</h2>{html}'
        "</section>"
        for i, (title, html) in enumerate(sections)
    )
    title = f"gemma_cot: {run.folder.resolve().name}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<a class="skip" href="#main">to the content</a><header><h1>{escape(title)}</h1>'
        f"{status_html(run, live)}<nav aria-label='sections'><ul>{links}</ul></nav></header>"
        f'<main id="main">{body}</main>'
        f'<script type="application/json" id="data">{embed(data)}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def status_html(run: RunFiles, live: bool) -> str:
    """Return the line that says how far a run is, with a bar while it goes."""
    planned = {stage: run.config.get(f"{stage}_steps", 0) for stage in STAGES[1:]}
    done = {stage: max((row["step"] for row in run.rows(stage)), default=0) for stage in planned}
    words = ", ".join(f"{stage} {done[stage]} of {planned[stage]} steps" for stage in planned)
    seconds = (run.summary.get("seconds") or {}).get("total")
    if run.finished:
        words = f"Finished: {words}" + (f", {seconds / 60:.0f} minutes." if seconds else ".")
        return f"<p>{words}</p>"
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    share = sum(done.values()) / max(1, sum(planned.values()))
    bar = f'<progress max="1" value="{share:.3f}" aria-label="steps done"></progress>'
    reload = (
        f'<label><input type="checkbox" id="reload" data-seconds="{RELOAD_SECONDS}" checked> '
        f"load anew every {RELOAD_SECONDS} s</label>"
    )
    return f"<p>Not finished: {words}. Written {written}. {bar} {reload * live}</p>"


