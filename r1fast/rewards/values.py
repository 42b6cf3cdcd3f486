"""Values part by part: lists, sets, tuples and intervals by their elements, elements as numbers or as formulas.

  list    1, 2 and {1, 2}: in any order. Against a tuple the order counts.
  tuple   (1, 2), [0, 1): in order, with the same brackets, which make the difference between intervals.
  named   x = 5 and x \\in [0, 1]: the name counts only if both sides give one.
  leaf    a number with its unit, or a formula (`formulas.py`).
A unit that only one side gives decides nothing; two units that differ are wrong. p% is p/100, and where the gold or the
answer is in percent, p as well: a question after percent is answered with and without the sign.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from r1fast.rewards.answers import (
    any_number,
    bare,
    decimals,
    plain_number,
    split_list,
    split_unit,
    top_level,
    units_conflict,
)
from r1fast.rewards.formulas import MAX_DEPTH, literal_digits, nesting, same_formula, squeezed
from r1fast.rewards.formulas import is_readable as is_readable_formula

_MAX_CHARS = 2000  # a longer answer is compared as text
_ROUNDED = 6  # decimals from which a decimal may stand for the exact value that it rounds
_OPEN, _CLOSE = ("(", "[", "\\{", "{", "\\langle"), (")", "]", "\\}", "}", "\\rangle")
_BRACKETS = re.compile(r"\\[{}]|\\[lr]angle|[()\[\]{}]")
_EQUALS = re.compile(r"\\[{}]|\\[lr]angle|[()\[\]{}]|(?<![<>!=])=(?!=)|\\approx|\\in(?![A-Za-z])")
_NAME = re.compile(r"(?!.*\\(?:le|ge|ne|sqrt|pi|infty)(?![A-Za-z]))[^0-9=<>+^]*[A-Za-z][^0-9=<>+^]*")  # no arithmetic
_MATRIX = re.compile(
    r"\\begin\{([pbvBV]?matrix|array|cases)\}(?:\{[lcr|]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL
)


_ARITHMETIC = re.compile(r"(?:[0-9.\s+*/()^{}-]|\\(?:cdot|times|frac)(?![A-Za-z]))+")
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne)(?![A-Za-z])")


class Value(NamedTuple):
    """kind: list, tuple, set or leaf; brackets of a tuple; name: what an equation calls the value."""

    kind: str
    text: str
    items: tuple["Value", ...] = ()
    brackets: str = ""
    name: str = ""


def is_number(text: str, *, loose: bool = False) -> bool:
    """Whether the text is a number, with or without a unit."""
    return any_number(split_unit(bare(text), loose=loose).text) is not None


def is_readable(text: str) -> bool:
    """Whether every part is a number or a formula."""
    value = read_value(text)
    leaves = value.items or (value,)
    return all(
        bool(leaf.items) or is_number(leaf.text) or is_readable_formula(split_unit(leaf.text).text) for leaf in leaves
    )


def same_text(gold: str, answer: str) -> bool:
    """Whether two values are written alike."""
    return squeezed(gold) == squeezed(answer)


def same_value(gold: str, answer: str) -> bool:
    """Whether the answer is the gold's value."""
    if len(answer) > _MAX_CHARS:
        return same_text(gold, answer)
    if same_text(gold, answer) or _same(read_value(gold), read_value(answer)):
        return True
    # 1,22 is a list, or a decimal where commas are decimal points: it equals what is written as a decimal
    for text, other in ((gold, answer), (answer, gold)):
        if re.fullmatch(r"-?(?:0,[0-9]+|[0-9]+,[0-9]{1,2})", text) and "," not in other:
            return any_number(text) == plain_number(split_unit(other).text)
    return False


@lru_cache(maxsize=4096)
def read_value(text: str) -> Value:
    """The parts of a value; never fails: what has no parts is a leaf."""
    text = bare(text)
    if (dollars := len(re.findall(r"(?<!\\)\$", text))) and dollars % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text).strip()
    if any_number(text) is not None and not re.fullmatch(r"-?[0-9]+,[0-9]+", text):
        return Value("leaf", text)
    if nesting(text) > MAX_DEPTH:
        return Value("leaf", text)
    parts = split_list(text)
    if len(parts) > 1 and len(parts) <= 200:
        if plain_number(text) is not None:
            return Value("leaf", text)
        return Value("list", text, tuple(item for part in parts for item in _spread(part)))
    if "\\pm" in text:
        return Value("list", text, tuple(_spread(text)))
    name, rest = _split_name(text)
    if not name and (rounded := re.search(r"\\approx(?![A-Za-z])", text)):
        return read_value(text[: rounded.start()])  # the exact value, and then what it is about
    if name:
        inner = read_value(rest)
        return inner._replace(name=name, text=text if inner.kind == "leaf" else inner.text)
    if match := _MATRIX.fullmatch(text):
        return _matrix(match[1], match[2], text)
    return _bracketed(text) or Value("leaf", text)


