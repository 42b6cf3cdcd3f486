"""Answers as text: one spelling for what is written in several ways, boxes, plain numbers, units, lists.

Everything here is linear in the text and imports neither sympy nor math-verify (half a second).
"""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

_OPENING, _CLOSING = r"\\\{|\\langle(?![A-Za-z])|[(\[{]", r"\\\}|\\rangle(?![A-Za-z])|[)\]}]"
_BRACKETED = re.compile(rf"({_OPENING})(.*?)({_CLOSING})", re.DOTALL)
_BRACKET, _BRACE = re.compile(rf"({_OPENING})|({_CLOSING})"), re.compile(r"(\{)|(\})|\\.", re.DOTALL)
_SEPARATOR = r"[,;、，]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|和|或"
_GROUPS, _GROUP = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})*$"), re.compile(r"[0-9]{3}(?![0-9])")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|min|max|gcd|lcm|pi|infty"
_DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = rf"(?:{_DIGITS})(?:[eE][+-]?[0-9]{{1,3}}(?![0-9a-zA-Z]))?"
_PLAIN = re.compile(rf"[+-]?{NUMBER}(?:\s*/\s*[0-9]+(?:\.[0-9]+)?)?")
_MIXED = re.compile(r"([+-]?)\s*([0-9]{1,3}(?:[ ,][0-9]{3})+|[0-9]+) +([0-9]+) ?/ ?([0-9]+)")
_SPACED_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")
_BASED = re.compile(r"([0-9a-zA-Z]+)_\{?([0-9]{1,2})\}?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
# What may stand between two boxes of one list: nothing but markup, or up to four words, the last of them a comma,
# "and" or "or", and then the name of what the next box holds. "but" and the like take the first box back.
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$]|\\[()\[\]]|\\q?quad)*"
    r"(?:(?!\b(?:but|wait|no|not|so|then|thus|again|hmm)\b)[A-Za-z()]+\s*){0,4}"
    r"(?:,|;|、|&|\b(?:and|or)\b|和|或|$)"
    r"(?:[\s$,]|\\[()\[\]]|\\q?quad|\b(?:and|or)\b)*"
    r"(?:[A-Za-z](?:_?\{?[A-Za-z0-9]{1,3}\}?)?(?:\([a-z]\))?\s*=\s*)?(?:[\s$]|\\[()\[\]])*"
)
_MAX_BETWEEN, _MAX_BOXES = 60, 100
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}


class Box(NamedTuple):
    content: str | None  # None where there is none
    closed: bool  # False if it never closes


def last_box(text: str) -> Box:
    """The content of the last \\boxed{...}, with balanced braces (escaped ones do not count)."""
    _, end, content = next(_boxes(text), (0, 0, None))
    return Box(content, end is not None)


def _boxes(text: str) -> Iterator[tuple[int, int | None, str | None]]:
    """From the last one to the first: where a box begins, where it ends and what it holds (None if it never closes)."""
    limit = len(text)
    for match in reversed(list(_BOX.finditer(text))):
        end = closing_end(text, match.end(), _BRACE, limit)
        yield match.start(), end, None if end is None else text[match.end() : end - 1].strip()
        limit = match.start()


def closing_end(text: str, begin: int, brackets: re.Pattern[str], limit: int | None = None) -> int | None:
    """The end of the bracket that closes one which was opened just before `begin`; None without it.

    brackets: matches those that open as its first group, those that close as its second.
    """
    depth = 1
    for match in brackets.finditer(text, begin, len(text) if limit is None else limit):
        depth += bool(match[1]) - bool(match[2])
        if depth == 0:
            return match.end()
    return None


def last_boxes(text: str) -> list[str] | None:
    """The boxes that end a text as one list: those joined by commas, "and" or "or"; [] without a box, None if the
    last one never closes.

    A box written twice is one answer. Boxes with prose between them are steps or second thoughts: the last counts.
    """
    contents: list[str] = []
    next_begin = 0
    for begin, end, content in islice(_boxes(text), _MAX_BOXES):
        if content is None or end is None:
            return list(dict.fromkeys(reversed(contents))) or None
        between = text[end:next_begin] if next_begin - end < _MAX_BETWEEN else "..."
        if contents and not _BETWEEN_BOXES.fullmatch(typeset_words(between)):
            break
        contents.append(content)
        next_begin = begin
    return list(dict.fromkeys(reversed(contents)))


