"""Accuracy reward: does the final answer equal the gold one?

What kind of thing the gold is decides how the answer is compared (`read_gold`):

  choice   one capital letter, alone or before its text: (B), \\textbf{(C)}\\ 17. Two letters are no answer to one.
  text     hex and binary literals, dates, clock times, IP and phone numbers, versions, ranges, grids of numbers, words
           with digits, chemical formulas: equal as text with spaces normalised. Arithmetic would divide and multiply
           them out, and then 21:45 equals 14:30 and 8 2 5 equals 5 8 2.
  words    equal as text, whatever the case.
  based    101_3: the base is part of the value, so digits and base must agree.
  value    everything else: numbers, formulas, equations, sets, tuples, intervals, part by part (`values.py`).

Golds that are none of these (None, NaN, a dict, an argument in prose, broken LaTeX) are unscorable: None. A list of
golds means that any of them is right. Plain numbers, letters and text are compared without importing math-verify.
"""

import re
from functools import lru_cache
from typing import Any, NamedTuple

from r1fast.data.templates import get_response_format
from r1fast.rewards.answers import bare, split_list, typeset_words
from r1fast.rewards.format import parse_rows, per_row
from r1fast.rewards.formulas import same_text
from r1fast.rewards.prose import Answer, after_lead, answer_part, expressions, is_expression
from r1fast.rewards.registry import reward
from r1fast.rewards.values import is_number, is_readable, same_value

_MISSING = frozenset(["", "nan", "NaN", "N/A", "None", "null", "<NA>"])  # as Python, JSON and pandas spell it
_LETTER = r"(?:\\text\s*\{\s*)?[(\[]?\s*(?:\\text\s*\{\s*)?([A-Z])"
_CHOICE = re.compile(
    rf"{_LETTER}\s*\}}?\s*(?:[)\]]\s*\}}?|[.:]|\)\s*\\\s*\}})*\s*\}}?(?P<rest>(?:(?<=[)\]}}.:\s]).*)?)", re.DOTALL
)
_CHOICES = re.compile(r"\(?[A-H]\)?(?:\s*(?:,|;|、|\band\b)+\s*\(?[A-H]\)?)+")
_TEXT_PATTERNS = tuple(
    re.compile(rf"(?<![\w.]){pattern}(?![\w])", re.IGNORECASE)
    for pattern in (
        r"[+-]?0(?:x[0-9a-f]+|b[01]+|o[0-7]+)",
        r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?(?:\s*[ap]\.?m\.?)?",
        r"[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}(?:[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2})?Z?)?",
        r"[0-9]+(?:\.[0-9]+){2,}(?:/[0-9]+)?",
        r"\+?(?:[0-9]{1,3}[ -])?\(?[0-9]{3}\)?[ -][0-9]{3}[ -][0-9]{4}|[0-9]{3}-[0-9]{4}",
        r"[0-9]+-[0-9]+(?:-[0-9]+)*",
    )
)
_GRID = re.compile(r"(?:[+-]?[0-9.]+|[A-Za-z_])(?:[\s|]+(?:[+-]?[0-9.]+|[A-Za-z_]))+")
# C6H6, H_2O, x1, 3a0, 0ff: a name, or digits of another base; as a product 3a0 would be 0
_NAME_WITH_DIGITS = re.compile(
    r"(?<![\\A-Za-z0-9_^{])(?:[A-Za-z]+[0-9]+[A-Za-z0-9]*|[0-9]+[A-Za-df-z][A-Za-z]*[0-9]+|0[0-9]*[A-Za-z]{2,})"
)
_CHEMICAL = re.compile(
    r"(?=\S*[0-9])(?=\S*[A-Z]\S*[A-Z])(?:\(|(?:[A-Z][a-z]|[BCFHIKNOPSUVWY])(?:[2-9]|[1-9][0-9])?|\)[0-9]*)+(?:\^\{?[0-9]?[-+]\}?)?"
)
_ARGUES = re.compile(
    r"\b(?:it|we|this|that|these|there|they|let|see|since|because|by|assume|suppose|note|proof|proved?|hence|thus|therefore|"
    r"follows?|which|induction|hypothesis|trivial|obvious(?:ly)?|clear(?:ly)?)\b",
    re.IGNORECASE,
)
_MAX_NAMING_WORDS = 6
_BASED = re.compile(r"\(?([0-9][0-9A-Za-z]*)\)?_[{\s]*(?:\\text\{)?\s*([0-9]+|[a-z]+)[}\s]*")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
          "twelve": 12, "sixteen": 16}  # fmt: skip
