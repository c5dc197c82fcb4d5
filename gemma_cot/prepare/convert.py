"""Published rows of public datasets to rows of our schema, one function a format.

Nothing of a dataset is ever run: equations are parsed, code is only printed, gold values are
literals. A row of ours also says where it is from (`source`) and where its reasoning is from
(`reasoning`: "published"; "derived" from an equation; "none": the file has no worked solution, and
`chosen` only names the answer in the right form). Knows no tokenizer, no filter and no output.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from gemma_cot.data import MAX_LINE, check_row, parse_json


class Rejected(Exception):
    """A row that cannot be used. `is_bad`: it breaks its format, which --on_bad_row decides on."""

    def __init__(self, code: str, detail: str, is_bad: bool = False):
        super().__init__(detail)
        self.code, self.detail, self.is_bad = code, detail, is_bad


def read_rows(path: str | Path) -> Iterator[tuple[int, str | bytes]]:
    """Yield (line number, text of one object) of a JSONL file or of a JSON array.

    JSONL is streamed, and of a line over MAX_LINE only so much is read that `parse_object` refuses
    it; an array is read whole. Raises ValueError for what is no such file.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(MAX_LINE).removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            file.seek(0)
            if head.lstrip().startswith(b"["):
                yield from _array_items(path, file.read())
                return
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
    except OSError as error:
        raise ValueError(
            f"{path}: must be a readable file, got {error.strerror}; correct the path"
        ) from None


