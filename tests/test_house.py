"""The house rules that a machine can keep: who may import whom, sizes, tests that can fail."""

import ast
import re
from pathlib import Path

import pytest
from mutation_check import MUTANTS

import gemma_cot

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gemma_cot"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))

# A module may import modules of a lower level, and modules to its left on its own level.
LEVELS = [
    ["hosts", "axes", "hf_config", "config", "metrics", "alarms", "settings", "stats", "progress",
     "curves", "checkpoint", "grpo.answer", "grpo.reward", "grpo.loss", "scores",
     "tasks.arithmetic", "tasks.families", "tasks.dataset"],
    ["tokenizer", "results", "data", "optim", "model.params", "model.load",
     "model.kernels.gradients", "model.kernels.layout", "model.layers", "model.kernels",
     "model.kernels.tiles", "model.kernels.logprob", "model.kernels.prefill",
     "model.kernels.decode", "model.gemma", "model.logprob", "model.cache", "model.sample",
     "model.kernels.reference"],
    ["lora.lora", "lora.peft", "lora", "testing.outcome", "testing.kernels",
     "testing.losses", "testing"],
    ["policy", "sft", "grpo.rollout", "grpo.step", "grpo.reserve", "evaluation",
     "guard.user", "guard.corpus", "guard.lint", "guard.canaries", "guard.jail", "guard.sandbox",
     "guard.symbolic", "rewards", "resume", "session", "run", "cli",
     "traces", "environment", "profiling", "turn", "finished", "replay",
     "prepare.convert", "prepare.spool", "prepare.filters", "prepare.rates", "prepare.card",
     "prepare.pipeline",
     "distill.settings", "distill.template", "distill.answer", "distill.journal",
     "distill.teacher", "distill.collect", "distill.pipeline",
     "serve.request", "serve.engine", "serve.app",
     "plan.chips", "plan.cost", "plan.programs", "plan.accounts", "plan.clock", "plan.fit",
     "report.gather", "report.diagnosis", "report.microscope", "report.panels", "report.sections",
     "report.page"],
]  # fmt: skip
COMMANDS = ["train", "evaluate", "generate", "export", "doctor", "tasks.pretrain",
            "prepare.__main__", "distill.command", "distill.__main__",
            "serve.__main__", "plan.__main__", "report.__main__"]  # fmt: skip
ORDER = {name: i for i, name in enumerate(name for level in LEVELS for name in level)}
MAX_FILE, MAX_FUNCTION = 425, 60


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__").removesuffix("__init__")


def our_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, as `module_name` writes them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gemma_cot"):
            base = node.module.removeprefix("gemma_cot").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                names.add(inner if inner in ORDER or inner in COMMANDS else base)
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("gemma_cot.") for a in node.names
                      if a.name.startswith("gemma_cot")}  # fmt: skip
    return names


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    if name in COMMANDS:
        assert our_imports(path).isdisjoint(COMMANDS)
    elif name in ORDER:
        upwards = {other for other in our_imports(path) if ORDER.get(other, 999) >= ORDER[name]}
        assert not upwards, f"{name} may not import {upwards}"
    else:
        rooms = ("", "grpo", "model", "tasks", "prepare", "distill", "guard", "serve", "plan",
                 "report")
        assert name in rooms, f"{name} has no place in LEVELS"
        assert not our_imports(path)


def test_the_reading_order_is_import_order():
    groups = re.findall(r"^ {4}[a-z ]{12}(.+)$", gemma_cot.__doc__, re.MULTILINE)
    order = " ".join(groups).split()
    paths = {module_name(path): path for path in SOURCES}
    packages = {"lora": "lora.lora", "model.kernels": "model.kernels.tiles"}
    for place, name in enumerate(order):
        used = {packages.get(other, other) for other in our_imports(paths[name])}
        assert used <= set(order[:place]), f"{name} uses what comes after it"
    assert order[0] == "hosts" and order[-1] == "train"


def test_rooms_keep_to_themselves():
    for path in SOURCES:
        name, imports = module_name(path), our_imports(path)
        if name in ("grpo.loss", "grpo.answer"):
            assert not imports
        if name == "grpo.reward":
            assert imports == {"grpo.answer"}
        if name.startswith("model."):
            strangers = ("lora", "grpo", "tokenizer", "optim", "data")
            assert not {other for other in imports if other.split(".")[0] in strangers}
        # never imported by the core
        for room in ("tasks", "prepare", "distill", "serve", "plan", "report"):
            if not name.startswith((room, "testing", "distill" if room == "prepare" else room)):
                assert not {other for other in imports if other.startswith(room)}


def test_only_the_top_level_touches_flags_and_prints():
    allowed = {*COMMANDS, "settings", "policy", "cli"}
    for path in SOURCES:
        if module_name(path) in allowed:
            continue
        tree = ast.parse(path.read_text())
        calls = {n.func.id for n in ast.walk(tree)
                 if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}  # fmt: skip
        assert "print" not in calls, path
        assert "from absl import flags" not in path.read_text(), path


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_are_short_and_explained(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "every file says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines"
    for node in tree.body:
        is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
        if is_public and "tasks.families" not in module_name(path):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_the_core_stays_an_afternoon_of_reading():
    """What a student reads; not the kernels, not the rules by which answers match, not the file
    formats of Hugging Face and PEFT."""
    rooms = ("config", "axes", "data", "optim", "model", "lora", "sft", "grpo", "turn", "train")
    tools = ("model.kernels", "model.load", "lora.peft", "grpo.answer")
    names = {path: module_name(path) for path in SOURCES}
    core = [path for path, name in names.items()
            if name.split(".")[0] in rooms and not name.startswith(tools)]  # fmt: skip
    lines = sum(path.read_text().count("\n") for path in core)
    assert lines <= 3500, f"the core has {lines} lines"


def asserts(node: ast.FunctionDef, helpers: set[str]) -> bool:
    """Return whether a test asserts: assert, pytest.raises, or a helper called assert_*."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert):
            return True
        if isinstance(inner, ast.Call):
            called = inner.func.attr if isinstance(inner.func, ast.Attribute) else (
                inner.func.id if isinstance(inner.func, ast.Name) else "")  # fmt: skip
            if called == "raises" or called in helpers:
                return True
            if called.startswith("assert_"):
                return True
    return False


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_can_fail(path):
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    helpers = {f.name for f in functions if not f.name.startswith("test") and asserts(f, set())}
    for function in functions:
        if function.name.startswith("test"):
            assert asserts(function, helpers), f"{function.name} asserts nothing"


def test_nothing_names_this_workplace_or_leaves_work_for_later():
    marks = ["TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error", "/wo" + "rk/", "../sha" + "red"]
    for path in [*SOURCES, *TESTS, ROOT / "README.md", ROOT / "pyproject.toml"]:
        text = path.read_text()
        assert not [mark for mark in marks if mark in text], path


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_of_the_mutation_check_has_its_place(mutant):
    assert (PACKAGE / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new and (ROOT / mutant.tests).exists()
