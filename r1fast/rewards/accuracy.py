"""Accuracy reward: does the final answer equal the gold one?

Plain numbers are compared as exact fractions and choice letters and words as text, all without math-verify, which
takes half a second to import; only formulas go through it. It is called without its own time limits, because those
need SIGALRM and the main thread: the worker pool's limit is the one that holds (a power tower can take for ever).
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from r1fast.data.templates import ResponseFormat, get_response_format
from r1fast.rewards.format import per_row
from r1fast.rewards.registry import reward

_MAX_FORMULA_CHARS = 1000  # a longer answer is text, not a formula to solve
_BOX = re.compile(r"\\boxed\s*\{")
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"[+-]?(?:{_DIGITS})(?:[eE][+-]?[0-9]{{1,3}}(?![0-9a-zA-Z]))?(?:\s*/\s*[0-9]+(?:\.[0-9]+)?)?")
# In running text a minus right after a word, a digit or a bracket is an operator or a dash: 7-3, (2)-1, plan-9.
_NUMBER_IN_TEXT = re.compile(rf"(?<![0-9.])(?:(?<![\w)\]}}])[+-])?{_NUMBER.pattern.removeprefix('[+-]?')}")
_LETTER = re.compile(r"[(\[]?([A-Z])(?:[)\].:]+(?:\s.*)?)?", re.DOTALL)
_LEAD = re.compile(r"\b(?:answer|option|choice|summary)\b[*\s]*(?:is\b[*\s]*:?|:|=)|答案(?:是|为|：|:)", re.IGNORECASE)
_NOT_WORDS = re.compile(r"[\\0-9_^=+*/<>{}$|()\[\]]")
# Cheap to write, for ever to evaluate: powers of powers, five-digit exponents, factorials and binomials of thousands.
_EXPLOSIVE = re.compile(r"\^\s*\{[^{}]*\^|\^\s*\{?\s*-?[0-9]{5,}|[0-9]{4,}\s*!|\\d?binom\s*\{\s*[0-9]{4,}")


class Box(NamedTuple):
    """The last \\boxed{} of a text: its content (None where there is none), and False if it never closes."""

    content: str | None
    closed: bool


@reward("accuracy")
def accuracy(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    answer: list[Any],
    response_format: list[str] | str = "think_answer",
    finish_reason: list[str | None] | str | None = None,
    prefilled: list[bool] | bool = False,
    strict: bool = True,
    **_: Any,
) -> list[float | None]:
    """1.0 for the right final answer, 0.0 otherwise, None where the gold answer is missing or cannot be read.

    strict: a completion without an answer part scores 0; False reads the text after the reasoning instead, or the
    whole text, which suits prompts that ask for no tags.
    """
    num_rows = len(completions)
    rows = zip(
        completions,
        answer,
        per_row(response_format, num_rows),
        per_row(finish_reason, num_rows),
        per_row(prefilled, num_rows),
        strict=True,
    )
    values: list[float | None] = []
    for text, gold, name, reason, opened in rows:
        final = final_answer(
            text, get_response_format(name), truncated=reason == "length", prefilled=bool(opened), strict=strict
        )
        values.append(score_answer(final, gold))
    return values


def final_answer(
    text: str, response_format: ResponseFormat, *, truncated: bool = False, prefilled: bool = False, strict: bool = True
) -> str | None:
    """The answer part of a completion, well formed or not; None if it has none, or was cut off before its end."""
    parsed = response_format.parse(text, prefilled=prefilled)
    if truncated and not parsed.closed:
        return None
    if parsed.answer is None and not strict:
        return text.rpartition(response_format.think_close)[2]
    return parsed.answer


def score_answer(final: str | None, gold: Any) -> float | None:
    """Compares an answer part with the gold answer; None if `gold` is empty or unparsable."""
    gold_text = _gold_text(gold)
    if not gold_text:
        return None
    gold_number = plain_number(gold_text)
    letter = _LETTER.fullmatch(gold_text)
    is_choice = letter is not None and len(gold_text) <= 4
    is_words = _is_words(gold_text)
    if gold_number is None and not is_choice and not is_words and not _is_readable(gold_text):
        return None
    if not final:
        return 0.0
    box = last_box(final)
    if not box.closed:
        return 0.0
    if gold_number is not None:
        return float(_equals_number(final, box.content, gold_number, gold_text))
    phrase = _bare(box.content if box.content is not None else _LEAD.split(final)[-1])
    if is_choice:
        found = _LETTER.fullmatch(phrase)
        return float(letter is not None and found is not None and found[1] == letter[1])
    if phrase.casefold() == gold_text.casefold():
        return 1.0
    if is_words:
        return 0.0
    return float(_equals_formula(final if box.content is None else _in_box(box.content), gold_text))


def last_box(text: str) -> Box:
    """The content of the last \\boxed{...}, with balanced braces (escaped ones do not count)."""
    starts = list(_BOX.finditer(text))
    if not starts:
        return Box(None, True)
    begin = index = starts[-1].end()
    depth = 1
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return Box(text[begin:index].strip(), True)
        index += 1
    return Box(None, False)


def plain_number(text: str) -> Fraction | None:
    """The exact value of a plain number: 1,000 -> 1000, 033 -> 33, 0.5 -> 1/2, 3/4, -2e3; None for anything else."""
    stripped = _bare(text).replace("{,}", ",")
    if len(stripped) > 100 or not _NUMBER.fullmatch(stripped):
        return None
    numerator, _, denominator = stripped.replace(",", "").partition("/")
    divisor = Fraction(denominator.strip() or 1)
    return Fraction(numerator.strip()) / divisor if divisor else None


def _gold_text(gold: Any) -> str:
    """A gold answer as data sets hold it: a number, a text, a solution that ends in a box or (GSM8K) in '#### 7'."""
    if gold is None or (isinstance(gold, float) and gold != gold):
        return ""
    text = str(gold)
    box = last_box(text)
    if box.content is not None:
        text = box.content
    elif "####" in text:
        text = text.rpartition("####")[2]
    return _bare(text)


def _bare(text: str) -> str:
    """Without the wrapping that changes no value: $..$, \\(..\\), \\text{..}, **..**, a final full stop."""
    text = text.strip().replace("−", "-")
    for _ in range(4):  # wrappings nest: **$\text{B}$.**
        before = text
        for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("\\text{", "}")):
            inner = text[len(opening) : -len(closing)]
            if len(text) > len(opening) + len(closing) and text == opening + inner + closing and closing not in inner:
                text = inner.strip()
        text = text.removesuffix(".").removesuffix("。").strip()
        if text == before:
            break
    return text


def _is_words(text: str) -> bool:
    """Words rather than a formula: no symbol or digit, and longer than a product of two variables."""
    return not _NOT_WORDS.search(text) and any(c.isalpha() for c in text) and (len(text) > 2 or not text.isascii())


def _is_readable(gold_text: str) -> bool:
    # math-verify hands back what it cannot parse as a string
    return any(not isinstance(value, str) for value in _parse_formula(_in_box(gold_text)))


def _equals_number(final: str, boxed: str | None, gold: Fraction, gold_text: str) -> bool:
    candidate = final if boxed is None else boxed
    number = plain_number(candidate)
    if number is None and boxed is None and "\\" not in final:
        found = _NUMBER_IN_TEXT.findall(final.replace("−", "-"))
        number = plain_number(found[-1]) if found else None
        return number == gold
    if number is not None:
        return number == gold
    return _equals_formula(final if boxed is None else _in_box(boxed), gold_text)


def _equals_formula(prediction: str, gold_text: str) -> bool:
    """`prediction` is LaTeX in a box, or text; a bare formula such as x+1 is boxed first."""
    if len(prediction) > _MAX_FORMULA_CHARS or (_EXPLOSIVE.search(prediction) and not _EXPLOSIVE.search(gold_text)):
        return False
    from math_verify import verify

    if not _BOX.search(prediction) and "$" not in prediction and "\\(" not in prediction and "\\[" not in prediction:
        prediction = _in_box(_bare(_LEAD.split(prediction)[-1]))
    gold = _parse_formula(_in_box(gold_text))
    # Gold first: verify is not symmetric (an interval given as an inequality is accepted one way only).
    return bool(verify(list(gold), list(_parse_formula(prediction)), timeout_seconds=None))


@lru_cache(maxsize=1024)  # the G samples of a prompt share their gold
def _parse_formula(text: str) -> tuple[Any, ...]:
    from math_verify import parse

    # math-verify warns at every start that its own time limits are off, which is what the pool wants.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return tuple(parse(text, parsing_timeout=None))


def _in_box(text: str) -> str:
    return f"\\boxed{{{text}}}"
