"""Ask a teacher for worked solutions: questions in, checked rows of our schema out.

    export DEEPSEEK_API_KEY=...
    python -m gemma_cot.distill --input=questions.jsonl --output=distilled --dry_run
    python -m gemma_cot.distill --input=questions.jsonl --output=distilled --max_usd=2

Needs the extra `teacher`. This is the process that asks; `gemma_cot.distill` starts it. It ends
early when something comes from its standard input (Ctrl-C), or when that ends, which means that the
process that started it is gone: it then sends nothing more, waits for the answers in flight, which
are paid for, and writes them.
"""

import asyncio
import json
import math
import os
import sys
from dataclasses import fields

from absl import flags

from gemma_cot import cli
from gemma_cot.config import embedded
from gemma_cot.distill.pipeline import distill, estimate, table
from gemma_cot.distill.settings import (
    PRICES_AS_OF,
    TEACHERS,
    Settings,
    check_settings,
    key_from_environment,
    teacher_of,
)
from gemma_cot.tokenizer import load_tokenizer

FLAGS = flags.FLAGS
_HELP = {
    "input": "Questions (JSONL): rows with domain and prompt, and metadata.final_answer as the "
    "gold answer where there is one. May be given several times.",
    "output": "Folder for journal, rows and rejects; the same one again goes on.",
    "teacher": f"Model name at the server. Known: {', '.join(TEACHERS)}.",
    "base_url": "Address of an OpenAI-compatible server, up to /v1; empty: the known teacher's.",
    "api_key_env": "Environment variable that holds the key; empty: no key is sent.",
    "extra_body": "JSON object put over every request; null leaves a field out.",
    "price": "CACHED,INPUT,OUTPUT in dollars per million tokens; empty: the known teacher's, "
    f"as of {PRICES_AS_OF}.",
    "max_usd": "Dollars that the output folder may cost in all; the run stops before.",
    "temperature": "Sampling temperature of the teacher.",
    "max_tokens": "Tokens a reply may have.",
    "seed": "Seed of the requests; another one asks everything anew.",
    "concurrency": "Requests in flight at most; fewer after a 429.",
    "timeout": "Seconds that one request may take in all.",
    "attempts": "Failures (429 not counted) after which a question is left for the next run.",
    "patience": "Seconds without any answer after which the run stops.",
    "max_rejects_in_row": "Questions without a row, one after the other, that stop the run.",
    "backoff": "Seconds before the first retry, at most; doubled with every further one.",
    "limit": "Only the first N questions; 0: all.",
    "model": "Folder of the student's tokenizer; empty: the embedded tiny model's.",
    "instruction": "System text of the student's run, counted in every prompt.",
    "max_prompt_tokens": "Questions with a longer prompt are not asked.",
    "max_completion_tokens": "Longer rows are rejected, stop token counted.",
    "against": "Test set, FILE or DATASET:FILE; questions like its own are not asked.",
    "max_overlap": "Share of a question's 8-grams that test sets may hold.",
    "max_similarity": "Jaccard index of 8-grams above which questions repeat.",
    "on_bad_row": "A row that breaks its format: fail or skip.",
}


def main() -> None:
    """Check the flags, then ask and print the table, or print what would be asked."""
    given = {item.name: FLAGS[item.name].value for item in fields(Settings)}
    cfg = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    check_settings(cfg)
    tokenizer = load_tokenizer(cfg.model or embedded("tiny_model"))
    if FLAGS.dry_run:
        print(describe(cfg, estimate(cfg, tokenizer)))
        return
    summary = distill(
        cfg, key_from_environment(cfg), tokenizer, stop_with_standard_input,
        lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    print(table(summary))
    if summary["failed"]:
        raise ValueError(summary["stopped"])
    if summary["stopped"] or summary["open"]:
        print(f"not complete{': ' * bool(summary['stopped'])}{summary['stopped']}; "
              "the same command goes on")  # fmt: skip


def describe(cfg: Settings, plan: dict) -> str:
    """Return the printed form of an estimate: the exact request, and what all of them cost."""
    key = f"Bearer ${cfg.api_key_env}"
    lines = [
        f"POST {teacher_of(cfg).base_url}/chat/completions",
        f"Authorization: {key}",
        "Content-Type: application/json",
        "",
        json.dumps(plan["request"], indent=2, ensure_ascii=False),
        "",
        f"{plan['to_ask']} of {plan['questions']} questions to ask, about "
        f"{plan['prompt_tokens']} input tokens (0.3 a character)",
    ]
    lines += [f"not asked: {n} {reason}" for reason, n in sorted(plan["not_asked"].items())]
    if plan["worst_usd"] is None:
        return "\n".join([*lines, "no price known: set --price=CACHED,INPUT,OUTPUT"])
    lines.append(
        f"at most ${plan['worst_usd']:.4f}: peak price, a token a character in, "
        f"{cfg.max_tokens} tokens a reply out (prices as of {PRICES_AS_OF} unless --price is set)"
    )
    if plan["likely_usd"] is not None:
        lines.append(f"about ${plan['likely_usd']:.4f} at the price of this hour, if replies stay "
                     "as long as those in the journal")  # fmt: skip
    return "\n".join(lines)


def stop_with_standard_input(stop: asyncio.Event) -> None:
    """Set `stop` when standard input speaks or ends; then be silent, as nobody may be listening."""

    def heard() -> None:
        stop.set()
        if not os.read(0, 4096):
            asyncio.get_running_loop().remove_reader(0)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)

    asyncio.get_running_loop().add_reader(0, heard)


def define_flags() -> None:
    """Define --dry_run and one flag per setting."""
    flags.DEFINE_bool("dry_run", False, "Print the first request and what all would cost.")
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for item in fields(Settings):
        default = item.default if isinstance(item.default, int | float | str) else None
        if item.type == tuple[str, ...]:
            flags.DEFINE_multi_string(item.name, [], _HELP[item.name])
        elif item.name == "on_bad_row":
            flags.DEFINE_enum(item.name, "fail", ["fail", "skip"], _HELP[item.name])
        elif default == math.inf:
            flags.DEFINE_float(item.name, math.inf, f"{_HELP[item.name]} Default: no limit.")
        else:
            define[item.type](item.name, default, _HELP[item.name])


if __name__ == "__main__":
    define_flags()
    cli.run(main)
