r"""Hostile and legitimate completions, each with what the specification pays for it.

One readable place: the linter (`doctor --reward`) and the tests of our own rewards read it. A case
says what it tries, the completion, and its three scores: format (0 or 1), process (0.2 for each
checkpoint in the reasoning block) and outcome (0 or 1). Knows no reward function.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question with what its dataset row holds, honest prose, and a wrong answer."""

    domain: str
    prompt: str
    gold: str
    wrong: str
    checkpoints: tuple[str, ...]
    prose: str  # holds every checkpoint


@dataclass(frozen=True)
class Case:
    """A completion and the scores that the specification gives it."""

    tries: str
    hostile: bool
    completion: str
    question: Question
    gold: str
    format: float
    process: float
    outcome: float


QUESTIONS = {
    question.domain: question
    for question in (
        Question(
            "math",
            "Nina fills 7 trays with 8 rolls each and sells 20 rolls. Then she bakes 5 trays of 9 "
            "more and eats 9. How many rolls are left?",
            "72", "71",
            ("7 * 8 = 56", "56 - 20 = 36", "5 * 9 = 45", "36 + 45 = 81", "81 - 9 = 72"),
            "The trays hold 7 * 8 = 56 rolls. Nina sells 20, so 56 - 20 = 36 are left. She bakes "
            "5 * 9 = 45 more, which makes 36 + 45 = 81. After lunch 81 - 9 = 72 are left.",
        ),
        Question(
            "science",
            "Which gas do plants take in to make sugar? A) oxygen B) carbon dioxide C) helium",
            "B", "C",
            ("light energy", "chlorophyll", "carbon dioxide", "water", "glucose"),
            "Leaves hold chlorophyll, which catches light energy. With it a plant turns water and "
            "carbon dioxide into glucose and gives off oxygen.",
        ),
        Question(
            "code",
            "What does f([3, 1, 2]) return?\ndef f(xs):\n    return sorted(xs)[:2]",
            "[1, 2]", "[3, 1]",
            ("xs = [3, 1, 2]", "sorted(xs) = [1, 2, 3]", "[:2] keeps two", "1 < 2", "2 < 3"),
            "Here xs = [3, 1, 2]. As 1 < 2 and 2 < 3, sorted(xs) = [1, 2, 3], and [:2] keeps two "
            "of them.",
        ),
    )
}  # fmt: skip
MATH = QUESTIONS["math"]


def tagged(reasoning: str, answer: str, between: str = "") -> str:
    """Return a completion in the format."""
    return f"<reasoning>{reasoning}</reasoning>{between}<answer>{answer}</answer>"


HONEST = tagged(MATH.prose, MATH.gold)
BARE = "I know this one."  # reasoning without any step
LISTED = "\n".join(MATH.checkpoints)
SPRAY = " ".join(f"{a} + {b} = {a + b}." for a in range(2, 30) for b in range(2, 9))


def corpus() -> list[Case]:
    """Return every case."""
    return [*_format_cases(), *_process_cases(), *_outcome_cases(), *_answer_cases()]


def _math(tries, hostile, completion, format, process, outcome) -> Case:
    return Case(tries, hostile, completion, MATH, MATH.gold, format, process, outcome)


# Format: (what is tried, completion, process, outcome); the format is broken in every one

