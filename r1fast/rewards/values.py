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

from r1fast.rewards.answers import any_number, bare, bracketed, plain_number, split_list, split_unit, top_level
from r1fast.rewards.formulas import MAX_DEPTH, literal_digits, nesting, same_formula, same_text
from r1fast.rewards.formulas import is_readable as is_readable_formula

_MAX_CHARS = 2000  # a longer answer is compared as text
_ROUNDED = 6  # decimals from which a decimal may stand for the exact value that it rounds
_NAMES = r"(?<![<>!=])=(?!=)|\\approx|\\in(?![A-Za-z])"  # what gives a name its value
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
    leaves = [item for item in value.items or (value,) if not item.items]
    return all(is_number(leaf.text) or is_readable_formula(split_unit(leaf.text).text) for leaf in leaves)


def same_value(gold: str, answer: str) -> bool:
    """Whether the answer is the gold's value."""
    if same_text(gold, answer):
        return True
    if len(answer) > _MAX_CHARS:
        return False
    if _same(read_value(gold), read_value(answer)):
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
    parts = split_list(text)
    if nesting(text) > MAX_DEPTH or (1 < len(parts) <= 200 and plain_number(text) is not None):
        return Value("leaf", text)
    if 1 < len(parts) <= 200 or "\\pm" in text:
        return Value("list", text, _spread(parts if len(parts) <= 200 else [text]))
    name, rest = _split_name(text)
    if name:
        inner = read_value(rest)
        return inner._replace(name=name, text=text if inner.kind == "leaf" else inner.text)
    if rounded := re.search(r"\\approx(?![A-Za-z])", text):
        return read_value(text[: rounded.start()])  # the exact value, and then what it is about
    if match := _MATRIX.fullmatch(text):
        return _matrix(match[1], match[2], text)
    return _bracketed(text) or Value("leaf", text)


def _spread(parts: list[str]) -> tuple[Value, ...]:
    """1 \\pm \\sqrt{5} is two values."""
    spread: list[str] = []
    for part in parts:
        if "\\pm" in part:
            plus = re.sub(r"\\pm\s*", "+", part).replace("\\mp", "-")
            spread.append(re.sub(r"(^|[({=])\s*\+", r"\1", plus))
            part = re.sub(r"\\pm\s*", "-", part).replace("\\mp", "+")
        spread.append(part)
    return tuple(map(read_value, spread))


def _split_name(text: str) -> tuple[str, str]:
    cuts = list(top_level(text, _NAMES))
    if not cuts:
        return "", text
    name = text[: cuts[0].start()].strip()
    if not _NAME.fullmatch(re.sub(r"_(?:\{[^{}]*\}|\w)|\s|(?<=[A-Za-z])\(.*\)$", "", name)):
        return "", text
    numbers = [part for part in text.split("=")[1:] if _ARITHMETIC.fullmatch(part)]
    if any(not same_formula(part, numbers[-1]) for part in numbers[:-1]):
        return "", text  # x = 8 = 3 is false: left to the formulas
    name = re.sub(r"\s|[$]", "", name)
    last = max((index for index, cut in enumerate(cuts) if cut[0] != "\\approx"), default=0)
    rest = text[cuts[last].end() : cuts[last + 1].start() if last + 1 < len(cuts) else len(text)]
    if re.fullmatch(r"[a-zA-Z]\([a-z]\)", name) and re.search(r"[a-z]", text[cuts[last].end() :]):
        name = "y"  # y = ... and f(x) = ... both say what function it is
    return name, rest.strip()


def _bracketed(text: str) -> Value | None:
    if (found := bracketed(text)) is None:
        return None
    brackets, inner, parts = found
    if len(parts) == 1 and (brackets == "()" or inner.lstrip().startswith("\\begin")):
        return read_value(inner)
    if brackets.startswith(("{", "\\{")):
        return Value("set", text, _spread(parts))
    return Value("tuple", text, tuple(map(read_value, parts)), brackets)


def _matrix(environment: str, body: str, text: str) -> Value:
    rows = [tuple(map(read_value, row.split("&"))) for row in body.split("\\\\") if row.strip().strip("\\")]
    cells = tuple(cell for row in rows for cell in row)
    if environment == "cases":
        return Value("list", text, cells)
    if len(rows) == 1 or len(cells) == len(rows):
        return Value("tuple", text, cells, "matrix")
    return Value("tuple", text, tuple(Value("tuple", "", row, "matrix") for row in rows), "matrix")


