"""The whole loop on a few short rows: every output is there, a stopped run resumes to the same
numbers, a broken reward loses nothing."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from commands import refused_line
from small_runs import numbers, write_rows

from gemma_cot import checkpoint, train
from gemma_cot.config import PRESETS, TrainConfig, embedded
from gemma_cot.grpo.loss import group_advantages
from gemma_cot.grpo.reward import RewardError
from gemma_cot.lora import load_peft, merge
from gemma_cot.metrics import METRICS, MetricsWriter
from gemma_cot.model.load import load_pretrained
from gemma_cot.replay import begin_of, open_replay, replay, same_tokens
from gemma_cot.results import read_results
from gemma_cot.traces import PER_TOKEN, read_trace, traced_steps
from gemma_cot.turn import first_adapter, next_batches, roll_out

USER_REWARD = """
import os, signal

calls, fail_at, stop_at = 0, None, None

def short(prompts, completions, *, metadata, domain, level, **columns):
    global calls
    calls += len(completions) == 8  # a rollout of four prompts; canaries are fewer
    if fail_at == calls and len(completions) == 8:
        raise RuntimeError("reward broke on purpose")
    if stop_at == calls and len(completions) == 8:
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(metadata) == len(domain) == len(level) == len(prompts) == len(completions)
    return [None if one == 0 else 1 / (1 + len(text)) for one, text in zip(level, completions)]
