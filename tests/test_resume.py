"""What a resumed run must share with the one before: settings, code, rewards, one by one."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_cot import resume
from gemma_cot.config import TrainConfig

FREE = {
    "output_dir", "resume", "overwrite", "allow_changes", "session", "mesh", "sample_every",
    "coordinator", "num_processes", "process_id", "checkpoint_every", "checkpoint_minutes",
    "keep_checkpoints", "keep_best", "trace_every", "profile_steps", "max_reward_errors",
    "max_skipped", "model", "train_data", "eval_data",
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_a_setting_that_differs_is_refused_unless_it_changes_no_number(tmp_path, name):
    cfg = TrainConfig(output_dir=f"{tmp_path}/.")
    prints = {"train_data": "1", "eval_data": "2"}
    for file, content in (("config.json", resume.as_json(cfg)), ("fingerprint.json", prints)):
        (tmp_path / file).write_text(json.dumps(content))
    then = getattr(cfg, name)
    others = {bool: then is False, str: "seed", tuple: ("math:sqrt",)}  # seed: a name it may allow
    other = str(tmp_path) if name == "output_dir" else others.get(type(then), 77)
    changed = dataclasses.replace(cfg, **{name: other})
    if name in FREE:
        assert resume.check_same(changed, prints) is None
    else:
        with pytest.raises(ValueError, match=f"1 that differ: {name} "):
            resume.check_same(changed, prints)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's source, of which `code_hash` takes the hash."""
    source = Path(resume.__file__).parent
    copy = Path(shutil.copytree(
        source, tmp_path / "gemma_cot",
        ignore=lambda folder, names: [n for n in names if "." in n and not n.endswith(".py")],
    ))  # fmt: skip
    monkeypatch.setattr(resume, "__file__", str(copy / "resume.py"))
    return copy


def test_the_code_that_training_runs_through_is_told_apart_to_a_byte(package):
    code = resume.code_hash.__wrapped__

    def changes(file: str) -> bool:
        path, before = package / file, code()
        source = path.read_bytes()
        path.write_bytes(source + b"\n")
        after = code()
        path.write_bytes(source)
        return after != before

    assert code() == resume.code_hash()
    for file in ("train.py", "grpo/loss.py", "guard/sandbox.py", "lora/lora.py", "model/gemma.py",
                 "model/kernels/decode.py"):  # fmt: skip
        assert changes(file), file
    for file in ("report/page.py", "serve/app.py", "distill/journal.py", "prepare/card.py"):
        assert not changes(file), file


def test_a_reward_whose_source_was_edited_is_another(tmp_path, monkeypatch):
    source = tmp_path / "edited.py"
    monkeypatch.setitem(sys.modules, "edited", SimpleNamespace(__file__=str(source)))
    prints = []
    for score in ("1.0", "2.0"):
        source.write_text(f"def score(completions, **columns):\n    return [{score}]\n")
        prints.append(resume.fingerprint(TrainConfig(reward=("edited:score=1",))))
    assert [name for name in prints[0] if prints[0][name] != prints[1][name]] == ["reward"]
