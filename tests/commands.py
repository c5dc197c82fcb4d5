"""Command lines of the package, run in the process of the tests, where their imports are made."""

import runpy
import sys
import warnings

import pytest
from absl import app  # noqa: F401 - its flags would else end with the first command's flagsaver
from absl.testing import flagsaver


def run_here(module: str, *arguments: str, capsys) -> tuple[int, str, str]:
    """Run a command that ends by itself as `python -m` would; return exit code, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), flagsaver.flagsaver():
        warnings.simplefilter("ignore")  # runpy: a test may have imported the module
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
    return ended.value.code, *capsys.readouterr()


def refused_line(module: str, *arguments: str, capsys) -> str:
    """Assert that a command ends with exit code 2 and one line on stderr alone; return the line."""
    code, out, err = run_here(module, *arguments, capsys=capsys)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and len(err.splitlines()) == 1, err
    return err