"""


@pytest.fixture(scope="module")
def user_reward(tmp_path_factory):
    """A module of the user's, importable, whose function can be told to fail."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_reward.py").write_text(USER_REWARD)
    sys.path.insert(0, str(folder))
    import user_reward

    yield user_reward
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def cfg(tmp_path_factory, user_reward) -> TrainConfig:
    """Two SFT and four GRPO steps on twelve short rows, four devices, two updates a rollout."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder)
    return TrainConfig(
        **PRESETS["tiny"]
        | dict(
            train_data=str(folder / "train.jsonl"),
            eval_data=str(folder / "eval.jsonl"),
            output_dir=str(tmp_path_factory.mktemp("out") / "whole"),
            max_completion_tokens=40,
            lora_rank=4,
            sft_steps=2,
            sft_batch=4,
            grpo_steps=4,
            num_generations=2,
            prompts_per_rollout=4,
            mini_batch=2,
            micro_batch=1,
            eval_limit=6,
            checkpoint_every=2,
            sample_every=1,
            reward=("user_reward:short=0.5",),
        )
    )


@pytest.fixture(scope="module")
def whole(cfg) -> TrainConfig:
    """The settings of a run that was never interrupted, after it ended."""
    train.main(cfg)
    return cfg


def test_a_run_leaves_all_its_outputs(whole, capsys):
    out = whole.output_dir
    rows = numbers(out)
    steps = [(row["stage"], row["step"]) for row in rows]
    assert steps == [("sft", 1), ("sft", 2), *(("grpo", n) for n in range(1, 5))]
    known = {*METRICS, "stage", "step", "reward_short", "none_short"}
    assert all(set(row) <= known for row in rows)
    assert all(row["ratio_max"] == 1.0 for row in rows if row["step"] % 2 and "ratio_max" in row)
    drift = [row["logp_drift_max"] for row in rows if row["stage"] == "grpo"]
    assert max(drift) < 1e-4  # the same network code in sampler and trainer, float32
    rates = [row["learning_rate"] for row in rows]  # warm-up of one step, then a cosine to 0
    cosine = [1, 0.5 + 0.5 / 2**0.5, 0.5, 0.5 - 0.5 / 2**0.5]
    wanted = [2e-3, 1e-3, *(1e-3 * share for share in cosine)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-5)
    summary = json.loads(Path(f"{out}/summary.json").read_text())
    for stage in ("base", "sft", "grpo"):
        results = read_results(f"{out}/eval/{stage}.jsonl")
        assert summary["stages"][stage]["n"] == len(results) == 6
        low, high = summary["stages"][stage]["full_format_accuracy_interval"]
        assert low <= summary["stages"][stage]["full_format_accuracy"] <= high
        canaries = summary["canaries"][stage]
        assert canaries["honest"]["outcome"] == 1.0 and canaries["two answers"]["outcome"] == 0.0
        assert "short" in canaries["nothing"]
    assert summary["steps"] == {"sft": 2, "grpo": 4}
    assert "<svg" in Path(f"{out}/curves.svg").read_text()
    config = json.loads(Path(f"{out}/config.json").read_text())
    assert config == train_config_as_json(whole)


def train_config_as_json(cfg) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def test_exports_hold_the_trained_policy(whole):
    model_cfg, base = load_pretrained(embedded("tiny_model"), "float32")
    _, merged = load_pretrained(f"{whole.output_dir}/merged", "float32")
    lora = load_peft(f"{whole.output_dir}/adapter", model_cfg)
    for a, b in zip(jax.tree.leaves(merge(base, lora)), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(abs(lora.layers["q"]["b"]).max()) > 0  # it was trained
    changed = [np.any(np.asarray(a) != np.asarray(b)) for a, b in
               zip(jax.tree.leaves(base), jax.tree.leaves(merged), strict=True)]  # fmt: skip
    assert sum(changed) == 7  # the seven projections, and nothing else


def test_a_broken_reward_ends_the_run_and_resuming_gives_the_same_numbers(
    whole, user_reward, capsys
):
    out = whole.output_dir.replace("whole", "broken")
    cfg = dataclasses.replace(whole, output_dir=out, checkpoint_every=0)
    user_reward.calls, user_reward.fail_at = 0, 2  # in the second rollout
    with pytest.raises(RewardError, match="short - must not raise - got RuntimeError: reward"):
        train.main(cfg)
    user_reward.fail_at = None
    command = f"saved. Go on with: python -m gemma_cot.train --resume --output_dir={out} "
    assert command + "--allow_changes=reward" in capsys.readouterr().out
    assert [row["step"] for row in numbers(out)] == [1, 2, 1, 2]
    assert checkpoint.latest_step(Path(out) / "checkpoints") == 4
    train.main(dataclasses.replace(cfg, resume=True))
    assert numbers(out) == numbers(whole.output_dir)
    for stage in ("base", "sft", "grpo"):
        assert read_results(f"{out}/eval/{stage}.jsonl") == read_results(
            f"{whole.output_dir}/eval/{stage}.jsonl"
        )
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert Path(f"{out}/{name}").read_bytes() == Path(f"{whole.output_dir}/{name}").read_bytes()


def test_a_signal_ends_a_run_in_order_and_it_goes_on_with_another_number_of_devices(
    whole, user_reward, capsys, monkeypatch
):
    out = whole.output_dir.replace("whole", "stopped")
    cfg = dataclasses.replace(whole, output_dir=out, mesh="4x1", sft_steps=0, beta=0.0)
    user_reward.calls, user_reward.stop_at = 0, 1  # in the first rollout
    train.main(cfg)
    user_reward.stop_at = None
    command = f"Go on with: python -m gemma_cot.train --resume --output_dir={out}\n"
    assert "stopped by SIGTERM. " + command in capsys.readouterr().out
    assert [row["step"] for row in numbers(out)] == [1, 2]  # the step was finished
    assert not Path(f"{out}/adapter").exists()
    other = out.replace("stopped", "on_one")
    shutil.copytree(out, other)
    train.main(dataclasses.replace(cfg, resume=True))
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    train.main(dataclasses.replace(cfg, output_dir=other, resume=True, mesh="1x1"))
    four, one = numbers(out), numbers(other)
    assert one[:2] == four[:2] and [row["step"] for row in one] == [1, 2, 3, 4]
    assert one[2]["reward"] == four[2]["reward"]  # the same completions
    for a, b in zip(one[2:], four[2:], strict=True):  # sums in another order: rounding
        np.testing.assert_allclose(
            *([row[n] for n in ("loss", "grad_norm", "entropy")] for row in (a, b)),
            rtol=1e-3, atol=1e-6,
        )  # fmt: skip


def test_traces_add_up_to_the_metrics_of_their_steps(whole):
    assert traced_steps(whole.output_dir) == [1, 4]  # the first, each 20th, the last
    rows = {row["step"]: row for row in numbers(whole.output_dir) if row["stage"] == "grpo"}
    for step in (1, 4):
        trace, row = read_trace(whole.output_dir, step), rows[step]
        members = [c for group in trace["groups"] for c in group["completions"]]
        tokens = {name: [v for c in members for v in c[name]] for name in PER_TOKEN}
        assert len(tokens["logp"]) == row["tokens"] == sum(len(c["ids"]) for c in members)
        for name, metric in (("kl", "kl"), ("entropy", "entropy"), ("clipped", "clip_share")):
            assert np.mean(tokens[name]) == pytest.approx(row[metric], abs=2e-6), name
        assert max(tokens["ratio"]) == pytest.approx(row["ratio_max"], abs=2e-6)
        drift = np.abs(np.subtract(tokens["logp_old"], tokens["logp_sampler"]))
        assert drift.max() == pytest.approx(row["logp_drift_max"], abs=2e-6)
        assert sum(tokens["weight"]) == pytest.approx(1, abs=1e-3)  # six decimals of each
        for group in trace["groups"]:
            own = group["completions"]
            rewards, valid = ([c[name] for c in own] for name in ("reward", "valid"))
            wanted = group_advantages(jax.numpy.array([rewards]), jax.numpy.array([valid]))[0]
            np.testing.assert_allclose([c["advantage"] for c in own], wanted, atol=2e-3)
            assert all(c["pieces"][-1] == "<end_of_turn>" for c in own if c["stopped"])
            assert "".join(group["prompt_pieces"]).startswith("<bos><start_of_turn>user")
    assert set(read_trace(whole.output_dir, 1)["groups"][0]["completions"][0]["ratio"]) == {1.0}


def test_a_step_is_made_again_from_the_checkpoint_before_it(whole):
    run = open_replay(whole.output_dir, whole.mesh)
    with jax.set_mesh(run.mesh):
        again = replay(run, 4)
    trace = read_trace(whole.output_dir, 4)
    assert same_tokens(again, trace) and again == trace
    with pytest.raises(ValueError, match="got step 1 where steps from 3 on have one"):
        begin_of(whole, 1)  # the checkpoint after SFT is not kept
    with pytest.raises(ValueError, match="must be one of the run's 4 GRPO steps, got 5"):
        begin_of(whole, 5)


def test_a_prompt_that_comes_twice_in_a_rollout_is_drawn_anew(whole):
    run = open_replay(whole.output_dir, whole.mesh)

    def completions(*chosen):
        with jax.set_mesh(run.mesh):
            rows = [run.train[i] for i in chosen]
            samples = jax.device_get(roll_out(run, first_adapter(run), rows, 0))
        return samples.tokens_BT.reshape(4, 2, -1)[:, :, run.width :].tolist()

    first, other, second, third = completions(0, 1, 0, 0)
    assert first != second != third != first
    assert [first, other] == completions(0, 1, 2, 3)[:2], "the first time as where it comes once"


def test_a_rollout_feeds_several_passes_with_one_pi_old(whole, user_reward):
    """mu = 2: rollouts of steps 1 to 4 and 5, two mini-batches each; KL in the reward."""
    out = whole.output_dir.replace("whole", "passes")
    cfg = dataclasses.replace(
        whole, output_dir=out, sft_steps=0, grpo_steps=5, num_iterations=2, eval_limit=2,
        kl_in="reward", kl="k1", learning_rate=0.01, temperature=3.0, sample_every=0, trace_every=4,
    )  # fmt: skip
    user_reward.calls = 0
    train.main(cfg)
    rows = numbers(out)
    assert user_reward.calls == 2 and [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    on_policy = [abs(row["ratio_max"] - 1) < 1e-5 for row in rows]
    assert on_policy == [True, False, False, False, True]
    drift = [row["logp_drift_max"] for row in rows]
    assert max(drift) < 1e-4  # pi_old is the sampler's policy in the second pass too
    assert all(row["kl"] > 0 for row in rows[1:4])
    assert traced_steps(out) == [1, 4, 5]
    lines = Path(out, "metrics.jsonl").read_text().splitlines()
    seconds = [row["seconds_update"] for row in map(json.loads, lines) if row["stage"] == "grpo"]
    assert len(set(seconds[:4])) == 1, "updates of one rollout share its time equally"
    run = open_replay(out, cfg.mesh)
    with jax.set_mesh(run.mesh):  # the second pass over a rollout's second mini-batch
        assert replay(run, 4) == read_trace(out, 4)


@pytest.mark.parametrize(("step", "number"), [(0, 0), (4, 1), (5, 2), (8, 2)])
def test_what_a_rollout_cut_short_had_left_is_not_sampled_again(whole, step, number):
    """Four updates a rollout; a run of 5 steps that goes on begins with the third rollout."""

    class Asked(Exception):
        pass

    def roll(asked: int):
        raise Asked(asked)

    run = SimpleNamespace(cfg=dataclasses.replace(whole, num_iterations=2))
    with pytest.raises(Asked, match=f"^{number}$"):
        next_batches(run, roll, step, None)


def test_grpo_without_sft_starts_from_the_base_model(whole):
    out = whole.output_dir.replace("whole", "no_sft")
    cfg = dataclasses.replace(
        whole, output_dir=out, sft_steps=0, grpo_steps=2, eval_limit=4, profile_steps="1:2",
        max_completion_tokens=160, length_buckets=8,
    )  # fmt: skip
    train.main(cfg)
    for step in (1, 2):  # updates narrower than the longest completion allowed, and traced so
        groups = read_trace(out, step)["groups"]
        longest = max(len(c["ids"]) for group in groups for c in group["completions"])
        assert longest <= 140, "none of 8 widths could be left out"
        assert all(len(c["logp"]) == len(c["ids"]) for g in groups for c in g["completions"])
    (profile,) = Path(out).glob("profile/plugins/profile/*/*.xplane.pb")
    for scope in (b"scored_rollout", b"log_updates", b"attention", b"decode_step", b"grpo_loss"):
        assert scope in profile.read_bytes(), scope
    summary = json.loads(Path(f"{out}/summary.json").read_text())
    assert list(summary["stages"]) == ["base", "grpo"]
    first = numbers(out)[0]
    assert first["kl"] == 0.0  # b = 0: policy and reference are the base model


def test_a_session_that_is_too_short_still_ends_with_evaluation_and_export(whole, capsys):
    out = whole.output_dir.replace("whole", "short_session")
    cfg = dataclasses.replace(whole, output_dir=out, sft_steps=0, eval_limit=4, session="0.01s")
    train.main(cfg)
    printed = capsys.readouterr().out
    assert "--session=0.01s: time is up after 0 of 4 GRPO steps" in printed
    assert "over_session" in printed
    summary = json.loads(Path(f"{out}/summary.json").read_text())
    assert summary["steps"]["grpo"] == 0 and summary["stages"]["grpo"]["n"] == 4
    assert Path(f"{out}/adapter/adapter_model.safetensors").is_file()
    assert Path(f"{out}/merged/model.safetensors").is_file()


def command(*arguments: str) -> subprocess.CompletedProcess:
    """Run a command line of the package on one CPU device."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment,
        timeout=300,
    )  # fmt: skip