_LEADS_LETTER = re.compile(
    r"(?:(?i:\b(?:answer|option|choice|réponse|respuesta|antwort|select|choose|pick)\b)[^A-Z.\n]{0,30}?|答案[^A-Z。\n]{0,10}?|[故应]?选[^A-Z。\n]{0,5}?)"
    rf"{_LETTER}(?![A-Za-z])",
)
_ANY_LETTER = re.compile(
    r"(?<![A-Za-z0-9_^\\{|°+=-])(?<![0-9] )(?<!circ )(\(?)([A-Z])(\)?)(?![A-Za-z0-9_^'’|]|\s*[-+=*<>])"
)
_ALTERNATIVE = re.compile(r"\s*\)?(?:[*\s]*(?:(?:,|/|、|and|or|&|或|和)\s*)+|[ *]+)\(?(?!I\s+[a-z])[A-Z](?![A-Za-z])")
_STANDS_ALONE = re.compile(rf"\W{{10}}|\W{{0,9}}(?:$|[.,;:。，])|{_ALTERNATIVE.pattern}")
_DENIED_BEFORE = re.compile(
    r"(?:(?i:\b(?:not|nor|neither|never|cannot|than|except|wrong|false|incorrect)|n['’]t)\b|[不非错])[^.,;:。，A-Z]{0,20}$"
)
_DENIED_AFTER = re.compile(r"\)?[*\s]*(?:is|选项)?\s*(?:not\b|wrong|incorrect|false|不[对是正]|错)")
_LETTER_UNIT = re.compile(r"(?<=[0-9]) [A-Za-z](?=\s*(?:[-+=,]|$))")  # 353 g - 79 g = 274 g, for a gold 274
_DENIED_NUMBER = re.compile(r"(?:\b(?:is|are|be) not|\bcannot be|\bisn['’]t)\s+[^\s0-9]?[0-9]\S*")
_UNKNOWN_OPERATOR = re.compile(r"(?<!\\)[?@#&~](?!\s*$)|\?\s*$")


class Gold(NamedTuple):
    kind: str  # see above
    text: str
    letter: str = ""


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
    finals = final_answers(completions, response_format, finish_reason, prefilled, strict=strict)
    return [score_answer(final, gold) for final, gold in zip(finals, answer, strict=True)]


def final_answers(
    completions: list[str], response_format: Any, finish_reason: Any, prefilled: Any, *, strict: bool
) -> list[str | None]:
    """The answer part of each completion, well formed or not; None if it has none, or was cut off before its end.

    The columns are lists, or one value for all rows.
    """
    rows = parse_rows(completions, response_format, prefilled)
    finals = [parsed.answer for parsed in rows]
    names, reasons = (per_row(column, len(completions)) for column in (response_format, finish_reason))
    for i, reason in enumerate(reasons):
        if reason == "length" and not rows[i].closed:
            finals[i] = None
        elif finals[i] is None and not strict:
            finals[i] = completions[i].rpartition(get_response_format(names[i]).think_close)[2]
    return finals


def score_answer(final: str | None, gold: Any) -> float | None:
    """Compares an answer part with the gold answer, or with each of a list of golds; None if no gold can be read."""
    golds = [read_gold(_as_text(each)) for each in (gold if isinstance(gold, list | tuple) else [gold])]
    if not any(golds):
        return None
    answer = answer_part(final) if final else None
    return float(answer is not None and any(_matches(each, answer) for each in golds if each))


def _as_text(gold: Any) -> str:
    if gold is None or isinstance(gold, dict | set | bytes) or gold != gold:
        return ""
    is_long = isinstance(gold, float) and abs(gold) < 1e15
    return str(float(f"{gold:.15g}") if is_long else gold)  # 0.1 + 0.2 was meant to be 0.3


