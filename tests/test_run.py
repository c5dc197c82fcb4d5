"""Bad input is refused in one clear line before anything is written or lost."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from commands import refused_line
from safetensors.numpy import load_file, save_file

from gemma_cot import checkpoint
from gemma_cot import run as run_module
from gemma_cot.config import PRESETS, TrainConfig, embedded
from gemma_cot.grpo.reward import RewardError
from gemma_cot.model.sample import Samples
from gemma_cot.results import KEYS, SUMMARY_KEYS
from gemma_cot.resume import check_folder, digest, fingerprint
from gemma_cot.rewards import read_rewards
from gemma_cot.run import OUTPUTS, Run, open_run, prepare
from gemma_cot.session import Session
from gemma_cot.settings import config_from_flags, define_flags
from gemma_cot.tokenizer import decode, encode

GOOD = {
    "domain": "math",
    "prompt": "1 + 1",
    "chosen": "<reasoning>1 + 1 = 2</reasoning><answer>2</answer>",
    "metadata": {"checkpoints": ["1 + 1 = 2"], "final_answer": "2"},
}


@pytest.fixture
def cfg(tmp_path) -> TrainConfig:
    """The tiny preset, two evaluation rows, into a folder that does not exist yet."""
    overrides = dict(output_dir=str(tmp_path / "run"), eval_limit=2)
    return TrainConfig(**PRESETS["tiny"] | overrides)


def refused(cfg: TrainConfig, *words: str) -> str:
    """Assert that the run is refused in one line with these words, and writes nothing."""
    with pytest.raises(ValueError) as caught:
        open_run(prepare(cfg))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not Path(cfg.output_dir).exists()
    return message


def with_rows(cfg: TrainConfig, tmp_path, *lines) -> TrainConfig:
    """Return cfg with a training file of these lines (a dict becomes JSON)."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return dataclasses.replace(cfg, train_data=str(path))


def test_missing_and_empty_data_files(cfg, tmp_path):
    refused(dataclasses.replace(cfg, train_data=str(tmp_path / "no.jsonl")), "no.jsonl", "readable")
    refused(dataclasses.replace(cfg, eval_data=str(tmp_path)), str(tmp_path), "readable")
    refused(with_rows(cfg, tmp_path, ""), "rows.jsonl", "at least one good row")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{'domain'", ("must be JSON",)),
        ("[1]", ("must be a JSON object", "list")),
        (GOOD | {"prompt": None}, ("prompt must be a non-blank string", "None")),
        (GOOD | {"prompt": 5}, ("prompt must be a non-blank string", "5")),
        ({k: v for k, v in GOOD.items() if k != "prompt"}, ("prompt must be",)),
        (GOOD | {"metadata": []}, ("metadata must be an object", "list")),
        (GOOD | {"metadata": "{}"}, ("metadata must be an object", "str")),
        (GOOD | {"metadata": {"final_answer": "2"}}, ("metadata.checkpoints must be a list",)),
        (GOOD | {"domain": "art"}, ("domain must be one of math, code, science", "art")),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(cfg, tmp_path, bad, words):
    rows = with_rows(cfg, tmp_path, GOOD, bad, GOOD)
    refused(rows, "rows.jsonl:2:", *words)
    run = prepare(dataclasses.replace(rows, on_bad_row="skip"))
    assert len(run.train) == 2
    assert len(run.rejects) == 1 and "rows.jsonl:2:" in run.rejects[0]


def test_fewer_rows_than_a_rollout_takes_are_warned_of(cfg, tmp_path):
    few = with_rows(cfg, tmp_path, *[GOOD] * 15)
    with pytest.warns(UserWarning, match="--prompts_per_rollout: 16 of 15 training rows"):
        prepare(few)
    with warnings.catch_warnings(record=True) as caught:
        prepare(dataclasses.replace(few, grpo_steps=0))
        prepare(with_rows(cfg, tmp_path, *[GOOD] * 16))
    assert not caught


def test_rows_that_are_all_too_long(cfg, tmp_path):
    long = GOOD | {"prompt": "1 + " * 100 + "1"}
    refused(with_rows(cfg, tmp_path, long), "at least one of 1 rows must fit", "--max_prompt")


def test_completions_longer_than_the_models_positions_are_refused(cfg):
    long = dataclasses.replace(cfg, max_completion_tokens=99999)
    refused(long, "--max_completion_tokens: prompt + completion must fit", "got 100063")


def test_training_and_evaluation_ask_with_the_same_instruction(cfg):
    run = prepare(dataclasses.replace(cfg, instruction="Think."))
    for row in (run.train[0], run.eval[0]):
        assert f"Think.\n\n{row.example.prompt}" in decode(run.tokenizer, row.prompt_ids)


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the embedded model that a test may damage."""
    return Path(shutil.copytree(embedded("tiny_model"), tmp_path / "model"))


def damage(model: Path, change) -> None:
    """Rewrite the weights after change(tensors)."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


NORM = "model.norm.weight"


def test_damaged_models(cfg, model):
    cfg = dataclasses.replace(cfg, model=str(model))
    weights = (model / "model.safetensors").read_bytes()
    damage(model, lambda t: t.pop(NORM))
    refused(cfg, "tensors are missing", NORM)
    (model / "model.safetensors").write_bytes(weights)
    damage(model, lambda t: t.update({"model.extra": np.zeros(2, np.float32)}))
    refused(cfg, "model.extra", "not part of")
    (model / "model.safetensors").write_bytes(weights)
    damage(model, lambda t: t.update({NORM: np.zeros(5, np.float32)}))
    refused(cfg, NORM, "(128,)", "(5,)")
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(cfg, "model.safetensors", "whole safetensors file")
    (model / "model.safetensors").unlink()
    refused(cfg, "safetensors weights, got none")
    (model / "config.json").unlink()
    refused(cfg, "config.json", "must exist")


def test_damaged_tokenizers(cfg, model):
    cfg = dataclasses.replace(cfg, model=str(model))
    tokenizer = model / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes()[:100])
    refused(cfg, "tokenizer.model", "must be a SentencePiece model")
    tokenizer.unlink()
    refused(cfg, "tokenizer.model", "must exist")


