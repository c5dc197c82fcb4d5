"""What a run has at hand: data, model, mesh, rewards, folder; and how it is begun, saved, resumed.

`prepare` reads and checks everything and writes nothing; `open_run` makes the folder. Called by
train; knows no stage's mathematics.
"""

import dataclasses
import json
import shutil
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from gemma_cot import checkpoint
from gemma_cot.axes import replicated
from gemma_cot.config import ModelConfig, TrainConfig, embedded
from gemma_cot.data import Encoded, encode_examples, prompt_width, read_jsonl
from gemma_cot.grpo.reward import (
    RewardError,
    format_reward,
    length_penalty,
    outcome_reward,
    process_reward,
    repetition_penalty,
)
from gemma_cot.grpo.rollout import Rollout, score_samples
from gemma_cot.guard import canaries, sandbox, symbolic
from gemma_cot.guard.user import checked, load_reward
from gemma_cot.lora import Lora, init_lora
from gemma_cot.metrics import truncate_after
from gemma_cot.model.load import load_pretrained, read_json, write_json
from gemma_cot.model.params import Params
from gemma_cot.optim import init_state, make_optimizer, make_schedule
from gemma_cot.policy import mesh_for, resolve_dtype
from gemma_cot.settings import check_batches, cut_batches, session_seconds
from gemma_cot.tokenizer import Tokenizer, load_tokenizer

STAGES = ("sft", "grpo")
OUTPUTS = ("config.json", "metrics.jsonl", "summary.json", "rejects.txt", "reward_errors.jsonl",
           "curves.svg", "eval",
           "checkpoints", "adapter", "merged", "tensorboard")  # fmt: skip
