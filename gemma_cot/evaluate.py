"""Evaluate a model, with or without an adapter, on a dataset in our schema.

    python -m gemma_cot.evaluate --model=runs/tiny/merged --data=data/eval.jsonl --output=out.jsonl

Writes a row per example to --output and the summary (rates with 95 % intervals, by domain too) to
the same name ending in .summary.json; prints the table.
"""

from pathlib import Path

from absl import flags

from gemma_cot import cli
from gemma_cot.config import embedded
from gemma_cot.data import encode_examples, prompt_width, read_jsonl
from gemma_cot.evaluation import evaluate_rows, summarise, table, write_results
from gemma_cot.model.load import write_json
from gemma_cot.policy import define_policy_flags, load_policy

FLAGS = flags.FLAGS


def main() -> None:
    """Read, complete, score, write, print."""
    if not FLAGS.output:
        raise ValueError("--output: must name a file, got nothing; set --output=results.jsonl")
    examples, rejects = read_jsonl(FLAGS.data or embedded("eval.jsonl"), FLAGS.on_bad_row)
    policy = load_policy(FLAGS)
    rows, discarded = encode_examples(
        policy.tokenizer,
        examples[: FLAGS.limit or len(examples)],
        policy.instruction,
        policy.max_prompt_tokens,
        policy.max_completion_tokens,
    )
    results = evaluate_rows(
        policy.params, policy.cfg, policy.lora, policy.tokenizer, rows, policy.mesh,
        width=prompt_width(rows), max_new_tokens=policy.max_completion_tokens, batch=FLAGS.batch,
        matcher=FLAGS.process_matcher, temperature=FLAGS.temperature, seed=FLAGS.seed,
    )  # fmt: skip
    summary = summarise(results) | {
        "temperature": FLAGS.temperature,
        "seed": FLAGS.seed,
        "instruction": policy.instruction,
        "max_completion_tokens": policy.max_completion_tokens,
        "rows_skipped": rejects,
        "rows_discarded_as_too_long": discarded,
    }
    write_results(FLAGS.output, results)
    write_json(Path(FLAGS.output).with_suffix(".summary.json"), summary)
    print(table({"model": summary}, {}))
    for domain, rates in summary["domains"].items():
        print(table({domain: rates}, {}).splitlines()[1])


if __name__ == "__main__":
    define_policy_flags()
    flags.DEFINE_string("data", "", "Rows to evaluate on (JSONL); empty: the embedded ones.")
    flags.DEFINE_string("output", "", "File that receives a result per row (JSONL).")
    flags.DEFINE_enum("on_bad_row", "fail", ["fail", "skip"], "A row that breaks the schema.")
    flags.DEFINE_enum(
        "process_matcher", "normalised", ["normalised", "literal"], "How checkpoints are found."
    )
    flags.DEFINE_integer("limit", 0, "Only the first N rows; 0: all.", lower_bound=0)
    flags.DEFINE_integer("batch", 128, "Prompts decoded together.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0: greedy.", lower_bound=0.0)
    cli.run(main)
