"""Rewards written for other trainers: verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`."""

import inspect
from collections.abc import Callable
from typing import Any

_VERL_ROW = ("data_source", "solution_str", "ground_truth", "extra_info")


def is_verl_function(function: Callable[..., Any]) -> bool:
    """True if the signature is verl's: it scores one `solution_str` against one `ground_truth`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return {"solution_str", "ground_truth"} <= set(parameters)


def adapt_verl(compute_score: Callable[..., Any]) -> Callable[..., list[float | None]]:
    """A batch reward that calls `compute_score` row by row; a dict result gives its "score".

    The gold comes from column `answer`. Further parameters of compute_score stay options of the reward.
    """
    parameters = inspect.signature(compute_score).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    options = {name: p for name, p in parameters.items() if name not in _VERL_ROW and p.kind is not p.VAR_KEYWORD}

    def verl_reward(
        completions: list[str],
        answer: list[Any],
        data_source: list[str] | None = None,
        extra_info: list[dict[str, Any]] | None = None,
        **given: Any,
    ) -> list[float | None]:
        chosen = {name: value for name, value in given.items() if name in options}
        values: list[float | None] = []
        for index, (completion, gold) in enumerate(zip(completions, answer, strict=True)):
            row = {
                "data_source": "" if data_source is None else data_source[index],
                "solution_str": completion,
                "ground_truth": gold,
                "extra_info": {} if extra_info is None else extra_info[index],
            }
            known = {name: value for name, value in row.items() if takes_any or name in parameters}
            result = compute_score(**known, **chosen)
            values.append(result["score"] if isinstance(result, dict) else result)
        return values

    verl_reward.__module__, verl_reward.__qualname__ = compute_score.__module__, compute_score.__qualname__
    # The visible signature holds compute_score's own options, so that a misspelt one is caught before any work.
    own = [p for p in inspect.signature(verl_reward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [p.replace(kind=p.KEYWORD_ONLY) for p in options.values()]
    verl_reward.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
    return verl_reward
