"""What a run has at hand: data, model, mesh, rewards, folder; and how it is begun, saved, resumed.

`prepare` reads and checks everything and writes nothing; `open_run` makes the folder. Called by
train; knows no stage's mathematics.
"""

import dataclasses
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from gemma_cot import checkpoint, hosts
from gemma_cot.axes import replicated
from gemma_cot.config import ModelConfig, TrainConfig, embedded
from gemma_cot.data import Encoded, encode_examples, prompt_width, read_jsonl
from gemma_cot.grpo.reward import RewardError
from gemma_cot.grpo.rollout import Rollout, score_samples
from gemma_cot.guard import canaries
from gemma_cot.guard.user import checked
from gemma_cot.hf_config import read_json
from gemma_cot.metrics import truncate_after
from gemma_cot.model.load import load_pretrained
from gemma_cot.model.params import Params
from gemma_cot.policy import check_positions, mesh_for, resolve_dtype
from gemma_cot.results import open_results, read_protocol, write_whole
from gemma_cot.resume import FILE, OUTPUTS, as_json, check_folder, fingerprint, take
from gemma_cot.rewards import read_rewards
from gemma_cot.session import Interrupted, Session
from gemma_cot.settings import check_batches, cut_batches
from gemma_cot.tokenizer import Tokenizer, load_tokenizer

STAGES = ("sft", "grpo")
MARGIN = 15.0  # seconds kept back at the end of a session for what is not measured


