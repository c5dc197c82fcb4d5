"""Two processes of two devices, on loopback, give the numbers of one process of four, bit for bit;
what one of them cannot do ends both with one line."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import free_port, numbers, write_model, write_rows

from gemma_cot import hosts
from gemma_cot.results import read_results

REWARD = """
import os
rollouts = 0

def short(prompts, completions, **columns):
    global rollouts
    rollouts += len(completions) == 4  # the share of four prompts times two; canaries are fewer
    if "BREAKS" in os.environ and rollouts == 2 and len(completions) == 4:
        raise RuntimeError("broke on purpose")
    return [1 / (1 + len(text)) for text in completions]
"""


def start(arguments: list[str], devices: int, **environment: str) -> subprocess.Popen:
    """Start a Python process with so many CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    fixed = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], env=os.environ | fixed | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ends(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Return (exit code, stdout, stderr) of processes; none outlives the test."""
    try:
        return [(p.returncode, *told) for p in processes if (told := p.communicate(timeout=900))]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A model of one layer, twelve short rows: one SFT and four GRPO steps in two rollouts."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "hosts_reward.py").write_text(REWARD)
    write_model(folder / "model")
    write_rows(folder)
    given = {
        "model": folder / "model", "train_data": folder / "train.jsonl",
        "eval_data": folder / "eval.jsonl", "reward": "hosts_reward:short=0.5",
        "max_completion_tokens": 40, "lora_rank": 4, "sft_steps": 1, "sft_batch": 4,
        "grpo_steps": 4, "num_generations": 2, "prompts_per_rollout": 4, "mini_batch": 2,
        "micro_batch": 1, "eval_limit": 7, "checkpoint_every": 2, "trace_every": 2,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items()]


def processes(count: int, flags: list[str], out: Path, breaks: int = -1) -> list[subprocess.Popen]:
    """Start `gemma_cot.train` as `count` processes on four devices in all.

    breaks: the process in which the user's reward raises.
    """
    port, source = free_port(), os.path.dirname(flags[0].partition("=")[2])
    where = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    return [
        start(
            ["-m", "gemma_cot.train", *flags, f"--output_dir={out}",
             f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"],
            4 // count, PYTHONPATH=where, **({"BREAKS": "1"} if i == breaks else {}),
        )
        for i in range(count)
    ]  # fmt: skip


def test_two_processes_give_the_numbers_of_one_and_resume(flags, tmp_path, request):
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = processes(1, flags, one)
    request.addfinalizer(alone.kill)
    broken = ends(*processes(2, flags, two, breaks=1))
    for code, _, err in broken:
        assert code == 2 and "RuntimeError: broke on purpose" in err.splitlines()[-1]
    assert "error: process 1: reward function short" in broken[0][2]
    assert "saved. Go on with: python -m gemma_cot.train --resume" in broken[0][1]
    assert [(row["stage"], row["step"]) for row in numbers(two)] == [
        ("sft", 1), ("grpo", 1), ("grpo", 2)
    ]  # fmt: skip
    first, second = ends(*processes(2, [*flags, "--resume"], two))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "base -> sft, answer" in first[1]
    assert "base -> sft" not in second[1]  # process 0 alone reports
    assert ends(alone)[0][0] == 0
    assert len(numbers(one)) == 5 and numbers(two) == numbers(one)
    for stage in ("base", "sft", "grpo"):
        results = read_results(two / f"eval/{stage}.jsonl")
        assert len(results) == 7 and results == read_results(one / f"eval/{stage}.jsonl")
    traces = [f"traces/{step}.json.gz" for step in (1, 2, 4)]
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", *traces):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    where = os.path.dirname(flags[0].partition("=")[2])
    ((code, out, err),) = ends(
        start(["-m", "gemma_cot.generate", f"--replay={two}:4:2"], 4, PYTHONPATH=where)
    )
    assert code == 0 and "the same tokens" in err, out + err


PAIR = """
import dataclasses, sys
from pathlib import Path
import jax, numpy as np
from gemma_cot import hosts
from gemma_cot.axes import make_mesh, replicated, sharding_of
from gemma_cot.config import PRESETS, TrainConfig
from gemma_cot.run import prepare

port, me, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
hosts.join(f"127.0.0.1:{port}", 2, me)
mesh = make_mesh()
x_BT = np.arange(16.0, dtype=np.float32).reshape(8, 2)
cut = hosts.place(x_BT, sharding_of("BT", mesh))
assert not cut.is_fully_addressable
assert (hosts.own(cut) == x_BT[hosts.share(8)]).all() and len(hosts.own(cut)) == 4
assert (hosts.fetch({"x": cut})["x"] == x_BT).all()
assert (hosts.own(hosts.place(x_BT, replicated(mesh))) == x_BT).all()
assert hosts.gather(lambda: {"me": me, "text": "x" * 100 * me}) == [
    {"me": 0, "text": ""}, {"me": 1, "text": "x" * 100}]
assert hosts.agreed(lambda: 7 if me == 0 else 1 / 0) == 7

def told(work):
    try:
        hosts.together(work)
    except ValueError as error:
        print("told:", error, flush=True)

def fails_within():
    if me == 1:
        raise KeyError("within")
    hosts.agreed(lambda: 1)

try:
    told(fails_within)
except KeyError:
    print("told: process 1: 'within'", flush=True)
cfg = TrainConfig(**PRESETS["tiny"] | dict(output_dir=out))
uneven = {"mesh": "4x1", "prompts_per_rollout": 6, "mini_batch": 2, "micro_batch": 1}
for change in ({"seed": me}, {"mesh": "1x4"}, {"mesh": "3x1"}, uneven,
               {"reward": ("hosts_none:f",) if me else ()}):
    told(lambda: prepare(dataclasses.replace(cfg, **change)))
if me == 1:
    hosts.leave(9)
try:
    hosts.gather(lambda: me)
except Exception as error:
    print("told:", type(error).__name__, flush=True)
    hosts.leave(7)
"""


def test_what_two_processes_hold_tell_each_other_and_refuse(tmp_path):
    port = str(free_port())
    pair = [start(["-c", PAIR, port, str(i), str(tmp_path / "run")], 2) for i in range(2)]
    first, second = ends(*pair)
    # Gloo's threads tell of their connections at the same time, in lines that may be torn.
    lines = [
        [line.removeprefix("told: ") for line in output.splitlines() if line.startswith("told: ")]
        for _, output, _ in (first, second)
    ]
    assert second[0] == 9, second[2]
    assert first[0] == 7, first[2]  # its peer had gone: not left waiting
    assert lines[0].pop() == "JaxRuntimeError"
    words = [
        "process 1: 'within'",
        "seed: must be the same in all processes, got 0 in process 0, 1 in process 1",
        "--mesh=1x4: the model axis must divide the devices of a process, as many in each",
        "--mesh=3x1: must multiply to the 4 devices present",
        "--prompts_per_rollout: must be divisible by 4 (the mesh's 4 data devices), got 6",
        "process 1: --reward 'hosts_none:f' - the module must be importable",
    ]
    for told in lines:
        assert len(told) == len(words)
        assert all(word.removeprefix("process 1: ") in line
                   for word, line in zip(words, told, strict=True)), told  # fmt: skip
    assert all(word in line for word, line in zip(words, lines[0], strict=True)), lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (("", 2, 0), "--num_processes: must be 1 without --coordinator, got 2"),
        (("here", 2, 0), "--coordinator: must be HOST:PORT or auto, got 'here'"),
        (("127.0.0.1:1234", 2, 2), "--process_id: must be 0 to --num_processes - 1 = 1, got 2"),
    ],
)
def test_addresses_and_numbers_that_cannot_be(where, words):
    with pytest.raises(ValueError, match=words):
        hosts.join(*where)
    assert not hosts.are_several()


def test_where_nobody_comes_and_where_the_port_is_taken():
    """Process 1 finds no coordinator; process 0 cannot be one."""
    join = "from gemma_cot import cli, hosts; hosts.WAIT_SECONDS = 1; "
    alone = start(["-c", f"{join}hosts.join('127.0.0.1:{free_port()}', 2, 1)"], 1)
    with contextlib.closing(socket.create_server(("", 0))) as other:
        port = other.getsockname()[1]
        first = start(["-c", f"{join}hosts.join('127.0.0.1:{port}', 2, 0)"], 1)
        (code, _, err), taken = ends(alone, first)
    assert code == 2
    assert "error: --coordinator: all 2 processes must meet at 127.0.0.1:" in err.splitlines()[-1]
    assert taken[0] != 0
    assert "process 0 must be able to meet the others" in taken[2].splitlines()[-1]


def test_a_pod_is_told_by_the_environment_alone(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for names, several in (("", False), ("localhost", False), ("t1k-w-0,t1k-w-1", True)):
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", names)
        assert hosts._on_a_pod() == several
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not hosts._on_a_pod()
