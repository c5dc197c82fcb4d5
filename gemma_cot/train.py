"""Teach a Gemma 3 to reason: SFT on the syntax, GRPO on three rewards, evaluation of every stage.

    python -m gemma_cot.train                          # embedded tiny model, 2 CPU cores, minutes
    python -m gemma_cot.train --preset=gemma3_1b_v5e8 --model=DIR --train_data=F --eval_data=F

Writes config.json, metrics.jsonl, eval/, checkpoints/, adapter/, merged/, curves.svg, summary.json
into --output_dir. All bad input is refused before anything is written.
"""

import json
import shlex
import time
from functools import partial
from pathlib import Path

import jax
from absl import flags

from gemma_cot import cli, hosts
from gemma_cot.alarms import keep_batch, onsets, skipped_in_a_row
from gemma_cot.checkpoint import write_folder
from gemma_cot.config import TrainConfig
from gemma_cot.curves import draw_curves
from gemma_cot.data import indices_for_step, target_width
from gemma_cot.environment import describe, peak_memory_gib, write_environment
from gemma_cot.evaluation import compare_stages, evaluate_batches, summarise, table
from gemma_cot.grpo.reward import RewardError
from gemma_cot.grpo.rollout import Rollout, mean_metrics
from gemma_cot.grpo.step import make_logprobs
from gemma_cot.lora import merge, save_peft
from gemma_cot.metrics import MetricsWriter, read_metrics, step_line, times
from gemma_cot.model.load import save_pretrained
from gemma_cot.optim import init_state, make_optimizer, make_schedule, split_batch
from gemma_cot.policy import write_recipe
from gemma_cot.profiling import Profile
from gemma_cot.progress import Progress
from gemma_cot.results import write_results, write_whole
from gemma_cot.run import Run, open_run, prepare
from gemma_cot.session import Interrupted, Session
from gemma_cot.settings import HOST_FLAGS, config_from_flags, define_flags, profile_range
from gemma_cot.sft import make_sft_step, sft_batch
from gemma_cot.traces import is_traced, save_trace
from gemma_cot.turn import (
    first_adapter,
    grpo_functions,
    grpo_start,
    grpo_tree,
    next_batches,
    scored_rollout,
    updates_of,
)


