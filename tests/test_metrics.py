"""metrics.jsonl survives kills and non-finite numbers; the line a step prints reads well."""

import errno
import io
import json
import sys
import time
import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot import metrics

GRPO = {
    "reward": 1.41,
    "reward_format": 0.98,
    "reward_process": 0.32,
    "reward_outcome": 0.61,
    "kl": 0.0123,
    "completion_tokens": 71.4,
    "truncated_rate": 0.0,
    "signal_share": 0.62,
    "loss": 0.00098,
    "ratio_max": 1.0,
    "grad_norm": 0.314,
    "tokens_per_second": 3100.0,
    "seconds_rollout": 0.52,
    "seconds_reward": 0.011,
    "seconds_update": 0.438,
}


def write_run(run, rows):
    with metrics.MetricsWriter(run) as writer:
        for stage, step in rows:
            writer.write(stage, step, {"loss": step / 2})


def test_every_metric_is_explained_in_one_sentence():
    assert set(GRPO) < set(metrics.METRICS)
    for name, meaning in metrics.METRICS.items():
        assert meaning[0].isupper() and meaning.endswith("."), name
        assert ". " not in meaning and len(meaning) <= 90, name


def test_rows_are_plain_floats_and_on_disk_at_once(tmp_path):
    writer = metrics.MetricsWriter(tmp_path / "new" / "run")
    writer.write("sft", jnp.asarray(3), {"loss": jnp.float32(0.5), "tokens": np.int64(7)})
    text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()  # before close
    assert text == '{"stage": "sft", "step": 3, "loss": 0.5, "tokens": 7.0}\n'
    writer.close()
    writer.close()


