"""R1's language-consistency reward: words of the target language / words of the chain of thought (v2 eq. 7).

The papers do not say what a word is. Here it is a run of letters of one script (English, Russian, Korean, ...), or
one character in scripts written without spaces (Chinese, Japanese, Thai). Formulas, code, numbers, tags and single
Latin letters (variables) are left out first. The count is by Unicode script: it needs no model, sees mixing word by
word, and cannot tell apart two languages that share a script, such as English and German.
"""

import re
from typing import Any

from r1fast.rewards.format import parse_rows, per_row
from r1fast.rewards.registry import reward

_SCRIPTS = {
    "latin": r"[A-Za-zÀ-ÖØ-öø-ɏḀ-ỿ]+(?:['’][A-Za-zÀ-ÖØ-öø-ɏḀ-ỿ]+)*",
    "han": r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]",
    "kana": r"[\u3041-\u3096\u30a1-\u30fa\u30fc]",
    "hangul": r"[\u1100-\u11ff\uac00-\ud7af]+",
    "cyrillic": r"[\u0400-\u052f]+",
    "greek": r"[\u0370-\u03ff\u1f00-\u1fff]+",
    "arabic": r"[\u0620-\u065f\u066e-\u06d3\u06fa-\u06ff]+",
    "hebrew": r"[\u0590-\u05ff]+",
    "devanagari": r"[\u0900-\u0965\u0970-\u097f]+",
    "thai": r"[\u0e01-\u0e4e]",
}
_WORD = re.compile("|".join(f"(?P<{script}>{pattern})" for script, pattern in _SCRIPTS.items()))
_LANGUAGES = {
    ("latin",): "en de fr es it pt nl pl cs sv da no fi tr vi id ro hu",
    ("cyrillic",): "ru uk bg sr",
    ("arabic",): "ar fa ur",
    ("han",): "zh",
    ("han", "kana"): "ja",
    ("hangul",): "ko",
    ("greek",): "el",
    ("hebrew",): "he",
    ("devanagari",): "hi",
    ("thai",): "th",
}
_LANGUAGE_SCRIPTS = {code: scripts for scripts, codes in _LANGUAGES.items() for code in codes.split()}
# Bounded repeats: an opening that never closes must cost a constant, not a scan to the end of a 32k-token text.
_NOT_PROSE = re.compile(
    r"```.*?```"  # code
    r"|`[^`\n]{1,400}`"
    r"|\$\$[^$]{1,2000}\$\$"  # formulas
    r"|\$[^$\n]{1,1000}\$"
    r"|\\\[.{1,2000}?\\\]"
    r"|\\\(.{1,1000}?\\\)"
    r"|\\(?:operatorname|begin|end)\{[^{}\n]{0,200}\}"
    r"|\\[A-Za-z]+"
    r"|<[/|]?[A-Za-z_｜▁]{1,40}[|｜]?>"  # tags
    r"|\|special_token\|"
    r"|https?://[!-~]+",
    re.DOTALL,
)


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
    values: list[float | None] = []
    targets = per_row(language, len(completions))
    for text, parsed, target in zip(
        completions, parse_rows(completions, response_format, prefilled), targets, strict=True
    ):
        thought = text if parsed.reasoning is None else parsed.reasoning
        values.append(language_ratio(thought, target) if target else None)
    return values


def language_ratio(text: str, language: str) -> float:
    """Words of the language's script / all words; 1.0 for a text without words (pure formulas mix nothing)."""
    scripts = target_scripts(language)
    num_target = num_words = 0
    for match in _WORD.finditer(_NOT_PROSE.sub(" ", text)):
        script = match.lastgroup
        if script == "latin" and len(match[0]) == 1:
            continue
        num_words += 1
        num_target += script in scripts
    return num_target / num_words if num_words else 1.0


def target_scripts(language: str) -> tuple[str, ...]:
    """Scripts that a language code ("en", "zh-Hans", "pt_BR") is written in."""
    code = re.split(r"[-_]", language.strip().lower())[0]
    if code not in _LANGUAGE_SCRIPTS:
        raise ValueError(f"language: unknown language {language!r}, expected a code of {sorted(_LANGUAGE_SCRIPTS)}")
    return _LANGUAGE_SCRIPTS[code]
