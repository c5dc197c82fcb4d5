"""Evaluate a model, with or without an adapter, on a dataset in our schema.

    python -m gemma_cot.evaluate --model=runs/tiny/merged --data=data/eval.jsonl --output=out.jsonl
    python -m gemma_cot.evaluate ... --num_completions=8 --temperature=1 --compare=other.jsonl
    python -m gemma_cot.evaluate --compare=before.jsonl,after.jsonl      # no model is loaded

Appends a row per example to --output as they come (--resume goes on after a kill), writes how they
were asked and scored to the same name ending in .protocol.json, the summary (rates with 95 %
intervals over rows, by domain too) to .summary.json, and rows that changed to .changed.jsonl. Hacks
are scored as train scores them (`canaries` in the summary). With --allow_code_execution the code in
answers runs in the sandbox against `metadata.tests`.
"""

import json
import time
from functools import partial
from pathlib import Path

from absl import flags

from gemma_cot import cli, hosts
from gemma_cot.config import TrainConfig, embedded
from gemma_cot.data import encode_examples, prompt_width, read_jsonl
from gemma_cot.evaluation import alarms, evaluate_batches, summarise, table
from gemma_cot.guard import canaries
from gemma_cot.policy import (
    Policy,
    check_temperature,
    define_policy_flags,
    load_policy,
    resolve_dtype,
)
from gemma_cot.results import (
    append_results,
    beside,
    differing,
    files_hash,
    open_results,
    read_protocol,
    read_results,
    template_hash,
    write_results,
    write_whole,
)
from gemma_cot.rewards import read_rewards
from gemma_cot.scores import budgets, changed_rows, pair_rows, paired
from gemma_cot.settings import define_host_flags

FLAGS = flags.FLAGS
SCORES = {"format": "full format", "outcome": "answer right", "majority": "majority right",
          "process": "process score", "code": "code passes"}  # fmt: skip
SHOWN = 5  # changed rows that are printed; the file has all


def check_flags() -> None:
    """Raise ValueError for flags that contradict each other."""
    if not FLAGS.output:
        raise ValueError("--output: must name a file, got nothing; set --output=results.jsonl")
    if FLAGS.output.endswith("/") or Path(FLAGS.output).is_dir():
        raise ValueError(
            f"--output: must name a file, got the folder {FLAGS.output}; set "
            f"--output={Path(FLAGS.output) / 'results.jsonl'}"
        )
    if len(FLAGS.compare) > 1:
        raise ValueError(
            f"--compare: must be one file beside --output, got {len(FLAGS.compare)}; leave "
            "--output out to compare two files"
        )
    check_temperature(FLAGS)
    if FLAGS.resume and FLAGS.overwrite:
        raise ValueError("--overwrite: must not stand beside --resume, got both; drop one")


def protocol_of(policy: Policy, n: int, data: str) -> dict:
    """Return what the numbers stand for: how the rows are asked, completed and scored."""
    model = FLAGS.model or embedded("tiny_model")
    weights = [p for folder in (model, FLAGS.adapter) if folder
               for p in sorted(Path(folder).glob("*.safetensors"))]  # fmt: skip
    return {
        "prompt_template_sha256": template_hash(policy.instruction),
        "instruction": policy.instruction,
        "extractor": "split_blocks: the only <answer> block",
        "matcher": "answers_match" + ("_symbolic (Math-Verify)" if FLAGS.math_verify else ""),
        "process_matcher": FLAGS.process_matcher,
        "max_prompt_tokens": policy.max_prompt_tokens,
        "max_completion_tokens": policy.max_completion_tokens,
        "n": n,
        "num_completions": FLAGS.num_completions,
        "temperature": FLAGS.temperature,
        "seed": FLAGS.seed,
        "dtype": resolve_dtype(FLAGS.dtype),
        "attention": FLAGS.attention,
        "weights_sha256": files_hash(*weights),
        "data_sha256": files_hash(Path(data)),
        "intervals": "95 %, over rows: Wilson for rates (k > 1: effective number of rows), normal "
                     "for process score, repetition and length",
        "model": str(model),
        "adapter": FLAGS.adapter,
        "data": data,
        **({"code": "metadata.tests in the sandbox"} if FLAGS.allow_code_execution else {}),
    }  # fmt: skip