# Settings that a resumed run may be given anew: they change no number of the run.
FREE_ON_RESUME = {"resume", "overwrite", "session", "sample_every", "checkpoint_every",
                  "max_reward_errors",
                  "keep_checkpoints"}  # fmt: skip


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
    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)  # phase -> wall-clock seconds
    reward_errors: list[dict] = field(default_factory=list)  # rows on which a reward raised
    canaries: dict[str, dict] = field(default_factory=dict)  # stage -> what hacks earned then

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.cfg.output_dir)

    @property
    def model_dir(self) -> str:
        """The folder of the base model."""
        return self.cfg.model or embedded("tiny_model")

    @property
    def width(self) -> int:
        """Columns of every left-padded prompt, in training and evaluation alike."""
        return prompt_width(self.train + self.eval)

    def place(self, tree):
        """Return `tree` (adapter, optimiser state) replicated over the mesh."""
        return jax.device_put(tree, replicated(self.mesh))

    def save(self, stage: str, step: int, tree: dict) -> None:
        """Write a checkpoint after `step` of `stage`, numbered through both stages."""
        number = step + (self.cfg.sft_steps if stage == "grpo" else 0)
        folder = self.out / "checkpoints"
        if number not in checkpoint.all_steps(folder):
            checkpoint.save(folder, number, tree, {"stage": stage, "step": step})
            checkpoint.prune(folder, self.cfg.keep_checkpoints)

    def restore(self, stage: str, tree: dict) -> tuple[int, dict]:
        """Return (steps of `stage` done, its tree): the latest checkpoint, if it is of `stage`."""
        folder = self.out / "checkpoints"
        if self.cfg.resume and checkpoint.latest_step(folder) is not None:
            meta = checkpoint.read_meta(folder)
            if meta["stage"] == stage:
                return meta["step"], checkpoint.restore(folder, tree)[0]
        return 0, tree

    def stage_done(self, stage: str) -> bool:
        """Whether a later stage than `stage` has a checkpoint already."""
        folder = self.out / "checkpoints"
        if not self.cfg.resume or checkpoint.latest_step(folder) is None:
            return False
        return STAGES.index(checkpoint.read_meta(folder)["stage"]) > STAGES.index(stage)

    @property
    def outcome(self):
        """The outcome reward, as training and evaluation both use it."""
        return {name: function for name, function, _ in self.rewards}["outcome"]

    def score(self, samples, rows: list[Encoded]) -> Rollout:
        """Read and score samples. A row on which a reward raises goes to reward_errors.jsonl.

        Raises RewardError at the first such row, or beyond --max_reward_errors of them.
        """
        limit, before = self.cfg.max_reward_errors, len(self.reward_errors)
        errors = self.reward_errors if limit else None
        rewards = [(name, checked(name, f, errors), weight) for name, f, weight in self.rewards]
        rollout = score_samples(samples, rows, self.tokenizer, rewards, self.cfg.num_generations)
        fresh = self.reward_errors[before:]
        if fresh:
            with open(self.out / "reward_errors.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(error) + "\n" for error in fresh)
        if len(self.reward_errors) > limit:
            raise RewardError(
                f"--max_reward_errors: rewards may raise on at most {limit} rows, got "
                f"{len(self.reward_errors)}, the last {fresh[-1]['error']} in "
                f"{fresh[-1]['reward']}; see {self.out}/reward_errors.jsonl and correct it"
            )
        return rollout

    def watch(self, stage: str) -> list[str]:
        """Score the canaries with the run's rewards, keep what they earn; return alarm lines."""
        self.canaries[stage] = canaries.score_canaries(self.eval, self.rewards, self.tokenizer)
        return canaries.alarms(self.canaries[stage])

    def timed(self, name: str, work, *args):
        """Return work(self, *args), its wall-clock time kept under `name`."""
        began = time.perf_counter()
        value = work(self, *args)
        self.seconds[name] = round(time.perf_counter() - began, 2)
        return value

    def out_of_time(self) -> bool:
        """Whether the --session ends before another step, the last evaluation and the export.

        Kept back: one and a half times the longest evaluation so far, and one minute.
        """
        evaluations = [s for name, s in self.seconds.items() if name.startswith("evaluate")]
        reserve = 1.5 * max(evaluations, default=0.0) + 60
        elapsed = time.monotonic() - self.began
        return elapsed + reserve > session_seconds(self.cfg.session)


def prepare(cfg: TrainConfig) -> Run:
    """Read and check everything that a run needs; write nothing. Raises ValueError, one line."""
    check_folder(cfg)
    rewards = read_rewards(cfg)
    examples, rejects = {}, []
    for split, path in (("train", cfg.train_data), ("eval", cfg.eval_data)):
        examples[split], bad = read_jsonl(path or embedded(f"{split}.jsonl"), cfg.on_bad_row)
        rejects += bad
    limit = cfg.eval_limit or len(examples["eval"])
    model_dir = cfg.model or embedded("tiny_model")
    model_cfg = ModelConfig.from_hf(read_json(Path(model_dir) / "config.json"))
    model_cfg = dataclasses.replace(model_cfg, attention=cfg.attention, logprob=cfg.logprob)
    check_positions(cfg, model_cfg)
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
    dtype = resolve_dtype(cfg.dtype)
    mesh = mesh_for(cfg.mesh, model_cfg, dtype, cut_batches(cfg))
    check_batches(cfg, mesh.shape["data"])
    _, params = load_pretrained(model_dir, dtype, mesh)
    return Run(cfg, model_cfg, params, tokenizer, train, unseen, rewards, mesh, rejects)


def read_rewards(cfg: TrainConfig) -> list[tuple]:
    """Return (name, function, weight) of the three built-in rewards and the user's own."""
    rewards = [
        ("format", format_reward, cfg.format_weight),
        ("process", partial(process_reward, matcher=cfg.process_matcher), cfg.process_weight),
        ("outcome", read_outcome(cfg.math_verify), cfg.outcome_weight),
    ]
    if cfg.length_weight:
        length = partial(length_penalty, limit=cfg.max_completion_tokens, cache=cfg.length_cache)
        rewards.append(("length", length, cfg.length_weight))
    if cfg.repetition_weight:
        rewards.append(("repetition", repetition_penalty, cfg.repetition_weight))
    if cfg.allow_code_execution:
        for line in sandbox.check():
            warnings.warn(line, stacklevel=2)
        run_code = partial(sandbox.code_reward, allow_code_execution=True)
        rewards.append(("code", run_code, cfg.code_weight))
    rewards += map(load_reward, cfg.reward)
    names = [name for name, _, _ in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"--reward: function names must differ from each other and from format, process, "
            f"outcome and code, got {', '.join(twice)} twice; rename a function"
        )
    return rewards


def read_outcome(math_verify: bool):
    """Return the outcome reward. Raises ValueError, one line, without the extra it needs."""
    if not math_verify:
        return outcome_reward
    symbolic.require()
    return partial(outcome_reward, matches=symbolic.answers_match_symbolic)


def check_positions(cfg: TrainConfig, model_cfg: ModelConfig) -> None:
    """Raise ValueError when a sample may be longer than the model's positions."""
    longest = cfg.max_prompt_tokens + cfg.max_completion_tokens
    if longest > model_cfg.max_positions:
        raise ValueError(
            f"--max_completion_tokens: prompt + completion must fit the model's "
            f"{model_cfg.max_positions} positions, got {longest}; lower it"
        )


def check_folder(cfg: TrainConfig) -> None:
    """Raise ValueError when --output_dir holds another run, or none where one is to be resumed."""
    config = Path(cfg.output_dir) / "config.json"
    holds_run = config.exists()
    if cfg.resume:
        if not holds_run:
            raise ValueError(
                f"--resume: {cfg.output_dir} must hold a run, got no config.json there; "
                "correct --output_dir or drop --resume"
            )
        before, now = read_json(config), as_json(cfg)
        differ = [n for n in now if n not in FREE_ON_RESUME and before.get(n) != now[n]]
        if differ:
            name = differ[0]
            raise ValueError(
                f"--resume: settings must be those of the run in {cfg.output_dir}, got "
                f"{len(differ)} that differ, first {name}: {before.get(name)!r} then, "
                f"{now[name]!r} now; set it back or choose another --output_dir"
            )
    elif holds_run and not cfg.overwrite:
        raise ValueError(
            f"--output_dir: {cfg.output_dir} must not hold a run, got one; add --resume to go on "
            "with it, --overwrite to delete it, or choose another folder"
        )
    elif Path(cfg.output_dir).exists() and not Path(cfg.output_dir).is_dir():
        raise ValueError(f"--output_dir: {cfg.output_dir} must be a folder, got a file; choose one")


def as_json(cfg: TrainConfig) -> dict:
    """Return the settings as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def open_run(run: Run) -> None:
    """Make the run's folder: config.json, and metrics.jsonl cut back to the last checkpoint."""
    if run.cfg.overwrite:
        for name in OUTPUTS:
            path = run.out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    run.out.mkdir(parents=True, exist_ok=True)
    write_json(run.out / "config.json", as_json(run.cfg))
    if run.rejects:
        (run.out / "rejects.txt").write_text("\n".join(run.rejects) + "\n", encoding="utf-8")
    if run.cfg.resume:
        done = {}
        if checkpoint.latest_step(run.out / "checkpoints") is not None:
            meta = checkpoint.read_meta(run.out / "checkpoints")
            done = {"sft": run.cfg.sft_steps} if meta["stage"] == "grpo" else {}
            done[meta["stage"]] = meta["step"]
        truncate_after(run.out / "metrics.jsonl", done)


def read_config(folder: str | Path) -> tuple[TrainConfig, str]:
    """Return (settings, base model folder) of the run in `folder`, wherever it was moved to."""
    stored = read_json(Path(folder) / "config.json")
    known = {item.name for item in dataclasses.fields(TrainConfig)}
    if not known <= stored.keys():
        raise ValueError(
            f"{folder}/config.json: must hold the settings of a run, got none of "
            f"{sorted(known - stored.keys())[:3]}; point --run at a folder that train wrote"
        )
    values = {name: stored[name] for name in known} | {"output_dir": str(folder)}
    cfg = TrainConfig(**values | {"reward": tuple(stored["reward"])})
    return cfg, cfg.model or embedded("tiny_model")


def latest_adapter(cfg: TrainConfig, model_cfg: ModelConfig) -> tuple[Lora, str]:
    """Return the adapter of the latest checkpoint of a run, and which one that is."""
    folder = Path(cfg.output_dir) / "checkpoints"
    meta = checkpoint.read_meta(folder)
    lora = init_lora(jax.random.key(0), model_cfg, cfg.lora_rank, cfg.lora_alpha)
    optimizer = make_optimizer(cfg, make_schedule(cfg.learning_rate, 1, 0.0))
    tree = {"state": init_state(optimizer, lora)}
    if meta["stage"] == "grpo":
        tree["reference"] = lora if cfg.sft_steps else None
    tree, meta = checkpoint.restore(folder, tree)
    return tree["state"].lora, f"{meta['stage']} step {meta['step']}"
