r"""Decide whether the text a model answered equals the gold answer.

Exact and bounded: numbers are compared as rationals, code literals by type and value, everything
else as text. Nothing the model wrote is run, nothing is picked out of prose, nothing is converted
between units. Knows no tags, rewards or datasets; grpo/reward.py calls `answers_match`.

The ten rules, in the order in which the functions below stand: gold and prediction to text (1),
marks taken off (2), one candidate (3), numbers (4), units (5), `x = v` (6), choice letters (7),
code literals (8), words (9), the rest without white space (10).
"""

import ast
import math
import numbers
import re
import unicodedata
import warnings
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

MAX_TEXT = 1000  # characters; beyond it the texts are only compared as they stand
MAX_OPTION = 200  # characters of an option's text where gold is the letter alone
MAX_NUMBER = 400  # characters; int() raises beyond 4,300 digits
RELATIVE_TOLERANCE = Fraction(1, 10**12)  # only where neither side is an integer


def answers_match(gold: str, predicted: str, domain: str = "math") -> bool:
    """Return whether `predicted` answers `gold`; never raises.

    Both may be numbers. `domain` "code" compares Python literals and program output, "science"
    also reads an option's label before its text, anything else is treated as "math".
    """
    gold, predicted = as_text(gold), as_text(predicted)
    if max(len(gold), len(predicted)) > MAX_TEXT:
        return collapse(gold) == collapse(predicted)
    gold, predicted = strip_marks(gold), strip_marks(predicted)
    if not gold or not predicted:
        return False
    if gold == predicted:
        return True
    if domain == "code":
        return _code_matches(gold, predicted)
    return _choice_or_value_matches(gold, predicted, is_science=domain == "science")


# 1 and 2: text, and the marks around it

_BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace()) + "\u200b\u2060\ufeff"
_FENCE_LANGUAGE = re.compile(r"\A(?:json|output|plaintext|py|python|text)? *\n")
_MARKS = {  # by the first character
    "$": (("math", "$$", "$$"), ("math", "$", "$")), "*": (("bold", "**", "**"),),
    "`": (("code", "```", "```"), ("code", "`", "`")), "_": (("bold", "__", "__"),),
    "\\": (("math", "\\(", "\\)"), ("math", "\\[", "\\]"), ("box", "\\boxed{", "}"), *(
        ("text", f"\\{name}{{", "}") for name in "text textbf textrm mathbf mathrm".split())),
}


def as_text(value: object) -> str:
    """Return `value` stripped if it is a string, a finite number in digits, else ''."""
    if isinstance(value, str):
        return value.strip(_BLANKS)
    try:
        text = str(value) if isinstance(value, numbers.Number) else ""
    except ValueError:  # more digits than str() prints
        return ""
    return "" if text.lower().lstrip("-") in {"nan", "inf", "infinity", "snan"} else text


def collapse(text: str) -> str:
    """Return `text` with every run of white space as one space."""
    return " ".join(text.split())


def strip_marks(text: str) -> str:
    r"""Take off white space, one final full stop, and one layer of each kind of mark.

    The kinds: math `$..$` or `\(..\)`; `\boxed{}`; `\text{}`; bold; code.
    """
    used = set()
    while True:
        text = text.strip(_BLANKS)
        kind, inner = _outer_mark(text, used)
        if kind is None:
            return text
        used.add(kind)
        text = inner


def _outer_mark(text: str, used: set[str]) -> tuple[str | None, str]:
    """Find a mark of a kind not in `used` around all of `text`; return kind and inside."""
    if "stop" not in used and text.endswith(".") and len(text) > 1:
        return "stop", text[:-1]
    for kind, opening, closing in _MARKS.get(text[:1], ()):
        if (text.startswith(opening) and text.endswith(closing) and kind not in used
                and (inner := text[len(opening) : -len(closing)]).strip(_BLANKS)
                and _is_one_layer(inner, opening, closing)):
            return kind, _FENCE_LANGUAGE.sub("", inner) if opening == "```" else inner
    return None, text