def report(summary: dict, protocol: dict) -> str:
    """Return the printed table: everything with its interval, by domain, and the protocol."""
    lines = [table({"model": summary}, {})]
    lines += [table({d: r}, {}).splitlines()[1] for d, r in summary["domains"].items()]
    names = {"repetition_rate": "repetition", "code_accuracy": "code passes"}
    if summary["num_completions"] > 1:
        names |= {f"pass_at_{k}": f"pass@{k}" for k in budgets(summary["num_completions"])}
        names |= {"majority_accuracy": "majority"}
    for label, rates in (("model", summary), *summary["domains"].items()):
        cells = [f"{short} {100 * rates[name]:.1f} % ({100 * rates[f'{name}_interval'][0]:.1f}-"
                 f"{100 * rates[f'{name}_interval'][1]:.1f})" for name, short in names.items()
                 if name in rates]
        low, high = rates["mean_completion_tokens_interval"]
        cells.append(f"tokens {rates['mean_completion_tokens']:.1f} ({low:.1f}-{high:.1f})")
        lines.append(f"{label}: {'  '.join(cells)}")
    asked = (
        "protocol: template {prompt_template_sha256:.12}, answer by {extractor} and {matcher}, "
        "checkpoints {process_matcher}, {max_completion_tokens} tokens, n {n}, k {num_completions},"
        " temperature {temperature:g}, seed {seed}, {dtype}, model {model} {adapter}"
    )
    return "\n".join([*lines, asked.format(**protocol).rstrip()])


def comparison(paths: tuple[str, str], results: tuple[list[dict], list[dict]]) -> tuple[dict, str]:
    """Compare two evaluations; write the changed rows. Returns (tests by score, printed text)."""
    before, after = paths
    pairs = pair_rows(*results)
    tests = {score: test for score in SCORES if (test := paired(pairs, score))}
    lines = [f"{before} -> {after}: {len(pairs)} rows in both, of {len(results[0])} and "
             f"{len(results[1])}"]  # fmt: skip
    protocols = [read_protocol(path) for path in paths]
    unknown = [path for path, p in zip(paths, protocols, strict=True) if not p]
    names = [] if unknown else [n for n in differing(*protocols) if n != "weights_sha256"]
    lines += [f"protocol: none beside {path}" for path in unknown]
    lines += [f"protocol: {n} {protocols[0].get(n)!r} -> {protocols[1].get(n)!r}" for n in names]
    for score, t in tests.items():
        low, high = t["interval"]
        lines.append(
            f"{SCORES[score]}: {100 * t['before']:.1f} -> {100 * t['after']:.1f} %, difference "
            f"{100 * t['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}): "
            f"{t['verdict']}; {t['gained']} rows gained, {t['lost']} lost, "
            f"{t['method']} p = {t['p_value']:.2g}"
        )
    kinds = {"full format": tests.get("format"), "answer": tests.get("outcome")}
    lines += alarms({f"{before} -> {after}, {kind}": t for kind, t in kinds.items() if t})
    changed = changed_rows(pairs)
    write_results(beside(after, "changed.jsonl"), changed)
    lines.append(f"{len(changed)} rows changed: {beside(after, 'changed.jsonl')}")
    for row in changed[:SHOWN]:
        scores = [(name, row["before"].get(name), row["after"].get(name)) for name in SCORES]
        moves = [f"{name} {a:g} -> {b:g}" for name, a, b in scores if None not in (a, b) and a != b]
        place = f"  row {row['id']} {row['domain']}: {', '.join(moves)}"
        lines.append(f"{place}  {row['prompt']!r:.60}")
    return tests, "\n".join(lines)


