"""Time: what each function takes at least, how many iterations a session holds, and, on the chips
themselves, what the functions really take."""

import statistics
import time

import jax
import jax.numpy as jnp

from gemma_cot.grpo.step import needs_old
from gemma_cot.plan.accounts import micro_batch, share_of
from gemma_cot.plan.chips import Chip
from gemma_cot.plan.cost import Cost, bound, forward, gradient, optimiser, prefill, sampling
from gemma_cot.plan.programs import FUNCTIONS, Call, Program, Setup

KEPT_BACK = 60.0  # seconds put aside for the export, which no bound knows; a run measures its own


def phases_of(setup: Setup, name: str) -> list[Cost]:
    """Return the cost of a call of a function, in phases that come one after the other."""
    s, cfg, width = share_of(setup), setup.cfg, setup.width
    longest = cfg.max_completion_tokens
    if name == "prefill":
        return [prefill(s, cfg.prompts_per_rollout // s.data, width)]
    if name in ("decode", "evaluate"):
        prompts = setup.eval_size[0] if name == "evaluate" else cfg.prompts_per_rollout
        group = 1 if name == "evaluate" else cfg.num_generations
        return sampling(s, prompts // s.data, group, setup.slots(name), width, longest)
    batch, micro = micro_batch(setup, name)
    if name == "reference_logprobs":
        return [forward(s, batch).times(micro)]
    return [gradient(s, batch, cfg.remat).times(micro), optimiser(s)]


def bounds(setup: Setup, chip: Chip) -> dict[str, tuple[float, str]]:
    """Return {function: (least seconds of a call, what limits it)}."""
    return {name: bound(phases_of(setup, name), chip) for name in FUNCTIONS}


def iteration(setup: Setup, seconds: dict[str, float]) -> float:
    """Return the seconds of one rollout and all that is done with it on the devices.

    Log-probs are taken once for the reference (beta > 0), once for the old policy (where it is
    needed). Scoring on the host runs while the devices are busy and is left out.
    """
    cfg = setup.cfg
    passes = (cfg.beta > 0) + needs_old(cfg)
    each = passes * seconds["reference_logprobs"] + cfg.num_iterations * seconds["update"]
    return seconds["decode"] + setup.updates * each


def iterations_in_session(
    setup: Setup, seconds: dict[str, float], compile_seconds: float, session: float
) -> int:
    """Return the GRPO iterations that `session` seconds hold after compiling, SFT, an evaluation
    before and after each stage, and what is kept back for the export."""
    cfg = setup.cfg
    evaluations = 1 + (cfg.sft_steps > 0) + (cfg.grpo_steps > 0)
    spent = compile_seconds + cfg.sft_steps * seconds["sft"] + KEPT_BACK
    spent += evaluations * setup.eval_size[1] * seconds["evaluate"]
    return max(0, int((session - spent) / iteration(setup, seconds)))


def measure(program: Program, call: Call, repeats: int = 3) -> float:
    """Run a compiled call on this machine's devices; return median seconds after a first run."""
    seconds = []
    for _ in range(repeats + 1):
        args, options = concrete((call.args, call.options))
        began = time.perf_counter()
        jax.block_until_ready(program.compiled(*args, **options))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def concrete(tree):
    """Return a tree with an array in place of every abstract one: small numbers, tokens 0."""

    def make(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), leaf.sharding)
        draw = jax.jit(make_numbers, static_argnums=(0, 1), out_shardings=leaf.sharding)
        return draw(leaf.shape, leaf.dtype)

    return jax.block_until_ready(jax.tree.map(make, tree))


def make_numbers(shape: tuple[int, ...], dtype) -> jax.Array:
    """Return zeros for integers, and for floats numbers as small as weights are."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return jax.random.uniform(jax.random.key(0), shape, dtype, 0.0, 0.02)
