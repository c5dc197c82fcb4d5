"""A turn of the GRPO loop up to its updates: which rows, sampling, scores, log-probs, advantages.

Called by train, and by replay, which makes the same turns again. Everything is a function of the
checkpoint and (seed, step); what is written meanwhile is the caller's (`meanwhile`).
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

from gemma_cot import hosts
from gemma_cot.config import TrainConfig
from gemma_cot.data import indices_for_step
from gemma_cot.grpo.reserve import Reserve, cut, empty_reserve, fill_batches, origins, pack, unpack
from gemma_cot.grpo.rollout import sample_prompts
from gemma_cot.grpo.step import (
    add_advantages,
    add_logprobs,
    make_grpo_step,
    make_logprobs,
    mini_batches,
)
from gemma_cot.lora import Lora, init_lora
from gemma_cot.optim import init_state, make_optimizer, make_schedule
from gemma_cot.run import Run

LORA_KEY, ROLLOUT_KEY = 0, 1  # purposes, folded into the key of the seed


def first_adapter(run: Run) -> Lora:
    """Return the adapter that a run begins with, on the mesh."""
    key = jax.random.fold_in(jax.random.key(run.cfg.seed), LORA_KEY)
    return run.place(init_lora(key, run.model_cfg, run.cfg.lora_rank, run.cfg.lora_alpha))


def grpo_functions(run: Run) -> tuple:
    """Return (schedule, optimizer, the jitted update, the jitted log-probs) of a run's GRPO."""
    cfg = run.cfg
    schedule = make_schedule(cfg.learning_rate, cfg.grpo_steps, cfg.warmup_fraction)
    optimizer = make_optimizer(cfg, schedule)
    step_fn = make_grpo_step(run.model_cfg, cfg, optimizer, run.mesh, run.width)
    return schedule, optimizer, step_fn, make_logprobs(run.model_cfg, cfg, run.mesh, run.width)


def grpo_start(run: Run, optimizer, lora, reference) -> tuple:
    """Return (steps done, state, reference, reserve): those of the checkpoint to go on from, else
    before the first step."""
    cfg = run.cfg
    state = run.place(init_state(optimizer, jax.tree.map(jnp.copy, lora)))  # state is donated
    reserve = empty_reserve(cfg, run.width + cfg.max_completion_tokens, len(run.rewards))
    step, tree = run.restore("grpo", grpo_tree(cfg, state, reference, reserve))
    reserve = unpack(tree["reserve"]) if cfg.dynamic_sampling else None
    return step, tree["state"], tree["reference"], reserve


def grpo_tree(cfg: TrainConfig, state, reference, reserve: Reserve | None) -> dict:
    """Return what a checkpoint of GRPO holds; the reserve only with dynamic sampling."""
    tree = {"state": state, "reference": reference}
    return tree | {"reserve": pack(reserve, cfg.mini_batch)} if cfg.dynamic_sampling else tree


def updates_of(cfg: TrainConfig) -> int:
    """Return how many updates a rollout feeds; with dynamic sampling, at most."""
    return cfg.prompts_per_rollout // cfg.mini_batch * cfg.num_iterations


@jax.profiler.annotate_function
def next_batches(run: Run, roll, step: int, reserve: Reserve | None):
    """Return (the next updates, the rollouts, further metrics, the reserve then).

    An update is (batch, the `origins` of its groups); there are `num_iterations` passes over them.
    roll(number) -> (batches, rollout). They are those of one rollout or, with dynamic sampling, of
    as many as it takes.
    """
    cfg = run.cfg
    if cfg.dynamic_sampling:
        updates, *rest = fill_batches(reserve, roll, run.out_of_time, cfg, run.mesh)
    else:
        batches, rollout = roll(-(-step // updates_of(cfg)))  # what one cut short has left is lost
        batches = add_advantages(batches, rollout.reward_PG, rollout.valid_PG, cfg, run.mesh)
        updates = list(zip(batches, cut(origins(rollout), cfg.mini_batch), strict=True))
        rest = [rollout], {}, reserve
    return updates * cfg.num_iterations, *rest


@jax.profiler.annotate_function
def scored_rollout(run: Run, logprobs, policy, reference, meanwhile, number: int):
    """Return (mini-batches without advantages, Rollout) of rollout `number`.

    The host calls meanwhile() -> time while the devices sample, and scores while they compute
    log-probs.
    """
    cfg = run.cfg
    chosen = indices_for_step(number, cfg.seed + 1, len(run.train), cfg.prompts_per_rollout)
    rows = [run.train[i] for i in chosen]
    if jax.default_backend() == "cpu":  # where an update seems to last until its rollout ends
        meanwhile()
    samples = roll_out(run, policy, rows, number)
    began = meanwhile()
    samples = hosts.fetch(samples)
    batches = mini_batches(samples, cfg, run.mesh)
    batches = add_logprobs(logprobs, run.params, batches, policy, reference, cfg)
    sampled = time.perf_counter()
    rollout = run.score(samples, rows)
    seconds = (sampled - began, time.perf_counter() - sampled)
    return batches, dataclasses.replace(rollout, seconds=seconds, number=number)


@jax.profiler.annotate_function
def roll_out(run: Run, lora, rows: list, number: int):
    """Sample the completions of rollout `number` for `rows`; returns device arrays."""
    cfg = run.cfg
    key = jax.random.fold_in(jax.random.key(cfg.seed), ROLLOUT_KEY)
    key = jax.random.fold_in(key, number)
    ids, beyond = [row.example.id for row in rows], run.train[-1].example.id + 1
    # A row that comes again gets a number past the last line's, so that its draws are others.
    ids = [x + beyond * ids[:i].count(x) for i, x in enumerate(ids)]
    return sample_prompts(
        run.params, run.model_cfg, lora, [row.prompt_ids for row in rows], run.width, key, run.mesh,
        prompt_ids=ids, num_completions=cfg.num_generations,
        max_new_tokens=cfg.max_completion_tokens, temperature=cfg.temperature,
        stop_ids=run.tokenizer.stop_ids, slots=cfg.rollout_slots,
    )  # fmt: skip