def _array_items(path: str | Path, content: bytes) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of every item of a JSON array."""
    try:
        text = content.decode("utf-8-sig")
        decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
        while True:
            while text[at] in " \t\r\n,":
                at += 1
            if text[at] == "]":
                break
            line, counted = line + text.count("\n", counted, at), at
            _, end = decoder.raw_decode(text, at)
            yield line, text[at:end]
            at = end
        if text[at + 1 :].strip():
            raise ValueError("text behind it")
    except (ValueError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{path}: must be one JSON array in UTF-8, got {error}; download the file again"
        ) from None


def parse_object(text: str | bytes) -> dict:
    """Return the JSON object that `text` is. Raises Rejected."""
    try:
        row = parse_json(text)
    except ValueError as error:
        code = "line_too_long" if len(text) > MAX_LINE else "bad_json"
        raise Rejected(code, str(error), is_bad=True) from None
    if not isinstance(row, dict):
        raise Rejected("bad_json", f"must be an object, got {type(row).__name__}", is_bad=True)
    return row


def _get(row: dict, key: str, kind: type | tuple = str):
    """Return row[key], a non-blank value of `kind`. Raises Rejected."""
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or value in ("", [], {}):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise Rejected("bad_fields", f"{key} must be a {names}, got {value!r:.60}", is_bad=True)
    return value


def make_row(
    domain: str, prompt: str, reasoning: str, answer: str, checkpoints: list[str],
    source: str, origin: str,
) -> dict:  # fmt: skip
    """Return a row of our schema; equal checkpoints are listed once."""
    return {
        "domain": domain,
        "prompt": prompt.strip(),
        "chosen": f"<reasoning>{reasoning.strip()}</reasoning><answer>{answer}</answer>",
        "metadata": {"checkpoints": list(dict.fromkeys(checkpoints)), "final_answer": answer},
        "source": source,
        "reasoning": origin,
    }


# GSM8K: `48/2 = <<48/2=24>>24` becomes the equation `48 / 2 = 24`, in the prose and as checkpoint

_MARK = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|//|\*\*|[-+*/()]")
_PLAIN = re.compile(r"(\d+)(?:([-+*/])(\d+))?")  # most marks: one number or one operation
_VALUE = re.compile(r"\s*\$?\s*(-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?)(?![\d])")
_IN_NUMBERS = {*"0123456789.+-*/%)"}
_GOES_ON = re.compile(r"[.,]?\d")  # a number that is longer than what was read of it
_AS_EXPRESSION = {"x": "*", "X": "*", "×": "*", "÷": "/", "−": "-"}


def spell(expression: str) -> str:
    """Return arithmetic with single spaces: `(5+.5)*-2` is `(5 + 0.5) * -2`. Raises Rejected."""
    plain = _PLAIN.fullmatch(expression)
    if plain:
        return f"{plain[1]} {plain[2]} {plain[3]}" if plain[2] else expression
    tokens = _TOKEN.findall(expression)
    if "".join(tokens) != "".join(expression.split()) or not tokens:
        raise Rejected("bad_fields", f"a mark must be arithmetic, got {expression!r:.60}", True)
    text, before = "", "("
    for token in tokens:
        is_sign = token in "+-" and before in ("(", "-", "+", "*", "/", "//", "**")
        if token == ")" or before == "(" or text.endswith("~"):
            text = text.removesuffix("~")
        else:
            text += " "
        text += ("0" if token[0] == "." else "") + token + ("~" if is_sign else "")
        before = token
    return text.removesuffix("~")


def write_equations(solution: str) -> tuple[str, list[str]]:
    """Return (text, checkpoints): every calculator mark of GSM8K written out as an equation.

    Where the prose spells the step as the mark does, the equation takes its place; where it spells
    it otherwise (22 % of the marks), the equation is added behind it.
    """
    text, checkpoints, at = "", [], 0
    for mark in _MARK.finditer(solution):
        if mark.start() < at:
            raise Rejected("bad_fields", f"marks must not overlap, got {mark[0]!r:.60}", True)
        text += solution[at : mark.start()]
        expression, value = mark[1].strip(), mark[2].strip()
        equation = f"{spell(expression)} = {spell(value)}"
        head = _without_step(text, expression)
        gap = "" if not head or head[-1] in " \n\t(" else " "
        text, at = head + gap + equation, mark.end()
        said = _VALUE.match(solution, at)
        if said and said[1].strip("-") and _is_same(said[1], value):
            at = said.end()
        elif solution.startswith(value, at) and not _GOES_ON.match(solution, at + len(value)):
            at += len(value)
        elif solution[at : at + 1].isalnum():
            text += ", "
        checkpoints.append(equation)
    return text + solution[at:], checkpoints


def _is_same(said: str, value: str) -> bool:
    """Return whether two numbers in digits are equal: `2,000.0` and `2000`."""
    said = said.replace(",", "")
    try:
        return said == value or Fraction(said) == Fraction(value)
    except (ValueError, ZeroDivisionError):
        return False


def _without_step(text: str, expression: str) -> str:
    """Return `text` without a final `expression =` however it is spaced, and without a final `$`.

    Anything else before the `=` stays, and so does the `=`.
    """
    text = text.rstrip(" ").removesuffix("$").rstrip(" ") + " " * (text[-1:] in " $")
    head = text.rstrip().removesuffix("=")
    if head == text.rstrip():
        return text
    wanted = "".join(expression.split())
    at, left = len(head), len(wanted)
    while left and at:
        at -= 1
        char = _AS_EXPRESSION.get(head[at], head[at])
        if char == wanted[left - 1]:
            left -= 1
        elif char not in " $,":
            break
    before = head[:at].rstrip(" $")[-1:]
    if left or _AS_EXPRESSION.get(before, before) in _IN_NUMBERS:
        return text
    return head[:at].rstrip("$")


def gsm8k(row: dict, source: str) -> Iterator[dict]:
    """Convert {"question", "answer"}; the final answer is what follows ####, without commas.

    A solution without a mark gives an empty checkpoint list.
    """
    solution, hashes, final = _get(row, "answer").rpartition("####")
    final = final.strip().replace(",", "")
    if not hashes or not re.fullmatch(r"-?\d+(\.\d+)?", final):
        raise Rejected("bad_fields", f"answer must end in #### number, got {final!r:.60}", True)
    reasoning, checkpoints = write_equations(solution)
    question = _get(row, "question")
    yield make_row("math", question, reasoning, final, checkpoints, source, "published")


# SVAMP: an equation, from which the steps are derived

_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def svamp(row: dict, source: str) -> Iterator[dict]:
    """Convert {"Body", "Question", "Equation", "Answer"}; every operation becomes a step."""
    equation, answer = _get(row, "Equation"), _get(row, "Answer", (int, float))
    try:
        steps: list[str] = []
        value = _steps(ast.parse(equation.strip(), mode="eval").body, steps)
        gold = Fraction(str(answer))
    except (SyntaxError, ValueError, RecursionError, ZeroDivisionError) as error:
        message = f"Equation must be arithmetic and Answer a number, got {error}"
        raise Rejected("bad_fields", message, True) from None
    final = _decimal(value)
    if value != gold:
        raise Rejected("answer_disagrees", f"Equation gives {final}, Answer is {answer}")
    body = _get(row, "Body").strip().rstrip(",")
    prompt = f"{body}{'' if body[-1:] in '.?!' else '.'} {_get(row, 'Question').strip()}"
    reasoning = " ".join(f"{step}." for step in steps) or f"The answer is {final}."
    name = f"svamp:{row['ID']}" if isinstance(row.get("ID"), str) else source
    yield make_row("math", prompt, reasoning, final, steps, name, "derived")


def _steps(node: ast.expr, steps: list[str]) -> Fraction:
    """Return the exact value of an expression and append its operations, innermost first."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise ValueError(f"{ast.unparse(node)!r:.60}")
    a, b = _steps(node.left, steps), _steps(node.right, steps)
    sign = _OPERATORS[type(node.op)]
    value = {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "/": a.__truediv__}[sign](b)
    steps.append(f"{_decimal(a)} {sign} {_decimal(b)} = {_decimal(value)}")
    return value