def train_sft(run: Run, writer: MetricsWriter, lora):
    """Stage 1. Returns (adapter, steps done): after `sft_steps` steps, or when time is up."""
    cfg, total = run.cfg, run.cfg.sft_steps
    schedule = make_schedule(cfg.sft_learning_rate, total, cfg.warmup_fraction)
    optimizer = make_optimizer(cfg, schedule)
    step_fn = make_sft_step(run.model_cfg, optimizer, run.mesh, run.width, cfg.remat)
    target = target_width(run.train)
    step, tree = run.restore("sft", {"state": run.place(init_state(optimizer, lora))})
    state = tree["state"]
    with Progress("sft", total, start=step) as progress:
        while step < total and run.turn("sft", step, total):
            began, step = time.perf_counter(), step + 1
            chosen = indices_for_step(step - 1, cfg.seed, len(run.train), cfg.sft_batch)
            batch = sft_batch([run.train[i] for i in chosen], run.width, target)
            batch = split_batch(batch, cfg.sft_batch // cfg.sft_micro_batches, run.mesh)
            state, metrics = step_fn(state, run.params, batch)
            metrics = {name: float(value) for name, value in metrics.items()}
            seconds = time.perf_counter() - began
            metrics |= {
                "learning_rate": float(schedule(step)),
                "memory_gib": peak_memory_gib(),
                "seconds_update": seconds,
                "tokens_per_second": metrics["tokens"] / seconds,
            }
            writer.write("sft", step, metrics)
            watch_update(run, writer, batch)
            progress.update(1, step_line("sft", step, total, metrics))
            if run.save_due(step - 1, step):
                run.save("sft", step, {"state": state}, writer.last)
    run.save("sft", step, {"state": state}, writer.last)
    return state.lora, step


def train_grpo(run: Run, writer: MetricsWriter, lora, reference):
    """Stage 2. Returns (adapter, steps done): after `grpo_steps` steps, or when time is up.

    lora: the adapter to start from; reference: that of the KL penalty, None for the base model.
    """
    cfg = run.cfg
    schedule, optimizer, step_fn, logprobs = grpo_functions(run)
    step, state, reference, reserve = grpo_start(run, optimizer, lora, reference)
    progress, pending = Progress("grpo", cfg.grpo_steps, start=step), []
    log = partial(log_updates, run, writer, schedule, progress, pending)
    trace = make_logprobs(run.model_cfg, cfg, run.mesh, run.width, entropy=True)
    profiled = profile_range(cfg.profile_steps) if hosts.is_writer() else (0, 0)
    profile = Profile(run.out / "profile", profiled)
    while step < cfg.grpo_steps and run.turn("grpo", step, cfg.grpo_steps):
        profile.turn(step, updates_of(cfg), state)
        roll = partial(scored_rollout, run, logprobs, state.lora, reference, log)
        try:
            updates, rollouts, extra, reserve = next_batches(run, roll, step, reserve)
        except RewardError:  # what it costs is this rollout
            run.save("grpo", step, grpo_tree(cfg, state, reference, reserve), writer.last)
            raise
        run.keep_errors()
        updates = updates[: cfg.grpo_steps - step]
        measured, began = [], time.perf_counter()
        show_samples(cfg, rollouts)
        for number, (batch, groups) in enumerate(updates, step + 1):
            seen = trace(run.params, state.lora, batch) if is_traced(cfg, number) else None
            state, metrics = step_fn(state, run.params, batch)
            measured.append(metrics)
            if seen is not None:
                save_trace(run, number, batch, seen, groups)
        pending.append((step, began, updates, measured, rollouts, extra))
        before, step = step, step + len(measured)
        if run.save_due(before, step):
            log()
            run.save("grpo", step, grpo_tree(cfg, state, reference, reserve), writer.last)
    profile.end(state)
    log()
    run.save("grpo", step, grpo_tree(cfg, state, reference, reserve), writer.last)
    return state.lora, step


@jax.profiler.annotate_function
def log_updates(
    run: Run, writer: MetricsWriter, schedule, progress: Progress, pending: list
) -> float:
    """Wait for dispatched updates, write and print their metrics; return the time when they ended.

    pending, which is emptied: (step before the first, time of dispatch, updates, metrics of each
    on the devices, rollouts, further metrics). The devices have the next rollout to do meanwhile,
    so the host's work costs them nothing.
    """
    ended = time.perf_counter()
    while pending:
        done, began, updates, measured, rollouts, extra = pending.pop()
        measured, ended = jax.device_get(measured), time.perf_counter()
        shared, spent = mean_metrics(rollouts) | extra, [rollout.seconds for rollout in rollouts]
        for step, ((batch, _), metrics) in enumerate(zip(updates, measured, strict=True), done + 1):
            metrics = {name: float(value) for name, value in metrics.items()}
            metrics |= shared | times(spent, ended - began, metrics["tokens"], len(measured))
            metrics |= {"learning_rate": float(schedule(step)), "memory_gib": peak_memory_gib()}
            writer.write("grpo", step, metrics)
            watch_update(run, writer, batch)
            progress.count(1)
            line = step_line("grpo", step, run.cfg.grpo_steps, metrics)
            print(f"{line}  {progress.time_left()} left", flush=True)
    return ended


def watch_update(run: Run, writer: MetricsWriter, batch: dict) -> None:
    """Print the alarms that the update last written sets off; keep its batch if it was skipped.

    Raises ValueError when more than --max_skipped in a row are.
    """
    rows = list(writer.rows)
    stage, step = rows[-1]["stage"], rows[-1]["step"]
    for alarm in onsets(rows, last_only=True):
        print(f"ALARM: {stage} step {step}: {alarm['alarm']}", flush=True)
    if not rows[-1]["skipped"]:
        return
    path = run.out / "bad" / f"{stage}-{step}.npz"
    arrays = hosts.fetch(batch)
    run.keep(path, partial(keep_batch, batch=arrays))
    if (skipped := skipped_in_a_row(rows)) > run.cfg.max_skipped:
        raise ValueError(
            f"--max_skipped: at most {run.cfg.max_skipped} updates in a row may be skipped as not "
            f"finite, got {skipped}; lower the learning rate, or look for the cause in {path}"
        )


def show_samples(cfg: TrainConfig, rollouts: list[Rollout]) -> None:
    """Print a prompt of every --sample_every-th rollout, its first completion and the scores."""
    for rollout in rollouts:
        if cfg.sample_every and rollout.number % cfg.sample_every == 0:
            first = {name: values[0] for name, values in rollout.scores.items()}
            scores = [f"{n} {'none' if x is None else f'{x:.1f}'}" for n, x in first.items()]
            print("--- sample:", rollout.rows[0].example.prompt)
            print(f"{rollout.completions[0]}\n--- {'  '.join(scores)}", flush=True)


def evaluate_stage(run: Run, stage: str, lora, step: int) -> list[dict]:
    """Evaluate an adapter after `step` steps of its stage on the evaluation rows, greedily.

    Rows are kept as they come; a resumed run does only those that are missing.
    """
    for line in run.watch(stage):
        print(line, flush=True)
    cfg = run.cfg
    path, results = run.open_eval(stage, step)
    left = run.eval[len(results) :]
    batches = evaluate_batches(
        run.params, run.model_cfg, lora, run.tokenizer, left, run.mesh, width=run.width,
        max_new_tokens=cfg.max_completion_tokens, batch=cfg.eval_batch, done=len(results),
        matcher=cfg.process_matcher, outcome=run.outcome, label=f"evaluate {stage}",
    )  # fmt: skip
    for part in batches:
        results += part
        run.keep(path, partial(write_results, results=results))
        run.leave_if_asked()
    return results


def export(run: Run, lora) -> None:
    """Write adapter/ (PEFT layout) and merged/ (Hugging Face layout, with tokenizer files).

    Each folder appears whole or not at all.
    """

    def write_adapter(folder: Path) -> None:
        save_peft(folder, run.model_cfg, lora, run.model_dir)
        write_recipe(folder, run.cfg)

    def write_merged(folder: Path) -> None:
        save_pretrained(folder, run.model_cfg, merged, tokenizer_dir=run.model_dir)
        write_recipe(folder, run.cfg)

    hosts.agreed(partial(write_folder, run.out / "adapter", write_adapter))
    run.leave_if_asked()
    merged = hosts.own(merge(run.params, lora))
    hosts.agreed(partial(write_folder, run.out / "merged", write_merged))


def finish(run: Run, results: dict[str, list[dict]], steps: dict[str, int]) -> None:
    """Write summary.json and curves.svg, and print the table of the stages."""
    stages = {stage: summarise(rows) for stage, rows in results.items()}
    comparisons = compare_stages(results)
    seconds = run.spent()
    summary = {
        "stages": stages,
        "comparisons": comparisons,
        "seconds": seconds,
        "steps": steps,
        "discarded": run.rejects,
        "canaries": run.canaries,
        "reward_errors": len(run.reward_errors),
        "alarms": onsets(read_metrics(run.out / "metrics.jsonl")),
        "jax": jax.__version__,
        "devices": [str(device) for device in run.mesh.devices.flat],
    }
    write_whole(run.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    draw_curves(run.out / "metrics.jsonl", summary, run.out / "curves.svg")
    print(f"\n{table(stages, comparisons)}\n")
    print("  ".join(f"{name} {value:.0f}s" for name, value in seconds.items()))
    print(f"run folder: {run.out}  (curves.svg, summary.json, eval/, adapter/, merged/)")


def main(cfg: TrainConfig) -> None:
    """Run every stage of the recipe. Raises ValueError, one line, for bad input.

    A run that a signal stops is saved, and the command that goes on with it printed.
    """
    cli.join_hosts(cfg.coordinator, cfg.num_processes, cfg.process_id)
    with Session(cfg.session, say=partial(print, flush=True)).listening() as session:
        run = hosts.together(partial(prepare, cfg, session))
        where = [f"--{name}={getattr(cfg, name)}" for name in HOST_FLAGS if cfg.coordinator]
        go_on = shlex.join(["--resume", f"--output_dir={run.out}", *where])
        go_on = f"Go on with: python -m gemma_cot.train {go_on}"
        try:
            run_stages(run)
        except Interrupted as stopped:
            run.settle()
            print(f"stopped by {stopped}. {go_on}")
        except RewardError:
            run.settle()
            print(f"saved. {go_on} --allow_changes=reward, once the reward is corrected")
            raise
        finally:
            run.close()


def run_stages(run: Run) -> None:
    """Run what is left of SFT, GRPO, the evaluation of each stage and the export."""
    cfg = run.cfg
    hosts.agreed(partial(open_run, run))
    hosts.agreed(partial(write_environment, run))
    print(describe(run), flush=True)
    lora = first_adapter(run)
    reference, steps = None, {"sft": cfg.sft_steps, "grpo": 0}
    with jax.set_mesh(run.mesh), MetricsWriter(run.out, hosts.is_writer()) as writer:
        results = {"base": run.timed("evaluate_base", evaluate_stage, "base", None, 0)}
        if cfg.sft_steps:
            if run.stage_done("sft"):
                lora = run.restore_part({"reference": lora})["reference"]
            else:
                lora, steps["sft"] = run.timed("sft", train_sft, writer, lora)
            reference = lora
            results["sft"] = run.timed("evaluate_sft", evaluate_stage, "sft", lora, steps["sft"])
        if cfg.grpo_steps and steps["sft"] == cfg.sft_steps:
            if cfg.session and "export" not in run.measured:
                run.timed("export", export, lora)  # measures it; and there is one from here on
            lora, steps["grpo"] = run.timed("grpo", train_grpo, writer, lora, reference)
            grpo = run.timed("evaluate_grpo", evaluate_stage, "grpo", lora, steps["grpo"])
            results["grpo"] = grpo
    for stage, total in (("sft", cfg.sft_steps), ("grpo", cfg.grpo_steps)):
        if steps[stage] < total:
            print(f"--session={cfg.session}: time is up after {steps[stage]} of {total} "
                  f"{stage.upper()} steps; --resume goes on")  # fmt: skip
    run.timed("export", export, lora)
    hosts.agreed(partial(finish, run, results, steps))


if __name__ == "__main__":
    define_flags()
    cli.run(lambda: main(config_from_flags(flags.FLAGS)))
