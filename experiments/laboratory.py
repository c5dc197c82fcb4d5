"""What the experiments share: short runs of the trainer's own stages, and plots of what they log.

Every experiment is a script beside this one, writes docs/NAME.json and docs/NAME.svg, and is what
one page of docs/ reports. They run on a CPU with the embedded tiny model, in minutes. With --check
a script writes nothing, and compares what it measures with docs/NAME.json instead.
"""

import argparse
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from gemma_cot.config import PRESETS, TrainConfig
from gemma_cot.curves import PANEL_HEIGHT, PANEL_WIDTH, X_TITLE, Panel, panel_svg
from gemma_cot.data import Encoded
from gemma_cot.evaluation import evaluate_batches, summarise
from gemma_cot.finished import saved_adapter
from gemma_cot.metrics import MetricsWriter, read_metrics
from gemma_cot.run import Run, open_run, prepare
from gemma_cot.train import train_grpo, train_sft
from gemma_cot.turn import first_adapter

DOCS = Path(__file__).parents[1] / "docs"
RUNS = Path(__file__).parents[1] / "runs" / "experiments"  # folders of the runs, to be looked at
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"  # what `store` writes into a page
QUIET = dict(sample_every=0, trace_every=0, checkpoint_every=0, overwrite=True)
# Stage 2 of the experiments: shorter completions, fewer of them and no KL, to be done in minutes.
SHORT = dict(max_completion_tokens=96, prompts_per_rollout=8, mini_batch=8, beta=0.0)
RATES = ("full_format_accuracy", "answer_accuracy", "process_score", "truncated_rate")


def settings(folder: Path, **changes) -> TrainConfig:
    """Return the tiny preset with `changes`, into `folder`."""
    return TrainConfig(**(PRESETS["tiny"] | QUIET | changes | {"output_dir": str(folder)}))


def begin(name: str, **changes) -> Run:
    """Return a run of the tiny preset with `changes`, its folder made: runs/experiments/NAME."""
    run = prepare(settings(RUNS / name, **changes))
    open_run(run)
    return run


def sft(run: Run, keep: tuple[int, ...] = ()) -> dict[int, object]:
    """Run stage 1. Returns {step: adapter after it} of the last step and of the steps in `keep`,
    which must be multiples of --checkpoint_every."""
    with jax.set_mesh(run.mesh), MetricsWriter(run.out) as writer, _silent():
        lora, _ = train_sft(run, writer, first_adapter(run))
        run.settle()
    steps = {step: saved_adapter(run.cfg, run.model_cfg, step)[0] for step in keep}
    return {step: run.place(kept) for step, kept in steps.items()} | {run.cfg.sft_steps: lora}


def starts(changes: dict, steps: tuple[int, ...]) -> dict[int, object]:
    """Return {SFT steps: adapter}, None for 0; from one SFT run of seed 0, which is made once and
    kept in runs/experiments/sft. Raises ValueError for one made with other code or settings."""
    changes = changes | dict(sft_steps=max(steps), checkpoint_every=50, keep_checkpoints=99)
    folder = RUNS / "sft"
    if (folder / "checkpoints" / str(max(steps))).exists():
        run = prepare(settings(folder, **changes | dict(resume=True, overwrite=False)))
    else:
        run = begin("sft", **changes)
        sft(run)
    adapters = {step: saved_adapter(run.cfg, run.model_cfg, step)[0] for step in steps if step}
    return {step: run.place(adapters[step]) if step else None for step in steps}


def grpo(run: Run, lora) -> tuple:
    """Run stage 2 from `lora`, None: from the base model. Returns (adapter, lines of metrics)."""
    with jax.set_mesh(run.mesh), MetricsWriter(run.out) as writer, _silent():
        fresh = first_adapter(run) if lora is None else lora
        lora, _ = train_grpo(run, writer, fresh, lora)
        run.settle()
    return lora, [row for row in read_metrics(run.out / "metrics.jsonl") if row["stage"] == "grpo"]


def rates(run: Run, lora, rows: list[Encoded], temperature: float = 0.0) -> dict:
    """Return the rates of an adapter on `rows` and their 95 % intervals, rounded."""
    with jax.set_mesh(run.mesh), _silent():
        parts = evaluate_batches(
            run.params, run.model_cfg, lora, run.tokenizer, rows, run.mesh, width=run.width,
            max_new_tokens=run.cfg.max_completion_tokens, batch=run.cfg.eval_batch,
            matcher=run.cfg.process_matcher, temperature=temperature,
        )  # fmt: skip
        summary = summarise([result for part in parts for result in part])
    found = {"n": summary["n"], "tokens": round(summary["mean_completion_tokens"], 2)}
    for name in RATES:
        found[name] = round(summary[name], 4)
        found[f"{name}_interval"] = [round(end, 4) for end in summary[f"{name}_interval"]]
    return found


def series(lines: list[dict], metric: str) -> list[float]:
    """Return a metric of every step, rounded to what a plot can show."""
    return [round(line[metric], 4) for line in lines]


def side_by_side(panels: list[Panel], rows: list[dict], title: str, x_title: str = "") -> str:
    """Return one SVG with the panels in a row, drawn by `gemma_cot.curves`.

    x_title: what stands under the x axis where it is not the steps of a run.
    """
    placed = []
    for i, panel in enumerate(panels):
        inner = panel_svg(panel, rows)
        inner = inner.replace(X_TITLE, x_title or X_TITLE)
        placed.append(re.sub(r"^<svg ", f'<svg x="{i * PANEL_WIDTH}" ', inner))
    width = PANEL_WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {PANEL_HEIGHT}" '
        f'width="{width}" height="{PANEL_HEIGHT}">\n'
        f"<title>{title}</title>\n{''.join(placed)}</svg>\n"
    )


def publish(
    name: str,
    page: str,
    measure: Callable[[], dict],
    draw: Callable[[dict], str],
    table: Callable[[dict], str],
) -> None:
    """Measure, and store the result; or, with --check, end with exit code 1 where the result is not
    the stored one. Another processor or another JAX rounds otherwise, and samples other tokens.
    """
    parser = argparse.ArgumentParser(description=f"The experiment behind docs/{page}.md.")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing to docs/")
    if not parser.parse_args().check:
        result = measure()
        store(name, page, result, draw(result), table(result))
        return
    global RUNS
    with tempfile.TemporaryDirectory() as folder:
        RUNS = Path(folder)  # an older run must not be gone on with
        result = json.loads(json.dumps(measure()))
    stored = json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))
    say(table(result))
    if result != stored:
        sys.exit(f"docs/{name}.json: must be what this code measures, got\n{table(stored)}\n"
                 f"run experiments/{name}.py, and say on the page what it shows")  # fmt: skip


def store(name: str, page: str, result: dict, svg: str, text: str) -> None:
    """Write docs/NAME.json and docs/NAME.svg, put `text` into docs/PAGE.md, and print it."""
    (DOCS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (DOCS / f"{name}.svg").write_text(svg, encoding="utf-8")
    path = DOCS / f"{page}.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    say(text)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def markdown_table(names: tuple[str, ...], rows: list[tuple]) -> str:
    """Return a table of Markdown."""
    head, *lines = (f"| {' | '.join(map(str, line))} |" for line in (names, *rows))
    return "\n".join([head, "|---" * len(names) + "|", *lines])


def percent(share: float) -> str:
    """Return "12.5 %"."""
    return f"{100 * share:.1f} %"


@contextlib.contextmanager
def _silent():
    """Send what the trainer prints to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
