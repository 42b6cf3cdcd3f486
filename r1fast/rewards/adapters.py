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


def is_adapted(function: Callable[..., Any]) -> bool:
    """True for what adapt_verl returns."""
    return getattr(function, "__name__", "") == "verl_reward" and hasattr(function, "compute_score")


def adapt_verl(compute_score: Callable[..., Any]) -> Callable[..., Any]:
    """A batch reward that calls `compute_score` row by row, as verl does; a dict result gives its "score".

    The gold comes from column `answer`; where a column is missing, verl passes "" for data_source, {} for extra_info.
    compute_score may be a coroutine function, whose rows then run together. Its further parameters stay options.
    """
    parameters = inspect.signature(compute_score).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    options = {name: p for name, p in parameters.items() if name not in _VERL_ROW and p.kind is not p.VAR_KEYWORD}

    def verl_reward(
        completions: list[str],
        answer: list[Any],
        data_source: list[str] | None = None,
        extra_info: list[dict[str, Any] | None] | None = None,
        **given: Any,
    ) -> Any:
        chosen = {name: value for name, value in given.items() if name in options}
        sources, extras = data_source or [""] * len(completions), extra_info or [None] * len(completions)
        results = []
        for row in zip(sources, completions, answer, ({} if extra is None else extra for extra in extras), strict=True):
            known = {name: value for name, value in zip(_VERL_ROW, row) if takes_any or name in parameters}
            results.append(compute_score(**known, **chosen))
        if results and inspect.isawaitable(results[0]):
            return _together(results)
        return [_score(result) for result in results]

    verl_reward.__module__, verl_reward.__qualname__ = compute_score.__module__, compute_score.__qualname__
    verl_reward.compute_score = compute_score  # type: ignore[attr-defined]
    # The visible signature holds compute_score's own options, so that a misspelt one is caught before any work.
    own = [p for p in inspect.signature(verl_reward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [p.replace(kind=p.KEYWORD_ONLY) for p in options.values()]
    verl_reward.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
    return verl_reward


async def _together(results: list[Any]) -> list[float | None]:
    import asyncio

    return [_score(result) for result in await asyncio.gather(*results)]


def _score(result: Any) -> Any:
    if not isinstance(result, dict):
        return result
    if "score" not in result:
        raise ValueError(f"compute_score returned a dict with the keys {sorted(map(str, result))}, expected 'score'")
    return result["score"]
