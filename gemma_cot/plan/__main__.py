"""Say before a run whether it fits and how long it takes, on chips that need not be there.

    python -m gemma_cot.plan --preset=gemma3_1b_v5e8 --topology=v5e:2x4 [--session_hours=9] [--json]

Takes the flags of gemma_cot.train and compiles the functions of that run for the chips named: two
to three minutes on 2 cores. Exit code 2 and one line when it cannot fit. --topology=local plans for
this machine's devices, and --measure times the functions there.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

from absl import flags

from gemma_cot import cli, config
from gemma_cot.config import ModelConfig, TrainConfig, embedded
from gemma_cot.data import read_jsonl
from gemma_cot.hf_config import read_json
from gemma_cot.model.params import num_params
from gemma_cot.plan.accounts import OWNERS, collectives, owners
from gemma_cot.plan.chips import GIB, Chip, compiler_of, devices_of
from gemma_cot.plan.clock import bounds, iteration, iterations_in_session, measure, phases_of
from gemma_cot.plan.fit import beside, largest_rollout, needs, refusal
from gemma_cot.plan.programs import FUNCTIONS, Setup, call_of, compile_call
from gemma_cot.policy import check_positions, device_memory, mesh_for, resolve_dtype
from gemma_cot.settings import (
    check_batches,
    config_from_flags,
    cut_batches,
    define_flags,
    session_seconds,
)

SHAPES = {
    "tiny": config.TINY, "270m": config.GEMMA3_270M, "1b": config.GEMMA3_1B,
    "4b": config.GEMMA3_4B, "12b": config.GEMMA3_12B, "27b": config.GEMMA3_27B,
}  # fmt: skip
SHAPE_OF_PRESET = {"tiny": "tiny", "gemma3_1b_v5e8": "1b"}


def define_plan_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags of train and this command's own on `values`."""
    define_flags(values)
    values["model"].help = f"Model folder, or one of {', '.join(SHAPES)}; empty: the preset's."
    flags.DEFINE_string(
        "topology", "v5e:2x4", "TPU chips as libtpu names them, or local.", flag_values=values
    )
    flags.DEFINE_float(
        "session_hours", None, "Hours of a session; default: --session, else 9.",
        lower_bound=0.01, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "eval_rows", 1000, "Evaluation rows, where neither --eval_data nor --eval_limit says.",
        lower_bound=1, flag_values=values,
    )  # fmt: skip
    for name, default, text in (
        ("largest", True, "Search for the largest rollout, 2 or 3 compilations more."),
        ("measure", False, "With --topology=local: run the functions and time them."),
        ("json", False, "Print one JSON object instead of text."),
    ):
        flags.DEFINE_bool(name, default, text, flag_values=values)


def read_shape(model: str, preset: str) -> ModelConfig:
    """Return the shape that --model names, or the preset's. Raises ValueError for neither."""
    model = model or SHAPE_OF_PRESET.get(preset, "")
    if model in SHAPES:
        return SHAPES[model]
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"--model: must be one of {', '.join(SHAPES)} or a folder with config.json, got "
            f"{model!r}; set --model=1b"
        )
    return ModelConfig.from_hf(read_json(Path(model) / "config.json"))


def count_eval_rows(cfg: TrainConfig, values: flags.FlagValues) -> int:
    """Return how many rows an evaluation has."""
    rows = cfg.eval_limit or values.eval_rows
    if cfg.eval_data or values.preset == "tiny":
        there = len(read_jsonl(cfg.eval_data or embedded("eval.jsonl"), cfg.on_bad_row)[0])
        rows = min(cfg.eval_limit or there, there)
    return rows


def set_up(values: flags.FlagValues) -> tuple[Setup, Chip | None, float]:
    """Return (the run, its chips' peaks, bytes that programs have of a chip). Raises ValueError."""
    cfg = config_from_flags(values)
    if values.measure and values.topology != "local":
        raise ValueError(
            f"--measure: can only time the devices of this machine, got --topology="
            f"{values.topology}; set --topology=local or drop --measure"
        )
    model_cfg = read_shape(cfg.model, values.preset)
    model_cfg = dataclasses.replace(model_cfg, attention=cfg.attention, logprob=cfg.logprob)
    check_positions(model_cfg, cfg.max_prompt_tokens, cfg.max_completion_tokens)
    devices, chip = devices_of(values.topology)
    if values.topology == "local":
        dtype, memory = resolve_dtype(cfg.dtype), device_memory(devices[0])
    else:
        dtype, memory = "bfloat16" if cfg.dtype == "auto" else cfg.dtype, chip.memory
    mesh = mesh_for(cfg.mesh, model_cfg, dtype, cut_batches(cfg), devices, memory)
    check_batches(cfg, mesh.shape["data"])
    return Setup(cfg, model_cfg, mesh, dtype, count_eval_rows(cfg, values)), chip, memory