_GREEK = (
    "α alpha β beta γ gamma δ delta ε epsilon ζ zeta η eta θ theta ι iota κ kappa λ lambda μ mu ν nu ξ xi π pi ρ rho "
    "σ sigma τ tau υ upsilon φ phi χ chi ψ psi ω omega Γ Gamma Δ Delta Θ Theta Λ Lambda Ξ Xi Π Pi Σ Sigma Φ Phi Ψ Psi "
    "Ω Omega"
)
_SIGNS = str.maketrans({
    **{letter: f"\\{name} " for letter, name in zip(_GREEK.split()[::2], _GREEK.split()[1::2])},
    **dict.fromkeys("−‐‑‒–—﹣", "-"),
    **dict.fromkeys("\u00a0\u2007\u2009\u202f\u2008\u200a\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "÷": "/", "≤": "\\le ", "≥": "\\ge ",
    "≠": "\\ne ", "≈": "\\approx ", "∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "±": "\\pm ",
    "∅": "\\emptyset ", "°": "^\\circ ", "º": "^\\circ ", "∣": "|", "′": "'", "…": "\\ldots ",
})  # fmt: skip
_ESCAPED_TWICE = re.compile(r"\\\\(?=[A-Za-z])(?!\\\\end)")
_ONE_SPELLING: tuple[tuple[str, str], ...] = (
    (r"(?<=[0-9]),\\!\s*(?=[0-9]{3})|(?<=[0-9])\s?\{\s*,\s*\}(?=[0-9]{3})", ","),
    (r"(?<=[0-9])(?:\\[,;:]|\\ |~|\\thinspace\s)(?=[0-9]{3}(?![0-9]))", ""),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\(?:thinspace|enspace)(?![A-Za-z])|\\q?quad", " "),
    (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])\.?", ""),
    (r"\\(?:boxed|[lL]arge|bf|checkmark)(?![A-Za-z])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
    # fonts
    (r"\\(?:math(?:rm|bf|it|sf|tt)|boldsymbol|bm|text(?:rm|bf|it|sf|tt|normal)|mbox|textup)\s*(?=\{)", r"\\text"),
    # upright e, i and d are the constants and the differential; a number in bold is a number
    (r"\\text\{\s*([eid]|-?[0-9][0-9.,]*)\s*\}", r"{\1}"),
    (r"\\text\{[\s,]*(and|or)[\s,]*\}", r" \1 "),
    (r"\\text\{\s*(?:percent|percentage|pct|\\?%)\s*\}|(?<=[0-9}$])\s*(?:percent(?:age)?|pct)\b|\\%", "%"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:leqslant|leq)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geqslant|geq)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
    (r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z]))", r"^\\circ "),
)  # fmt: skip
_WRAPPINGS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("__", "__"),
              ("*", "*"), ("`", "`"), ('"', '"'), ("'", "'"), ("\\text{", "}"), ("{", "}"))  # fmt: skip


@lru_cache(maxsize=1024)
def typeset(text: str) -> str:
    """One spelling: full-width digits, dashes, thin spaces, fractions as one sign, Unicode roots and powers, LaTeX's
    spaces, sizes, fonts and digit groups. No value changes."""
    if not text.isascii():
        text = re.sub(r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+)", r"^{\1}", text)
        text = re.sub(r"([₀₁₂₃₄₅₆₇₈₉]+)", r"_{\1}", text)
        text = re.sub(r"(?<=[0-9])\s?(?=[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒])", " ", text)
        text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).replace("\u2044", "/").translate(_SIGNS)
        text = re.sub(r"([√∛])\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])", r"\1{\2}", text)
        text = text.replace("√", "\\sqrt").replace("∛", "\\sqrt[3]")
    if not re.search(r"[\\!=p~]", text):
        return text
    if "\\begin" not in text:  # where a row ends with two backslashes
        text = _ESCAPED_TWICE.sub(r"\\", text)
    return substituted(text, _ONE_SPELLING)


def substituted(text: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text


def typeset_words(text: str) -> str:
    """Markup of words taken off: \\text{ and } reads as `and`."""
    return re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r" \1 ", text)


def bare(text: str) -> str:
    """Without the wrapping that changes no value: $..$, \\(..\\), \\text{..}, **..**, a final full stop."""
    text = text.strip()
    for _ in range(6):  # wrappings nest: **$\text{B}$.**
        before = text
        for opening, closing in _WRAPPINGS:
            inner = text[len(opening) : -len(closing)]
            if text == opening + inner + closing and closing not in inner and opening not in inner:
                text = inner.strip()
        text = text.rstrip("。,").removesuffix("\\").strip()
        text = text if text.endswith("..") else text.removesuffix(".").rstrip()
        if text == before:
            break
    return text