def _decimal(value: Fraction) -> str:
    """Return an exact decimal of at most 9 places. Raises Rejected where there is none."""
    if value * 10**9 % 1:
        raise Rejected("step_not_exact", f"{value} has no short exact decimal")
    whole, rest = divmod(abs(value.numerator) * 10**9 // value.denominator, 10**9)
    return f"{'-' * (value < 0)}{whole}.{rest:09}".rstrip("0").rstrip(".")


# MBPP: what does this call return? The assertions know, without running anything

_DOCSTRING = re.compile(r'\n[ \t]*(?:"""|\'\'\').*?(?:"""|\'\'\')[ \t]*(?=\n|$)', re.DOTALL)
_CALL = "\n\nWhat does `"  # between the program and its call in a prompt


def mbpp(row: dict, source: str) -> Iterator[dict]:
    """Convert a task of mxeval's MBPP: a row for every assertion `candidate(args) == literal`.

    The docstring goes: it holds the answers.
    """
    task, name = _get(row, "task_id", (str, int)), _get(row, "entry_point")
    opening = _DOCSTRING.sub("", _get(row, "prompt").replace("\r\n", "\n"), count=1)
    code = opening.strip("\n") + "\n" + _get(row, "canonical_solution").strip("\r\n").rstrip()
    code = "\n".join(line.rstrip() for line in code.replace("\r\n", "\n").expandtabs(4).split("\n"))
    try:
        ast.parse(code)
        tests = [n.test for n in ast.walk(ast.parse(_get(row, "test"))) if type(n) is ast.Assert]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Rejected("code_not_parsed", f"task {task}: {error}") from None
    if not tests:
        raise Rejected("no_literal_gold", f"task {task} has no assertion")
    left_out = []
    for number, test in enumerate(tests, 1):
        try:
            call, gold = _assertion(test, name, f"task {task}, assertion {number}")
        except Rejected as reject:
            left_out.append(reject)
            continue
        yield make_row(
            "code", f"{code}{_CALL}{call}` return?", f"{call} returns {gold}.", gold, [],
            f"mbpp:{task}:{number}", "none",
        )  # fmt: skip
    if left_out:
        raise left_out[0]


def _assertion(test: ast.expr, name: str, where: str) -> tuple[str, str]:
    """Return (call, literal) of `candidate(args) == literal` as text. Raises Rejected."""
    try:
        if not isinstance(test, ast.Compare) or [type(o) for o in test.ops] != [ast.Eq]:
            raise ValueError("not one ==")
        call, gold = test.left, test.comparators[0]
        if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "candidate":
            raise ValueError("no call of candidate on the left")
        ast.literal_eval(gold)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise Rejected("no_literal_gold", f"{where}: {error}"[:200]) from None
    call.func.id = name
    return ast.unparse(call), ast.unparse(gold)


# Choice questions: ARC, OpenBookQA, aristo-mini

LETTERS = "ABCDEFGHIJ"
_INSTRUCTION = re.compile(
    r"(?:Please choose the correct answer to the question: )?(.*?)\s*\n\s*(Answer1: .*?)"
    r"(?:\n+Answer format: .*)?\s*", re.DOTALL,
)  # fmt: skip


def choices(row: dict, source: str) -> Iterator[dict]:
    """Convert a choice question in any of the three published layouts.

    {"instruction", "answer"}: options as `Answer1: ..`, gold as `answer2`; {"query", "choices",
    "gold"}: gold counted from 0; {"question": {"stem", "choices"}, "answerKey"}: gold by label.
    """
    if "instruction" in row:
        stem, options, gold = _instruction_layout(row)
    elif "query" in row:
        stem, options = _get(row, "query").removeprefix("Question: "), _get(row, "choices", list)
        gold = row.get("gold")
    else:
        question = _get(row, "question", dict)
        listed = _get(question, "choices", list)
        stem, options = _get(question, "stem"), [_part(c, "text") for c in listed]
        labels = [_part(c, "label") for c in listed]
        key = _get(row, "answerKey")
        gold = labels.index(key) if key in labels else key
        source = f"aristo_mini:{row['id']}" if isinstance(row.get("id"), str) else source
    if not all(isinstance(o, str) and o.strip() for o in options) or not (
        2 <= len(options) <= len(LETTERS)
    ):
        raise Rejected("bad_fields", f"choices must be 2 to 10 texts, got {options!r:.60}", True)
    if type(gold) is not int or not 0 <= gold < len(options):
        raise Rejected("bad_fields", f"gold must name one of the options, got {gold!r:.60}", True)
    options = [" ".join(option.split()) for option in options]
    if options.count(options[gold]) > 1:
        raise Rejected("options_repeat", f"two options read {options[gold]!r:.60}")
    listing = "\n".join(f"{LETTERS[i]}) {option}" for i, option in enumerate(options))
    answer = f"{LETTERS[gold]}) {options[gold]}"
    reasoning = f"The option that answers the question is {answer}"
    prompt = f"{stem.strip()}\n{listing}"
    yield make_row("science", prompt, reasoning, answer, [], source, "none")


def _part(choice: object, key: str) -> object:
    return choice.get(key) if isinstance(choice, dict) else None


def _instruction_layout(row: dict) -> tuple[str, list[str], int]:
    """Return (stem, options, gold) of {"instruction", "answer"}."""
    found = _INSTRUCTION.fullmatch(_get(row, "instruction"))
    if found is None:
        raise Rejected("bad_fields", "instruction must list Answer1: .. Answer2: ..", True)
    options = re.split(r"\s*\bAnswer[1-9]: ", " " + found[2])[1:]
    digit = re.fullmatch(r"answer([1-9])", _get(row, "answer"))
    return found[1], options, int(digit[1]) - 1 if digit else -1


def ours(row: dict, source: str) -> Iterator[dict]:
    """Pass on a row that is in our schema already; further keys are kept."""
    try:
        check_row(row, 0)
    except ValueError as error:
        raise Rejected("bad_schema", str(error), is_bad=True) from None
    yield {"source": source} | row


DATASETS: dict[str, Callable[[dict, str], Iterator[dict]]] = {
    "gsm8k": gsm8k,
    "svamp": svamp,
    "mbpp": mbpp,
    "arc": choices,
    "openbookqa": choices,
    "aristo_mini": choices,
    "ours": ours,
}


def question_of(prompt: str) -> str:
    """Return a prompt without its options: what is compared with test sets."""
    return prompt.partition("\nA) ")[0]


def split_key(prompt: str) -> str:
    """Return what decides a prompt's split: all questions on one program go together."""
    return prompt.partition(_CALL)[0]
