"""R1's language-consistency reward: words of the target language / words of the chain of thought (v2 eq. 7).

The papers do not say what a word is. Here it is a run of letters of one script, or one character in scripts written
without spaces (Chinese, Japanese, Thai). The count needs no model, sees mixing word by word, and cannot tell apart two
languages that share a script, such as English and German.

Mathematics is no foreign language. Left out are formulas, code, numbers, tags, and what mathematics writes in letters:
single Latin and Greek letters, labels of one to four capitals (triangle ABC) or more in alphabetical order, names of
functions (sin, log, sinx), products of variables (two or three letters without a vowel, or beside an operator: dx,
y = ax + b), units of measurement, and the arguments of \\text{} and \\mathrm{}. A `$` that opens a formula has no space
after it, and the one that closes it none before: text between two prices is prose.

Han characters count for Chinese, and for Japanese only if the text holds kana: Japanese cannot be written without kana
beyond a title, so a text of _MIN_HAN characters without any is Chinese; a shorter one is either.
"""

import re
from collections import Counter
from typing import Any

from r1fast.rewards.format import parse_rows, per_row
from r1fast.rewards.registry import reward

_SCRIPTS = {  # a word of it, and the languages that it writes
    "latin": (
        r"[A-Za-zÀ-ÖØ-öø-ɏḀ-ỿ]+(?:['’][A-Za-zÀ-ÖØ-öø-ɏḀ-ỿ]+)*",
        "en de fr es it pt nl pl cs sv da no fi tr vi id ro hu",
    ),
    "han": (r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]", "zh ja"),
    "kana": (r"[\u3041-\u3096\u30a1-\u30fa\u30fc]", "ja"),
    "hangul": (r"[\u1100-\u11ff\uac00-\ud7af]+", "ko"),
    "cyrillic": (r"[\u0400-\u052f]+", "ru uk bg sr"),
    "greek": (r"[\u0370-\u03ff\u1f00-\u1fff]+", "el"),
    "arabic": (r"[\u0620-\u065f\u066e-\u06d3\u06fa-\u06ff]+", "ar fa ur"),
    "hebrew": (r"[\u0590-\u05ff]+", "he"),
    "devanagari": (r"[\u0900-\u0965\u0970-\u097f]+", "hi"),
    "thai": (r"[\u0e01-\u0e4e]", "th"),
}
_WORD = re.compile("|".join(f"(?P<{script}>{pattern})" for script, (pattern, _) in _SCRIPTS.items()))
# Bounded repeats: an opening that never closes must cost a constant, not a scan to the end of a 32k-token text.
_NOT_PROSE = re.compile(
    r"```.*?```"  # code
    r"|`[^`\n]{1,400}`"
    r"|\$\$[^$]{1,2000}\$\$"  # formulas
    r"|(?<![0-9])\$(?=[^\s$])[^$\n]{0,1000}(?<=[^\s$])\$(?![0-9])"
    r"|\\\[.{1,2000}?\\\]"
    r"|\\\(.{1,1000}?\\\)"
    r"|\\(?:operatorname|begin|end|text[a-z]*|math[a-z]+|mbox)\*?\s?\{[^{}\n]{0,200}\}"
    r"|\\[A-Za-z]+"
    r"|<[/|]?[A-Za-z_｜▁]{1,40}[|｜]?>"  # tags
    r"|\|special_token\|"
    r"|https?://[!-~]+",
    re.DOTALL,
)
_MIN_HAN = 4  # characters
_SYMBOLS = re.compile(r"[A-Z]{2,4}|[b-df-hj-np-tv-xz]{2,3}|(?:sin|cos|tan|cot|log|ln|exp)[nt-z]")
_OPERATORS = "=+*^<>≤≥×·"
_FUNCTION_NAMES = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim max min sup inf det gcd lcm mod "
    "deg dim ker arg sgn tr sqrt pi"
)
_UNIT_NAMES = (
    "mm cm dm km mg kg ml kw kwh mw gw hz khz mhz ghz kb mb gb tb kpa pa kj mj mol rad rpm mph kph kmh ft lb lbs "
    "oz hr hrs sec min ms ns us nm eur usd"
)
_FUNCTIONS, _UNITS = frozenset(_FUNCTION_NAMES.split()), frozenset(_UNIT_NAMES.split())


@reward("language")
def language_consistency(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    language: list[str | None] | str | None = None,
    response_format: list[str] | str = "think_answer",
    prefilled: list[bool] | bool = False,
    **_: Any,
) -> list[float | None]:
    """Share of the reasoning's words that are in the row's language (column `language`: "en", "zh", ...), 0 to 1.

    None without a language. A completion without a reasoning part is judged whole; one without words scores 1.0.
    """
    parsed_rows = parse_rows(completions, response_format, prefilled)
    rows = zip(completions, parsed_rows, per_row(language, len(completions)), strict=True)
    return [
        language_ratio(text if parsed.reasoning is None else parsed.reasoning, target) if target else None
        for text, parsed, target in rows
    ]


def language_ratio(text: str, language: str) -> float:
    """Words of the language's script / all words; 1.0 for a text without words (pure formulas mix nothing)."""
    scripts = target_scripts(language)
    counts = Counter(
        match.lastgroup for match in _WORD.finditer(_NOT_PROSE.sub(" ", text)) if not _is_mathematics(match)
    )
    if "kana" in scripts and not counts["kana"] and counts["han"] >= _MIN_HAN:
        scripts = ("kana",)
    return sum(counts[script] for script in scripts) / counts.total() if counts else 1.0


def _is_mathematics(match: re.Match[str]) -> bool:
    word, script, prose, (begin, end) = match[0], match.lastgroup, match.string, match.span()
    if script != "latin" or len(word) == 1:
        return script in ("latin", "greek") and len(word) == 1
    before, after = prose[max(0, begin - 2) : begin].rstrip()[-1:], prose[end : end + 2].lstrip()[:1]
    return bool(
        word in _FUNCTIONS
        or _SYMBOLS.fullmatch(word)
        or (word.isupper() and "".join(sorted(set(word))) == word)
        or (len(word) <= 3 and any(sign and sign in _OPERATORS for sign in (before, after)))
        or (before.isdigit() and word.lower() in _UNITS)
    )


def target_scripts(language: str) -> tuple[str, ...]:
    """Scripts that a language code ("en", "zh-Hans", "pt_BR") is written in."""
    code = re.split(r"[-_]", language.strip().lower())[0]
    scripts = tuple(script for script, (_, languages) in _SCRIPTS.items() if code in languages.split())
    if not scripts:
        known = sorted({name for _, languages in _SCRIPTS.values() for name in languages.split()})
        raise ValueError(f"language: unknown language {language!r}, expected a code of {known}")
    return scripts
