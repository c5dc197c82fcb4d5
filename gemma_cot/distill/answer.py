"""From what the teacher wrote to a row of our schema, or the reason why not.

The checks are the project's own: the format, the matcher of checkpoints and `answers_match`. Pure
functions; nothing the teacher wrote is run.
"""

import ast
import json
import re
from fractions import Fraction

from gemma_cot.data import parse_row
from gemma_cot.distill.template import Question
from gemma_cot.grpo.answer import answers_match
from gemma_cot.grpo.reward import TAGS, checkpoint_hits, is_visible
from gemma_cot.prepare.convert import Rejected, spell
from gemma_cot.prepare.filters import check_content
from gemma_cot.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer, encode_target

# How often a question is asked when the answer is unusable for this reason; any other: once.
TRIES = {"bad_schema": 5, "length": 2}
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DECIMAL = re.compile(r"\d+\.\d+")
_TO_ASCII = str.maketrans(
    {"×": "*", "·": "*", "x": "*", "÷": "/", "−": "-", "–": "-", "$": "", "€": ""}
)
MAX_EQUATION, MAX_BITS = 200, 4096  # characters; bits of a power


def make_row(record: dict, question: Question, tokenizer: Tokenizer, limit: int) -> dict:
    """Return the row that an answered request gives. Raises Rejected with a reason code.

    limit: tokens of a completion, its stop token included.
    """
    if record["finish_reason"] in ("length", "content_filter"):
        raise Rejected(record["finish_reason"], f"the teacher stopped: {record['finish_reason']}")
    steps, answer = parse_solution(record["content"])
    lines, checkpoints = [], []
    for text, equation in steps:
        if equation:
            equation = exact_equation(equation)
            checkpoints.append(equation)
            if equation not in text or not checkpoint_hits(text, [equation])[0]:
                text = f"{text.rstrip(' .:;=')}: {equation}."
        lines.append(text)
    for part in (*lines, answer):
        if any(tag in part for tag in (*TAGS, START_OF_TURN, END_OF_TURN)):
            raise Rejected("tags_in_text", f"tags are written here, got {part!r:.60}")
    if question.gold and not answers_match(question.gold, answer, question.domain):
        raise Rejected("wrong_answer", f"must answer {question.gold!r:.60}, got {answer!r:.60}")
    final = question.gold or answer
    reasoning = "\n".join(lines)
    row = {
        "domain": question.domain,
        "prompt": question.prompt,
        "chosen": f"<reasoning>{reasoning}</reasoning><answer>{final}</answer>",
        "metadata": question.metadata
        | {"checkpoints": list(dict.fromkeys(checkpoints)), "final_answer": final},
        **question.extra,
        "reasoning": "teacher",
        "teacher": {
            name: record[name] for name in ("model", "date", "key", "prompt_hash", "usage")
        },
    }
    try:
        parse_row(json.dumps(row), 0)
    except ValueError as error:
        raise Rejected("bad_schema", str(error)) from None
    check_content(row)
    length = len(encode_target(tokenizer, row["chosen"]))
    if length > limit:
        raise Rejected("completion_too_long", f"{length} tokens, at most {limit}")
    return row


def parse_solution(content: str) -> tuple[list[tuple[str, str]], str]:
    """Return ([(text, equation or ""), ...], answer). Raises Rejected("bad_schema")."""
    fenced = _FENCE.fullmatch(content.strip())
    try:  # numbers stay as they are spelled
        found = json.loads(fenced[1] if fenced else content, parse_float=str, parse_int=str)
    except (ValueError, RecursionError) as error:
        raise Rejected("bad_schema", f"must be JSON, got {error}") from None
    steps = found.get("steps") if isinstance(found, dict) else None
    if not isinstance(steps, list) or not steps:
        raise Rejected("bad_schema", f"must hold a list of steps, got {found!r:.60}")
    pairs = []
    for step in steps:
        step = step if isinstance(step, dict) else {}
        text, equation = step.get("text"), step.get("equation") or ""
        if not isinstance(text, str) or not is_visible(text) or not isinstance(equation, str):
            raise Rejected("bad_schema", f"a step must hold a text, got {step!r:.60}")
        pairs.append((" ".join(text.split()), equation.strip()))
    answer = found.get("answer")
    answer = str(answer) if isinstance(answer, bool) else answer
    if not isinstance(answer, str) or not is_visible(answer):
        raise Rejected("bad_schema", f"must hold an answer, got {answer!r:.60}")
    return pairs, answer.strip()


def exact_equation(text: str) -> str:
    """Return an equation with single spaces, `44 * 9 = 396`, all of whose sides are equal.

    Raises Rejected where it is not arithmetic, or not exact as rational numbers.
    """
    sides = _THOUSANDS.sub("", text.strip(" .;").translate(_TO_ASCII)).split("=")
    try:
        if len(text) > MAX_EQUATION or len(sides) < 2:
            raise ValueError("one line with a = in it")
        spelled = [spell(side) for side in sides]
        values = [_value(ast.parse(_exact(side), mode="eval").body) for side in spelled]
        if not any(any(c in side[1:] for c in "+-*/") for side in spelled):
            raise ValueError("nothing is calculated")
    except (Rejected, SyntaxError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise Rejected("not_arithmetic", f"an equation must be arithmetic, got {text!r:.60} "
                       f"({error})"[:200]) from None  # fmt: skip
    if len(set(values)) > 1:
        raise Rejected("step_not_exact", f"both sides must be equal, got {text!r:.60}")
    return " = ".join(spelled)


def _exact(side: str) -> str:
    """Return an expression with its decimals as fractions: floats would round them."""
    return _DECIMAL.sub(lambda found: f"({Fraction(found[0])})", side)


def _value(node: ast.expr) -> Fraction:
    """Return the exact value of an arithmetic expression. Raises ValueError."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if not isinstance(node, ast.BinOp):
        raise ValueError("numbers and operators only")
    a, b = _value(node.left), _value(node.right)
    match node.op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.Div():
            return a / b
        case ast.FloorDiv():
            return Fraction(a // b)
        case ast.Pow() if b.denominator == 1:
            bits = max(a.numerator.bit_length(), a.denominator.bit_length())
            if bits * abs(b) <= MAX_BITS:
                return a ** int(b)
    raise ValueError("an operator that is not exact, or a power that is too large")