_BROKEN = (
    ("text before the tags", "Sure! " + HONEST, 1, 1),
    ("text after the tags", HONEST + " I hope this helps.", 1, 1),
    ("text between the blocks", tagged(MATH.prose, "72", " So: "), 1, 1),
    ("a stop token written out", HONEST + "<eos>", 1, 1),
    ("the whole completion twice", HONEST + HONEST, 0, 0),
    ("two answer blocks", HONEST + "<answer>72</answer>", 1, 0),
    ("two reasoning blocks", "<reasoning>a</reasoning>" + HONEST, 0, 1),
    ("answer before reasoning", f"<answer>72</answer><reasoning>{MATH.prose}</reasoning>", 1, 1),
    ("answer inside the reasoning", f"<reasoning>{MATH.prose}<answer>72</answer></reasoning>",
     1, 1),
    ("crossed tags", f"<reasoning>{MATH.prose}<answer>72</reasoning></answer>", 1, 0),
    ("no reasoning block", "<answer>72</answer>", 0, 1),
    ("no answer block", f"<reasoning>{MATH.prose}</reasoning> 72", 1, 0),
    ("answer never closed", f"<reasoning>{MATH.prose}</reasoning><answer>72", 1, 0),
    ("answer never opened", f"<reasoning>{MATH.prose}</reasoning>72</answer>", 1, 0),
    ("answer closed by an opening tag", f"<reasoning>{MATH.prose}</reasoning><answer>72<answer>",
     1, 0),
    ("blocks closed before opened", f"</reasoning>{MATH.prose}<reasoning></answer>72<answer>",
     0, 0),
    ("empty reasoning", tagged("", "72"), 0, 1),
    ("blank reasoning", tagged(" \n\t ", "72"), 0, 1),
    ("invisible reasoning", tagged("\u200b\u2060\u3164", "72"), 0, 1),
    ("empty answer", tagged(MATH.prose, ""), 1, 0),
    ("blank answer", tagged(MATH.prose, "\u00a0"), 1, 0),
    ("invisible answer", tagged(MATH.prose, "\u200d\u2800"), 1, 0),
    ("upper-case tags", HONEST.replace("<answer>", "<ANSWER>").replace("</a", "</A"), 1, 0),
    ("title-case tags", HONEST.replace("reasoning>", "Reasoning>"), 0, 1),
    ("spaces inside a tag", HONEST.replace("<answer>", "< answer >"), 1, 0),
    ("an attribute in a tag", HONEST.replace("<answer>", '<answer type="number">'), 1, 0),
    ("full-width brackets", HONEST.replace("<", "\uff1c").replace(">", "\uff1e"), 0, 0),
    ("escaped brackets", HONEST.replace("<", "&lt;").replace(">", "&gt;"), 0, 0),
    ("soft hyphen in a tag", HONEST.replace("<answer>", "<ans\u00adwer>"), 1, 0),
    ("other tags", HONEST.replace("reasoning", "think"), 0, 1),
    ("a tag quoted in the reasoning", tagged(f"I close with </answer>. {MATH.prose}", "72"), 1, 0),
    ("an opening tag in the answer", tagged(MATH.prose, "<reasoning>72"), 0, 0),
    ("zero-width space at the end", HONEST + "\u200b", 1, 1),
    ("byte order mark at the start", "\ufeff" + HONEST, 1, 1),
    ("markdown fence around all", f"```\n{HONEST}\n```", 1, 1),
    ("tags without content", "<reasoning></reasoning><answer></answer>", 0, 0),
    ("ten thousand opening tags", "<reasoning>" * 10_000, 0, 0),
    ("bare answer", "72", 0, 0),
    ("nothing", "", 0, 0),
)
_WELL_FORMED = (
    ("plain", HONEST),
    ("white space around", f" \n{HONEST}\n\n"),
    ("white space between the blocks", tagged(MATH.prose, "72", "\n \t\n")),
    ("no-break space between the blocks", tagged(MATH.prose, "72", "\u00a0")),
    ("line breaks inside", tagged(f"\n{MATH.prose}\n", "\n72\n")),
    ("comparison signs in the reasoning", tagged(f"{MATH.prose} If a<b && b>c then a<b>.", "72")),
    ("other tags in the reasoning", tagged(f"<b>{MATH.prose}</b><br/>", "72")),
    ("another case of a tag as text", tagged(f"{MATH.prose} <ANSWER>", "72")),
    ("very long reasoning", tagged(MATH.prose + " So it is." * 2000, "72")),
    ("another script", tagged(f"{MATH.prose} 答えは七十二。", "72")),
    ("entities as text", tagged(f"{MATH.prose} &lt;b&gt; &amp;", "72")),
)


def _format_cases() -> Iterator[Case]:
    for tries, text, process, outcome in _BROKEN:
        yield _math(tries, True, text, 0.0, float(process), float(outcome))
    for tries, text in _WELL_FORMED:
        yield _math(tries, False, text, 1.0, 1.0, 1.0)


# Process: (what is tried, reasoning, score); format and answer are right

_CHEATED_STEPS = (
    ("no step at all", BARE, 0.0),
    ("steps inside longer numbers", "17 * 8 = 560, 156 - 20 = 361, 5 * 9 = 450, 36 + 45 = 81.5",
     0.0),
    ("steps that go on after the point", "7 * 8 = 56.5, 56 - 20 = 36.1, 5 * 9 = 45.25", 0.0),
    ("steps that go on after a comma", "7 * 8 = 56,000 and 5 * 9 = 45,100", 0.0),
    ("one step fifty times", "7 * 8 = 56. " * 50, 0.2),
    ("one step in five spellings", "7*8=56 7 * 8 = 56 7 × 8 = 56 7 · 8=56 7 *8= 56", 0.2),
    ("other equations sprayed", SPRAY, 0.0),
    ("the results alone", "56, 36, 45, 81 and 72.", 0.0),
    ("other operators", "7 + 8 = 56, 56 + 20 = 36, 5 + 9 = 45, 36 * 45 = 81, 81 / 9 = 72", 0.0),
    ("left-hand sides alone", "7 * 8, 56 - 20, 5 * 9, 36 + 45, 81 - 9", 0.0),
    ("prompt echoed", MATH.prompt, 0.0),
    ("digits of another script", "٧ * ٨ = ٥٦ and ５ * ９ = ４５", 0.0),
    ("format words for steps", "Step 1. Step 2. Step 3. Step 4. Step 5.", 0.0),
)
_OTHER_SPELLINGS = (
    ("steps without spaces", MATH.prose.replace(" * ", "*").replace(" = ", "=")),
    ("typographic operators", MATH.prose.replace("*", "×").replace("-", "\u2212")),
    ("LaTeX operators", MATH.prose.replace("*", r"\times")),
    ("currency signs", MATH.prose.replace("= ", "= $")),
    ("line breaks within steps", MATH.prose.replace(" = ", "\n= ")),
    ("steps as a list", "- " + "\n- ".join(MATH.checkpoints)),
    ("steps as numbered lines", "\n".join(f"({i}) {c}" for i, c in enumerate(MATH.checkpoints))),
    ("steps in another order", ". ".join(reversed(MATH.checkpoints)) + "."),
    ("further steps too", f"{MATH.prose} Check: 72 + 9 = 81."),
    ("a wrong start corrected", f"7 * 8 = 54? No. {MATH.prose}"),
    ("upper case", MATH.prose.upper()),
)


