"""What one GRPO update saw, token by token: RUN/traces/STEP.json.gz, every --trace_every steps.

A trace holds the update's groups: prompt, completions with scores, reward and advantage, and for
every completion token the log-prob of sampler, old policy, policy and reference, ratio, KL (k3),
entropy, loss weight, and whether it was clipped. All come from the trainer's own functions, with
the parameters before the update. Called by train; read by report and replay. Changes no number of
the run.
"""

import gzip
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gemma_cot import hosts
from gemma_cot.config import TrainConfig
from gemma_cot.grpo.loss import (
    MAX_LOG_RATIO,
    MAX_LOG_REFERENCE_RATIO,
    OBJECTIVES,
    kl_penalty,
    kl_per_token,
)
from gemma_cot.grpo.reserve import Groups
from gemma_cot.run import Run
from gemma_cot.tokenizer import Tokenizer, decode

SUFFIX = ".json.gz"
DECIMALS = 6  # of stored numbers; float32 log-probs hold no more
PER_TOKEN = (
    "logp_sampler", "logp_old", "logp", "logp_ref", "ratio", "kl", "entropy", "weight", "clipped"
)  # fmt: skip


def is_traced(cfg: TrainConfig, step: int) -> bool:
    """Return whether GRPO step `step` (from 1) is traced: the first, every N-th, the last."""
    ends = step in (1, cfg.grpo_steps)
    return cfg.trace_every > 0 and (ends or step % cfg.trace_every == 0)


def save_trace(
    run: Run, step: int, batch: dict, seen: tuple[jax.Array, jax.Array], known: Groups
) -> None:
    """Write the trace of an update. All processes must call it; process 0 writes.

    batch: what the update is given, [M, rows, T]; seen: (logp, entropy) of its tokens under the
    policy before it; known: the `origins` of its groups.
    """
    arrays = hosts.fetch(batch | {"logp_BT": seen[0], "entropy_BT": seen[1]})
    trace = trace_of(run, step, arrays, known)  # computes on the mesh: all must
    run.keep(trace_path(run.out, step), lambda path: write_trace(run.out, trace))


def trace_of(run: Run, step: int, arrays: dict, known: Groups) -> dict:
    """Return the trace of an update as JSON values; arrays: its batch and `seen`, on the host."""
    T, G = arrays["tokens_BT"].shape[-1], run.cfg.num_generations
    flat = {  # "logp_BT" [M, rows, T] -> "logp" [B, T]; "advantage_B" -> one column
        name.rsplit("_", 1)[0]: np.asarray(value).reshape(-1, T if name.endswith("T") else 1)
        for name, value in arrays.items()
    }
    flat |= jax.device_get(_derived(flat, run.cfg))
    flat["mask"] = np.concatenate(known["mask_BT"])[:, :T]  # an update may have fewer columns
    rows = {row.example.id: row for row in run.train}
    groups = []
    for p, (number, rollout) in enumerate(zip(known["row_P"], known["rollout_P"], strict=True)):
        own = {name: value[p * G : p * G + G] for name, value in flat.items()}
        ids, example = rows[int(number)].prompt_ids, rows[int(number)].example
        groups.append(
            {
                "row": example.id,
                "sampled_in": int(rollout),
                "domain": example.domain,
                "prompt": example.prompt,
                "metadata": example.metadata,
                "prompt_ids": ids,
                "prompt_pieces": _pieces(run.tokenizer, ids),
                "completions": [
                    _completion({name: value[g] for name, value in own.items()}, run.tokenizer)
                    | _scores(run, known, p, g)
                    for g in range(G)
                ],
            }
        )
    return {"step": step, "groups": groups}


