"""Model, rows and metrics of runs that are small enough to be repeated and compared."""

import json
import socket
from pathlib import Path

import jax

from gemma_cot.config import ModelConfig, embedded
from gemma_cot.model.load import save_pretrained
from gemma_cot.model.params import init_params

TIMED = ("tokens_per_second", "seconds_", "memory_")  # differ from run to run
MODEL = ModelConfig(
    num_layers=1, embed_dim=20, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=28,
    vocab_size=768, window=5, global_layers=(True,), query_scalar=9.0, rope_scale_global=2.0,
)  # fmt: skip


def write_model(folder: Path) -> None:
    """Write random weights in conftest's shape of one layer, with the embedded tokenizer."""
    save_pretrained(folder, MODEL, init_params(jax.random.key(0), MODEL),
                    tokenizer_dir=embedded("tiny_model"))  # fmt: skip


def short_rows(first: int) -> list[dict]:
    """Return twelve sums with their worked solutions: `first` + `first` and those that follow."""
    return [
        {
            "domain": "math",
            "prompt": f"{a} + {a}",
            "chosen": f"<reasoning>{a} + {a} = {2 * a}</reasoning><answer>{2 * a}</answer>",
            "metadata": {"checkpoints": [f"{a} + {a} = {2 * a}"], "final_answer": str(2 * a)},
            "level": a % 3,
        }
        for a in range(first, first + 12)
    ]


def write_rows(folder: Path) -> None:
    """Write twelve short rows each to folder/train.jsonl and folder/eval.jsonl."""
    for name, first in (("train", 2), ("eval", 50)):
        text = "".join(json.dumps(row) + "\n" for row in short_rows(first))
        (folder / f"{name}.jsonl").write_text(text)


def free_port() -> int:
    """Return a port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def numbers(path: Path | str) -> list[dict]:
    """Return the rows of a JSONL file, of a run's metrics or of an evaluation, without times.

    path: the file, or the folder of a run, whose metrics.jsonl it is then.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]