def _same(gold: Value, answer: Value) -> bool:
    if gold.kind == "leaf" and answer.kind == "leaf":
        return _same_leaf(gold, answer)
    if gold.kind == "leaf" or answer.kind == "leaf":
        return _same_mixed(gold, answer)
    if gold.name and answer.name and gold.name != answer.name and gold.kind != "tuple":
        return False
    if gold.kind == answer.kind == "tuple":
        # They tell intervals apart; from three elements on, and in matrices, they are a matter of taste.
        brackets = {value.brackets.replace("\\langle", "(").replace("\\rangle", ")") for value in (gold, answer)}
        matter = len(gold.items) == 2 and "matrix" not in brackets
        return (len(brackets) == 1 or not matter) and _same_in_order(gold.items, answer.items)
    if gold.kind == "tuple" or answer.kind == "tuple":
        ordered = gold if gold.kind == "tuple" else answer
        return ordered.brackets in ("()", "[]", "matrix") and _same_in_order(gold.items, answer.items)
    # What the lists name; x_1 and x_2 are the solutions of one unknown.
    names = [len({item.name.partition("_")[0] for item in value.items} - {""}) for value in (gold, answer)]
    if max(names) > 1 >= min(names):
        return _same_in_order(gold.items, answer.items)  # x = 1, y = 2 against 1, 2
    return _same_in_any_order(gold.items, answer.items)


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


def _same_in_order(gold: tuple[Value, ...], answer: tuple[Value, ...]) -> bool:
    return len(gold) == len(answer) and all(_same(first, second) for first, second in zip(gold, answer))


def _same_in_any_order(gold: tuple[Value, ...], answer: tuple[Value, ...]) -> bool:
    left = list(answer)
    if any(item.items for item in answer):  # solutions: one that is given twice is given
        texts = list({item.text: item for item in answer}.values())
        left = [item for index, item in enumerate(texts) if not any(_same(item, other) for other in texts[:index])]
    if len(gold) != len(left):
        return False
    for item in gold:
        match = next((other for other in left if _same(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_leaf(gold: Value, answer: Value) -> bool:
    if gold.name and answer.name:
        are_relations = gold.name != answer.name
    else:
        are_relations = any(one.name and _RELATION.search(two.text) for one, two in ((gold, answer), (answer, gold)))
    if are_relations:
        return same_formula(gold.text, answer.text)
    first, second = (_split_name(value.text)[1] if value.name else value.text for value in (gold, answer))
    one = split_unit(first)
    other = split_unit(second, loose=any_number(one.text) is not None)
    # Several words are a description, which decides nothing.
    if one.unit and other.unit and one.unit != other.unit and max(len(one.unit), len(other.unit)) <= 12:
        return False
    if _same_quantity(one.text, other.text):
        return True
    return one.percent != other.percent and _same_quantity(
        one.text, other.text, 100 if one.percent else 1, 100 if other.percent else 1
    )


def _same_quantity(gold: str, answer: str, gold_divisor: int = 1, answer_divisor: int = 1) -> bool:
    first, second = any_number(gold), any_number(answer)
    if first is None or second is None:
        digits = max(literal_digits(gold), literal_digits(answer))
        scaled = _scaled(gold, first, gold_divisor), _scaled(answer, second, answer_divisor)
        return same_formula(*scaled, digits=digits)
    difference = abs(first / gold_divisor - second / answer_divisor)
    # A decimal of six or more places may be what rounds the other, a fraction.
    places = [_decimals(text) for text, other in ((gold, answer), (answer, gold)) if "/" in other]
    return not difference or any(count >= _ROUNDED and difference * 2 <= Fraction(1, 10**count) for count in places)


def _decimals(text: str) -> int:
    """Digits after the decimal point of a plain decimal; 0 for other numbers."""
    match = re.fullmatch(r"[+-]?[0-9,]*\.([0-9]+)", text.strip())
    return len(match[1]) if match else 0


def _scaled(text: str, number: Fraction | None, divisor: int) -> str:
    if number is not None:
        return str(number / divisor)
    return text if divisor == 1 else f"\\frac{{{text}}}{{{divisor}}}"
