"""Length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3): of a prompt's samples the shorter are paid more."""

from collections import defaultdict
from typing import Any

from r1fast.rewards.accuracy import accuracy
from r1fast.rewards.registry import reward


@reward("length")
def length(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    group_ids: list[int],
    answer: list[Any],
    response_format: list[str] | str = "think_answer",
    finish_reason: list[str | None] | str | None = None,
    prefilled: list[bool] | bool = False,
    strict: bool = True,
    **_: Any,
) -> list[float | None]:
    """0.5 - (tokens - fewest) / (most - fewest), fewest and most among the samples of a prompt (`group_ids`).

    A wrong answer gets at most 0, and all get 0 where all are as long. None where the gold answer cannot be read.
    strict: as for `accuracy`.
    """
    correct = accuracy(
        prompts, completions, completion_ids, answer, response_format, finish_reason, prefilled, strict=strict
    )
    lengths: dict[int, list[int]] = defaultdict(list)
    for group, ids in zip(group_ids, completion_ids, strict=True):
        lengths[group].append(len(ids))
    values: list[float | None] = []
    for right, group, ids in zip(correct, group_ids, completion_ids, strict=True):
        fewest, most = min(lengths[group]), max(lengths[group])
        value = 0.5 - (len(ids) - fewest) / (most - fewest) if most > fewest else 0.0
        values.append(None if right is None else value if right else min(0.0, value))
    return values
