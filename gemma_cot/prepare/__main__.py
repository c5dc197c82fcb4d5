"""Turn published dataset files into checked, deduplicated, decontaminated rows of our schema.

    python -m gemma_cot.prepare --dataset=gsm8k --input=train.jsonl --against=test.jsonl \
        --model=DIR --output=prepared/gsm8k

Host only. Writes train.jsonl, eval.jsonl, rejects.jsonl,
card.md and lengths.svg, or nothing.
"""

from dataclasses import fields

from absl import flags

from gemma_cot import cli
from gemma_cot.config import TrainConfig, embedded
from gemma_cot.prepare.card import markdown
from gemma_cot.prepare.convert import DATASETS
from gemma_cot.prepare.pipeline import Settings, check_settings, prepare
from gemma_cot.tokenizer import load_tokenizer

FLAGS = flags.FLAGS


def main() -> None:
    """Check the flags, prepare, print the card."""
    given = {item.name: FLAGS[item.name].value for item in fields(Settings)}
    cfg = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    check_settings(cfg)
    report = prepare(cfg, load_tokenizer(cfg.model or embedded("tiny_model")))
    print(markdown(report))


if __name__ == "__main__":
    flags.DEFINE_enum("dataset", None, sorted(DATASETS), "Layout of the input files.")
    flags.DEFINE_multi_string("input", [], "File as published; may be given several times.")
    flags.DEFINE_string("output", "", "New folder for the result.")
    flags.DEFINE_string("model", "", "Folder of the tokenizer; empty: the embedded tiny model's.")
    flags.DEFINE_string("instruction", "", "System text of the run, counted in every prompt.")
    for name, text in (
        ("max_prompt_tokens", "Longer prompts are discarded."),
        ("max_completion_tokens", "Longer targets too, stop token counted."),
    ):
        flags.DEFINE_integer(name, getattr(TrainConfig, name), text)
    flags.DEFINE_multi_string(
        "against", [], "Test set, FILE or DATASET:FILE; rows like its questions are dropped."
    )
    flags.DEFINE_float("max_overlap", 0.0, "Share of a row's 8-grams that test sets may hold.")
    flags.DEFINE_float("max_similarity", 0.8, "Jaccard index of 8-grams above which rows repeat.")
    flags.DEFINE_float("eval_share", 0.0, "Share of prompts, by hash, that goes to eval.jsonl.")
    flags.DEFINE_string("tasks", "", "MBPP only: FIRST-LAST task number; empty: all.")
    flags.DEFINE_multi_string(
        "pass_rates", [], "Result file of evaluate --num_completions=K: drop rows by pass rate."
    )
    flags.DEFINE_float("pass_rate_min", 0.01, "Lowest pass rate kept; 0.01: not never right.")
    flags.DEFINE_float("pass_rate_max", 0.99, "Highest pass rate kept; 0.99: not always right.")
    flags.DEFINE_enum(
        "pass_rate_by", "answer", ["answer", "reward"],
        "reward: whatever the rate, drop rows whose completions all earned the same in format, "
        "process and outcome together.",
    )
    flags.DEFINE_enum(
        "unmeasured", "keep", ["keep", "drop"], "Rows whose prompt --pass_rates does not hold."
    )
    flags.DEFINE_enum("order", "input", ["input", "pass_rate"], "pass_rate: easiest first.")
    flags.DEFINE_enum("on_bad_row", "fail", ["fail", "skip"], "A row that breaks its format.")
    cli.run(main)
