"""Make the groups of a GRPO step again: from the checkpoint before it, by the same turns.

Checkpoints are made every --checkpoint_every steps and a step's rollout needs the policy after all
steps before it, so the turns in between are made again; rows, draws and updates are functions of
the checkpoint and (seed, step). Called by generate; writes nothing.
"""

import dataclasses
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gemma_cot import checkpoint, hosts
from gemma_cot.config import TrainConfig
from gemma_cot.finished import read_config, saved_adapter
from gemma_cot.grpo.step import make_logprobs
from gemma_cot.hf_config import read_json
from gemma_cot.resume import FILE
from gemma_cot.run import Run, prepare
from gemma_cot.traces import trace_of
from gemma_cot.turn import first_adapter, grpo_functions, grpo_start, next_batches, scored_rollout


def parse_replay(text: str) -> tuple[str, int, int]:
    """Return run, step and group of --replay=RUN:STEP:PROMPT. Raises ValueError, one line."""
    folder, step, group = (text.rsplit(":", 2) + ["", ""])[:3]
    if not (folder and step.isdecimal() and group.isdecimal() and int(step) and int(group)):
        raise ValueError(
            f"--replay: must be RUN:STEP:PROMPT, a run's folder, a GRPO step and a group of it, "
            f"both from 1, got {text!r}; set --replay=runs/tiny:20:1"
        )
    return folder, int(step), int(group)


def open_replay(folder: str, mesh: str = "auto") -> Run:
    """Read what a run had at hand. Warns where code, model or data are other ones now."""
    cfg, _ = read_config(folder)
    alone = dict(mesh=mesh, coordinator="", num_processes=1, process_id=0, session="")
    run = prepare(dataclasses.replace(cfg, resume=False, overwrite=True, **alone))
    path = Path(folder) / FILE
    before = read_json(path) if path.is_file() else {}
    now = json.loads(json.dumps(run.fingerprint))
    differ = [name for name in now if before.get(name) != now[name]]
    if differ:
        warnings.warn(f"replay: not those of the run any more: {', '.join(differ)}; the tokens may "
                      "differ", stacklevel=2)  # fmt: skip
    return run


def begin_of(cfg: TrainConfig, step: int) -> dict:
    """Return meta and number of the latest checkpoint from which GRPO step `step` can be made, {}
    for a run without SFT that begins anew. Raises ValueError where none is kept."""
    folder = Path(cfg.output_dir) / "checkpoints"
    if not 1 <= step <= cfg.grpo_steps:
        raise ValueError(
            f"--replay: the step must be one of the run's {cfg.grpo_steps} GRPO steps, got {step}; "
            "correct it"
        )
    kept = [number for number in checkpoint.all_steps(folder) if number >= cfg.sft_steps]
    before = [number for number in kept if number < cfg.sft_steps + step]
    if before:
        return checkpoint.read_meta(folder, before[-1]) | {"number": before[-1]}
    if not cfg.sft_steps:
        return {}
    first = f"from {kept[0] - cfg.sft_steps + 1} on" if kept else "none"
    raise ValueError(
        f"--replay: a step needs a checkpoint before it, got step {step} where steps {first} have "
        "one; take such a step, and let a run keep more with --keep_checkpoints"
    )


def replay(run: Run, step: int, say: Callable[[str], None] = lambda line: None) -> dict:
    """Return the trace of GRPO step `step` (from 1), made again; say(line) tells how far it is."""
    cfg = run.cfg
    run.begin = begin_of(cfg, step)
    lora = run.place(
        saved_adapter(cfg, run.model_cfg, run.begin["number"])[0]
        if run.begin.get("stage") == "sft"
        else first_adapter(run)
    )
    _, optimizer, step_fn, logprobs = grpo_functions(run)
    reference = lora if cfg.sft_steps else None
    done, state, reference, reserve = grpo_start(run, optimizer, lora, reference)
    while True:
        say(f"replay: GRPO step {done + 1} of {step}")
        roll = partial(scored_rollout, run, logprobs, state.lora, reference, time.perf_counter)
        updates, _, _, reserve = next_batches(run, roll, done, reserve)
        for batch, groups in updates[: step - done]:
            done += 1
            if done == step:
                measure = make_logprobs(run.model_cfg, cfg, run.mesh, run.width, entropy=True)
                logp, entropy = measure(run.params, state.lora, batch)
                arrays = hosts.fetch(batch | {"logp_BT": logp, "entropy_BT": entropy})
                return trace_of(run, step, arrays, groups)
            state, _ = step_fn(state, run.params, batch)


def same_tokens(trace: dict, again: dict) -> bool:
    """Return whether two traces of a step hold the same tokens, group by group."""
    ids = [
        [[c["ids"] for c in group["completions"]] for group in one["groups"]]
        for one in (trace, again)
    ]
    return ids[0] == ids[1]
