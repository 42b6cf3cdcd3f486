"""Accuracy that depends on length by a cosine (arXiv 2502.03373, section 3.3; TRL's get_cosine_scaled_reward)."""

import math
from typing import Any

from r1fast.rewards.accuracy import accuracy
from r1fast.rewards.registry import reward


@reward("cosine")
def cosine(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    answer: list[Any],
    max_len: int,
    response_format: list[str] | str = "think_answer",
    finish_reason: list[str | None] | str | None = None,
    prefilled: list[bool] | bool = False,
    strict: bool = True,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    **_: Any,
) -> list[float | None]:
    """From max_value_correct for a short right answer to min_value_correct for one of max_len tokens; a wrong one
    goes the other way, from min_value_wrong to max_value_wrong. None where the gold answer cannot be read.

    max_len: tokens, such as the stage's max_completion_length; beyond it the value stays as it is there, where a
    cosine would rise again. strict: as for `accuracy`.
    """
    if max_len < 1:
        raise ValueError(f"cosine: max_len must be >= 1, got {max_len}")
    correct = accuracy(
        prompts, completions, completion_ids, answer, response_format, finish_reason, prefilled, strict=strict
    )
    values: list[float | None] = []
    for right, ids in zip(correct, completion_ids, strict=True):
        first, last = (max_value_correct, min_value_correct) if right else (min_value_wrong, max_value_wrong)
        progress = min(1.0, len(ids) / max_len)
        value = last + 0.5 * (first - last) * (1.0 + math.cos(math.pi * progress))
        values.append(None if right is None else value)
    return values