def test_non_finite_numbers_become_null(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write("grpo", 1, {"a": np.nan, "b": np.inf, "c": -jnp.inf, "d": 0.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line
    assert json.loads(line) == {
        "stage": "grpo", "step": 1, "a": None, "b": None, "c": None, "d": 0.0
    }  # fmt: skip


def test_what_is_not_a_number_is_refused_and_leaves_no_line(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        for value in (np.ones(2), "high", None):
            with pytest.raises((TypeError, ValueError)):
                writer.write("sft", 1, {"loss": value})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_resume_leaves_no_doubled_and_no_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(tmp_path, [("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2), ("grpo", 3)])
    with open(path, "a") as file:
        file.write('{"stage": "grpo", "step": 4, "lo')  # killed in the middle of a line
    assert [row["step"] for row in metrics.read_metrics(path)] == [1, 2, 1, 2, 3]
    assert metrics.truncate_after(path, {"sft": 2, "grpo": 2}) == 1  # grpo 3; the torn one is none
    write_run(tmp_path, [("grpo", 3), ("grpo", 4)])
    got = [(row["stage"], row["step"], row["loss"]) for row in metrics.read_metrics(path)]
    assert got == [
        ("sft", 1, 0.5),
        ("sft", 2, 1.0),
        ("grpo", 1, 0.5),
        ("grpo", 2, 1.0),
        ("grpo", 3, 1.5),
        ("grpo", 4, 2.0),
    ]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["metrics.jsonl"]


def test_truncation_to_an_earlier_stage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(tmp_path, [("sft", 0), ("sft", 1), ("grpo", 0)])
    assert metrics.truncate_after(path, {"sft": 0}) == 2
    assert [(row["stage"], row["step"]) for row in metrics.read_metrics(path)] == [("sft", 0)]
    assert metrics.truncate_after(path, {}) == 1
    assert path.read_text() == ""
    assert metrics.truncate_after(tmp_path / "absent.jsonl", {"sft": 1}) == 0
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize("bad", ["{", "[1]", '"word"', '{"stage": "sft"}', ""])
def test_a_broken_line_in_the_middle_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    good = '{"stage": "sft", "step": 1}\n'
    path.write_text(good + bad + "\n" + good)
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: a line must be one JSON object"):
        metrics.read_metrics(path)
    assert path.read_text().count("\n") == 3  # nothing was touched


def test_sft_line():
    values = {"loss": 0.4123, "grad_norm": 0.314, "learning_rate": 2e-3, "tokens_per_second": 14210}
    assert metrics.step_line("sft", 120, 500, values) == (
        "sft  120/500  loss 0.412 (nats a token)  grad 0.31  lr 2.0e-03  14.2k tok/s"
    )


def test_grpo_line_says_what_an_on_policy_loss_is_worth():
    line = metrics.step_line("grpo", 37, 100, GRPO)
    assert line == (
        "grpo  37/100  reward 1.41 (format 0.98 process 0.32 outcome 0.61)  kl 0.012  len 71  "
        "cut 0%  signal 62% of groups  loss 0.00098 (on-policy: watch grad)  "
        "grad 0.31  3.1k tok/s  rollout 0.52s reward 0.01s update 0.44s"
    )
    assert "\n" not in line and len(line) <= 220
    off_policy = metrics.step_line("grpo", 38, 100, GRPO | {"ratio_max": 1.3})
    assert "loss 0.00098  grad" in off_policy


def test_lines_leave_out_what_they_are_not_given():
    assert metrics.step_line("sft", 1, 2, {"loss": 1.0}) == "sft  1/2  loss 1 (nats a token)"
    assert metrics.step_line("grpo", 1, 2, {}) == "grpo  1/2"
    line = metrics.step_line("sft", 1, 2, {"loss": np.nan, "tokens_per_second": 85.4})
    assert line == "sft  1/2  loss nan (nats a token)  85 tok/s"


class FakeWriter:
    """Stands in for tensorboardX.SummaryWriter, which CI does not install."""

    seen: list = []

    def __init__(self, folder):
        self.seen.append(folder)

    def add_scalar(self, tag, value, step):
        self.seen.append((tag, value, step))

    def close(self):
        self.seen.append("closed")


def test_tensorboard_files_are_written_when_it_is_installed(tmp_path, monkeypatch):
    fake = types.SimpleNamespace(SummaryWriter=FakeWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    monkeypatch.setattr(FakeWriter, "seen", [])
    write_run(tmp_path, [("sft", 4)])
    assert FakeWriter.seen == [str(tmp_path / "tensorboard"), ("sft/loss", 2.0, 4), "closed"]


def test_tensorboard_own_event_writer(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # import raises ImportError
    write_run(tmp_path, [("sft", 4), ("grpo", 5)])
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = [event for event in EventFileLoader(str(path)).Load() if event.step]
    assert [(event.step, event.summary.value[0].tag) for event in events] == [
        (4, "sft/loss"),
        (5, "grpo/loss"),
    ]


def test_no_or_broken_tensorboard_never_stops_a_run(tmp_path, monkeypatch):
    for name in ("tensorboardX", "tensorboard", "tensorboard.summary.writer.event_file_writer"):
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not installed is nothing to warn of
        write_run(tmp_path, [("sft", 1)])
    assert not (tmp_path / "tensorboard").exists()

    def broken(folder):
        raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=broken))
    with pytest.warns(UserWarning, match="no TensorBoard files.*Descriptors"):
        write_run(tmp_path, [("sft", 2)])
    assert len(metrics.read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_updates_share_the_seconds_of_what_they_came_from():
    got = metrics.times([(3.0, 0.3), (6.0, 0.6)], 9.0, 560.0, 3)
    want = {"seconds_rollout": 3.0, "seconds_reward": 0.3, "seconds_update": 3.0}
    assert got == pytest.approx(want | {"tokens_per_second": 560 / 6.3})


def test_weights_and_biases_gets_every_step_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.json").write_text('{"seed": 7}')
    write_run(tmp_path, [("sft", 1), ("grpo", 1)])
    (stored,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    latest = time.monotonic() + 60  # wandb's own process writes, on a busy machine later
    while b"grpo/step" not in (content := stored.read_bytes()) and time.monotonic() < latest:
        time.sleep(0.1)
    assert b"sft/loss" in content and b"grpo/step" in content and b"seed" in content
    assert len(metrics.read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_weights_and_biases_that_cannot_start_is_only_warned_of(tmp_path, monkeypatch):
    broken = types.ModuleType("wandb")  # has none of its functions
    broken.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.warns(UserWarning, match="no Weights & Biases, it fails to start: AttributeError"):
        write_run(tmp_path, [("sft", 1)])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_run(tmp_path, [("sft", 2)])
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


class FullDisk(io.RawIOBase):
    """A file that takes `room` bytes, and then none until there is more."""

    def __init__(self):
        self.room, self.content = 0, b""

    def write(self, data) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = bytes(data[: self.room])
        self.room, self.content = self.room - len(taken), self.content + taken
        return len(taken)


def test_lines_that_the_disk_does_not_take_are_written_when_it_does(tmp_path):
    writer, disk = metrics.MetricsWriter(tmp_path), FullDisk()
    writer._file = disk
    writer._add_scalar = lambda *_: disk.write(b"event")  # TensorBoard meets the same disk
    disk.room = 30
    with pytest.warns(UserWarning) as warned:
        for step in range(1, 4):
            writer.write("grpo", step, {"reward": step})
    assert [str(w.message).partition(":")[0] for w in warned] == [
        "metrics.jsonl", "no more TensorBoard and W&B files"
    ]  # fmt: skip
    assert len(disk.content) == 30
    disk.room = 10**6
    writer.write("grpo", 4, {"reward": 4})
    rows = [json.loads(line) for line in disk.content.splitlines()]
    assert [(row["step"], row["reward"]) for row in rows] == [(n, n) for n in range(1, 5)]