def _spread(part: str) -> list[Value]:
    """1 \\pm \\sqrt{5} is two values."""
    if "\\pm" not in part:
        return [read_value(part)]
    plus = re.sub(r"\\pm\s*", "+", part).replace("\\mp", "-")
    minus = re.sub(r"\\pm\s*", "-", part).replace("\\mp", "+")
    return [read_value(re.sub(r"(^|[({=])\s*\+", r"\1", plus)), read_value(minus)]


def _split_name(text: str) -> tuple[str, str]:
    cuts = top_level_names(text)
    if not cuts:
        return "", text
    name = text[: cuts[0].start()].strip()
    if not _NAME.fullmatch(re.sub(r"_(?:\{[^{}]*\}|\w)|\s|(?<=[A-Za-z])\(.*\)$", "", name)):
        return "", text
    exact = [match for match in cuts if match[0] != "\\approx"] or cuts[:1]
    rest = text[exact[-1].end() :]
    numbers = [part for part in text.split("=")[1:] if _ARITHMETIC.fullmatch(part)]
    if any(not same_formula(part, numbers[-1]) for part in numbers[:-1]):
        return "", text  # x = 8 = 3 is false: left to the formulas
    later = [match.start() for match in cuts if match.start() > exact[-1].start()]
    name = re.sub(r"\s|[$]", "", name)
    # y = ... and f(x) = ... both say what function it is
    name = "y" if re.fullmatch(r"[a-zA-Z]\([a-z]\)", name) and re.search(r"[a-z]", rest) else name
    return name, (text[exact[-1].end() : later[0]] if later else rest).strip()


def top_level_names(text: str) -> list[re.Match[str]]:
    """The signs that give a name its value: =, \\approx, \\in."""
    depth = 0
    found = []
    for match in _EQUALS.finditer(text):
        token = match[0]
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0 and (token == "=" or token in ("\\approx", "\\in")):
            found.append(match)
    return found


def _bracketed(text: str) -> Value | None:
    opening = next((token for token in _OPEN if text.startswith(token)), "")
    closing = next((token for token in _CLOSE if text.endswith(token)), "")
    if not opening or not closing or (opening == "{" and closing != "}"):
        return None
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += (match[0] in _OPEN) - (match[0] in _CLOSE)
        if depth == 0 and match.end() < len(text):
            return None
    inner = text[len(opening) : len(text) - len(closing)]
    parts = _plain_split(inner)
    if len(parts) == 1 and inner.lstrip().startswith("\\begin"):
        return read_value(inner)
    if opening in ("\\{", "{"):
        return Value("set", text, tuple(item for part in parts for item in _spread(part)))
    if len(parts) == 1 and (opening, closing) == ("(", ")"):
        return read_value(inner)
    if len(parts) == 1 and opening == "[" and _BRACKETS.search(inner) is None:
        return Value("tuple", text, (read_value(inner),), "[]")
    return Value("tuple", text, tuple(read_value(part) for part in parts), opening + closing)


def _plain_split(inner: str) -> list[str]:
    """The parts between brackets, where every comma separates."""
    separators = re.compile(r"\\[{}]|\\[lr]angle|[()\[\]{}]|[,;、]")
    parts, begin = [], 0
    for match in top_level(inner, separators):
        parts.append(inner[begin : match.start()].strip())
        begin = match.end()
    parts.append(inner[begin:].strip())
    return [part for part in parts if part]


def _matrix(environment: str, body: str, text: str) -> Value:
    rows = [row for row in re.split(r"\\\\", body) if row.strip().strip("\\")]
    cells = [[read_value(cell) for cell in row.split("&")] for row in rows]
    if environment == "cases":
        return Value("list", text, tuple(cell for row in cells for cell in row))
    if len(cells) == 1 or all(len(row) == 1 for row in cells):
        return Value("tuple", text, tuple(cell for row in cells for cell in row), "matrix")
    return Value("tuple", text, tuple(Value("tuple", "", tuple(row), "matrix") for row in cells), "matrix")


def _same(gold: Value, answer: Value) -> bool:
    if gold.kind == "leaf" and answer.kind == "leaf":
        return _same_leaf(gold, answer)
    if gold.kind == "leaf" or answer.kind == "leaf":
        return _same_mixed(gold, answer)
    if gold.name and answer.name and gold.name != answer.name and gold.kind != "tuple":
        return False
    if gold.kind == "tuple" and answer.kind == "tuple":
        return _same_brackets(gold, answer) and _same_in_order(gold.items, answer.items)
    if gold.kind == "tuple" or answer.kind == "tuple":
        ordered = gold if gold.kind == "tuple" else answer
        return ordered.brackets in ("()", "[]", "matrix") and _same_in_order(gold.items, answer.items)
    if len(_names(gold)) > 1 >= len(_names(answer)) or len(_names(answer)) > 1 >= len(_names(gold)):
        return _same_in_order(gold.items, answer.items)  # x = 1, y = 2 against 1, 2
    return _same_in_any_order(gold.items, answer.items)