def _derived(flat: dict[str, np.ndarray], cfg: TrainConfig) -> dict[str, jax.Array]:
    """Return what the loss makes of log-probs: ratio, clipped, and with a reference kl [B, T], and
    kl_penalty [B, 1] where the KL is in the reward."""
    logp_BT, in_loss_BT = jnp.asarray(flat["logp"]), jnp.asarray(flat["weight"] > 0)
    old_BT = jnp.asarray(flat.get("logp_old", flat["logp"]))
    log_ratio_BT = jnp.clip(logp_BT - old_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_ratio_BT = jnp.where(in_loss_BT, log_ratio_BT, 0.0)
    n_B1 = jnp.maximum(in_loss_BT.sum(axis=1, keepdims=True).astype(jnp.float32), 1.0)
    advantage_B1 = jnp.asarray(flat["advantage"])
    _, ratio_BT, clipped_BT = OBJECTIVES[cfg.objective](
        log_ratio_BT, logp_BT, n_B1, advantage_B1, cfg.epsilon, cfg.epsilon_high
    )
    derived = {"ratio": ratio_BT, "clipped": clipped_BT & in_loss_BT}
    if "logp_ref" in flat:
        ref_BT = jnp.asarray(flat["logp_ref"])
        d_BT = jnp.clip(ref_BT - logp_BT, -MAX_LOG_REFERENCE_RATIO, MAX_LOG_REFERENCE_RATIO)
        d_BT = jnp.where(in_loss_BT, d_BT, 0.0)
        derived["kl"] = kl_per_token(d_BT, ratio_BT, "k3")
        if cfg.kl_in == "reward":
            penalty_B = cfg.beta * kl_penalty(old_BT, ref_BT, in_loss_BT, cfg.kl)
            derived["kl_penalty"] = penalty_B[:, None]
    return derived


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    piece = tokenizer.processor.id_to_piece
    return [piece(i) if i < tokenizer.vocab_size else "" for i in ids]


def _completion(update: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict:
    """Return a completion: text, advantage, and per token what PER_TOKEN names.

    update: its row of what the update is given.
    """
    mask_T = update["mask"]
    ids = update["tokens"][mask_T].tolist()
    stopped = ids[-1] in tokenizer.stop_ids
    return {
        "text": decode(tokenizer, ids[:-1] if stopped else ids),
        "stopped": stopped,
        "advantage": _rounded(update["advantage"][0]),
        "kl_penalty": _rounded(update["kl_penalty"][0]) if "kl_penalty" in update else None,
        "ids": ids,
        "pieces": _pieces(tokenizer, ids),
    } | {
        name: [_rounded(value) for value in update[name][mask_T]]
        for name in PER_TOKEN
        if name in update
    }


def _scores(run: Run, known: Groups, p: int, g: int) -> dict:
    """Return how completion g of group p was scored."""
    names = [name for name, _, _ in run.rewards]
    return {
        "scores": dict(zip(names, map(_rounded, known["score_PKG"][p, :, g]), strict=True)),
        "reward": _rounded(known["reward_PG"][p, g]),
        "valid": bool(known["valid_PG"][p, g]),
    }


def _rounded(value: float) -> float | None:
    """Return a float of DECIMALS decimals, None for what is not finite."""
    return round(float(value), DECIMALS) if math.isfinite(value) else None


def write_trace(run: str | Path, trace: dict) -> None:
    """Write a trace into the run's folder; the file appears by one rename, whole."""
    path = trace_path(run, trace["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    text = json.dumps(trace, ensure_ascii=False, allow_nan=False)
    fresh.write_bytes(gzip.compress(text.encode(), mtime=0))  # the same bytes every time
    os.replace(fresh, path)


def trace_path(run: str | Path, step: int) -> Path:
    """Return where the trace of a step is."""
    return Path(run) / "traces" / f"{step}{SUFFIX}"


def traced_steps(run: str | Path) -> list[int]:
    """Return the GRPO steps that left a trace, in order."""
    names = (path.name.removesuffix(SUFFIX) for path in Path(run).glob(f"traces/*{SUFFIX}"))
    return sorted(int(name) for name in names if name.isdecimal())


def read_trace(run: str | Path, step: int) -> dict:
    """Read the trace of a step. Raises ValueError, one line, for none or a broken one."""
    path = trace_path(run, step)
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        steps = traced_steps(run)
        near = min(steps, key=lambda other: abs(other - step), default=None)
        raise ValueError(
            f"step {step}: must be one of the {len(steps)} traced GRPO steps of {run}"
            f"{f' ({steps[0]} to {steps[-1]})' if steps else ''}, got no {path.name}; "
            + (f"take {near}, or run with a lower --trace_every" if steps else
               "run with --trace_every above 0")
        ) from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: must be a trace, got {error}; delete the file") from None
