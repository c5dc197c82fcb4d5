"""Answer a prompt: print completions of a model, with or without an adapter.

    python -m gemma_cot.generate --adapter=runs/tiny/adapter --prompt="What is 12 * 34?"
    python -m gemma_cot.generate --adapter=DIR --prompt=TEXT --num_completions=4 --temperature=1
    python -m gemma_cot.generate --replay=runs/tiny:20:1     # group 1 of GRPO step 20, once more
"""

import sys
from functools import partial

import jax
from absl import flags

from gemma_cot import cli
from gemma_cot.axes import round_up
from gemma_cot.data import WIDTH_STEP
from gemma_cot.grpo.rollout import completion_texts, sample_prompts
from gemma_cot.policy import check_temperature, define_policy_flags, load_policy
from gemma_cot.replay import open_replay, parse_replay, replay, same_tokens
from gemma_cot.tokenizer import encode_prompt
from gemma_cot.traces import read_trace, trace_path, write_trace

FLAGS = flags.FLAGS


def replay_group(text: str) -> None:
    """Print the completions of a group of a GRPO step, sampled again, and compare their tokens with
    the step's trace; write that trace where there is none. Raises ValueError when they differ."""
    folder, step, number = parse_replay(text)
    run = open_replay(folder, FLAGS.mesh)
    with jax.set_mesh(run.mesh):
        trace = replay(run, step, say=partial(print, file=sys.stderr, flush=True))
    if number > len(trace["groups"]):
        raise ValueError(
            f"--replay: step {step} has {len(trace['groups'])} groups, got {number}; lower it"
        )
    for g, completion in enumerate(trace["groups"][number - 1]["completions"], 1):
        print(f"--- completion {g}, {len(completion['ids'])} tokens", file=sys.stderr)
        print(completion["text"])
    if not trace_path(folder, step).exists():
        write_trace(folder, trace)
        print(f"{trace_path(folder, step)}: written, there was none", file=sys.stderr)
    elif same_tokens(read_trace(folder, step), trace):
        print(f"the same tokens as in {trace_path(folder, step)}", file=sys.stderr)
    else:
        raise ValueError(
            f"--replay: tokens must be those of {trace_path(folder, step)}, got others; code, "
            "model, data and kind of device must be those of the run"
        )


def main() -> None:
    """Print the completions to stdout; on several, a numbered line before each, on stderr."""
    if FLAGS.replay:
        return replay_group(FLAGS.replay)
    if not FLAGS.prompt.strip():
        raise ValueError("--prompt: must hold a question, got nothing; set --prompt=TEXT")
    check_temperature(FLAGS)
    policy = load_policy(FLAGS)
    ids = encode_prompt(policy.tokenizer, FLAGS.prompt, policy.instruction)
    if len(ids) > policy.max_prompt_tokens:
        raise ValueError(
            f"--prompt: must be at most {policy.max_prompt_tokens} tokens with its chat turns, got "
            f"{len(ids)}; shorten it or raise --max_prompt_tokens"
        )
    data = policy.mesh.shape["data"]  # the same prompt on every device of `data`; one is printed
    samples = sample_prompts(
        policy.params, policy.cfg, policy.lora, [ids] * data, round_up(len(ids), WIDTH_STEP),
        jax.random.key(FLAGS.seed), policy.mesh, prompt_ids=[0] * data,
        num_completions=FLAGS.num_completions, max_new_tokens=policy.max_completion_tokens,
        temperature=FLAGS.temperature, stop_ids=policy.tokenizer.stop_ids,
    )  # fmt: skip
    host = jax.device_get(samples)
    texts = completion_texts(
        policy.tokenizer, host.tokens_BT, host.completion_mask_BT, host.stopped_B
    )
    for g in range(FLAGS.num_completions):
        if FLAGS.num_completions > 1:
            print(f"--- completion {g + 1} of {FLAGS.num_completions}", file=sys.stderr)
        print(texts[g])
        if not host.stopped_B[g]:
            print(f"(cut off at {policy.max_completion_tokens} tokens)", file=sys.stderr)


if __name__ == "__main__":
    define_policy_flags()
    flags.DEFINE_string("prompt", "", "The question.")
    flags.DEFINE_string("replay", "", "RUN:STEP:PROMPT, a group of a GRPO step to sample again.")
    flags.DEFINE_integer("num_completions", 1, "Completions to sample.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0: greedy.", lower_bound=0.0)
    cli.run(main)