@dataclass
class Run:
    """Everything a stage needs besides the adapter it trains."""

    cfg: TrainConfig
    model_cfg: ModelConfig
    params: Params  # frozen base weights, on the mesh
    tokenizer: Tokenizer
    train: list[Encoded]
    eval: list[Encoded]
    rewards: list[tuple]  # (name, function, weight)
    mesh: Mesh
    rejects: list[str]  # rows that were skipped or discarded, with the reason
    fingerprint: dict  # hashes of code, model and data
    begin: dict = field(default_factory=dict)  # meta and number of the checkpoint to go on from
    session: Session = field(default_factory=Session)
    saver: checkpoint.Saver = field(default_factory=checkpoint.Saver)
    saved: float = field(default_factory=time.monotonic)  # when the latest checkpoint began
    seconds: dict[str, float] = field(default_factory=dict)  # phase -> seconds, of all sessions
    under_way: tuple[str, float] = ("", 0.0)  # the phase that runs, and when it would have begun
    measured: dict[str, float] = field(default_factory=dict)  # what `kept_back` goes by
    reward_errors: list[dict] = field(default_factory=list)  # rows on which a reward raised
    errors_kept: int = 0  # of these, in reward_errors.jsonl
    taken: int | None = None  # what holds the folder for this process alone, an open file
    canaries: dict[str, dict] = field(default_factory=dict)  # stage -> what hacks earned then

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.cfg.output_dir)

    @property
    def model_dir(self) -> str:
        """The folder of the base model."""
        return self.cfg.model or embedded("tiny_model")

    @cached_property
    def width(self) -> int:
        """Columns of every left-padded prompt, in training and evaluation alike."""
        return prompt_width(self.train + self.eval)

    def place(self, tree):
        """Return `tree` (adapter, optimiser state) replicated over the mesh."""
        return hosts.place(tree, replicated(self.mesh))

    def save_due(self, before: int, step: int) -> bool:
        """Whether to save after `step`, `before` being the step after which that was last asked."""
        every, minutes = self.cfg.checkpoint_every, self.cfg.checkpoint_minutes
        by_steps = every > 0 and step // every > before // every
        if by_steps or not minutes:
            return by_steps
        return hosts.agreed(lambda: time.monotonic() - self.saved >= 60 * minutes)

    def save(self, stage: str, step: int, tree: dict, metrics: dict) -> None:
        """Begin to save a checkpoint after `step` of `stage`, numbered through both stages.

        metrics: what was last logged, for --keep_best. Warns when the save before came to nothing.
        """
        self.settle()
        number = step + (self.cfg.sft_steps if stage == "grpo" else 0)
        folder, self.saved = self.out / "checkpoints", time.monotonic()
        if hosts.is_writer() and checkpoint.fault(folder / str(number)):  # not there, or broken
            finite = {n: v for n, v in metrics.items() if isinstance(v, float) and math.isfinite(v)}
            seconds = {n: s for n, s in self.spent().items() if n != "over_session"}
            meta = {"stage": stage, "step": step, "metrics": finite, "measured": self.measured,
                    "seconds": seconds}  # fmt: skip
            keep = partial(
                checkpoint.prune, folder, number, self.cfg.keep_checkpoints, self.cfg.keep_best
            )
            self.saver.start(folder, number, tree, meta, keep)

    def settle(self) -> None:
        """Wait for the save that is under way; warn when it came to nothing."""
        problem = self.saver.wait()
        if problem:
            good = checkpoint.all_steps(self.out / "checkpoints")
            where = f"the last good checkpoint is {good[-1]}" if good else "there is none yet"
            warnings.warn(f"{problem}; the run goes on, {where}", stacklevel=2)

    def close(self) -> None:
        """Settle, and give the folder back."""
        self.settle()
        if self.taken is not None:
            os.close(self.taken)
            self.taken = None

    def restore(self, stage: str, tree: dict) -> tuple[int, dict]:
        """Return (steps of `stage` done, its tree): what the run goes on from, if of `stage`."""
        if self.begin.get("stage") != stage:
            return 0, tree
        tree, _ = checkpoint.restore(self.out / "checkpoints", tree, self.begin["number"])
        return self.begin["step"], tree

    def restore_part(self, tree: dict) -> dict:
        """Return `tree`, a part of what the checkpoint holds that the run goes on from."""
        return checkpoint.restore(self.out / "checkpoints", tree, self.begin["number"], True)[0]

    def stage_done(self, stage: str) -> bool:
        """Whether the run goes on from a later stage than `stage`."""
        return bool(self.begin) and STAGES.index(self.begin["stage"]) > STAGES.index(stage)

    def open_eval(self, stage: str, step: int) -> tuple[Path, list[dict]]:
        """Return the result file of a stage after `step` steps, and the rows it has from before.

        Rows that were asked of another policy or in another way are done anew.
        """
        path, cfg = self.out / "eval" / f"{stage}.jsonl", self.cfg
        asked = ("instruction", "max_prompt_tokens", "max_completion_tokens", "process_matcher")
        protocol = {name: getattr(cfg, name) for name in asked}
        protocol |= {"stage": stage, "step": step, "n": len(self.eval)}
        protocol |= {name: self.fingerprint[name] for name in ("model", "eval_data", "code")}

        def begun() -> list[dict]:
            same = cfg.resume and read_protocol(path) == json.loads(json.dumps(protocol))
            return open_results(path, protocol, resume=same, overwrite=True)

        try:
            return path, hosts.agreed(begun)
        except ValueError as error:
            warnings.warn(f"{error}; the rows of {stage} are done anew", stacklevel=2)
            return path, []

    def keep(self, path: Path, write: Callable[[Path], None]) -> None:
        """Let process 0 write(path), which the run can do without; warn where the disk refuses."""
        try:
            if hosts.is_writer():
                write(path)
        except OSError as error:
            line = f"{path}: cannot be written, got {error.strerror}; the run goes on, make room"
            warnings.warn(line, stacklevel=2)

    @property
    def outcome(self):
        """The outcome reward, as training and evaluation both use it."""
        return {name: function for name, function, _ in self.rewards}["outcome"]

    @jax.profiler.annotate_function
    def score(self, samples, rows: list[Encoded]) -> Rollout:
        """Read and score samples. Rows on which a reward raises are noted (`keep_errors`).

        Raises RewardError at the first such row, or beyond --max_reward_errors of them.
        """
        limit, before = self.cfg.max_reward_errors, len(self.reward_errors)
        errors = self.reward_errors if limit else None
        rewards = [(name, checked(name, f, errors), weight) for name, f, weight in self.rewards]
        try:
            group = self.cfg.num_generations
            rollout = score_samples(samples, rows, self.tokenizer, rewards, group)
        except ValueError as error:  # a RewardError in the process in which it was raised only
            raise RewardError(str(error)) from error
        self.measured["rollout_tokens"] = float(samples.completion_mask_BT.sum(1).mean())
        fresh = self.reward_errors[before:]
        if limit:  # those of all processes
            fresh = [error for errors in hosts.gather(lambda: fresh) for error in errors]
            self.reward_errors[before:] = fresh
        if len(self.reward_errors) > limit:
            self.keep_errors()
            raise RewardError(
                f"--max_reward_errors: rewards may raise on at most {limit} rows, got "
                f"{len(self.reward_errors)}, the last {fresh[-1]['error']} in "
                f"{fresh[-1]['reward']}; see {self.out}/reward_errors.jsonl and correct it"
            )
        return rollout

    def keep_errors(self) -> None:
        """Append the rows on which rewards raised since the last call to reward_errors.jsonl."""
        fresh = self.reward_errors[self.errors_kept :]
        if fresh:
            self.keep(self.out / "reward_errors.jsonl", partial(_append_lines, fresh))
        self.errors_kept = len(self.reward_errors)

    def watch(self, stage: str) -> list[str]:
        """Score the canaries with the run's rewards, keep what they earn; return alarm lines."""
        self.canaries[stage] = canaries.score_canaries(self.eval, self.rewards, self.tokenizer)
        return canaries.alarms(self.canaries[stage])

    def timed(self, name: str, work, *args):
        """Return work(self, *args), its wall-clock time added to that of earlier sessions.

        Raises Interrupted instead when the run was asked to stop.
        """
        self.leave_if_asked()
        began = time.perf_counter()
        self.under_way = name, began - self.seconds.get(name, 0.0)
        value = work(self, *args)
        seconds = round(time.perf_counter() - began, 2)
        self.seconds[name], self.under_way = self.spent()[name], ("", 0.0)
        kind = name.partition("_")[0]  # "evaluate" or "export", the longest counts
        if seconds > self.measured.get(kind, 0.0):
            self.measured[kind] = seconds
            if kind == "evaluate":
                tokens = sum(result["num_tokens"] for result in value)
                self.measured["evaluate_tokens"] = tokens / max(len(value), 1)
        return value

    def spent(self) -> dict[str, float]:
        """Return the seconds of every phase and in all, those of the sessions before included, as
        far as they were saved; and "over_session" of this one."""
        name, began = self.under_way
        running = {name: round(time.perf_counter() - began, 2)} if name else {}
        phases, now = self.seconds | running, self.session.spent()
        now["total"] = round(now["total"] + phases.pop("total", 0.0), 2)  # of the sessions before
        return phases | now

    def leave_if_asked(self) -> None:
        """Raise Interrupted when a signal asked the run to stop; everything is saved then."""
        if self.session.stops() and self.session.asked:
            raise Interrupted(self.session.asked)

    def kept_back(self, evaluations: int = 1) -> float:
        """Return the seconds to keep back for evaluations, merge and export.

        A quarter more than the longest of each took so far, evaluation longer by as much as
        completions are now longer than they were in it.
        """
        have = self.measured.get
        growth = max(1.0, have("rollout_tokens", 0.0) / max(have("evaluate_tokens", 0.0), 1.0))
        work = evaluations * growth * have("evaluate", 0.0) + have("export", 0.0)
        return MARGIN + 1.25 * work

    def turn(self, stage: str, step: int, total: int) -> bool:
        """Whether another turn of `stage` may begin, `step` of whose `total` steps are done."""
        evaluations = 2 if stage == "sft" and self.cfg.grpo_steps else 1
        return self.session.turn(stage, step, total, self.kept_back(evaluations))

    def out_of_time(self) -> bool:
        """Whether to begin nothing more: asked to stop, or the rest of --session is kept back."""
        return self.session.stops(self.kept_back())


