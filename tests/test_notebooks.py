"""The notebooks are well-formed; `pytest -m notebook` runs every cell that needs no TPU."""

import ast
import json
import re

import pytest
from notebooks import KAGGLE, SCRATCH, execute, printed

VARIES = ("sample", "group", "step", "loop", "unseen")  # with the rounding of the machine


@pytest.mark.parametrize("path", [SCRATCH, KAGGLE], ids=lambda path: path.stem)
def test_notebooks_are_well_formed_and_small(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9-]{3,64}", name) for name in names)  # by hand, so they stay
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(line for line in cell["source"] if not line.startswith("%pip "))
            assert ast.parse(source).body and cell["execution_count"] is None
    assert path.stat().st_size < 100_000


def test_the_real_run_shows_no_numbers_of_another_model():
    cells = json.loads(KAGGLE.read_text())["cells"]
    assert not [cell["id"] for cell in cells if cell.get("outputs")]
    tags = {cell["id"]: cell["metadata"].get("tags", []) for cell in cells}
    assert [name for name, given in tags.items() if "tpu" in given] == ["install"]  # all else runs


@pytest.mark.notebook
def test_grpo_from_scratch_runs_and_teaches(tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    monkeypatch.delenv("XLA_FLAGS")  # conftest's four devices
    kept, now = printed(json.loads(SCRATCH.read_text())), printed(execute(SCRATCH, tmp_path))
    assert list(now) == list(kept)
    for name, text in kept.items():  # those that the file has
        assert not text or name in VARIES or now[name] == text, name
    before, after = (
        sum(map(float, re.findall(r"'(?:format|process|outcome)': ([\d.]+)", line)))
        for line in now["unseen"].splitlines() if line.startswith("after")
    )  # fmt: skip
    assert after > before + 0.1, "GRPO raises the reward on questions that it has not seen"


@pytest.mark.notebook
def test_kaggle_v5e8_runs_without_a_tpu(tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    monkeypatch.delenv("XLA_FLAGS")
    now = printed(execute(KAGGLE, tmp_path))
    assert "no TPU" in now["parameters"] and re.search(r"^grpo +answers", now["see"], re.MULTILINE)
    run = tmp_path / "kaggle_try" / "run"
    assert "<html" in (run / "report.html").read_text()[:500]
    assert (tmp_path / "kaggle_try" / "merged.zip").stat().st_size > 1_000_000
    assert "pass@4" in now["evaluate"]