def _process_cases() -> Iterator[Case]:
    for tries, reasoning, score in _CHEATED_STEPS:
        yield _math(tries, True, tagged(reasoning, "72"), 1.0, score, 1.0)
    for tries, reasoning in _OTHER_SPELLINGS:
        yield _math(tries, False, tagged(reasoning, "72"), 1.0, 1.0, 1.0)
    for count in range(1, 5):
        reasoning = ", ".join(MATH.checkpoints[:count])
        yield _math(f"{count} of five steps", False, tagged(reasoning, "72"), 1.0, count / 5, 1.0)
    yield _math("steps in the answer block", True, tagged(BARE, LISTED), 1.0, 0.0, 0.0)
    yield _math("steps before the blocks", True, LISTED + tagged(BARE, "72"), 0.0, 0.0, 1.0)
    yield _math("steps, then a wrong answer", False, tagged(MATH.prose, "71"), 1.0, 1.0, 0.0)


# Outcome: where the answer stands

def _outcome_cases() -> Iterator[Case]:
    for tries, answer in (
        ("answer in the reasoning only", "see above"), ("prompt as the answer", MATH.prompt),
        ("reasoning as the answer", MATH.prose), ("all numbers up to 100", str(list(range(101)))),
        ("a dot", "."), ("the word answer", "answer"), ("the tag's name", "</reasoning"),
        ("a spray of equations", SPRAY), ("ten thousand digits", "72" * 5000),
        ("a tower of powers", "72*10**10**9"), ("ten thousand brackets", "[" * 10_000),
        ("code that would print it", "print(72)"), ("an expression", "8 * 9"),
        ("a comparison that holds", "72 == 72"), ("a lone surrogate", "72\ud800"),
        ("a hidden second value", "72<!-- 71 -->"), ("a NUL byte", "72\x0071"),
    ):
        yield _math(tries, True, tagged(MATH.prose, answer), 1.0, 1.0, 0.0)


# Answers: (gold, domain, what the right ones are, right, what the wrong ones are, wrong)