def _names(value: Value) -> set[str]:
    """What a list names; x_1 and x_2 are the solutions of one unknown."""
    return {item.name.partition("_")[0] for item in value.items if item.name}


def _same_mixed(gold: Value, answer: Value) -> bool:
    """A set of one is its element; an interval may be an inequality; both sides whole are left to the formulas."""
    whole, leaf = (gold, answer) if answer.kind == "leaf" else (answer, gold)
    if len(whole.items) == 1 and whole.kind in ("set", "list"):
        return _same(gold.items[0], answer) if whole is gold else _same(gold, answer.items[0])
    if "\\cup" in leaf.text and whole.kind == "list":  # x < 0 or x > 1
        return _same_in_any_order(tuple(map(read_value, leaf.text.split("\\cup"))), whole.items)
    if not re.search(r"[<>]|\\(?:le|ge|ne|cup|cap|in|setminus|infty|begin|text|mathbb)(?![A-Za-z])", leaf.text):
        return False
    return same_formula(gold.text, answer.text)


def _same_brackets(gold: Value, answer: Value) -> bool:
    """Brackets tell intervals apart; from three elements on, and in matrices, they are a matter of taste."""
    if "matrix" in (gold.brackets, answer.brackets) or len(gold.items) != 2:
        return True
    return gold.brackets.replace("\\langle", "(").replace("\\rangle", ")") == answer.brackets.replace(
        "\\langle", "("
    ).replace("\\rangle", ")")


def _same_in_order(gold: tuple[Value, ...], answer: tuple[Value, ...]) -> bool:
    return len(gold) == len(answer) and all(_same(first, second) for first, second in zip(gold, answer))


def _same_in_any_order(gold: tuple[Value, ...], answer: tuple[Value, ...]) -> bool:
    if any(item.items for item in answer):  # solutions: one that is given twice is given
        answer = tuple({item.text: item for item in answer}.values())
        answer = tuple(
            item for index, item in enumerate(answer) if not any(_same(item, other) for other in answer[:index])
        )
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        match = next((other for other in left if _same(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_leaf(gold: Value, answer: Value) -> bool:
    if gold.name and answer.name and gold.name != answer.name:
        return same_formula(gold.text, answer.text)
    if bool(gold.name) != bool(answer.name) and _RELATION.search((answer if gold.name else gold).text):
        return same_formula(gold.text, answer.text)
    first, second = _value_text(gold, answer), _value_text(answer, gold)
    one, other = split_unit(first), split_unit(second, loose=any_number(split_unit(first).text) is not None)
    if units_conflict(one.unit, other.unit):
        return False
    if one.percent == other.percent:
        return _same_quantity(one.text, other.text)
    scaled = Fraction(1, 100)
    if one.percent:
        return _same_quantity(one.text, other.text) or _same_quantity(one.text, other.text, gold_scale=scaled)
    return _same_quantity(one.text, other.text) or _same_quantity(one.text, other.text, answer_scale=scaled)


def _value_text(value: Value, other: Value) -> str:
    """The text after the name, where the other side has none to compare it with."""
    return _split_name(value.text)[1] if value.name else value.text


def _same_quantity(
    gold: str, answer: str, *, gold_scale: Fraction = Fraction(1), answer_scale: Fraction = Fraction(1)
) -> bool:
    first, second = any_number(gold), any_number(answer)
    if first is not None and second is not None:
        return _same_number(first * gold_scale, second * answer_scale, gold, answer)
    digits = max(literal_digits(gold), literal_digits(answer))
    return same_formula(_scaled(gold, first, gold_scale), _scaled(answer, second, answer_scale), digits=digits)


def _scaled(text: str, number: Fraction | None, scale: Fraction) -> str:
    if number is None:
        return text if scale == 1 else f"\\frac{{{text}}}{{{scale.denominator}}}"
    number *= scale
    if number.denominator == 1:
        return str(number.numerator)
    return f"\\frac{{{number.numerator}}}{{{number.denominator}}}"


def _same_number(first: Fraction, second: Fraction, gold: str, answer: str) -> bool:
    """Equal, or one the decimal of six or more places that rounds the other, a fraction."""
    if first == second:
        return True
    places = [decimals(text) for text, other in ((gold, answer), (answer, gold)) if "/" in other]
    return any(count >= _ROUNDED and abs(first - second) * 2 <= Fraction(1, 10**count) for count in places)