def test_a_vocabulary_larger_than_the_embedding(cfg, model):
    cfg = dataclasses.replace(cfg, model=str(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 700}))
    refused(cfg, "vocabulary must fit the embedding's 700 rows", "768")


def test_batches_that_do_not_divide(cfg):
    refused(dataclasses.replace(cfg, micro_batch=3), "micro_batch", "64", "set --micro_batch to")
    six = dataclasses.replace(cfg, sft_batch=6, mesh="4x1")  # over conftest's four host devices
    refused(six, "--sft_batch", "divisible by 4", "=8")
    refused(dataclasses.replace(cfg, mesh="3x1"), "--mesh=3x1", "4 devices")


def test_auto_mesh_suits_the_batches(cfg):
    assert dict(prepare(cfg).mesh.shape) == {"data": 4, "model": 1}
    six = prepare(dataclasses.replace(cfg, sft_batch=6))
    assert dict(six.mesh.shape) == {"data": 2, "model": 2}


def test_another_run_in_the_folder_is_never_touched(cfg):
    out = Path(cfg.output_dir)
    open_run(prepare(cfg))
    (out / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}\n')
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="must not hold a run, got one; add --resume"):
        prepare(cfg)
    with pytest.raises(ValueError, match="1 that differ: beta 0.02 then, 0.5 now; .*=beta$"):
        prepare(dataclasses.replace(cfg, resume=True, beta=0.5))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "notes.txt").write_text("mine")
    open_run(prepare(dataclasses.replace(cfg, overwrite=True)))
    assert not (out / "metrics.jsonl").exists() and "metrics.jsonl" in OUTPUTS
    assert (out / "notes.txt").read_text() == "mine"  # only what a run writes is deleted


def bare(cfg: TrainConfig, **rest) -> Run:
    """Return a run without model, rows and rewards."""
    return Run(cfg, None, None, None, [], [], [], None, [], {}, **rest)


