"""Which samples are good enough to train on: the filters of rejection sampling (v1 section 2.3.3, v2 B.3.3).

R1 keeps correct samples and drops chains of thought with mixed languages, long paragraphs or code blocks. Its
thresholds are not published; ours are the defaults of a stage's `filters`.
"""

import re

from r1fast.data.templates import Parsed
from r1fast.rewards.answers import last_box
from r1fast.rewards.language import language_ratio
from r1fast.rewards.repetition import repetition_ratio

_NGRAM = 10  # words; long enough that a careful re-check of a step is no repetition, while a loop is
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n")


def check_completion(
    parsed: Parsed,
    *,
    finish_reason: str | None,
    language: str | None,
    min_language: float,
    max_repetition: float,
    max_paragraph_chars: int,
    allow_code: bool,
) -> str | None:
    """The first reason to drop a sample, or None for one worth keeping, if it is right.

    language: None skips the language check. max_repetition: share of repeated 10-grams of words.
    """
    if finish_reason != "stop":
        return "truncated"
    if not parsed.well_formed or parsed.reasoning is None or not last_box(parsed.answer or "").closed:
        return "malformed"
    if language is not None and language_ratio(parsed.reasoning, language) < min_language:
        return "mixed_language"
    if repetition_ratio(parsed.reasoning, _NGRAM) > max_repetition:
        return "repetitive"
    if any(len(paragraph) > max_paragraph_chars for paragraph in _PARAGRAPH_BREAK.split(parsed.reasoning)):
        return "long_paragraph"
    if not allow_code and "```" in parsed.reasoning:
        return "code_block"
    return None