def main() -> None:
    """Compare two files, or evaluate a policy."""
    if len(FLAGS.compare) == 2 and not FLAGS.output:
        before, after = FLAGS.compare
        print(comparison((before, after), (read_results(before), read_results(after)))[1])
        return
    check_flags()
    cli.join_hosts(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    hosts.together(evaluate)


def evaluate() -> None:
    """Evaluate the policy that the flags name; process 0 writes and prints."""
    names = ("math_verify", "process_matcher", "allow_code_execution")
    rewards = read_rewards(TrainConfig(**{name: FLAGS[name].value for name in names}))
    functions = {name: function for name, function, _ in rewards}
    others = [read_results(path) for path in FLAGS.compare]
    data = FLAGS.data or embedded("eval.jsonl")
    examples, rejects = read_jsonl(data, FLAGS.on_bad_row)
    policy = load_policy(FLAGS)
    rows, discarded = encode_examples(
        policy.tokenizer,
        examples[: FLAGS.limit or len(examples)],
        policy.instruction,
        policy.max_prompt_tokens,
        policy.max_completion_tokens,
    )
    protocol = protocol_of(policy, len(rows), str(data))
    results = hosts.agreed(
        partial(open_results, FLAGS.output, protocol, FLAGS.resume, FLAGS.overwrite)
    )
    ids = {result["id"] for result in results}
    left = [row for row in rows if row.example.id not in ids]
    began, fresh = time.monotonic(), []
    try:
        for part in evaluate_batches(
            policy.params, policy.cfg, policy.lora, policy.tokenizer, left, policy.mesh,
            width=prompt_width(rows), max_new_tokens=policy.max_completion_tokens,
            batch=FLAGS.batch, matcher=FLAGS.process_matcher, outcome=functions["outcome"],
            code=functions.get("code"), num_completions=FLAGS.num_completions,
            temperature=FLAGS.temperature, seed=FLAGS.seed, done=len(results),
        ):  # fmt: skip
            if hosts.is_writer():
                append_results(FLAGS.output, part)
            fresh += part
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"- {FLAGS.output} has {len(results) + len(fresh)} of {len(rows)} "
                                "rows; --resume goes on") from None  # fmt: skip
    if not hosts.is_writer():
        return
    seconds = time.monotonic() - began
    tokens = sum(result["num_tokens"] for result in fresh) * FLAGS.num_completions
    results += fresh
    summary = summarise(results) | {"protocol": protocol}
    summary |= {name: protocol[name] for name in ("temperature", "seed", "instruction",
                                                  "max_completion_tokens")}  # fmt: skip
    summary |= {"rows_skipped": rejects, "rows_discarded_as_too_long": discarded}
    summary |= {
        "rows_per_second": len(fresh) / seconds, "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }  # fmt: skip
    summary["canaries"] = canaries.score_canaries(rows, rewards, policy.tokenizer)
    print(report(summary, protocol))
    print("\n".join(canaries.lines(summary["canaries"])))
    if fresh:
        print(f"{len(fresh)} rows in {seconds:.1f} s, compilation included: "
              f"{len(fresh) / seconds:.1f} rows/s, {tokens / seconds:.0f} tokens/s")  # fmt: skip
    for path, other in zip(FLAGS.compare, others, strict=True):
        summary["comparison"], text = comparison((path, FLAGS.output), (other, results))
        print(text)
    write_whole(beside(FLAGS.output, "summary.json"), json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    define_policy_flags()
    define_host_flags()
    flags.DEFINE_string("data", "", "Rows to evaluate on (JSONL); empty: the embedded ones.")
    flags.DEFINE_string("output", "", "File that receives a result per row (JSONL).")
    flags.DEFINE_bool("resume", False, "Go on with --output where a killed evaluation stopped.")
    flags.DEFINE_bool("overwrite", False, "Replace what is in --output.")
    flags.DEFINE_list(
        "compare", [], "OTHER.jsonl: compare with these results. BEFORE.jsonl,AFTER.jsonl without "
        "--output: compare the two and evaluate nothing."
    )  # fmt: skip
    flags.DEFINE_enum("on_bad_row", "fail", ["fail", "skip"], "A row that breaks the schema.")
    flags.DEFINE_enum(
        "process_matcher", "normalised", ["normalised", "literal"], "How checkpoints are found."
    )
    flags.DEFINE_bool("math_verify", False, "Math-Verify (extra `math`) decides on formulas.")
    flags.DEFINE_bool("allow_code_execution", False, "Run answers' code against metadata.tests.")
    flags.DEFINE_integer("limit", 0, "Only the first N rows; 0: all.", lower_bound=0)
    flags.DEFINE_integer("batch", 128, "Completions decoded together.", lower_bound=1)
    flags.DEFINE_integer("num_completions", 1, "Samples of every row; above 1: pass@k, majority.",
                         lower_bound=1)  # fmt: skip
    flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0: greedy.", lower_bound=0.0)
    cli.run(main)
