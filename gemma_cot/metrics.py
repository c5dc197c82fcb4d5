"""What a run reports: metrics.jsonl, TensorBoard and Weights & Biases, the one line a step prints.

Host only; knows no model and no flag. `METRICS` is the glossary that the README prints. The JSONL
file is the record (a resumed run drops what it will redo); the others are a convenience, made when
their packages are installed. Weights & Biases stays offline unless WANDB_MODE says otherwise.
"""

import importlib
import importlib.util
import json
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

METRICS = {
    "loss": "Minimised: SFT nats a token; GRPO on-policy beta * KL if rows weigh alike, not CISPO.",
    "grad_norm": "Euclidean norm of the whole gradient, before clipping.",
    "skipped": "Whether loss or gradient was not finite and the update left out: 1, else 0.",
    "learning_rate": "Learning rate of this update.",
    "tokens": "Completion tokens that carried loss in this step, over all devices.",
    "reward": "Mean over completions of the weighted sum of all reward parts.",
    "reward_std": "Standard deviation of the reward within a group, mean over groups.",
    "reward_format": "Share of completions in the <reasoning>, <answer> form (unweighted).",
    "reward_process": "Mean of 0.2 a checkpoint found in the reasoning, at most 1 (unweighted).",
    "reward_outcome": "Share of completions whose final answer is right (unweighted).",
    "reward_code": "Share of completions whose code passes its tests in the sandbox (unweighted).",
    "reward_length": "Mean overlong penalty, 0 to -1 (unweighted).",
    "reward_repetition": "Mean of minus the share of repeated token runs (unweighted).",
    "none_process": "Share of completions without checkpoints to look for, only where above 0.",
    "none_outcome": "Share of completions without a gold answer, only where above 0.",
    "kl": "Estimated KL divergence of the policy from the reference policy, nats a token.",
    "entropy": "Entropy of the policy's next-token distribution, nats a token; 0 is certainty.",
    "ratio_max": "Largest probability ratio of policy to old policy; 1 when on-policy.",
    "clip_share": "Share of tokens with a clipped ratio; their reward then moves CISPO only.",
    "completion_tokens": "Mean length of a completion in tokens, its stop token included.",
    "decode_useful": "Share of the sampler's decode steps that went into rows not yet ended.",
    "truncated_rate": "Share of completions cut off at the length limit, without a stop token.",
    "repetition": "Share of runs of 8 tokens that repeat an earlier one, mean over completions.",
    "signal_share": "Share of groups whose rewards differ; the others teach nothing.",
    "rollouts": "Rollouts that were sampled for these updates (dynamic sampling).",
    "wasted_tokens": "Share of sampled tokens that enter no update, for want of signal (dynamic).",
    "reserve_groups": "Groups with signal left over for the next update (dynamic sampling).",
    "filled_groups": "Groups without signal that fill up an update for want of others (dynamic).",
    "logp_drift_max": "Largest |log-prob in the sampler - log-prob in the trainer| of a token.",
    "logp_drift_mean": "Mean of that difference; float noise only, below 1e-4 in float32.",
    "tokens_per_second": "Completion tokens (`tokens`) per second of the whole step.",
    "memory_gib": "Most memory so far in GiB: of the fullest device or, on a CPU, of the process.",
    "seconds_rollout": "Seconds spent sampling completions, and starting their log-probs.",
    "seconds_reward": "Seconds spent scoring completions on the host.",
    "seconds_update": "Seconds spent on log-probs, gradients and the optimiser.",
}

KEPT_ROWS = 256  # of the latest lines, for alarms

