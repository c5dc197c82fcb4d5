"""Whether a run's programs fit a chip, what to change when one does not, and how much more would.

A program needs its arguments, results and temporaries; beside it the chip keeps what the run holds
on to while it runs, and the code of all programs.
"""

import dataclasses
import math

from gemma_cot.axes import uneven_letters
from gemma_cot.plan.accounts import tree_bytes
from gemma_cot.plan.programs import Program, Setup, call_of, compile_call, grpo_batch

TRIES = 3  # guesses of the largest rollout, a compilation each


def beside(setup: Setup, name: str, programs: dict[str, Program]) -> float:
    """Return the bytes that one chip keeps while `name` runs and that are not its arguments.

    The reference adapter; the moments of the optimiser while nothing is updated; the rollout.
    """
    adapter = tree_bytes(setup.state.lora)
    code = sum(program.code for program in programs.values())
    if name in ("sft", "evaluate"):
        return code + adapter
    rollout = setup.updates * tree_bytes(grpo_batch(setup))
    moments = 0 if name == "update" else tree_bytes(setup.state) - adapter
    return code + adapter + moments + rollout


def needs(setup: Setup, programs: dict[str, Program]) -> dict[str, float]:
    """Return {function: bytes that a chip needs while it runs}."""
    return {name: p.total + beside(setup, name, programs) for name, p in programs.items()}


def refusal(
    setup: Setup, needed: dict[str, float], memory: float, largest: int | None = None
) -> str:
    """Return one line about the function that exceeds a chip's memory most, "" when all fit.

    largest: `largest_rollout`, where it is known.
    """
    name = max(needed, key=lambda name: needed[name])
    if needed[name] <= memory:
        return ""
    always = tree_bytes(setup.params) + tree_bytes(setup.state)
    flag, value, change = remedy(setup, name if always < memory else "", largest)
    return (
        f"--{flag}: {name} must fit the {memory / 2**30:.2f} GiB that programs have of a chip, "
        f"got {needed[name] / 2**30:.2f} GiB with {flag} {value}; {change}"
    )


def remedy(setup: Setup, name: str, largest: int | None) -> tuple[str, object, str]:
    """Return (the flag to change, its value now, what to change it to) for a function too big, or
    for weights and state that are too big themselves ("")."""
    cfg = setup.cfg
    if name in ("prefill", "decode"):
        step, now = rollout_step(setup), cfg.prompts_per_rollout
        fewer = now // 2 // step * step if largest is None else largest
        if 0 < fewer < now:
            return "prompts_per_rollout", now, f"set --prompts_per_rollout={fewer} or less"
    if name == "evaluate" and cfg.eval_batch > setup.data:
        return "eval_batch", cfg.eval_batch, f"set --eval_batch={cfg.eval_batch // 2} or less"
    if name in ("update", "sft") and cfg.remat != "all":
        return "remat", cfg.remat, "set --remat=all"
    if name in ("update", "reference_logprobs") and cfg.micro_batch > 1:
        fewer = max(n for n in range(1, cfg.micro_batch) if cfg.micro_batch % n == 0)
        return "micro_batch", cfg.micro_batch, f"set --micro_batch={fewer}"
    rows = cfg.sft_batch // setup.data
    more = [n for n in range(cfg.sft_micro_batches + 1, rows + 1) if rows % n == 0]
    if name == "sft" and more:
        change = f"set --sft_micro_batches={more[0]}"
        return "sft_micro_batches", cfg.sft_micro_batches, change
    data, model = setup.mesh.shape["data"], setup.mesh.shape["model"]
    wider = [m for m in range(model + 1, data * model + 1)
             if data * model % m == 0 and not uneven_letters(setup.model_cfg.sizes, m)]  # fmt: skip
    larger = "take a larger --topology or a smaller --model"
    change = f"set --mesh={data * model // wider[0]}x{wider[0]}" if wider else larger
    return "mesh", f"{data}x{model}", change


def rollout_step(setup: Setup) -> int:
    """Return what prompts_per_rollout must be a multiple of."""
    return math.lcm(setup.cfg.mini_batch, setup.data)


def largest_rollout(setup: Setup, programs: dict[str, Program], memory: float) -> int:
    """Return the largest prompts_per_rollout that fits, 0 for none.

    The sampler's memory grows in proportion to its rows: two sizes predict the largest one, which
    is then compiled and made smaller until it fits.
    """
    step = rollout_step(setup)

    def needed(prompts: int) -> float:
        cfg = dataclasses.replace(setup.cfg, prompts_per_rollout=prompts)
        other = dataclasses.replace(setup, cfg=cfg)
        decode = compile_call(other, call_of("decode", other))
        return needs(other, programs | {"decode": decode})["decode"]

    now = setup.cfg.prompts_per_rollout
    sizes = {now: needs(setup, programs)["decode"]}
    other = 2 * now if sizes[now] <= memory else step
    sizes[other] = needed(other)
    for _ in range(TRIES):
        best = max((prompts for prompts, size in sizes.items() if size <= memory), default=0)
        (p1, size1), (p2, size2) = sorted(sizes.items())[-2:]
        if p1 == p2 or size2 <= size1:
            break
        guess = int(p1 + (memory - size1) * (p2 - p1) / (size2 - size1)) // step * step
        if guess <= best or guess in sizes:
            break
        sizes[guess] = needed(guess)
        if sizes[guess] <= memory:
            return guess
    return best