def make_plan(
    setup: Setup, chip: Chip | None, memory: float, values: flags.FlagValues
) -> dict:
    """Compile everything; return the plan as the JSON object that --json prints."""
    calls = {name: call_of(name, setup) for name in FUNCTIONS}
    programs = {}
    for name, call in calls.items():
        if sys.stderr.isatty():
            print(f"compiling {name} ...", file=sys.stderr, flush=True)
        programs[name] = compile_call(setup, call)
    needed = needs(setup, programs)
    limited = memory < float("inf")
    largest = largest_rollout(setup, programs, memory) if values.largest and limited else None
    no = refusal(setup, needed, memory, largest)
    held = {name: owners(setup, name, p) for name, p in programs.items()}
    found = {name: collectives(p.text) for name, p in programs.items() if p.compiled}
    cost = {name: phases_of(setup, name) for name in FUNCTIONS}
    plan = {
        "fits": not no,
        "refusal": no,
        "hbm_gib_per_chip": {n: p.total / GIB for n, p in programs.items()},
        "hbm_gib_by_owner": {
            n: {owner: size / GIB for owner, size in of.items()} for n, of in held.items()
        },
        "hbm_gib_beside": {n: beside(setup, n, programs) / GIB for n in programs},
        "hbm_gib_limit": memory / GIB if limited else None,
        "headroom_gib": (memory - max(needed.values())) / GIB if limited else None,
        "collectives": {n: {k: total for k, (total, _) in of.items()} for n, of in found.items()},
        "collectives_in_loops": {
            n: {k: looped for k, (_, looped) in of.items() if looped} for n, of in found.items()
        },
        "compile_seconds": {n: round(p.seconds, 1) for n, p in programs.items()},
        "tflop_per_chip": {n: sum(c.flops for c in of) / 1e12 for n, of in cost.items()},
        "hbm_gb_moved_per_chip": {n: sum(c.hbm for c in of) / 1e9 for n, of in cost.items()},
        "mesh": f"{setup.mesh.shape['data']}x{setup.mesh.shape['model']}",
        "topology": values.topology,
        "compiler": compiler_of(setup.mesh.devices.flat[0]),
        "dtype": setup.dtype,
        "largest_prompts_per_rollout": largest,
        "bound_seconds": None, "limiter": None, "iterations_in_session": None,
        "measured_seconds": None,
    }  # fmt: skip
    if chip:
        plan |= time_plan(setup, chip, plan["compile_seconds"], session_hours(setup.cfg, values))
    if values.measure and not no:
        plan["measured_seconds"] = {n: measure(programs[n], call) for n, call in calls.items()}
    return plan


def time_plan(
    setup: Setup, chip: Chip, compile_seconds: dict[str, float], hours: float
) -> dict:
    """Return the part of the plan that follows from the chip's peaks."""
    least = bounds(setup, chip)
    seconds = {name: value for name, (value, _) in least.items()}
    compiling = sum(compile_seconds.values())
    return {
        "bound_seconds": seconds | {"iteration": iteration(setup, seconds)},
        "limiter": {name: limiter for name, (_, limiter) in least.items()},
        "iterations_in_session": iterations_in_session(setup, seconds, compiling, 3600 * hours),
        "session_hours": hours,
    }


def session_hours(cfg: TrainConfig, values: flags.FlagValues) -> float:
    """Return the hours of a session: --session_hours, else --session, else 9."""
    given = values.session_hours
    if given and not math.isfinite(given):
        raise ValueError(f"--session_hours: must be a number of hours, got {given}; set 9")
    return given or (session_seconds(cfg.session) / 3600 if cfg.session else 9.0)