def test_overwriting_leaves_nothing_of_the_run_before(cfg):
    out = Path(cfg.output_dir)
    folders = "bad eval checkpoints adapter merged tensorboard traces profile wandb".split()
    files = ("metrics.jsonl summary.json rejects.txt reward_errors.jsonl curves.svg "
             "environment.json report.html").split()  # fmt: skip
    for path in [*(out / name / "old" for name in folders), *(out / name for name in files)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    run = bare(dataclasses.replace(cfg, overwrite=True))
    open_run(run)
    run.close()
    assert {path.name for path in out.iterdir()} == {".lock", "config.json", "fingerprint.json"}


@pytest.mark.parametrize("name", ["config.json", "eval/mine.txt", "merged/w.bin"])
def test_what_no_run_wrote_is_never_overwritten(cfg, name):
    """A model's folder, or another's files under a run's names."""
    mine = Path(cfg.output_dir) / name
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    message = f"must hold a run or none of its files, got {name.split('/')[0]} of something else"
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=message):
            open_run(prepare(dataclasses.replace(cfg, overwrite=overwrite)))
    assert mine.read_text() == "{}"


def test_resuming_with_anything_else_is_refused_by_name_unless_insisted_on(cfg, model, tmp_path):
    cfg = with_rows(dataclasses.replace(cfg, model=str(model)), tmp_path, GOOD, GOOD)
    open_run(prepare(cfg))
    again = dataclasses.replace(cfg, resume=True)
    prepare(again)

    def differs(cfg: TrainConfig, *words: str) -> str:
        with pytest.raises(ValueError) as caught:
            check_folder(cfg, fingerprint(cfg))
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
        return message

    moved = Path(shutil.move(model, tmp_path / "elsewhere"))  # where it lies decides nothing
    prepare(dataclasses.replace(again, model=str(moved)))
    again = dataclasses.replace(again, model=str(moved))
    damage(moved, lambda t: t.update({NORM: t[NORM] + 1}))
    differs(again, "1 that differ: model (model.safetensors) '", "--allow_changes=model")
    Path(cfg.train_data).write_text(json.dumps(GOOD) + "\n")
    prints = Path(cfg.output_dir) / "fingerprint.json"
    stored = json.loads(prints.read_text())
    prints.write_text(json.dumps(stored | {"code": "0123"}))
    both = dataclasses.replace(again, temperature=0.5)
    differs(both, "4 that differ: temperature 1.0 then, 0.5 now; code '0123' then, ",
            "insist with --allow_changes=temperature,code,model,train_data")  # fmt: skip
    some = dataclasses.replace(both, allow_changes="temperature, code,model")
    differs(some, "1 that differ: train_data", "--allow_changes=train_data")
    differs(dataclasses.replace(some, allow_changes="tempo"), "must name settings or code, jax",
            "['tempo']")  # fmt: skip
    run = prepare(dataclasses.replace(some, allow_changes="temperature,code,model,train_data"))
    open_run(run)  # what was insisted on is what the run has from here on
    assert json.loads(prints.read_text()) == run.fingerprint
    prepare(dataclasses.replace(again, temperature=0.5))


