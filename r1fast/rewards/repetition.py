"""Repetition penalty: the share of n-grams that have been said before, times a penalty (<= 0)."""

import re
from typing import Any

from r1fast.rewards.registry import reward

# A CJK character counts as a word; symbols count too, or a loop of formulas would go unseen.
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")


@reward("repetition")
def repetition(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    ngram: int = 3,
    max_penalty: float = -1.0,
    **_: Any,
) -> list[float | None]:
    """`max_penalty` times the share of repeated n-grams of words: 0 for a text without any, never above 0."""
    if max_penalty > 0:
        raise ValueError(f"repetition: max_penalty must be <= 0, got {max_penalty}")
    return [min(0.0, max_penalty * repetition_ratio(text, ngram)) for text in completions]


def repetition_ratio(text: str, ngram: int) -> float:
    """1 - unique / total n-grams of lower-cased words; 0.0 for a text of fewer than `ngram` words."""
    if ngram < 1:
        raise ValueError(f"repetition: ngram must be >= 1, got {ngram}")
    tokens = _TOKEN.findall(text.lower())
    total = len(tokens) - ngram + 1
    if total <= 0:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + ngram]) for i in range(total)}) / total