def table(plan: dict) -> str:
    """Return memory, work and time by function, a column each."""
    rows = [("", [name.removesuffix("_logprobs") for name in FUNCTIONS])]
    by_owner = plan["hbm_gib_by_owner"]
    for owner in OWNERS:
        rows.append((f"  {owner}", [f"{by_owner[f].get(owner, 0):.3f}" for f in FUNCTIONS]))
    rows.insert(1, ("HBM a chip, GiB", [f"{plan['hbm_gib_per_chip'][f]:.3f}" for f in FUNCTIONS]))
    rows.append(("kept beside, GiB", [f"{plan['hbm_gib_beside'][f]:.3f}" for f in FUNCTIONS]))
    rows.append(("TFLOP a chip", [f"{plan['tflop_per_chip'][f]:.3f}" for f in FUNCTIONS]))
    moved = plan["hbm_gb_moved_per_chip"]
    rows.append(("GB moved a chip", [f"{moved[f]:.2f}" for f in FUNCTIONS]))
    if plan["bound_seconds"]:
        least = plan["bound_seconds"]
        rows.append(("bound of a call, ms", [f"{1e3 * least[f]:.2f}" for f in FUNCTIONS]))
        rows.append(("  limited by", [plan["limiter"][f] for f in FUNCTIONS]))
    if plan["measured_seconds"]:
        taken = plan["measured_seconds"]
        rows.append(("measured, ms", [f"{1e3 * taken[f]:.2f}" for f in FUNCTIONS]))
    rows.append(("compiled in, s", [f"{plan['compile_seconds'][f]:.1f}" for f in FUNCTIONS]))
    return "\n".join(f"{name:21s}" + "".join(f"{c:>12s}" for c in cells) for name, cells in rows)


def text_of(setup: Setup, plan: dict) -> str:
    """Return the plan as text."""
    cfg, devices = setup.cfg, setup.mesh.devices
    lines = [
        f"{num_params(setup.model_cfg):,} parameters in {setup.dtype}, LoRA rank {cfg.lora_rank}; "
        f"{devices.size} x {devices.flat[0].device_kind} ({plan['topology']}), mesh {plan['mesh']}",
        f"compiled by {plan['compiler']}; by another release memory may be another",
        f"rollout {cfg.prompts_per_rollout} prompts x {cfg.num_generations} of {setup.width} + "
        f"{cfg.max_completion_tokens} tokens; an update {cfg.mini_batch} prompts x "
        f"{cfg.num_generations} rows, micro-batches of {cfg.micro_batch} a data device: "
        f"{setup.micro_batches} of them, {setup.updates * cfg.num_iterations} updates a rollout",
        table(plan),
        "collectives in the program (in its loops):",
    ]
    for name, found in plan["collectives"].items():
        looped = plan["collectives_in_loops"][name]
        kinds = [f"{count} {kind} ({looped.get(kind, 0)})" for kind, count in found.items()]
        lines.append(f"  {name:20s} {', '.join(kinds) or 'none'}")
    if plan["headroom_gib"] is not None:
        lines.append(
            f"fits: {'yes' if plan['fits'] else 'NO'}, headroom {plan['headroom_gib']:.2f} of "
            f"{plan['hbm_gib_limit']:.2f} GiB that programs have of a chip"
        )
    if plan["largest_prompts_per_rollout"] is not None:
        lines.append(f"largest rollout: {plan['largest_prompts_per_rollout']} prompts")
    if plan["bound_seconds"]:
        lines.append(
            f"an iteration takes at least {plan['bound_seconds']['iteration']:.3f} s; a session of "
            f"{plan['session_hours']:g} h holds at most {plan['iterations_in_session']} after "
            f"compiling, SFT, evaluations of {setup.eval_rows} rows, and export"
        )
        lines.append(
            "Bounds follow from shapes and peak figures, every completion at full length, no time "
            "on the host; nothing here was measured" + (
                " but the line that says so" if plan["measured_seconds"] else ""
            )
        )  # fmt: skip
    return "\n".join(lines)


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Make the plan and print it. Raises ValueError, one line, when the run cannot fit."""
    setup, chip, memory = set_up(values)
    plan = make_plan(setup, chip, memory, values)
    print(json.dumps(plan) if values.json else text_of(setup, plan), flush=True)
    if not plan["fits"]:
        raise ValueError(plan["refusal"])


if __name__ == "__main__":
    define_plan_flags()
    cli.run(main)