@lru_cache(maxsize=1024)  # the G samples of a prompt share their gold
def read_gold(gold: str) -> Gold | None:
    """The kind of a gold as data sets hold it: bare, or a solution that ends in boxes or (GSM8K) in '#### 7'."""
    if gold.strip() in _MISSING:
        return None
    part = answer_part(gold)
    if part is None or not part.text:
        return None
    text = part.text
    if not part.marked and not is_expression(text):
        text = _told(text)
    if choice := _choice(text):
        return choice
    if _CHOICES.fullmatch(text):
        return Gold("choices", _letters(text))
    if "$" in text and is_number(text.replace("$", "")):
        text = text.replace("$", "")
    if not re.search(r"\w|\\(?:emptyset|varnothing|infty)", text):
        return None
    if based := _based(text):
        return Gold("based", based)
    argues = not part.marked and _ARGUES.search(text)
    if _is_text(text):
        return None if argues else Gold("text", _lines(text))
    if _is_words(text):
        few = part.marked or len(text.split()) <= _MAX_NAMING_WORDS
        is_name = (few and not argues) or "\\text" in gold or "\\mathrm" in gold
        return Gold("words", _spaced(text)) if is_name else None
    return Gold("value", text) if is_readable(text) else None


def _based(text: str) -> str:
    """101_2, 101_{2}, (101)_{\\text{two}} in one spelling; "" for anything else."""
    match = _BASED.fullmatch(text.replace("$", "").strip())
    base = str(_BASES.get(match[2], match[2])) if match else ""
    return f"{match[1].upper()}_{base}" if match and base.isdigit() and base != "1" else ""


def _letters(text: str) -> str:
    return "".join(sorted(set(re.findall("[A-H]", text))))


def _told(text: str) -> str:
    """What a gold in prose gives after "the answer is", or the text itself."""
    tail = after_lead(text) or ""
    stated, runs = bare(tail) or text, expressions(tail)
    is_long = runs and not re.fullmatch(r"[A-Za-z]", runs[0]) and len(stated) > len(runs[0]) + 20
    return runs[0] if is_long else stated


def _choice(text: str) -> Gold | None:
    match = _CHOICE.fullmatch(text)
    if match is None:
        line = re.fullmatch(r"\(?([A-Z])\)?[ .:]\s*([A-Z][a-z].*)", text.splitlines()[-1].strip())
        return Gold("choice", bare(line[2]), line[1]) if line else None
    rest = bare(re.sub(r"^(?:\\(?![A-Za-z])|[~\s])+", "", match["rest"]))
    delimited = re.match(r"\s*[A-Z]\s", text) is None
    if (rest and not delimited and not re.match(r"[A-Z][a-z]", rest)) or re.match(r"[-+*/^_=<>']", rest):
        return None
    return Gold("choice", rest.splitlines()[0] if rest else "", match[1])


def _is_text(text: str) -> bool:
    """Literals and words with digits; see the module docstring."""
    if any(pattern.fullmatch(text) for pattern in _TEXT_PATTERNS) or _CHEMICAL.fullmatch(_spaced(text, fold=False)):
        return True
    if "\\" not in text and (_GRID.fullmatch(text) or "\n" in text) and not is_number(text):
        return True
    if not re.search(r"[0-9]", text) or "\\" in text:
        return False
    quantities = all(is_number(part) or is_expression(part) for part in split_list(text))
    return bool(_NAME_WITH_DIGITS.search(text)) or not (is_expression(text) or quantities)


def _is_words(text: str) -> bool:
    """Words rather than a formula: no symbol or digit, and longer than a product of two variables."""
    inner = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    if re.search(r"[\\0-9_^=+*/<>{}$|()\[\]]", inner) or not any(char.isalpha() for char in inner):
        return False
    return len(inner) > 2 or not inner.isascii() or inner != text


def _spaced(text: str, *, fold: bool = True) -> str:
    text = re.sub(r"\\text\s*\{([^{}]*)\}(?=_)|(?<=[0-9}])\\text\s*\{([A-Z][^{}]*)\}", r"\1\2", text)
    text = re.sub(r"(?<=[0-9])\s*([apAP])\.?([mM])\b\.?", r" \1\2", text)
    text = re.sub(r"(?<=[A-Za-z)])_(?:\{([0-9]+)\}|([0-9]))", r"\1\2", text)
    text = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).split())
    return text.casefold() if fold else text


def _lines(text: str) -> str:
    """Spaces normalised in each line: the lines of a grid are part of it."""
    return "\n".join(line for line in map(_spaced, text.splitlines()) if line)


