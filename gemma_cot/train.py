"""Teach a Gemma 3 to reason: SFT on the syntax, GRPO on three rewards, evaluation of every stage.

    python -m gemma_cot.train                          # embedded tiny model, 2 CPU cores, minutes
    python -m gemma_cot.train --preset=gemma3_1b_v5e8 --model=DIR --train_data=F --eval_data=F

Writes config.json, metrics.jsonl, eval/, checkpoints/, adapter/, merged/, curves.svg, summary.json
into --output_dir. All bad input is refused before anything is written.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
from absl import flags

from gemma_cot import cli
from gemma_cot.config import TrainConfig
from gemma_cot.curves import draw_curves
from gemma_cot.data import indices_for_step, target_width
from gemma_cot.evaluation import compare, evaluate_rows, summarise, table
from gemma_cot.grpo.rollout import Rollout, rollout_metrics, sample_prompts
from gemma_cot.grpo.step import (
    add_advantages,
    add_logprobs,
    make_grpo_step,
    make_logprobs,
    mini_batches,
)
from gemma_cot.lora import init_lora, merge, save_peft
from gemma_cot.metrics import MetricsWriter, step_line
from gemma_cot.model.load import save_pretrained, write_json
from gemma_cot.model.params import num_params
from gemma_cot.optim import init_state, make_optimizer, make_schedule, split_batch
from gemma_cot.policy import write_recipe
from gemma_cot.progress import Progress
from gemma_cot.results import read_results, write_results
from gemma_cot.run import Run, open_run, prepare
from gemma_cot.settings import config_from_flags, define_flags
from gemma_cot.sft import make_sft_step, sft_batch

LORA_KEY, ROLLOUT_KEY = 0, 1  # purposes, folded into the key of the seed
merge_on_device = jax.jit(merge)


def train_sft(run: Run, writer: MetricsWriter, lora):
    """Stage 1. Returns the adapter after `sft_steps` steps, from the latest checkpoint on."""
    cfg, total = run.cfg, run.cfg.sft_steps
    schedule = make_schedule(cfg.sft_learning_rate, total, cfg.warmup_fraction)
    optimizer = make_optimizer(cfg, schedule)
    step_fn = make_sft_step(run.model_cfg, optimizer, run.mesh, run.width, cfg.remat)
    target = target_width(run.train)
    first, tree = run.restore("sft", {"state": run.place(init_state(optimizer, lora))})
    state = tree["state"]
    with Progress("sft", total, start=first) as progress:
        for step in range(first + 1, total + 1):
            began = time.perf_counter()
            chosen = indices_for_step(step - 1, cfg.seed, len(run.train), cfg.sft_batch)
            batch = sft_batch([run.train[i] for i in chosen], run.width, target)
            batch = split_batch(batch, cfg.sft_batch // cfg.sft_micro_batches, run.mesh)
            state, metrics = step_fn(state, run.params, batch)
            metrics = {name: float(value) for name, value in metrics.items()}
            seconds = time.perf_counter() - began
            metrics |= {
                "learning_rate": float(schedule(step)),
                "seconds_update": seconds,
                "tokens_per_second": metrics["tokens"] / seconds,
            }
            writer.write("sft", step, metrics)
            progress.update(1, step_line("sft", step, total, metrics))
            if step % cfg.checkpoint_every == 0 or step == total:
                run.save("sft", step, {"state": state})
    return state.lora


def train_grpo(run: Run, writer: MetricsWriter, lora, reference):
    """Stage 2. Returns (adapter, steps done): after `grpo_steps` steps, or when time is up.

    lora: the adapter to start from; reference: that of the KL penalty, None for the base model.
    """
    cfg = run.cfg
    schedule = make_schedule(cfg.learning_rate, cfg.grpo_steps, cfg.warmup_fraction)
    optimizer = make_optimizer(cfg, schedule)
    step_fn = make_grpo_step(run.model_cfg, cfg, optimizer, run.mesh, run.width)
    logprobs = make_logprobs(run.model_cfg, cfg, run.mesh, run.width)
    state = run.place(init_state(optimizer, jax.tree.map(jnp.copy, lora)))  # state is donated
    step, tree = run.restore("grpo", {"state": state, "reference": reference})
    state, reference = tree["state"], tree["reference"]
    updates = cfg.prompts_per_rollout // cfg.mini_batch
    log = partial(log_updates, run, writer, schedule, Progress("grpo", cfg.grpo_steps, start=step))
    pending = None
    while step < cfg.grpo_steps and not run.out_of_time():
        number = step // updates
        chosen = indices_for_step(number, cfg.seed + 1, len(run.train), cfg.prompts_per_rollout)
        rows = [run.train[i] for i in chosen]
        samples = roll_out(run, state.lora, rows, number)
        clock = [log(pending)]  # the updates before, while the devices sample
        samples = jax.device_get(samples)
        clock.append(time.perf_counter())
        batches = mini_batches(samples, cfg, run.mesh)
        batches = add_logprobs(logprobs, run.params, batches, state.lora, reference, cfg.beta)
        rollout = run.score(samples, rows)  # while the devices compute log-probs
        clock.append(time.perf_counter())
        batches = add_advantages(batches, rollout.reward_PG, rollout.valid_PG, cfg, run.mesh)
        measured = []
        for batch in batches[: cfg.grpo_steps - step]:
            state, metrics = step_fn(state, run.params, batch)
            measured.append(metrics)
        pending = (step, measured, rollout, clock)
        step += len(measured)
        if cfg.sample_every and number % cfg.sample_every == 0:
            print(sample_text(rows[0].example.prompt, rollout), flush=True)
        if step % cfg.checkpoint_every < updates:
            log(pending)
            pending = None
            run.save("grpo", step, {"state": state, "reference": reference})
    log(pending)
    run.save("grpo", step, {"state": state, "reference": reference})
    if step < cfg.grpo_steps:
        print(f"--session={cfg.session}: time is up after {step} of {cfg.grpo_steps} GRPO steps")
    return state.lora, step


def roll_out(run: Run, lora, rows: list, number: int):
    """Sample the completions of rollout `number` for `rows`; returns device arrays.

    The adapter is merged into float32 weights, which makes decoding faster; bfloat16 ones would
    round it away, and the sampler would no longer be the policy that is trained.
    """
    cfg, params = run.cfg, run.params
    if params["embed"].dtype == jnp.float32:
        params, lora = merge_on_device(params, lora), None
    key = jax.random.fold_in(jax.random.key(cfg.seed), ROLLOUT_KEY)
    key = jax.random.fold_in(key, number)
    return sample_prompts(
        params, run.model_cfg, lora, [row.prompt_ids for row in rows], run.width, key, run.mesh,
        prompt_ids=[row.example.id for row in rows], num_completions=cfg.num_generations,
        max_new_tokens=cfg.max_completion_tokens, temperature=cfg.temperature,
        stop_ids=run.tokenizer.stop_ids, slots=cfg.rollout_slots,
    )  # fmt: skip


def log_updates(run: Run, writer: MetricsWriter, schedule, progress: Progress, pending) -> float:
    """Wait for dispatched updates, write and print their metrics; return the time when they ended.

    pending: (step before the first, metrics of each on the devices, rollout, clock) or None. The
    devices have the next rollout to do meanwhile, so the host's work costs them nothing.
    """
    if pending is None:
        return time.perf_counter()
    step, measured, rollout, clock = pending
    for metrics in measured:
        metrics = {name: float(value) for name, value in metrics.items()}
        step += 1
        clock.append(time.perf_counter())
        metrics |= rollout_metrics(rollout) | times(clock, metrics["tokens"], len(measured))
        metrics["learning_rate"] = float(schedule(step))
        writer.write("grpo", step, metrics)
        progress.count(1)
        line = step_line("grpo", step, run.cfg.grpo_steps, metrics)
        print(f"{line}  {progress.time_left()} left", flush=True)
    return clock[-1]


def times(clock: list[float], tokens: float, updates: int) -> dict[str, float]:
    """Return the time metrics of an update; a rollout's time is shared out over its updates.

    clock: seconds at the start, after sampling, after scoring, and after each update.
    """
    rollout, reward = (clock[1] - clock[0]) / updates, (clock[2] - clock[1]) / updates
    update = clock[-1] - clock[-2]
    return {
        "seconds_rollout": rollout,
        "seconds_reward": reward,
        "seconds_update": update,
        "tokens_per_second": tokens / (rollout + reward + update),
    }


def sample_text(prompt: str, rollout: Rollout) -> str:
    """Return a prompt and its first completion with its scores, to be printed now and then."""
    scores = "  ".join(
        f"{name} {'none' if values[0] is None else f'{values[0]:.1f}'}"
        for name, values in rollout.scores.items()
    )
    return f"--- sample: {prompt}\n{rollout.completions[0]}\n--- {scores}"


def evaluate_stage(run: Run, stage: str, lora) -> list[dict]:
    """Evaluate an adapter on the evaluation rows, greedily; a resumed run reads what it has."""
    for line in run.watch(stage):
        print(line, flush=True)
    path = run.out / "eval" / f"{stage}.jsonl"
    if run.cfg.resume and path.exists():
        return read_results(path)
    cfg = run.cfg
    results = evaluate_rows(
        run.params, run.model_cfg, lora, run.tokenizer, run.eval, run.mesh, width=run.width,
        max_new_tokens=cfg.max_completion_tokens, batch=cfg.eval_batch,
        matcher=cfg.process_matcher, outcome=run.outcome, label=f"evaluate {stage}",
    )  # fmt: skip
    write_results(path, results)
    return results


def export(run: Run, lora) -> None:
    """Write adapter/ (PEFT layout) and merged/ (Hugging Face layout, with tokenizer files)."""
    save_peft(run.out / "adapter", run.model_cfg, lora, run.model_dir)
    merged = merge(run.params, lora)
    save_pretrained(run.out / "merged", run.model_cfg, merged, tokenizer_dir=run.model_dir)
    for name in ("adapter", "merged"):
        write_recipe(run.out / name, run.cfg)


def finish(run: Run, results: dict[str, list[dict]], steps: dict[str, int]) -> None:
    """Write summary.json and curves.svg, and print the table of the stages."""
    stages = {stage: summarise(rows) for stage, rows in results.items()}
    names = list(results)
    comparisons = {
        f"{names[i]} -> {names[i + 1]}, {score}": compare(
            results[names[i]], results[names[i + 1]], column
        )
        for i in range(len(names) - 1)
        for score, column in (("full format", "format"), ("answer", "outcome"))
    }
    seconds = run.seconds | {"total": round(time.monotonic() - run.began, 2)}
    summary = {
        "stages": stages,
        "comparisons": comparisons,
        "seconds": seconds,
        "steps": steps,
        "discarded": run.rejects,
        "canaries": run.canaries,
        "reward_errors": len(run.reward_errors),
        "jax": jax.__version__,
        "devices": [str(device) for device in run.mesh.devices.flat],
    }
    write_json(run.out / "summary.json", summary)
    draw_curves(run.out / "metrics.jsonl", summary, run.out / "curves.svg")
    print(f"\n{table(stages, comparisons)}\n")
    print("  ".join(f"{name} {value:.0f}s" for name, value in seconds.items()))
    print(f"run folder: {run.out}  (curves.svg, summary.json, eval/, adapter/, merged/)")


def describe(run: Run) -> str:
    """Return what a run begins by printing."""
    cfg, model_cfg = run.cfg, run.model_cfg
    lines = [
        f"model {run.model_dir}: {num_params(model_cfg):,} parameters, {model_cfg.num_layers} "
        f"layers; LoRA rank {cfg.lora_rank} alpha {cfg.lora_alpha:g}",
        f"data: {len(run.train)} training rows, {len(run.eval)} evaluation rows; devices: "
        f"{run.mesh.devices.size} {run.mesh.devices.flat[0].platform}, mesh "
        f"{run.mesh.shape['data']}x{run.mesh.shape['model']}",
        *run.rejects,
    ]
    return "\n".join(lines)


def main(cfg: TrainConfig) -> None:
    """Run every stage of the recipe. Raises ValueError, one line, for bad input."""
    run = prepare(cfg)
    open_run(run)
    print(describe(run), flush=True)
    key = jax.random.fold_in(jax.random.key(cfg.seed), LORA_KEY)
    lora = run.place(init_lora(key, run.model_cfg, cfg.lora_rank, cfg.lora_alpha))
    reference, steps = None, {"sft": cfg.sft_steps, "grpo": 0}
    with jax.set_mesh(run.mesh), MetricsWriter(run.out) as writer:
        results = {"base": run.timed("evaluate_base", evaluate_stage, "base", None)}
        if cfg.sft_steps:
            if not run.stage_done("sft"):
                lora = run.timed("sft", train_sft, writer, lora)
            reference = lora
            results["sft"] = run.timed("evaluate_sft", evaluate_stage, "sft", lora)
        if cfg.grpo_steps:
            lora, steps["grpo"] = run.timed("grpo", train_grpo, writer, lora, reference)
            results["grpo"] = run.timed("evaluate_grpo", evaluate_stage, "grpo", lora)
    run.timed("export", export, lora)
    finish(run, results, steps)


if __name__ == "__main__":
    define_flags()
    cli.run(lambda: main(config_from_flags(flags.FLAGS)))