_SFT_LINE = (
    "loss {loss:.3g} (nats a token)",
    "grad {grad_norm:.2g}",
    "lr {learning_rate:.1e}",
    "{speed} tok/s",
)
_GRPO_LINE = (
    "reward {reward:.2f} (format {reward_format:.2f} process {reward_process:.2f} "
    "outcome {reward_outcome:.2f})",
    "kl {kl:.2g}",
    "len {completion_tokens:.0f}",
    "repeat {repetition:.0%}",
    "cut {truncated_rate:.0%}",
    "signal {signal_share:.0%} of groups",
    "loss {loss:.2g}{note}",
    "grad {grad_norm:.2g}",
    "{speed} tok/s",
    "rollout {seconds_rollout:.2f}s reward {seconds_reward:.2f}s update {seconds_update:.2f}s",
)
_ON_POLICY = " (on-policy: watch grad)"  # a surrogate near 0 has a gradient that is not


class MetricsWriter:
    """Append steps to `run/metrics.jsonl`, `run/tensorboard/` and `run/wandb/`.

    Tags are STAGE/NAME. Lines that the disk does not take are kept and tried again with the next.
    `last` is what was last written, `rows` the latest lines. A context manager; close() is safe to
    call twice.
    """

    def __init__(self, run: str | Path, write: bool = True):
        run = Path(run)
        if write:
            run.mkdir(parents=True, exist_ok=True)
        path = run / "metrics.jsonl" if write else os.devnull
        self.rows = deque(read_metrics(run / "metrics.jsonl"), maxlen=KEPT_ROWS)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._unwritten, self._warned, self.last = b"", False, {}
        self._add_scalar, self._close_events = _open_events(run / "tensorboard" if write else None)
        self._log_wandb, self._close_wandb = _open_wandb(run if write else None)

    def write(self, stage: str, step: int, metrics: dict) -> None:
        """Append one line and flush it: `stage`, `step` and every metric as a float.

        Values are anything float() takes (0-d arrays too). NaN and infinities become null, as JSON
        has no word for them. Raises TypeError or ValueError for what is not one number.
        """
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self.rows.append({"stage": stage, "step": int(step), **finite})
        line = json.dumps(self.rows[-1], allow_nan=False)
        self._unwritten, self.last = self._unwritten + line.encode() + b"\n", values
        self._flush()
        with self._conveniences():
            for name, value in values.items():
                self._add_scalar(f"{stage}/{name}", value, int(step))
            tagged = {f"{stage}/{name}": v for name, v in (values | {"step": step}).items()}
            self._log_wandb(tagged)

    @contextmanager
    def _conveniences(self) -> Iterator[None]:
        """Do without TensorBoard and W&B from the first line on that the disk does not take."""
        try:
            yield
        except OSError as error:
            self._add_scalar = self._log_wandb = self._close_wandb = lambda *_: None
            self._close_events = lambda: None
            warnings.warn(f"no more TensorBoard and W&B files: {error.strerror}", stacklevel=4)

    def _flush(self) -> None:
        """Write what there is; warn once where the disk takes none."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                line = f"metrics.jsonl: takes no lines, got {error.strerror}; they are kept"
                warnings.warn(f"{line} in memory until it does", stacklevel=3)
            self._warned = True

    def close(self) -> None:
        if not self._file.closed:
            self._flush()
            self._file.close()
            with self._conveniences():
                self._close_events()
                self._close_wandb()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict]:
    """Return the rows of a metrics.jsonl, [] when there is no file. A torn last line is left out.

    Raises ValueError, with the line number, for any other line that is not a step.
    """
    if not Path(path).exists():
        return []
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # after the last newline: nothing, or torn
        try:
            row = json.loads(line)
            row["stage"], row["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}:{number}: a line must be one JSON object with stage and step, got "
                f"{line[:60]!r}; delete the line"
            ) from error
        rows.append(row)
    return rows


def truncate_after(path: str | Path, stage_steps: dict[str, int]) -> int:
    """Keep the rows up to step `stage_steps[stage]` of each stage; return how many others went.

    Call it before a resumed run appends, with the last step of each stage that the checkpoint
    contains: {"sft": 500, "grpo": 40}. Rows of a stage that is not named go, and a torn last line
    goes uncounted. The file is replaced by one rename. Raises like `read_metrics`.
    """
    rows = read_metrics(path)
    kept = [row for row in rows if row["step"] <= stage_steps.get(row["stage"], -1)]
    if Path(path).exists():
        fresh = Path(path).with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(fresh, path)
    return len(rows) - len(kept)


def _open_events(folder: Path | None) -> tuple[Callable, Callable]:
    """Return (add_scalar(tag, value, step), close); both do nothing without TensorBoard."""
    for opener in (_open_tensorboardx, _open_tensorboard) if folder else ():
        try:
            return opener(folder)
        except ImportError:
            continue
        except Exception as error:  # an installed TensorBoard can break on its protobuf alone
            warnings.warn(f"no TensorBoard files, it fails to load: {error!r}", stacklevel=3)
    return lambda tag, value, step: None, lambda: None


def _open_tensorboardx(folder: Path) -> tuple[Callable, Callable]:
    writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder))
    return writer.add_scalar, writer.close


def _open_tensorboard(folder: Path) -> tuple[Callable, Callable]:
    """Use the `tensorboard` package's own event writer, which needs no TensorFlow."""
    module = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    event_pb2 = importlib.import_module("tensorboard.compat.proto.event_pb2")
    summary_pb2 = importlib.import_module("tensorboard.compat.proto.summary_pb2")
    writer = module.EventFileWriter(str(folder))

    def add_scalar(tag: str, value: float, step: int) -> None:
        scalar = summary_pb2.Summary.Value(tag=tag, simple_value=value)
        summary = summary_pb2.Summary(value=[scalar])
        writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    return add_scalar, writer.close