def _is_one_layer(inner: str, opening: str, closing: str) -> bool:
    """Return whether a mark opened before `inner` is still open at its end."""
    if closing == "}":
        depths = list(accumulate((c == "{") - (c == "}") for c in inner))
        return min(depths) >= 0 and depths[-1] == 0
    if opening == "__" and inner.isidentifier():
        return False  # __init__ is a name
    return not any(mark in inner.replace("\\$", "") for mark in (opening, closing))


# 4: numbers; 3 follows, since what remains of a second value is no unit


class Quantity(NamedTuple):
    """An exact value and its unit: a tuple of tokens, each the set of its accepted spellings."""

    value: Fraction
    unit: tuple[frozenset[str], ...]


_DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_MONEY = r"(?:US)?\$|USD|EUR|GBP|INR|JPY|Rs\.?|[\u00a2-\u00a5\u0e3f\u20a0-\u20c0]"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<money>{_MONEY})? ?(?P<inner_sign>[+-]?) ?"
    r"(?:(?P<whole>[0-9]+) (?P<top>[0-9]+) ?/ ?(?P<bottom>[0-9]+)"
    rf"|(?P<first>{_DECIMAL})(?: ?/ ?(?P<second>[+-]?{_DECIMAL})"
    r"|(?:[eE]| ?(?:[*x×·]|\\times|\\cdot) ?10 ?(?:\^|\*\*) ?\{?)(?P<power>[+-]?[0-9]{1,3})\}?)?)"
    r" ?(?P<tail>.*)"
)
_GROUP = rf"(?:\{{ ?([+-]?{_DECIMAL}) ?\}}|([0-9]))"
_FRAC = re.compile(rf"\\[dt]?frac ?{_GROUP} ?{_GROUP}")
_TEXT_COMMAND = re.compile(r"\\(?:text|textrm|mathrm|mbox)\{([^{}]*)\}")
_GROUP_SPACE = re.compile(r"(?<=[0-9])(?:\\,|,\\!|\{,\}|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_LATEX_SPACE = re.compile(r"\\[,;:! ]|\\quad|(?<!^)~")  # "~72" is about 72


@lru_cache(maxsize=1024)
def parse_quantity(text: str) -> Quantity | None:
    """Read one number with at most a currency sign and a unit; None if `text` is anything else."""
    if len(text) > MAX_NUMBER:
        return None
    text = _GROUP_SPACE.sub(",", text)
    text = _TEXT_COMMAND.sub(r" \1 ", text.replace("\\%", "%").replace("\\$", "$"))
    text = _LATEX_SPACE.sub(" ", text.replace("\u2212", "-"))
    found = _NUMBER.fullmatch(collapse(_FRAC.sub(r" \1\2/\3\4 ", collapse(text))))
    if found is None or (found["inner_sign"] and (found["sign"] or not found["money"])):
        return None
    size = _magnitude(found)
    unit = parse_unit(found["tail"])
    if size is None or unit is None or (found["money"] and unit == _PERCENT):
        return None
    if found["money"]:
        unit = (_spellings(found["money"]), *unit)
    return Quantity(-size if "-" in (found["sign"], found["inner_sign"]) else size, unit)


def _magnitude(found: re.Match) -> Fraction | None:
    """Return the exact value of a `_NUMBER` match without its sign, None if it has none."""
    if found["whole"]:
        top, bottom = int(found["top"]), int(found["bottom"])
        return int(found["whole"]) + Fraction(top, bottom) if top < bottom else None
    first = Fraction(found["first"].replace(",", ""))
    if found["second"]:
        second = Fraction(found["second"].replace(",", ""))
        return first / second if second else None
    return first * Fraction(10) ** int(found["power"]) if found["power"] else first


def same_number(gold: Quantity, predicted: Quantity) -> bool:
    """Compare two quantities: 75 and 0.75 answer 75%, and 75% answers both of them."""
    if not _units_agree(gold.unit, predicted.unit):
        return False
    is_mixed = (gold.unit == _PERCENT) != (predicted.unit == _PERCENT)
    shares = (side.value / (100 if side.unit == _PERCENT else 1) for side in (gold, predicted))
    return _equal(gold.value, predicted.value) or (is_mixed and _equal(*shares))


def _equal(a: Fraction, b: Fraction) -> bool:
    """Compare exactly, within 1e-12 of the larger one where neither is an integer."""
    if 1 in (a.denominator, b.denominator):
        return a == b
    return abs(a - b) <= RELATIVE_TOLERANCE * max(abs(a), abs(b))


# 5: currency signs and units

_PERCENT = (frozenset({"%"}),)
_PERCENT_WORDS = {"%", "percent", "per cent", "pct"}
_CURRENCIES = {"$", "€", "£", "¥", "₹", "¢"}
_SPELLINGS = {
    "$": "dollar usd US$ buck", "€": "euro eur", "£": "pound gbp", "¥": "yen jpy yuan",
    "₹": "rupee inr rs", "¢": "cent", "m": "meter metre", "km": "kilometer kilometre",
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "in": "inch", "ft": "foot feet",
    "yd": "yard", "mi": "mile", "g": "gram gramme gm", "kg": "kilogram kilogramme kilo",
    "mg": "milligram", "lb": "pound", "oz": "ounce", "L": "l liter litre",
    "mL": "ml milliliter millilitre", "h": "hour hr", "min": "minute", "s": "second sec",
    "ms": "millisecond", "year": "yr", "°": "degree deg", "°C": "celsius C",
    "°F": "fahrenheit F", "K": "kelvin", "N": "newton", "J": "joule", "W": "watt", "V": "volt",
    "A": "ampere amp", "hz": "hertz", "pa": "pascal", "person": "people", "child": "children",
    "man": "men", "woman": "women",
}
_ALIASES: dict[str, set[str]] = {}
for _canonical, _words in _SPELLINGS.items():
    for _word in (_canonical, *_words.split()):
        _ALIASES.setdefault(_word, set()).add(_canonical)
# Words that make "75 <word>" another number, an expression or a second thought.
_NOT_UNITS = set(
    "or and to not no nor is are was be if than of but minus plus by about approximately around "
    "roughly nearly almost maybe perhaps possibly probably likely hopefully unsure either versus "
    "vs unless except instead until negative below wait think guess actually because since hundred "
    "thousand million billion trillion dozen mn bn half halves third thirds fourth fourths fifth "
    "fifths eighth eighths tenth tenths hundredth hundredths thousandth thousandths zero one two "
    "three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty "
    "seventy eighty ninety twice pi sin cos tan log ln sqrt mod infinity thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen hundreds thousands millions billions trillions dozens "
    "lakh crore squared cubed factorial modulo exp wrong sorry".split()
)
_UNIT_REWRITES = tuple((re.compile(pattern, re.IGNORECASE), unit) for pattern, unit in (
    (r"\^ ?\{? ?\\circ ?\}?|\\degree|º", "°"),
    (r"(?:°|\bdegrees?) ?c(?:elsius)?\b", "°C"),
    (r"(?:°|\bdegrees?) ?f(?:ahrenheit)?\b", "°F"),
    (r"\b(?:square|sq\.?) (\w+)", r"\1^2"),
    (r"\b(?:cubic|cu\.?) (\w+)", r"\1^3"),
    (r" squared\b|²", "^2"), (r" cubed\b|³", "^3"),
    (r"\bper\b", "/"), (r"\bmph\b", "mi/h"), (r"\b(?:kph|kmh)\b", "km/h"),
))
_UNIT_TOKEN = re.compile(r"(/?) ?([^ /^.]+)\.?(?: ?\^\{?(-?[1-4])\}?)? ?|.")


def parse_unit(tail: str) -> tuple[frozenset[str], ...] | None:
    """Read what follows a number as a unit of at most eight tokens; None if it is no unit."""
    if tail.casefold() in _PERCENT_WORDS:
        return _PERCENT
    for pattern, replacement in _UNIT_REWRITES:
        tail = pattern.sub(replacement, tail)
    unit = []
    for slash, word, power in _UNIT_TOKEN.findall(tail):
        if not _is_unit_word(word):
            return None
        unit += [_spellings(part) for part in (slash, word, power) if part]
    return tuple(unit) if len(unit) <= 8 else None


def _is_unit_word(word: str) -> bool:
    """Return whether `word` may be part of a unit rather than of an expression or of prose.

    A single letter outside the table is a variable, `a-b` a difference, `T-shirt` a word.
    """
    if word in _ALIASES:
        return True
    letters = word.replace("-", "").replace("'", "")
    is_word = letters.isalpha() and word[0].isalpha() and len(word) <= 30
    is_long_enough = len(letters) > (1 if letters == word else 3)
    return is_word and is_long_enough and word.casefold() not in _NOT_UNITS


@lru_cache(maxsize=4096)
def _spellings(word: str) -> frozenset[str]:
    """Return every form under which `word` equals another: singular, symbol, either case.

    Case is kept in single letters and after m or M, where it tells milli from mega.
    """
    if len(word) > 2 or (len(word) == 2 and word[0] not in "mM°"):
        word = word if word in _ALIASES else word.casefold()
    forms = {word}
    for ending, instead in (("s", ""), ("es", ""), ("ies", "y")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            forms.add(word[: -len(ending)] + instead)
    return frozenset(forms.union(*(_ALIASES.get(form, ()) for form in forms)))


def _units_agree(gold: tuple, predicted: tuple) -> bool:
    """Return whether one side has no unit or both have the same; `$5` agrees with `$5 an hour`."""
    if not gold or not predicted:
        return True
    if 1 in (len(gold), len(predicted)) and gold[0] & predicted[0] & _CURRENCIES:
        return True
    return len(gold) == len(predicted) and all(map(frozenset.__and__, gold, predicted))


# 6: a value, perhaps named

_VARIABLE = re.compile(r"(\\?[^\W\d_]\w{0,15}(?:_?\{\w{1,8}\})?)\s*=\s*(\S.*)", re.DOTALL)


def _split_variable(text: str) -> tuple[str, str]:
    """Split `x = v` into the variable and the value; the variable is '' where there is none."""
    found = _VARIABLE.fullmatch(text)
    return (found[1], strip_marks(found[2])) if found else ("", text)


def _value_matches(gold: str, predicted: str) -> bool:
    """Compare two values as numbers if either is one, else as text."""
    gold_name, gold = _split_variable(gold)
    name, predicted = _split_variable(predicted)
    if gold_name and name and gold_name != name:
        return False
    gold_number, number = parse_quantity(gold), parse_quantity(predicted)
    if gold_number is None and number is None:
        return _same_words(gold, predicted)
    return gold_number is not None and number is not None and same_number(gold_number, number)


# 7: choice letters

_CHOICE = re.compile(
    r"(?:([A-Ja-j])$|\(([A-Ja-j])\)(?:[.:]?(?=\s|$))|([A-Ja-j])(?:[):]|\.(?=\s|$)))((?s:.*))"
)
# A second label, a leading "or", a second line, a bare letter alone or after a connecting word.
_OTHER_CHOICE = re.compile(
    r"(?:^|[\s,;/(])[A-Ea-e][).:](?:\s|$)|\([A-Ea-e]\)|^(?i:or|and)\b|\n"
    r"|(?:^|\b(?i:or|and|not|no|nor|but|maybe|then|to|is|be|think|answer|option|choice|vs)\.?\s+"
    r"|[,;/&|.:=→(]\s*)\(?[A-E][).!?]*$"
)


def _choice(text: str) -> tuple[str, str] | None:
    """Split `B`, `(B)`, `B) text`, `B. text`, `B: text` into letter and text, else None."""
    found = _CHOICE.fullmatch(text)
    if found is None:
        return None
    return (found[1] or found[2] or found[3]).upper(), strip_marks(found[4])


def _choice_or_value_matches(gold: str, predicted: str, is_science: bool) -> bool:
    """Compare as option of a choice where gold is one, else as value."""
    gold_choice, choice = _choice(gold), _choice(predicted)
    if gold_choice and not is_science and not gold.lstrip("(")[0].isupper():
        gold_choice = None  # a lower-case letter in mathematics is a variable
    if gold_choice is None:
        option = choice[1] if is_science and choice else ""
        return _value_matches(gold, predicted) or (option != "" and _value_matches(gold, option))
    letter, option = gold_choice
    if choice is None or (choice[0] != letter and choice[1]):  # the option's text by itself
        return option != "" and _value_matches(option, predicted)
    if choice[0] != letter or not choice[1]:
        return choice[0] == letter
    if option:
        return _value_matches(option, choice[1])
    return len(choice[1]) <= MAX_OPTION and _OTHER_CHOICE.search(choice[1]) is None


# 8: code literals; a string without an end goes to the end of the text, so that one pass suffices

_STRING = re.compile(r"'(?:[^'\\]|\\.)*\\?(?:'|\Z)|\"(?:[^\"\\]|\\.)*\\?(?:\"|\Z)", re.DOTALL)


def _code_matches(gold: str, predicted: str) -> bool:
    """Compare as Python literals of one type if gold is a literal, else as program output."""
    wanted = _literal(gold)
    if wanted is None:
        return _LOOSE_CODE_SPACE.sub("", collapse(gold)) == _LOOSE_CODE_SPACE.sub(
            "", collapse(predicted))
    got = _literal(predicted) or _literal(_split_variable(predicted)[1])
    return got is not None and _same_value(wanted[0], got[0])


def _literal(text: str) -> tuple[object] | None:
    """Return the one value that `text` is a Python literal of, None if it is not one.

    A comment is refused: it is the place to hide a second candidate.
    """
    if "#" in text and "#" in _STRING.sub("", text):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a string is no concern here
            return (ast.literal_eval(text),)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _same_value(a: object, b: object) -> bool:
    """Compare two literals: same type at every level, floats as rule 4 compares numbers."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same_value, a, b))
    if isinstance(a, set):
        return set(map(_typed, a)) == set(map(_typed, b))
    if isinstance(a, dict):
        a, b = ({_typed(key): value for key, value in side.items()} for side in (a, b))
        return a.keys() == b.keys() and all(_same_value(a[key], b[key]) for key in a)
    if isinstance(a, float) and math.isfinite(a) and math.isfinite(b):
        return _equal(Fraction(a), Fraction(b))
    return a == b


def _typed(value: object) -> tuple:
    """Return a hashable value under which 1, 1.0 and True differ."""
    return type(value), tuple(map(_typed, value)) if isinstance(value, tuple) else value


# 9 and 10: words, program output, formulas

_FORMULA = re.compile(r"[^\W\d_][0-9]|[0-9][^\W\d_]")
_LETTERS = re.compile(r"[^\W\d_]+")
_SHORT_WORDS = {"no", "ok", "on", "up"}
_WORD_MARKS = set(" -'’\",;:!?.&")
_LOOSE_SPACE = re.compile(r"(?<![0-9.]) | (?![0-9.])")  # not between digits: "1 2" is not "12"
_LOOSE_CODE_SPACE = re.compile(r"(?<!\w) | (?!\w)")  # not between words: "a b" is not "ab"


def _same_words(gold: str, predicted: str) -> bool:
    """Compare plain words without case, everything else without white space."""
    gold, predicted = collapse(gold), collapse(predicted)
    if not (_is_plain(gold) and _is_plain(predicted)):
        return _LOOSE_SPACE.sub("", gold) == _LOOSE_SPACE.sub("", predicted)
    if len(gold) == 2 and gold.casefold() not in _SHORT_WORDS:
        return gold == predicted  # Co is not CO, Rr is not rr
    return gold.casefold() == predicted.casefold()


def _is_plain(text: str) -> bool:
    """Return whether `text` is plain words: no operators, no digits or capitals inside a word."""
    words = _LETTERS.findall(text)
    return (
        max(map(len, words), default=0) > 1
        and _FORMULA.search(text) is None
        and all(c.isalnum() or unicodedata.category(c)[0] == "M" for c in set(text) - _WORD_MARKS)
        and all(word[1:] == word[1:].lower() or word == word.upper() for word in words)
    )
