"""Say what a run did in one HTML file that needs no network.

    python -m gemma_cot.report --run=runs/tiny                # runs/tiny/report.html
    python -m gemma_cot.report --run=runs/tiny --step=40      # all groups of that traced step
    python -m gemma_cot.report --run=runs/tiny --watch        # write it anew while the run goes

No device is needed.
"""

import time
from pathlib import Path

from absl import flags

from gemma_cot import cli
from gemma_cot.report.gather import RunFiles, gather
from gemma_cot.report.page import RELOAD_SECONDS, report_html, step_html
from gemma_cot.results import write_whole

FLAGS = flags.FLAGS


def define_report_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("run", "", "Folder of a run, finished or going.")
    flags.DEFINE_string(
        "output", "", "HTML file, or a folder for report.html or step_N.html; empty: the run's."
    )
    flags.DEFINE_integer("step", None, "Only the microscope, with all groups of this traced step.")
    flags.DEFINE_bool("watch", False, "Write the report anew until the run has ended.")


def write_report(output: Path, live: bool) -> RunFiles:
    """Write the report of --run once; return what it was made of."""
    run = gather(FLAGS.run)
    write_whole(output, report_html(run, live))
    return run


def watch(output: Path) -> None:
    """Write the report anew whenever metrics.jsonl or the evaluations change, until the end."""
    before, run = None, None
    while run is None or not run.finished:
        state = _state()
        if state != before:
            run, before = write_report(output, live=True), state
            last = run.metrics[-1] if run.metrics else {"stage": "no step", "step": 0}
            clock = time.strftime("%H:%M:%S")
            print(f"{clock}  {last['stage']} {last['step']}  {output}", flush=True)
        if not run.finished:
            time.sleep(RELOAD_SECONDS / 2)


def _state() -> tuple:
    """Return what changes when the run has gone on: sizes and times of the files it appends to."""
    folder = Path(FLAGS.run)
    evaluations = sorted(folder.glob("eval/*.jsonl"))
    paths = [folder / "metrics.jsonl", folder / "summary.json", *evaluations]
    return tuple((path.stat().st_size, path.stat().st_mtime) for path in paths if path.exists())


def main() -> None:
    """Write the report that the flags ask for."""
    if not FLAGS.run:
        raise ValueError("--run: must name the folder of a run, got nothing; set --run=runs/tiny")
    if FLAGS.watch and FLAGS.step is not None:
        raise ValueError("--watch and --step: at most one may be set, got both; drop one")
    name = "report.html" if FLAGS.step is None else f"step_{FLAGS.step}.html"
    output = Path(FLAGS.output or FLAGS.run)
    if not FLAGS.output or FLAGS.output.endswith("/") or output.is_dir():
        output /= name
    if FLAGS.step is not None:
        write_whole(output, step_html(gather(FLAGS.run), FLAGS.step))
    elif FLAGS.watch:
        watch(output)
    else:
        write_report(output, live=False)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    define_report_flags()
    cli.run(main)
