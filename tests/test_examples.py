"""The examples do what they say."""

import runpy
from pathlib import Path

import jax

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_check_my_kernel_passes_the_kernel_and_catches_each_bug(capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # JAX's own code
        runpy.run_path(str(EXAMPLES / "check_my_kernel.py"))["main"]()
    last = [table.splitlines()[-1] for table in capsys.readouterr().out.strip().split("\n\n")]
    passed = [int(line.split(" of ")[0]) for line in last]
    assert passed[0] == 48, "6 cases x 2 dtypes x a value and three gradients"
    assert passed[1:] == [4, 2, 2], "of 6 x 2 values; a window of 1 hides padding and scores"
