"""Export the adapter of a run's checkpoint (the latest by default), whether the run ended or not.

    python -m gemma_cot.export --run=runs/tiny --output=DIR --format=merged|peft
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags

from gemma_cot import cli
from gemma_cot.finished import read_config, saved_adapter
from gemma_cot.lora import load_peft, merge, save_peft
from gemma_cot.model.load import load_pretrained, save_pretrained
from gemma_cot.policy import resolve_dtype, write_recipe

FLAGS = flags.FLAGS


def same(a, b) -> bool:
    """Return whether two trees hold the same arrays, bit for bit."""
    pairs = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.all(pairs)


def main() -> None:
    """Write the folder, read it back, and say done only when every parameter is the same."""
    if not FLAGS.run or not FLAGS.output:
        raise ValueError(
            f"--run, --output: must name folders, got {FLAGS.run!r} and {FLAGS.output!r}; set both"
        )
    out = Path(FLAGS.output)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--output: {out} must be new or empty, got files in it; choose another")
    cfg, model_dir = read_config(FLAGS.run)
    model_cfg, params = load_pretrained(model_dir, resolve_dtype(cfg.dtype))
    lora, where = saved_adapter(cfg, model_cfg, FLAGS.checkpoint)
    if FLAGS.format == "peft":
        save_peft(out, model_cfg, lora, model_dir)
        written, again = lora.layers, load_peft(out, model_cfg).layers
    else:
        written = merge(params, lora)
        save_pretrained(out, model_cfg, written, tokenizer_dir=model_dir)
        again = load_pretrained(out, resolve_dtype(cfg.dtype))[1]
    write_recipe(out, cfg)
    if not same(written, again):
        raise ValueError(
            f"--output: {out} must read back bit for bit, got other values; check the disk, "
            "delete the folder and export again"
        )
    print(f"{FLAGS.format} export of {where} in {out}, read back and identical")


if __name__ == "__main__":
    flags.DEFINE_string("run", "", "Folder of a run of gemma_cot.train.")
    flags.DEFINE_string("output", "", "New folder to write.")
    flags.DEFINE_integer("checkpoint", None, "Number in RUN/checkpoints; default: the latest.")
    flags.DEFINE_enum("format", "merged", ["merged", "peft"], "Whole model, or adapter alone.")
    cli.run(main)