def _append_lines(rows: list[dict], path: Path) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def prepare(cfg: TrainConfig, session: Session | None = None) -> Run:
    """Read and check everything that a run needs; write nothing. Raises ValueError, one line."""
    session = session or Session(cfg.session)
    rewards = read_rewards(cfg)
    prints = fingerprint(cfg)
    hosts.check_same(as_json(cfg) | prints | {"process_id": 0})
    begin = hosts.agreed(partial(check_folder, cfg, prints))
    examples, rejects = {}, []
    for split, path in (("train", cfg.train_data), ("eval", cfg.eval_data)):
        examples[split], bad = read_jsonl(path or embedded(f"{split}.jsonl"), cfg.on_bad_row)
        rejects += bad
    limit = cfg.eval_limit or len(examples["eval"])
    model_dir = cfg.model or embedded("tiny_model")
    model_cfg = ModelConfig.from_hf(read_json(Path(model_dir) / "config.json"))
    model_cfg = dataclasses.replace(model_cfg, attention=cfg.attention, logprob=cfg.logprob)
    check_positions(model_cfg, cfg.max_prompt_tokens, cfg.max_completion_tokens)
    tokenizer = load_tokenizer(model_dir, model_cfg.vocab_size)
    encode = partial(
        encode_examples,
        tokenizer,
        instruction=cfg.instruction,
        max_prompt_tokens=cfg.max_prompt_tokens,
        max_completion_tokens=cfg.max_completion_tokens,
    )
    train, long_train = encode(examples["train"])
    unseen, long_unseen = encode(examples["eval"][:limit])
    for split, count in (("training", long_train), ("evaluation", long_unseen)):
        if count:
            rejects.append(
                f"{count} {split} rows over {cfg.max_prompt_tokens} prompt or "
                f"{cfg.max_completion_tokens} completion tokens: discarded"
            )
    if cfg.grpo_steps and not cfg.max_reward_errors:
        canaries.try_rewards(train, rewards, tokenizer, cfg.num_generations)
    if cfg.grpo_steps and len(train) < cfg.prompts_per_rollout:
        warnings.warn(
            f"--prompts_per_rollout: {cfg.prompts_per_rollout} of {len(train)} training rows; some "
            "are in a rollout more than once",
            stacklevel=2,
        )
    dtype = resolve_dtype(cfg.dtype)
    mesh = mesh_for(cfg.mesh, model_cfg, dtype, cut_batches(cfg))
    check_batches(cfg, mesh.shape["data"])
    _, params = load_pretrained(model_dir, dtype, mesh)
    return Run(
        cfg, model_cfg, params, tokenizer, train, unseen, rewards, mesh, rejects, prints, begin,
        session, measured=dict(begin.get("measured", {})), seconds=dict(begin.get("seconds", {})),
    )  # fmt: skip


def open_run(run: Run) -> None:
    """Make the run's folder: config.json, and metrics.jsonl cut back to the last checkpoint.

    Raises ValueError, one line, where another process is at work there.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    run.taken = take(run.out)
    if run.cfg.overwrite:
        for name in OUTPUTS:
            path = run.out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for name, content in ((FILE, run.fingerprint), ("config.json", as_json(run.cfg))):
        write_whole(run.out / name, json.dumps(content, indent=2) + "\n")
    if run.rejects:
        (run.out / "rejects.txt").write_text("\n".join(run.rejects) + "\n", encoding="utf-8")
    if run.cfg.resume:
        done = {"sft": run.cfg.sft_steps} if run.stage_done("sft") else {}
        if run.begin:
            done[run.begin["stage"]] = run.begin["step"]
        truncate_after(run.out / "metrics.jsonl", done)