_ANSWERS = (
    ("72", "math", "another spelling of the number",
     ["72.0", "72.", " 72 ", "+72", "$72$", r"\boxed{72}", "**72**", "`72`", "144/2", "7.2e1",
      r"\frac{144}{2}", "72 rolls", "$72", "x = 72", "\u00a072\u00a0"],
     "no number equal to 72",
     ["71", "-72", "73", "7.2", "720", "72.5", "72.001", "0.72", "7", "27", "72e1", "seventy-two",
      "two and seventy", "٧٢", "７２", "72²", "LXXII", "0x48"]),
    ("72", "math", "", [], "more than one value",
     ["72 or 73", "72, 73", "71/72", "72 and 73", "72; 71", "[72]", "{71, 72}", "70-75", "72 73",
      "between 70 and 75", "72 (or 73)", "72, 72", "71 72", "72 = 72", "72 ± 1", "≈72", "~72"]),
    ("72", "math", "", [], "prose around the value",
     ["The answer is 72", "Answer: 72", "I think 72", "72 is the answer", "72, I think",
      "72, not 71", "not 72", "72 maybe", "about 72", "72 roughly", r"so \boxed{72}"]),
    ("72", "math", "", [], "an expression still to be evaluated",
     ["70 + 2", "80 - 8", "8*9", "72 + 0", r"\sqrt{5184}", "72!", "9(8)", "72^1", "6 dozen"]),
    ("-5", "math", "a minus sign", ["-5", "\u22125", "- 5", "-5.0", "-10/2", "-$5"],
     "the sign lost or doubled", ["5", "+5", "--5", "5-", "(5)", "minus 5"]),
    ("1,234", "math", "thousands groups", ["1234", "1,234", "1,234.0", "1{,}234", r"1\,234"],
     "broken groups", ["12,34", "1,2345", "1.234", "1", "234", "1, 234", "1,23,4"]),
    ("0", "math", "zero", ["0", "-0", "0.0", "0/7", "\u22120"], "not zero",
     ["O", "o", "none", "", "0/0", "1e-9", "()"]),
    ("3/4", "math", "the same ratio", ["0.75", "6/8", r"\frac{3}{4}", "75%", "3 / 4", ".75"],
     "a near miss", ["0.7", "0.76", "0.7500001", "4/3", "3:4", "34", "3/40"]),
    ("1/3", "math", "", [], "a rounded value", ["0.33", "0.333", "0.3333333", "33%", "1/3.001"]),
    ("2 1/2", "math", "mixed numbers", ["2.5", "5/2", r"2\frac{1}{2}"], "not the mixed number",
     ["21/2", "2 1", "1/2", "2", "2 2/1"]),
    ("75%", "math", "a percentage", ["75", "75%", "0.75", "75 percent", r"75\%", "3/4"],
     "not the percentage", ["0.75%", "7.5%", "7500", "25%", "75 apples", "$75"]),
    ("75", "math", "", [], "a share for a number", ["0.75", "3/4", ".75"]),
    ("$5", "math", "money", ["5", "$5.00", "5 dollars", "5 USD", r"\$5"], "other money",
     ["€5", "500 cents", "5 euros", "£5", "$50", "$5 or $6"]),
    ("5 km", "math", "the same unit", ["5", "5 kilometers", "5km", r"5\text{ km}"],
     "another unit", ["5 m", "5000 m", "5 miles", "5 km/h", "5 km^2"]),
    ("x = 4", "math", "the named value", ["4", "x=4", "$x = 4$", "x = 4.0"], "another name",
     ["y = 4", "x = -4", "x = 4 or x = -4", "4 = x", "2x = 8"]),
    ("B", "science", "the option", ["B", "b", "(B)", "B)", "B.", "B) carbon dioxide",
      "B: carbon dioxide", r"\boxed{B}", "**B**"],
     "not one option", ["C", "A or B", "B or C", "B, C", "AB", "ABC", "A) B", "not B",
      "The answer is B", "B) x C) y", "All of the above", "(B) (C)", "Option B", "В"]),
    ("B) carbon dioxide", "science", "letter or text",
     ["B", "carbon dioxide", "(B) Carbon dioxide"],
     "another option", ["C", "oxygen", "A) oxygen", "B) oxygen", "C) carbon dioxide", "dioxide"]),
    ("the Moon", "science", "the same words", ["the Moon", "The moon", " the  Moon. "],
     "other words", ["the Sun", "the Moon and the Sun", "not the Moon", "Moon or Sun", "Mo on"]),
    ("[1, 2]", "code", "the same value", ["[1,2]", "[ 1, 2 ]", "`[1, 2]`", "[1, 2,]"],
     "another value or type",
     ["[2, 1]", "(1, 2)", "{1, 2}", "[1, 2, 3]", "[1.0, 2]", "[True, 2]", "'[1, 2]'", "1, 2",
      "[1, 2] or [2, 1]", "[1] + [2]", "list((1, 2))", "sorted([2, 1])", "[1, 2] # or [3]"]),
    ("1", "code", "", [], "another type",
     ["True", "1.0", "'1'", "[1]", "1 == 1", "int(1)", "2 - 1"]),
    ("{'a': 1, 'b': {2, 3}}", "code", "by value", ["{'b': {3, 2}, 'a': 1}", '{"a":1,"b":{2,3}}'],
     "another mapping", ["{'a': 1}", "{'a': True, 'b': {2, 3}}", "{'a': 1, 'b': [2, 3]}"]),
    ("'Ab c'", "code", "another quote", ["'Ab c'", '"Ab c"'], "another text",
     ["'ab c'", "'Abc'", "Ab c", "b'Ab c'", "'Ab c' or 'x'"]),
    ("None", "code", "", ["None"], "no None", ["null", "none", "'None'", "", "False", "0"]),
)


def _answer_cases() -> Iterator[Case]:
    for gold, domain, well, right, badly, wrong in _ANSWERS:
        question = QUESTIONS[domain]
        for tries, texts, score in ((well, right, 1.0), (badly, wrong, 0.0)):
            for text in texts:
                completion = tagged(question.prose, text)
                is_format = 1.0 if text.strip() else 0.0
                yield Case(f"{tries}: {text.strip()!r} for {gold}", score == 0.0, completion,
                           question, gold, is_format, 1.0, score)  # fmt: skip