def test_export_evaluate_and_generate_agree_with_the_run(whole, tmp_path):
    exported = command(
        "gemma_cot.export", f"--run={whole.output_dir}", f"--output={tmp_path}/merged"
    )
    assert exported.returncode == 0, exported.stderr
    assert "merged export of grpo step 4" in exported.stdout
    weights = "merged/model.safetensors"
    assert (tmp_path / weights).read_bytes() == Path(f"{whole.output_dir}/{weights}").read_bytes()
    evaluated = command(
        "gemma_cot.evaluate", f"--model={tmp_path}/merged", f"--data={whole.eval_data}",
        "--limit=6", f"--output={tmp_path}/rows.jsonl",
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    wanted = read_results(f"{whole.output_dir}/eval/grpo.jsonl")
    assert read_results(tmp_path / "rows.jsonl") == wanted
    prompt = f"--prompt={wanted[0]['prompt']}"
    generated = command("gemma_cot.generate", f"--adapter={whole.output_dir}/adapter", prompt)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout == wanted[0]["completion"] + "\n"


@pytest.mark.parametrize("matcher", ["normalised", "literal"])
def test_a_stage_is_evaluated_as_the_run_scores_and_only_what_is_left(tmp_path, matcher):
    asked, done = [], [{"id": 1}]
    run = SimpleNamespace(
        cfg=TrainConfig(process_matcher=matcher, max_completion_tokens=7, eval_batch=3),
        params=None, model_cfg=None, tokenizer=None, mesh=None, width=5, eval=["a", "b", "c"],
        outcome=object(), watch=lambda stage: [], open_eval=lambda stage, step: (tmp_path, done),
    )  # fmt: skip

    def batches(params, cfg, lora, tokenizer, rows, mesh, **rest):
        asked.append(rest | {"rows": rows})
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate_batches", batches)
        assert train.evaluate_stage(run, "sft", None, 2) == done
    assert asked == [dict(
        rows=["b", "c"], matcher=matcher, outcome=run.outcome, width=5, max_new_tokens=7, batch=3,
        done=1, label="evaluate sft",
    )]  # fmt: skip


def test_a_sample_of_every_so_many_rollouts_is_shown(capsys):
    def shown(every: int) -> list[str]:
        rollouts = [
            SimpleNamespace(number=number, completions=["c"], scores={"format": [1.0]},
                            rows=[SimpleNamespace(example=SimpleNamespace(prompt=number))])
            for number in range(5)
        ]  # fmt: skip
        train.show_samples(TrainConfig(sample_every=every), rollouts)
        return [line[-1] for line in capsys.readouterr().out.splitlines() if "sample:" in line]

    assert (shown(1), shown(2), shown(0)) == (["0", "1", "2", "3", "4"], ["0", "2", "4"], [])


def test_the_summary_says_what_was_discarded_and_which_alarms_there_were(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step, skipped in enumerate((0, 1, 0), 1):
            writer.write("grpo", step, {"skipped": skipped})
    run = SimpleNamespace(
        out=tmp_path, spent=lambda: {"total": 3.0}, rejects=["rows.jsonl:3: blank"], canaries={},
        reward_errors=[], mesh=SimpleNamespace(devices=np.array(["cpu"])),
    )  # fmt: skip
    train.finish(run, {}, {"sft": 0, "grpo": 3})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["discarded"] == ["rows.jsonl:3: blank"] and summary["seconds"] == {"total": 3.0}
    assert [(one["stage"], one["step"]) for one in summary["alarms"]] == [("grpo", 2)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate",), "--prompt: must hold a question"),
        (("generate", "--prompt=a", f"--seed={2**32}"), "not an integer in the range [0, "),
        (("generate", "--prompt=a", "--num_completions=2"), "--temperature: must be above 0 for 2"),
        (("generate", "--prompt=" + "7 " * 400), "--prompt: must be at most 256 tokens"),
        (("generate", "--prompt=a", "--adapter=nowhere"), "nowhere: must hold adapter_config.json"),
        (("evaluate", "--data=nowhere.jsonl", "--output=x"), "nowhere.jsonl: must be a readable"),
        (("evaluate",), "--output: must name a file"),
        (("export", "--run=nowhere", "--output=x"), "nowhere/config.json: file must exist"),
    ],
)
def test_the_other_commands_refuse_bad_input(arguments, words, capsys):
    name, *rest = arguments
    assert words in refused_line(f"gemma_cot.{name}", *rest, capsys=capsys)