def _matches(gold: Gold, answer: Answer) -> bool:
    if gold.kind == "choice":
        letter = _answered_letter(answer)
        if letter is not None or not gold.text or re.fullmatch(r"\W*[A-Z]\W*", answer.text):
            return letter == gold.letter
        inner = read_gold(gold.text)
        return inner is not None and inner.kind != "choice" and _matches(inner, answer)
    if gold.kind == "value":
        return _matches_value(gold.text, answer)
    tail = None if answer.marked else after_lead(answer.text)
    last = answer.text if tail is None else bare(tail)
    if gold.kind == "choices":
        text = answer.text if answer.marked else bare(tail or answer.text)
        return bool(_CHOICES.fullmatch(text) or re.fullmatch("[A-H]{2,8}", text)) and _letters(text) == gold.text
    if gold.kind == "based":
        return _based((expressions(last) or [last])[-1]) == gold.text
    if gold.kind == "words":
        return gold.text in (_spaced(answer.text), _spaced(last))
    if gold.text in (_lines(answer.text), _lines(last)):
        return True
    pattern = next((pattern for pattern in _TEXT_PATTERNS if pattern.fullmatch(gold.text)), None)
    if answer.marked or pattern is None:
        return False
    found = [match[0] for match in pattern.finditer(last)]
    return bool(found) and _spaced(found[-1]) == gold.text


def _denied(text: str, match: re.Match[str], group: int) -> bool:
    """Whether the letter is named as what the answer is not."""
    begin, end = match.span(group)
    return bool(_DENIED_BEFORE.search(text[max(0, begin - 30) : begin]) or _DENIED_AFTER.match(text, end))


def _answered_letter(answer: Answer) -> str | None:
    """The one letter that an answer gives; "" where it gives two, None without any."""
    text = typeset_words(answer.text).strip()
    if lower := re.fullmatch(r"\(?([a-z])\)", text):
        return lower[1].upper()
    if leads := [match for match in _LEADS_LETTER.finditer(text) if not _denied(text, match, 1)]:
        return "" if _ALTERNATIVE.match(text, leads[-1].end()) else leads[-1][1]
    if lower := re.search(r"(?i:answer)[^A-Z()\n]{0,20}\(([a-z])\)", text):
        return lower[1].upper()
    if begin := re.match(rf"{_LETTER}(?:\s*\}}?[)\].:。,、]|\s*\}}*\s*$|(?=[^\x00-\x7f]))", text):
        return "" if _ALTERNATIVE.match(text, begin.end() - (text[begin.end() - 1] == ",")) else begin[1]
    if answer.marked:
        return None
    found = [
        letter
        for letter in _ANY_LETTER.finditer(text)
        if not _denied(text, letter, 2)
        if letter[1] or letter[3] or letter[2] not in "AI" or _STANDS_ALONE.match(text, letter.end())
    ]
    if len(found) > 1 and _ALTERNATIVE.fullmatch(text, found[-2].end(), found[-1].end(2)):
        return ""
    return found[-1][2] if found else None


def _matches_value(gold: str, answer: Answer) -> bool:
    text = answer.text
    if same_text(gold, text):
        return True
    if answer.marked and _UNKNOWN_OPERATOR.search(typeset_words(text)):
        return False
    if all(is_expression(part) or is_number(part, loose=True) for part in split_list(text)):
        return same_value(gold, text)
    return _matches_prose(gold, text)


def _matches_prose(gold: str, text: str) -> bool:
    """The first expression after "the answer is", else the last one of the text."""
    text = _DENIED_NUMBER.sub(" ", text)
    if (tail := after_lead(text)) is not None:
        stated = bare(tail)
        if is_number(stated, loose=True) or is_expression(stated):
            return same_value(gold, stated)
        if runs := _worth(expressions(tail), gold):
            return same_value(gold, runs[0])
    runs = _worth(expressions(text), gold)
    if not runs:
        return False
    last = runs[-1]
    if is_number(gold):
        if ", " in last and not re.search(r"(?:and|or)(?![a-z])|[()\[\]]", last):
            last = split_list(last)[-1]  # In 1999, 35 people
        last = _LETTER_UNIT.sub("", last)
    return same_value(gold, last)


def _worth(runs: list[str], gold: str) -> list[str]:
    """Runs that can answer: a gold with digits is not answered by the name of a variable."""
    if re.fullmatch(r"\W*(?:\\?[A-Za-z]+|[A-Za-z]_\{?\w+\}?)\W*", gold):
        return runs
    return [run for run in runs if re.search(r"[0-9]|\\(?:pi|infty|emptyset|sqrt)|[-+*/^=<>].*[A-Za-z]", run)]
