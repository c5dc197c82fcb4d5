"""Read what a run wrote: the files of its folder as one record. A run may still be going.

Host only. Everything but config.json may be missing; what is missing is left out of the report.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from gemma_cot.evaluation import compare_stages, summarise
from gemma_cot.hf_config import read_json
from gemma_cot.metrics import read_metrics
from gemma_cot.results import read_results
from gemma_cot.traces import traced_steps

STAGES = ("base", "sft", "grpo")


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds."""

    folder: Path
    config: dict  # config.json: every setting
    metrics: list[dict]  # the rows of metrics.jsonl
    summary: dict  # summary.json, {} before the run's end
    environment: dict  # environment.json: versions, devices, data; {} where there is none
    results: dict[str, list[dict]]  # stage -> its evaluated rows, a completion each
    stages: dict[str, dict]  # stage -> rates with intervals
    comparisons: dict[str, dict]  # "BEFORE -> AFTER, score" -> paired test
    traced: list[int]  # GRPO steps with a trace

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    def rows(self, stage: str) -> list[dict]:
        """Return the metrics of the steps of a stage."""
        return [row for row in self.metrics if row["stage"] == stage]

    def series(self, metric: str, stage: str = "grpo") -> list[float]:
        """Return the finite values of a metric over the steps of a stage."""
        values = [row.get(metric) for row in self.rows(stage)]
        return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]


def gather(folder: str | Path) -> RunFiles:
    """Read a run's folder. Raises ValueError, one line, where it is none or a file is broken."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--run: must be the folder of a run, got {folder} without config.json; point to what "
            "train wrote (its --output_dir)"
        )
    config = read_json(folder / "config.json")
    summary = _optional(folder / "summary.json")
    paths = {stage: folder / "eval" / f"{stage}.jsonl" for stage in STAGES}
    there = {stage: path for stage, path in paths.items() if path.is_file()}
    results = {stage: read_results(path, torn_is_out=True) for stage, path in there.items()}
    stages = summary.get("stages") or {s: summarise(rows) for s, rows in results.items()}
    return RunFiles(
        folder=folder,
        config=config,
        metrics=read_metrics(folder / "metrics.jsonl"),
        summary=summary,
        environment=_optional(folder / "environment.json"),
        results=results,
        stages={stage: stages[stage] for stage in STAGES if stages.get(stage)},
        comparisons=summary.get("comparisons") or compare_stages(results),
        traced=traced_steps(folder),
    )


def _optional(path: Path) -> dict:
    """Read a JSON file, {} where there is none. Raises ValueError for a broken one."""
    return read_json(path) if path.is_file() else {}
