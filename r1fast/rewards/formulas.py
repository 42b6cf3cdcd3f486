"""Formulas as text: LaTeX that math-verify's parser reads, which evaluates nothing, and whether two are the same.

Numbers are equal if they are equal: decimals are read as exact fractions, irrational values are compared to 100 digits
relative to their size. Formulas with variables are compared as functions, by their values at fixed points, which
neither expands nor simplifies anything. Sets and relations that are not the same part by part go to math-verify. What
is too large to evaluate is found from its tree (`trees.py`); what is still slow is for the worker pool's time limit.
"""

import logging
import re
from functools import lru_cache
from itertools import accumulate
from typing import Any

from r1fast.rewards.answers import FUNCTIONS, closing_end, substituted

_MAX_CHARS = 500  # the parser takes seconds for more
MAX_DEPTH = 16  # the parser's time grows steeply with nested brackets
_COMPLEX = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])|\\(?:Re|Im|arg|imath)(?![A-Za-z])")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
# Two numbers with a space between are no product; what dots stand for is open; the parser drops primes and bases.
_UNREADABLE = re.compile(r"[0-9]\s+[0-9]|\\[lcvd]?dots(?![a-z])|\.\.|'|\\prime|(?<![\^{A-Za-z0-9])[0-9]+\s*_")
_BRACED, _PARENTHESES = re.compile(r"(?:\^|\\sqrt(?:\[[^\[\]]{0,9}\])?)\("), re.compile(r"(\()|(\))")
# What is written as in a programming language, as LaTeX: 7*y**2 - sqrt(3) is 7 \cdot y^{2} - \sqrt{3}.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"\*\*", "^"),
    (rf"(?<![A-Za-z\\])({FUNCTIONS})(?![A-Za-z])", r"\\\1"),
    (r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty"),
    (r"\\(sin|cos|tan|cot|sec|csc)\s*\^\s*\{?\s*-1\s*\}?", r"\\arc\1 "),
    (r"(\^|\\sqrt(?:\[[^\[\]]*\])?)\s*(?=\()", r"\1"),
)
_OPERATORS: tuple[tuple[str, str], ...] = (
    (r"_([0-9]+)(?![0-9])", r"_{\1}"),
    (r"\^\s*([+-]?[0-9]{2,}|-[0-9A-Za-z])", r"^{\1}"),
    (r"(\^(?:\{[^{}]*\}|[0-9]))\s+(?=[0-9])", r"\1 \\cdot "),
    (r"\{?([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}?", r"\\binom{\1}{\2}"),
    (r"(?<=[0-9])\s*x\s*(?=10\^)", r"\\times "),
    (r"\\[dt]?binom\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\\frac{(\1)!}{(\2)!(\1-(\2))!}"),
    (r"\*", r"\\cdot "),
    (r"\\?%", r"\\%"),
)


def same_formula(gold: str, answer: str, *, digits: int | None = None) -> bool:
    """Whether two formulas are equal; spellings that cannot be read are equal only if they are the same text."""
    gold_tree, answer_tree = parse(gold), parse(answer)
    if gold_tree is None or answer_tree is None:
        return same_text(gold, answer)
    from r1fast.rewards.trees import same

    return same(gold_tree, answer_tree, max(map(literal_digits, (gold, answer))) if digits is None else digits)


def is_readable(text: str) -> bool:
    """Whether a formula parses, or is at least complete: brackets closed, and something between them."""
    if parse(text) is not None:
        return True
    braces = "".join(re.findall(r"(?<!\\)[{}]", text))
    while "{}" in braces:
        braces = braces.replace("{}", "")
    return not braces and bool(re.search(r"\w", re.sub(r"\\(?![lc]?dots)[A-Za-z]+", "", text)))


def same_text(gold: str, answer: str) -> bool:
    """Whether two values are written alike."""
    return _squeezed(gold) == _squeezed(answer)


def _squeezed(text: str) -> str:
    """The text without spaces and markup that mean nothing; 3 1/2, \\frac{1}{23} and 2^{n-1} keep theirs."""
    text = re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}|\$", r"\1", text)
    text = re.sub(r"(?<![0-9,])\s+|\s+(?![0-9])", "", text)
    return re.sub(r"\{([0-9A-Za-z])\}(?![0-9])", r"\1", text)


@lru_cache(maxsize=4096)  # the G samples of a prompt share their gold, and often their answers
def parse(text: str) -> Any | None:
    """The sympy tree of a formula, decimals as exact fractions, nothing evaluated; None if it is none."""
    if len(text) > _MAX_CHARS:
        return None
    latex = _latex(text)
    if nesting(latex) > MAX_DEPTH or not re.search(r"[0-9A-Za-z]", latex) or _UNREADABLE.search(latex):
        return None
    from r1fast.rewards import trees

    # math-verify warns at every start that its own time limits are off, which is what the pool wants.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    in_degrees = bool(_TRIGONOMETRIC.search(latex))
    try:
        return trees.read(latex, is_complex=bool(_COMPLEX.search(latex)), in_degrees=in_degrees)
    except Exception:  # the parser and sympy's constructors raise a dozen kinds, among them Exception itself
        return None


def _latex(text: str) -> str:
    text = substituted(text, _NAMES)
    chain = re.split(r"(>|\\ge(?![A-Za-z]))", text)
    if len(chain) == 5:  # 3 > x > 1
        text = " ".join(reversed(chain)).replace(">", "<").replace("\\ge", "\\le ")
    return substituted(_braced(text), _OPERATORS).strip()


def _braced(text: str) -> str:
    """^(..) and \\sqrt(..) with braces in place of their brackets, if all of them close."""
    braced = text
    while match := _BRACED.search(braced):
        end = closing_end(braced, match.end(), _PARENTHESES)
        if end is None:
            return text
        braced = f"{braced[: match.end() - 1]}{{{braced[match.end() : end - 1]}}}{braced[end:]}"
    return braced


def nesting(text: str) -> int:
    """How deep the brackets nest."""
    return max(accumulate(((char in "([{") - (char in ")]}") for char in text), initial=0))


def literal_digits(text: str) -> int:
    """Significant digits of the longest decimal with at least six places: how precisely a text gives its value."""
    found = re.findall(r"([0-9]*)\.([0-9]{6,})", text)
    return max((len((whole + places).lstrip("0")) for whole, places in found), default=0)