def _open_wandb(run: Path | None) -> tuple[Callable, Callable]:
    """Return (log(values by "STAGE/NAME"), close); both do nothing without Weights & Biases.

    Each stage has its own x axis, "STAGE/step". WANDB_MODE: offline (the default here: files that
    `wandb sync` sends), online, disabled.
    """
    mode, nothing = os.environ.get("WANDB_MODE", "offline"), (lambda values: None, lambda: None)
    if run is None or mode == "disabled" or not importlib.util.find_spec("wandb"):
        return nothing
    try:
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(console="off", silent=True, quiet=True)
        config = json.loads((run / "config.json").read_text()) if run.exists() else {}
        opened = wandb.init(
            project="gemma_cot", name=run.resolve().name, dir=str(run), mode=mode, config=config,
            settings=settings,
        )  # fmt: skip
        for stage in ("sft", "grpo"):
            opened.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        return opened.log, opened.finish
    except Exception as error:  # no key, no network, a broken installation: never the run's end
        warnings.warn(f"no Weights & Biases, it fails to start: {error!r}", stacklevel=3)
        return nothing


def times(
    rollouts: list[tuple[float, float]], update: float, tokens: float, updates: int
) -> dict[str, float]:
    """Return the time metrics of each of so many updates: its share of `update`, the seconds that
    all of them took, and of the rollouts' (sampling, scoring) seconds."""
    rollout, reward = (sum(part) / updates for part in zip(*rollouts, strict=True))
    update /= updates
    return {
        "seconds_rollout": rollout,
        "seconds_reward": reward,
        "seconds_update": update,
        "tokens_per_second": tokens / (rollout + reward + update),
    }


def step_line(stage: str, step: int, total_steps: int, metrics: dict) -> str:
    """Return the one line a step prints; words whose metric is absent are left out."""
    values = {name: float(value) for name, value in metrics.items()}
    words = values | {"note": _ON_POLICY if abs(values.get("ratio_max", 0) - 1) < 1e-3 else ""}
    if "tokens_per_second" in values:
        speed = values["tokens_per_second"]
        words["speed"] = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
    parts = [f"{stage}  {step}/{total_steps}"]
    for template in _SFT_LINE if stage == "sft" else _GRPO_LINE:
        try:
            parts.append(template.format_map(words))
        except KeyError:
            continue
    return "  ".join(parts)
