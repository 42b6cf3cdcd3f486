"""Rewards by name: `@reward("accuracy")` registers one, `resolve` finds one by name, dotted path or file.

A reward is `f(prompts, completions, completion_ids, **columns) -> list[float | None]` (TRL's signature); columns of
the data arrive by name, one list per column, and None means "not applicable to this row".
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from r1fast.user_code import load_function
from r1fast.wording import did_you_mean

RewardFunction = Callable[..., Any]

REWARDS: dict[str, RewardFunction] = {}
# Of rewards that keep to a time of their own: its seconds for a row, as a function of the reward's options.
SECONDS_PER_ROW: dict[str, Callable[..., float]] = {}
_VERL_ROW = ("data_source", "solution_str", "ground_truth", "extra_info")
_BUILTIN_MODULES = (
    "accuracy", "code", "cosine", "format", "language", "length", "reasoning_gym", "repetition", "tag_count",
)  # fmt: skip


def reward(
    name: str, *, seconds_per_row: Callable[..., float] | None = None
) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: registers a reward under a name that recipes can use.

    seconds_per_row: for a reward that itself bounds the time of a row, that bound, given its options (ValueError for
    wrong ones); its calls then have so much more time than others.
    """

    def register(function: RewardFunction) -> RewardFunction:
        known = REWARDS.get(name)
        if known is not None and _dotted(known) != _dotted(function):
            raise ValueError(
                f"reward {name!r} is registered twice: {_dotted(known)} and {_dotted(function)}; rename one"
            )
        REWARDS[name] = function
        if seconds_per_row is not None:
            SECONDS_PER_ROW[name] = seconds_per_row
        return function

    return register


def resolve(name: str) -> RewardFunction:
    """The reward of a registry name, `package.module.function`, or `path/to/file.py:function`; or ValueError."""
    for module in _BUILTIN_MODULES:
        import_module(f"r1fast.rewards.{module}")
    if name in REWARDS:
        return REWARDS[name]
    if "." not in name and ":" not in name:
        raise ValueError(
            f"unknown reward {name!r}, expected one of {sorted(REWARDS)}, a dotted path 'package.module.function' "
            f"or 'path/to/file.py:function'{did_you_mean(name, REWARDS)}"
        )
    function = load_function("reward", name)
    return adapt_verl(function) if is_verl_function(function) else function


def is_builtin(function: RewardFunction) -> bool:
    """One of r1fast's own."""
    return function.__module__.startswith("r1fast.rewards.") and function in REWARDS.values()


def takes_messages(name: str, function: RewardFunction) -> bool:
    """Whether the completions of chat prompts are passed as TRL does, as [{"role": "assistant", "content": text}]:
    to functions that a recipe names by their path. Registered rewards and verl's get text."""
    return name not in REWARDS and not is_builtin(function) and not is_adapted(function)


def locate(name: str) -> str:
    """A spelling of `name` that another process resolves to the same function, whatever its working directory."""
    if ".py:" in name:
        path, _, attribute = name.rpartition(":")
        return f"{Path(path).resolve()}:{attribute}"
    function = REWARDS.get(name)
    if function is None or is_builtin(function):
        return name
    if function.__module__ == "__main__" or "<locals>" in function.__qualname__:
        raise ValueError(
            f"reward {name!r} is defined in {_dotted(function)}, which a worker process cannot import; "
            "move it to the top level of a module, or name it 'path/to/file.py:function'"
        )
    return _dotted(function)


def _dotted(function: RewardFunction) -> str:
    return f"{function.__module__}:{function.__qualname__}"


# verl's compute_score(data_source, solution_str, ground_truth, extra_info)


def is_verl_function(function: RewardFunction) -> bool:
    """True if the signature is verl's: it scores one `solution_str` against one `ground_truth`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return {"solution_str", "ground_truth"} <= set(parameters)


def is_adapted(function: RewardFunction) -> bool:
    """True for what adapt_verl returns."""
    return getattr(function, "__name__", "") == "verl_reward" and hasattr(function, "compute_score")


def adapt_verl(compute_score: RewardFunction) -> RewardFunction:
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
        return _together(results) if results and inspect.isawaitable(results[0]) else list(map(_score, results))

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
