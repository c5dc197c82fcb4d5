"""Plant known bugs, one at a time, and see that the tests notice: python tests/mutation_check.py

Each mutant is the package with one text replaced, in a temporary folder; the tests named beside it
must fail there (and pass without it). Prints a line per mutant; exit code 1 when one survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """A bug: in `file`, `old` (which stands there once) becomes `new`; `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


GOLDEN = "tests/model/test_golden.py"
MUTANTS = (
    Mutant(
        "window off by one",
        "model/layers.py",
        "distance_TS < window",
        "distance_TS <= window",
        GOLDEN,
    ),
    Mutant(
        "(1 + w) missing",
        "model/kernels/gradients.py",
        "1.0 + w_D.astype(jnp.float32)",
        "w_D.astype(jnp.float32)",
        GOLDEN,
    ),
    Mutant(
        "the norm's gradient as if rms were constant",
        "model/kernels/gradients.py",
        "d_y * scale - x_f32 * (r * r * mean)",
        "d_y * scale",
        "tests/model/test_layers.py",
    ),
    Mutant(
        "RoPE bases swapped",
        "model/layers.py",
        "jnp.stack([position / cfg.rope_base_local**exponent, wide])",
        "jnp.stack([wide, position / cfg.rope_base_local**exponent])",
        GOLDEN,
    ),
    Mutant(
        "query scale missing",
        "model/layers.py",
        "q_BTNH * cfg.query_scalar**-0.5",
        "q_BTNH",
        GOLDEN,
    ),
    Mutant(
        "embedding scale missing",
        "model/gemma.py",
        " * jnp.asarray(cfg.embed_dim**0.5, table_VD.dtype)",
        "",
        GOLDEN,
    ),
    Mutant("GELU exact", "model/layers.py", "approximate=True", "approximate=False", GOLDEN),
    Mutant(
        "padding visible",
        "model/layers.py",
        "(t[None, :] >= start_B[:, None])",
        "(t[None, :] >= 0 * start_B[:, None])",
        GOLDEN,
    ),
    Mutant(
        "window off by one in decoding",
        "model/cache.py",
        "age_S < window",
        "age_S <= window",
        "tests/model/test_cache.py",
    ),
    Mutant(
        "BOS doubled",
        "tokenizer.py",
        "return [BOS, *encode(",
        "return [BOS, BOS, *encode(",
        "tests/test_tokenizer.py",
    ),
    Mutant(
        "stop token out of the mask",
        "model/sample.py",
        "[None, :] < length_B[:, None]",
        "[None, :] < length_B[:, None] - 1",
        "tests/model/test_sample.py",
    ),
    Mutant(
        "stop token out of the SFT target",
        "tokenizer.py",
        "[*encode(tokenizer, completion), tokenizer.end_of_turn]",
        "[*encode(tokenizer, completion)]",
        "tests/test_tokenizer.py",
    ),
    Mutant(
        "one stop id",
        "tokenizer.py",
        "stops = {EOS, end_of_turn}",
        "stops = {EOS}",
        "tests/test_tokenizer.py",
    ),
    Mutant(
        "LoRA scale missing",
        "model/kernels/gradients.py",
        "+ scale * lora_product",
        "+ lora_product",
        "tests/model/test_layers.py",
    ),
    Mutant(
        "a merged adapter's scale missing in its gradient",
        "model/kernels/gradients.py",
        "d_z = scale * jnp.einsum",
        "d_z = jnp.einsum",
        "tests/model/test_layers.py",
    ),
    Mutant(
        "the chosen token missing in the gradient of its log-prob",
        "model/kernels/gradients.py",
        "jax.nn.one_hot(target, len(embed_VD)) - e",
        "-e",
        "tests/model/test_logprob.py",
    ),
    Mutant(
        "softmax's gradient without its mean",
        "model/kernels/gradients.py",
        "product_BKQTS - e_BKQTS * mean_BKQT1",
        "product_BKQTS",
        "tests/model/test_layers.py",
    ),
    Mutant(
        "last key of a block of queries not seen",
        "model/layers.py",
        "min(S, S - T + first + QUERY_BLOCK)",
        "min(S, S - T + first + QUERY_BLOCK - 1)",
        "tests/model/test_layers.py",
    ),
    Mutant(
        "draw: not counted from where the part of the vocabulary begins",
        "model/sample.py",
        "u_B1 - before_B1)",
        "u_B1)",
        "tests/model/test_sample.py",
    ),
    Mutant(
        "mean of micro-batch means",
        "grpo/step.py",
        "np.asarray(weight_BT)}",
        "np.asarray(weight_BT) / cfg.micro_batch}",
        "tests/grpo/test_step.py",
    ),
    Mutant(
        "std with G",
        "grpo/loss.py",
        "jnp.maximum(count_P1 - 1.0, 1.0)",
        "jnp.maximum(count_P1, 1.0)",
        "tests/grpo/test_advantages.py",
    ),
    Mutant(
        "noise becomes signal",
        "grpo/loss.py",
        "high_P > low_P + tolerance",
        "high_P >= low_P",
        "tests/grpo/test_advantages.py",
    ),
    Mutant("k1 for k3", "grpo/loss.py", "k3 = jnp.expm1(d) - d", "k3 = -d", "tests/grpo"),
    Mutant(
        "ratio missing in ratio_k3",
        "grpo/loss.py",
        "return ratio_BT * k3",
        "return k3",
        "tests/grpo/test_kl.py",
    ),
    Mutant(
        "clip without min",
        "grpo/loss.py",
        "return jnp.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)",
        "return clipped_BT * advantage_B1",
        "tests/grpo/test_loss.py",
    ),
    Mutant(
        "GSPO: the product for the mean",
        "grpo/loss.py",
        "log_ratio_BT.sum(axis=1, keepdims=True) / n_B1",
        "log_ratio_BT.sum(axis=1, keepdims=True)",
        "tests/grpo/test_loss.py",
    ),
    Mutant(
        "CISPO: gradient through the weight",
        "grpo/loss.py",
        "jax.lax.stop_gradient(jnp.minimum(ratio_BT, 1 + epsilon_high))",
        "jnp.minimum(ratio_BT, 1 + epsilon_high)",
        "tests/grpo/test_loss.py",
    ),
    Mutant(
        "RLOO: the mean for the product",
        "grpo/loss.py",
        "sum_B1 = log_ratio_BT.sum(axis=1, keepdims=True)",
        "sum_B1 = log_ratio_BT.mean(axis=1, keepdims=True)",
        "tests/grpo/test_loss.py",
    ),
    Mutant(
        "one's own reward in the leave-one-out baseline",
        "grpo/loss.py",
        'centred_PG * (count_P1 / others_P1) if baseline != "mean" else centred_PG',
        "centred_PG",
        "tests/grpo/test_advantages.py",
    ),
    Mutant(
        "KL in the reward and in the loss",
        "grpo/step.py",
        'beta=cfg.beta if cfg.kl_in == "loss" else 0.0',
        "beta=cfg.beta",
        "tests/grpo/test_step.py",
    ),
    Mutant(
        "KL added to the reward",
        "grpo/step.py",
        "reward_PG - cfg.beta * kl_B",
        "reward_PG + cfg.beta * kl_B",
        "tests/grpo/test_step.py",
    ),
    Mutant(
        "pi_old of a second pass not frozen",
        "grpo/step.py",
        " and cfg.num_iterations == 1",
        "",
        "tests/grpo/test_step.py",
    ),
    Mutant(
        "log-probs at temperature 1",
        "model/kernels/gradients.py",
        "both = of_logits(logits, target, temperature)",
        "both = of_logits(logits, target)",
        "tests/model/test_logprob.py",
    ),
    Mutant(
        "prefill kernel: window off by one",
        "model/kernels/prefill.py",
        "(t - s < window)",
        "(t - s <= window)",
        "tests/model/kernels/test_kernel_attention.py",
    ),
    Mutant(
        "decode kernel: oldest key off by one",
        "model/kernels/decode.py",
        "width + token_P - (window - 1)",
        "width + token_P - window",
        "tests/model/kernels/test_kernel_attention.py",
    ),
    Mutant(
        "log-prob kernel: temperature missing in its gradient",
        "model/kernels/logprob.py",
        "return g / temperature",
        "return g",
        "tests/model/kernels/test_kernel_logprob.py",
    ),
)


def run_tests(tests: str, package_parent: Path) -> bool:
    """Return whether the tests pass with the package found in `package_parent`."""
    environment = os.environ | {"PYTHONPATH": str(package_parent)}
    command = [sys.executable, "-m", "pytest", "-xq", "-n0", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, cwd=package_parent, env=environment, capture_output=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {tests}:\n{done.stdout.decode()[-2000:]}")
    return done.returncode == 0


def copy_to(folder: Path) -> Path:
    """Copy what the tests need into `folder`; return it."""
    for part in ("gemma_cot", "tests", "data"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def plant(mutant: Mutant, folder: Path) -> None:
    """Replace the text in the copy of the package in `folder`."""
    path = folder / "gemma_cot" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"mutant {mutant.name!r}: {mutant.old!r} must stand once in {mutant.file}, got "
            f"{text.count(mutant.old)} times; update tests/mutation_check.py"
        )
    path.write_text(text.replace(mutant.old, mutant.new))


def main() -> None:
    """Run the named tests on the sound package, then on every mutant."""
    survivors = []
    for mutant in MUTANTS:
        with tempfile.TemporaryDirectory() as name:
            folder = copy_to(Path(name))
            plant(mutant, folder)
            began = time.perf_counter()
            if run_tests(mutant.tests, folder):
                survivors.append(mutant.name)
        verdict = "SURVIVED" if mutant.name in survivors else "caught"
        print(f"{verdict:9s} {mutant.name:35s} {mutant.tests}  "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    sound = sorted({mutant.tests for mutant in MUTANTS})
    with tempfile.TemporaryDirectory() as name:
        folder = copy_to(Path(name))
        broken = [tests for tests in sound if not run_tests(tests, folder)]
    for tests in broken:
        print(f"FAILS     without any mutant                  {tests}")
    print(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} planted bugs caught")
    sys.exit(1 if survivors or broken else 0)


if __name__ == "__main__":
    main()