def plain_number(text: str) -> Fraction | None:
    """The exact value of a plain number: 1,000 -> 1000, 033 -> 33, 0.5 -> 1/2, 3/4, -2e3; None for anything else."""
    stripped = bare(text.replace("−", "-")).replace("{,}", ",")
    if len(stripped) > 100 or not _PLAIN.fullmatch(stripped):
        return None
    numerator, _, denominator = stripped.replace(",", "").partition("/")
    divisor = Fraction(denominator.strip() or 1)
    return Fraction(numerator.strip()) / divisor if divisor else None


def any_number(text: str) -> Fraction | None:
    """plain_number, and the spellings that are numbers only where one is expected: 3 1/2, 1 000, 0,5, 5 million."""
    value = plain_number(text)
    if value is not None or len(text) > 100:
        return value
    text = text.strip()
    if match := _MIXED.fullmatch(text):
        sign, whole, numerator, denominator = match.groups()
        if int(numerator) >= int(denominator):  # 11 7/6 is no mixed number, and no product either
            return None
        value = int(re.sub("[ ,]", "", whole)) + Fraction(int(numerator), int(denominator))
        return -value if sign == "-" else value
    if match := _BASED.fullmatch(text):
        digits, base = match[1], int(match[2])
        fits = 2 <= base <= 36 and all(int(digit, 36) < base for digit in digits)
        return Fraction(int(digits, base)) if fits else None
    if _SPACED_THOUSANDS.fullmatch(text) or _DECIMAL_COMMA.fullmatch(text):
        return Fraction(text.replace(" ", "").replace(",", "."))
    head, _, scale = text.rpartition(" ")
    number = plain_number(head) if scale.lower() in _SCALES else None
    return None if number is None else number * 10 ** _SCALES[scale.lower()]


_UNIT_NAMES = {
    "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "m": "m meter metre", "dm": "dm",
    "km": "km kilometer kilometre", "in": "in inch inche", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile",
    "mg": "mg milligram", "g": "g gram gm", "kg": "kg kilogram", "lb": "lb lbs pound", "oz": "oz ounce",
    "t": "t ton tonne", "gbp": "gbp",
    "s": "s sec second", "min": "min minute", "h": "h hr hour", "day": "day", "week": "week wk", "month": "month",
    "year": "year yr", "ml": "ml mL milliliter millilitre", "l": "l L liter litre", "gal": "gal gallon",
    "degree": "degree deg", "rad": "rad radian", "usd": "usd dollar buck", "cent": "cent", "eur": "eur euro",
    "unit": "unit", "km/h": "km/h kmh kph", "mi/h": "mph", "j": "J joule", "n": "N newton", "w": "W watt",
    "v": "V volt", "hz": "Hz hertz", "pa": "Pa pascal", "k": "K kelvin", "mol": "mol mole", "yuan": "yuan rmb",
    "rupee": "rupee rs", "people": "people person", "piece": "piece pc", "/": "per",
    "^2": "square sq", "^3": "cubic cu",
}  # fmt: skip
_UNITS = {word: unit for unit, words in _UNIT_NAMES.items() for word in words.split()}
_CURRENCIES = {"$": "usd", "\\$": "usd", "€": "eur", "£": "gbp", "¥": "yuan", "₹": "rupee"}
_UNIT_WORDS = r"[A-Za-zµ]+(?:[\s/.-]+[A-Za-zµ]+)*\.?"
_POWER = r"(?:\s*\^\s*\{?\s*-?[0-9]\s*\}?)?"
_TEXT_UNIT = re.compile(rf"(.*?[0-9A-Za-z}})\]])\s*\\text\s*\{{\s*([^{{}}]*)\}}({_POWER})\.?", re.DOTALL)
_WORD_UNIT = re.compile(rf"(.*?[0-9)}}%])(\s*)({_UNIT_WORDS})({_POWER})((?:\s*/\s*[A-Za-z]+{_POWER})?)\.?", re.DOTALL)
_DEGREES = re.compile(r"(.*?[0-9)}])\s*\^\\circ\s*([CFK]?)", re.DOTALL)
_CURRENCY_BEFORE = re.compile(r"([+-]?)\s*(\\?\$|[€£¥₹])\s*(.*)", re.DOTALL)
_CURRENCY_AFTER = re.compile(r"(.*?[0-9)}])\s*(\\?\$|[€£¥₹])", re.DOTALL)
_MAX_QUANTITY = 300  # characters


class Quantity(NamedTuple):
    """A value as written, with what stands beside it."""

    text: str
    unit: str | None = None
    percent: bool = False