def test_a_large_weight_file_is_told_by_size_and_pieces(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(2**26 + 2**20)  # over the size up to which all of it is hashed
    empty = digest(path)
    with open(path, "r+b") as file:
        file.seek(-1, 2)  # the last byte is in the last piece
        file.write(b"x")
    assert digest(path) != empty
    small = tmp_path / "small.safetensors"
    small.write_bytes(b"12")
    assert digest(small) != digest(path) and digest(tmp_path / "none") is None


def test_flags_that_are_not_given_come_from_the_run_that_is_resumed(cfg):
    open_run(prepare(dataclasses.replace(cfg, beta=0.5, reward=("test_run:ones=2",))))
    values = flags.FlagValues()
    define_flags(values)
    given = ["train", "--resume", f"--output_dir={cfg.output_dir}", "--sample_every=3"]
    values(given)
    got = config_from_flags(values)
    assert (got.beta, got.reward) == (0.5, ("test_run:ones=2",))
    assert (got.eval_limit, got.sample_every) == (2, 3)
    assert got.resume and got.output_dir == cfg.output_dir
    values(["train", *given[1:], "--preset=tiny"])  # a preset that is given counts as flags do
    with pytest.raises(ValueError, match="2 that differ: beta 0.5 then, 0.02 now; .*eval_limit"):
        prepare(dataclasses.replace(config_from_flags(values), reward=("test_run:ones=2",)))


ROW = json.dumps(dict.fromkeys(sorted(KEYS | SUMMARY_KEYS), 0)) + "\n"
PRINTS = {"model": "1", "eval_data": "2", "code": "3"}


@pytest.mark.parametrize(
    "changes",
    [
        {}, *({name: "other"} for name in ("instruction", "process_matcher", *PRINTS)),
        {"max_prompt_tokens": 9}, {"max_completion_tokens": 9}, {"step": 9}, {"rows": [None]},
    ],
)  # fmt: skip
def test_rows_asked_in_another_way_are_done_anew(cfg, changes):
    def opened(step: int = 2, rows: tuple = (), **others) -> tuple[Path, list[dict]]:
        prints = {name: others.pop(name, value) for name, value in PRINTS.items()}
        run = bare(dataclasses.replace(cfg, resume=True, **others))
        return dataclasses.replace(run, fingerprint=prints, eval=rows).open_eval("sft", step)

    path, none = opened()
    path.write_text(ROW)
    _, kept = opened(**changes)
    assert none == [] and kept == ([] if changes else [json.loads(ROW)])


def test_resuming_nothing(cfg):
    refused(dataclasses.replace(cfg, resume=True), "--resume", "must hold a run")


def test_rows_that_are_not_where_they_were_are_asked_for(cfg, tmp_path):
    cfg = with_rows(cfg, tmp_path, GOOD)
    run = prepare(cfg)
    open_run(run)
    run.close()
    Path(cfg.train_data).rename(tmp_path / "elsewhere.jsonl")
    again = dataclasses.replace(cfg, resume=True)
    with pytest.raises(ValueError, match=f"--train_data: .*{cfg.train_data}.*set --train_data to"):
        prepare(again)
    prepare(dataclasses.replace(again, train_data=str(tmp_path / "elsewhere.jsonl")))


LOCKING = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.write(fd, str(os.getpid()).ljust(20).encode())
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_which_another_process_works_is_left_alone(cfg):
    out = Path(cfg.output_dir)
    out.mkdir()
    command = [sys.executable, "-c", LOCKING, out / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        for name in OUTPUTS:
            (out / name).write_text("{}")
        for flag in ("resume", "overwrite"):
            run = dataclasses.replace(prepare(dataclasses.replace(cfg, output_dir=f"{out}.new")),
                                      cfg=dataclasses.replace(cfg, **{flag: True}))  # fmt: skip
            with pytest.raises(ValueError, match=f"--output_dir: .*, process {other.pid}; wait"):
                open_run(run)
        assert all((out / name).read_text() == "{}" for name in OUTPUTS)
        other.kill()
    open_run(run)
    again = partial(subprocess.run, command, input=b"", capture_output=True, timeout=60)
    assert again().stdout == b"" and os.pread(run.taken, 20, 0).split() == [b"%d" % os.getpid()]
    run.close()
    assert again().stdout == b"locked\n"


def test_resuming_a_run_that_has_ended_and_lost_its_checkpoints_is_refused(cfg):
    open_run(prepare(cfg))
    assert prepare(dataclasses.replace(cfg, resume=True)).begin == {}, "killed before its first"
    (Path(cfg.output_dir) / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="--resume: .*checkpoints must hold a checkpoint to go on"):
        prepare(dataclasses.replace(cfg, resume=True))
    evaluation = dataclasses.replace(cfg, sft_steps=0, grpo_steps=0, overwrite=True)
    open_run(prepare(evaluation))
    (Path(cfg.output_dir) / "summary.json").write_text("{}")  # which has none to begin with
    prepare(dataclasses.replace(evaluation, overwrite=False, resume=True))


def test_an_empty_folder_made_for_checkpoints_is_no_run_of_others(cfg):
    (Path(cfg.output_dir) / "checkpoints").mkdir(parents=True)
    prepare(cfg)
    (Path(cfg.output_dir) / "checkpoints" / "7").mkdir()
    with pytest.raises(ValueError, match="must hold a run or none of its files, got checkpoints"):
        prepare(cfg)


def test_a_run_without_any_reward_is_refused(cfg):
    without = dict.fromkeys(("format_weight", "process_weight", "outcome_weight"), 0.0)
    none = dataclasses.replace(cfg, **without)
    refused(none, "--outcome_weight: at least one reward must have a weight other than 0")
    assert read_rewards(dataclasses.replace(none, grpo_steps=0))
    assert read_rewards(dataclasses.replace(none, reward=("test_run:fragile=-1",)))


@pytest.mark.parametrize("name", ["reward_outcom", "-reward_code"])
def test_a_best_by_a_reward_that_the_run_has_not_is_refused(cfg, name):
    refused(dataclasses.replace(cfg, keep_best=name), "--keep_best", f"outcome), got '{name}'")


def test_a_reward_that_cannot_score_is_refused_before_anything_is_done(cfg):
    own = dataclasses.replace(cfg, reward=("test_run:scores_in_a_tuple",))
    refused(own, "scores_in_a_tuple - must return a list - got type tuple")
    prepare(dataclasses.replace(own, grpo_steps=0))
    prepare(dataclasses.replace(own, max_reward_errors=1))


def ones(completions, **columns):
    return [1.0 for _ in completions]


def test_a_reward_is_tried_on_a_whole_group_of_every_domain(cfg):
    prepare(dataclasses.replace(cfg, reward=("test_run:best_of_its_group",)))
    refused(dataclasses.replace(cfg, reward=("test_run:no_code",)), "no_code", "ZeroDivisionError")


def best_of_its_group(completions, **columns):
    lengths = np.array([len(text) for text in completions]).reshape(-1, TrainConfig.num_generations)
    return [float(x) for x in (lengths == lengths.max(axis=1, keepdims=True)).ravel()]


def no_code(completions, domain, **columns):
    return [1 / (name != "code") for name in domain]


def scores_in_a_tuple(completions, **columns):
    return tuple(1.0 for _ in completions)


def test_rewards_that_cannot_be_used(cfg):
    refused(dataclasses.replace(cfg, reward=("no_such_module_:f",)), "--reward", "no_such_module_")
    refused(dataclasses.replace(cfg, reward=("math:sqrt", "math:sqrt=2")), "--reward", "sqrt twice")


def test_penalties_and_code_are_rewards_only_where_asked_for(cfg):
    names = [name for name, _, _ in read_rewards(cfg)]
    assert names == ["format", "process", "outcome"]
    cfg = dataclasses.replace(
        cfg, length_weight=0.5, length_cache=40, repetition_weight=0.25, allow_code_execution=True,
        code_weight=3.0,
    )  # fmt: skip
    rewards = {name: (function, weight) for name, function, weight in read_rewards(cfg)}
    assert [weight for _, weight in rewards.values()] == [1.0, 1.0, 1.0, 0.5, 0.25, 3.0]
    ids = {"completion_ids": [[1] * 124], "metadata": [{"tests": ["assert f() == 2"]}]}
    row = (["p"], ["<answer>def f(): return 2</answer>"])
    # max_completion_tokens is 144 in the tiny preset: (124 - 104) / 40
    assert rewards["length"][0](*row, **ids) == [-0.5]
    assert rewards["repetition"][0](*row, **ids) == [pytest.approx(-116 / 117)]
    assert rewards["code"][0](*row, **ids) == [1.0]


def test_a_reward_may_not_bear_a_built_in_name(cfg, tmp_path, monkeypatch):
    (tmp_path / "clashing.py").write_text("def code(prompts, completions, **c): return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = dataclasses.replace(cfg, reward=("clashing:code",))
    assert read_rewards(cfg)[-1][0] == "code"
    refused(dataclasses.replace(cfg, allow_code_execution=True), "--reward", "code twice")


@pytest.mark.skipif(find_spec("math_verify") is not None, reason="it is installed")
def test_math_verify_without_the_extra_is_refused(cfg):
    refused(dataclasses.replace(cfg, math_verify=True), "--math_verify", "gemma_cot[math]")


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock of run, at 100 s, which a test sets."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(run_module, "time", clock)
    return clock


def test_a_checkpoint_is_due_by_steps_and_by_minutes(cfg, clock):
    run = bare(dataclasses.replace(cfg, checkpoint_every=8, checkpoint_minutes=1.0), saved=100.0)
    clock.now += 59
    assert not run.save_due(0, 7) and not run.save_due(8, 9)
    assert run.save_due(7, 8) and run.save_due(6, 10)
    clock.now += 2
    assert run.save_due(0, 1)
    never = dataclasses.replace(cfg, checkpoint_every=0)
    assert not bare(never, saved=100.0).save_due(7, 8)


def test_the_best_checkpoint_is_kept_beside_the_latest(cfg):
    run = bare(dataclasses.replace(cfg, keep_checkpoints=1, keep_best="-loss"))
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), 1):
        run.save("sft", step, {"x": np.ones(1)}, {"loss": loss})
    run.settle()
    assert checkpoint.all_steps(run.out / "checkpoints") == [2, 4]


def test_what_comes_at_the_end_is_reckoned_from_the_longest_so_far(cfg, clock):
    def work(run: Run, seconds: float, *tokens: int) -> list[dict]:
        clock.now += seconds
        return [{"num_tokens": n} for n in tokens]

    run = bare(cfg)
    assert run.kept_back() == 15.0  # nothing is measured yet
    run.timed("evaluate_base", work, 6.0, 50, 70)
    run.timed("evaluate_sft", work, 10.0, 10, 30)
    run.timed("evaluate_grpo", work, 2.0, 90)
    run.timed("export", work, 4.0)
    assert run.seconds == {
        "evaluate_base": 6.0, "evaluate_sft": 10.0, "evaluate_grpo": 2.0, "export": 4.0
    }  # fmt: skip
    assert run.kept_back() == 15 + 1.25 * (10 + 4)
    run.measured["rollout_tokens"] = 60.0  # three times those of the longest evaluation
    assert run.kept_back() == 15 + 1.25 * (30 + 4) and run.kept_back(2) == 15 + 1.25 * (60 + 4)
    run.measured["rollout_tokens"] = 10.0
    assert run.kept_back() == 15 + 1.25 * (10 + 4)


def test_sft_keeps_back_the_evaluation_after_grpo_too(cfg):
    asked = SimpleNamespace(turn=lambda stage, step, total, reserve: reserve)
    measured = {"evaluate": 10.0, "export": 4.0}
    run = bare(cfg, session=asked, measured=measured)
    assert run.turn("sft", 0, 5) == 15 + 1.25 * (2 * 10 + 4)
    assert run.turn("grpo", 0, 5) == 15 + 1.25 * (10 + 4)
    alone = bare(dataclasses.replace(cfg, grpo_steps=0), session=asked, measured=measured)
    assert alone.turn("sft", 0, 5) == 15 + 1.25 * (10 + 4)


def fragile(prompts, completions, **columns):
    """A user's reward that fails on a completion without the letter a."""
    return [1 / text.count("a") for text in completions]


def sampled(run, texts: list[str]) -> Samples:
    """Return samples that read as these texts, after prompts of three tokens."""
    ids = [[*encode(run.tokenizer, text), run.tokenizer.end_of_turn] for text in texts]
    shape = (len(texts), 3 + max(map(len, ids)))
    tokens_BT, mask_BT = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for b, row in enumerate(ids):
        tokens_BT[b, 3 : 3 + len(row)] = row
        mask_BT[b, 3 : 3 + len(row)] = True
    start_B, stopped_B = np.zeros(len(texts), np.int32), np.ones(len(texts), bool)
    useful_B = np.ones(len(texts), np.float32)
    return Samples(tokens_BT, mask_BT, np.zeros(shape, np.float32), start_B, stopped_B, useful_B)


def test_rows_on_which_a_reward_raises_are_noted_and_stop_the_run_above_the_limit(cfg):
    cfg = dataclasses.replace(cfg, num_generations=4, max_reward_errors=2)
    run = prepare(cfg)
    open_run(run)
    run.rewards.append(("fragile", fragile, 1.0))
    rollout = run.score(sampled(run, ["a", "b", "aa", "c"]), run.train[:1])
    assert rollout.scores["fragile"] == [1.0, None, 0.5, None]  # None, and never 0
    assert rollout.valid_PG.tolist() == [[True, False, True, False]]
    run.keep_errors()
    noted = [json.loads(line) for line in (run.out / "reward_errors.jsonl").open()]
    assert [error["completion"] for error in noted] == ["b", "c"]
    assert noted[0]["reward"] == "fragile" and "ZeroDivisionError" in noted[0]["error"]
    assert noted[0]["prompt"] == run.train[0].example.prompt
    run.score(sampled(run, ["a"] * 4), run.train[:1])  # two of two: still running
    with pytest.raises(RewardError, match="--max_reward_errors: .* at most 2 rows, got 3, the last "
                                          "ZeroDivisionError.* in fragile; see .*errors.jsonl"):
        run.score(sampled(run, ["a", "a", "a", ""]), run.train[:1])
    assert len((run.out / "reward_errors.jsonl").read_text().splitlines()) == 3


def test_without_a_limit_the_first_row_that_raises_stops_the_run(cfg):
    run = prepare(dataclasses.replace(cfg, num_generations=2, micro_batch=8))
    run.rewards.append(("fragile", fragile, 1.0))
    with pytest.raises(RewardError, match="fragile - must not raise - got Zero.* completion 'b'"):
        run.score(sampled(run, ["a", "b"]), run.train[:1])
    assert not run.out.exists()


def test_canaries_are_scored_with_the_runs_own_rewards_and_count_no_errors(cfg):
    run = prepare(dataclasses.replace(cfg, max_reward_errors=1))
    assert run.watch("base") == []
    assert run.canaries["base"]["honest"]["outcome"] == 1.0
    run.rewards.append(("fragile", fragile, 1.0))
    lines = run.watch("sft")
    assert any("canary 'nothing' makes a reward fail" in line for line in lines)
    assert run.reward_errors == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--length_weight=1", "--length_cache=200"],
         "--length_cache: must be at most max_completion_tokens 144, got 200; lower it"),
        (["--beta_=1"], "Unknown command line flag 'beta_'"),
        (["--preset=huge"], "preset=huge"),
        (["--sft_steps=many"], "sft_steps=many"),
        (["rows.jsonl"], "arguments must be --flags, got ['rows.jsonl']"),
        (["--epsilon=-1"], "--epsilon: must be above 0, got -1.0; raise --epsilon"),
        (["--prompts_per_rollout=6"], "--mini_batch: must divide prompts_per_rollout 6, got 16"),
        (["--session=9 hours"], "--session: must be a time such as 9h"),
    ],
)
def test_bad_flags_end_with_one_line_and_exit_code_2(tmp_path, capsys, arguments, words):
    out = f"--output_dir={tmp_path}/run"
    assert words in refused_line("gemma_cot.train", out, *arguments, capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_a_refused_process_says_no_more_than_its_line(tmp_path):
    command = [sys.executable, "-m", "gemma_cot.train", f"--output_dir={tmp_path}/run", "--lora=8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: Unknown command line flag 'lora'")


def test_seconds_are_those_of_all_sessions(cfg, clock):
    def work(run: Run) -> None:
        clock.now += 5
        saved.append(run.spent())
        clock.now += 2

    saved = []
    for _ in range(2):
        begin = {"seconds": saved[-1]} if saved else {}
        run = bare(cfg, begin=begin, seconds=dict(begin.get("seconds", {})),
                   session=Session(clock=lambda: clock.now))  # fmt: skip
        clock.now += 1
        run.timed("grpo", work)
    assert saved == [{"grpo": 5.0, "total": 6.0}, {"grpo": 10.0, "total": 12.0}]
    assert run.spent() == {"grpo": 12.0, "total": 14.0}


def test_a_checkpoint_has_the_seconds_but_not_how_late_its_session_was(cfg, clock):
    run = bare(cfg, seconds={"sft": 3.0}, session=Session("1s", clock=lambda: clock.now))
    clock.now += 9
    run.save("sft", 1, {"x": np.ones(1)}, {})
    run.settle()
    assert run.spent() == {"sft": 3.0, "total": 9.0, "over_session": 8.0}
    meta = checkpoint.read_meta(run.out / "checkpoints", 1)
    assert meta["seconds"] == {"sft": 3.0, "total": 9.0}
