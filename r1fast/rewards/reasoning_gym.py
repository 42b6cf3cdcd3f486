"""reasoning_gym reward: the data set's own verifier, on rows of `reasoning_gym:NAME` sources.

Many of its tasks have several right answers, or an answer that is a program, a board or a sentence: comparing with the
one gold answer would pay for wrong answers and reject right ones.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from r1fast.rewards.accuracy import final_answers
from r1fast.rewards.registry import reward


@reward("reasoning_gym")
def reasoning_gym(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    answer: list[Any],
    metadata: list[Any],
    reasoning_gym: list[str | None],
    response_format: list[str] | str = "think_answer",
    finish_reason: list[str | None] | str | None = None,
    prefilled: list[bool] | bool = False,
    strict: bool = True,
    **_: Any,
) -> list[float | None]:
    """The verifier's score of the final answer, 0 to 1; None for rows that name no data set (column `reasoning_gym`).

    strict: as for `accuracy`: a completion without an answer part scores 0, or the text after its reasoning is read.
    """
    finals = final_answers(completions, response_format, finish_reason, prefilled, strict=strict)
    values: list[float | None] = [None] * len(completions)
    for i, (name, final) in enumerate(zip(reasoning_gym, finals, strict=True)):
        if name:
            entry = {"question": prompts[i], "answer": answer[i], "metadata": metadata[i] or {}}
            values[i] = float(_verifier(name)(final.strip(), entry)) if final else 0.0
    return values


@lru_cache(maxsize=64)
def _verifier(name: str) -> Callable[[str, dict[str, Any]], float]:
    try:
        from reasoning_gym.factory import get_score_answer_fn

        return get_score_answer_fn(name)
    except ModuleNotFoundError as error:
        text = "the reward reasoning_gym needs the package reasoning-gym: pip install 'r1fast[tasks]'"
        raise ValueError(text) from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"column reasoning_gym: {name!r} is no data set of reasoning-gym: {error}") from error