def split_unit(text: str, *, loose: bool = False) -> Quantity:
    """The value and its unit. loose: any word after a space is taken for one, as fits an answer to a number
    ("14 x", "12 ways"); otherwise letters are one only if they are known and stand apart: 2ab is a product."""
    text = text.strip()
    if len(text) > _MAX_QUANTITY:
        return Quantity(text)
    if match := _CURRENCY_BEFORE.fullmatch(text):
        return Quantity(match[1] + split_unit(match[3]).text, _CURRENCIES[match[2]])
    if match := _CURRENCY_AFTER.fullmatch(text):
        return Quantity(match[1], _CURRENCIES[match[2]])
    if text.endswith("%"):
        return Quantity(text[:-1].rstrip().removesuffix("$").rstrip(), percent=True)
    if (match := _DEGREES.fullmatch(text)) and not re.search("[a-z]{2}", match[1].replace("frac", "")):
        return Quantity(match[1], f"degree{match[2]}")
    if match := _TEXT_UNIT.fullmatch(text):
        return Quantity(match[1], _unit(match[2] + match[3]) or None)
    match = _WORD_UNIT.fullmatch(text)
    if not match or not _is_unit(match, loose) or match[3] in _SCALES:
        return Quantity(text)
    scale, _, rest = match[3].partition(" ")
    if scale in _SCALES:
        return Quantity(f"{match[1]} {scale}", _unit(rest))
    return Quantity(match[1], _unit(match[3] + match[4] + match[5]))


def _is_unit(match: re.Match[str], loose: bool) -> bool:
    words = match[3].rstrip(".")
    if words.split()[0].lower() in ("and", "or", "mod", "choose", "to"):
        return False
    known = all(word in _UNITS or word.rstrip("s") in _UNITS for word in re.split(r"[\s/]+", words))
    if not match[2]:  # glued: 10cm is a length, 2ab a product, and 10m is a length only where a number is expected
        return known and (len(words) > 1 or loose)
    return loose or known or (len(words) > 2 and min(map(len, words.split())) > 1)


def _unit(words: str) -> str:
    """`cm^2` for 'square centimeters', 'cm^{2}', ...; the words themselves where they are no known unit."""
    words = re.sub(r"\\[A-Za-z]*|[{}.]", " ", words.replace("²", "^2").replace("³", "^3"))
    power = ""
    names = []
    for word in re.findall(r"\^\s*-?[0-9]|/|[^\s/^]+", words):
        name = _UNITS.get(word) or _UNITS.get(word.lower()) or _UNITS.get(word.lower().rstrip("s")) or word.lower()
        if name.startswith("^"):
            power = re.sub(r"\s", "", name)
        else:
            names.append(name)
    return "".join(names) + power


def split_list(text: str) -> list[str]:
    """The parts of a list at its weakest separator: `;`, else commas, "and" and "or"; [text] for a single thing.

    A comma before exactly three digits, without a space, groups thousands.
    """
    cuts = []
    for cut in top_level(text, _SEPARATOR):
        grouped = _GROUPS.search(text[max(0, cut.start() - 40) : cut.start()]) and _GROUP.match(text, cut.end())
        if cut[0] != "," or not grouped:
            cuts.append(cut)
    return _between(text, [cut for cut in cuts if cut[0] == ";"] or cuts) if cuts else [text.strip()]


def bracketed(text: str) -> tuple[str, str, list[str]] | None:
    """(brackets, what they hold, its parts at every comma) of a text that one pair of brackets holds as a whole."""
    whole = _BRACKETED.fullmatch(text)
    if whole is None or (whole[1] == "{" and whole[3] != "}"):
        return None
    if closing_end(text, whole.end(1), _BRACKET) not in (None, len(text)):
        return None
    opening, inner, closing = whole.groups()
    parts = _between(inner, list(top_level(inner, "[,;、]")))
    is_single = len(parts) == 1 and opening == "[" and _BRACKET.search(inner) is None
    return opening + ("]" if is_single else closing), inner, parts


def _between(text: str, cuts: list[re.Match[str]]) -> list[str]:
    begins, ends = [0, *(cut.end() for cut in cuts)], [*(cut.start() for cut in cuts), len(text)]
    parts = (text[begin:end].strip() for begin, end in zip(begins, ends))
    return [part for part in parts if part]


def top_level(text: str, tokens: str) -> Iterator[re.Match[str]]:
    """The matches of a pattern outside all brackets; a half-open interval's brackets close each other."""
    depth = 0
    for match in re.finditer(rf"{_BRACKET.pattern}|({tokens})|\\[a-zA-Z]+|\\.", text):
        if match[3] is None:
            depth = max(0, depth + bool(match[1]) - bool(match[2]))
        elif depth == 0:
            yield match
