"""Rewards by name: `@reward("accuracy")` registers one, `resolve` finds one by name, dotted path or file.

A reward is `f(prompts, completions, completion_ids, **columns) -> list[float | None]` (TRL's signature); columns of
the data arrive by name, one list per column, and None means "not applicable to this row". Where the prompt is a chat,
a function named by its path gets TRL's completions (`takes_messages`). Functions with the signature of verl's
compute_score are adapted on the way.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from r1fast.rewards.adapters import adapt_verl, is_adapted, is_verl_function
from r1fast.user_code import load_function
from r1fast.wording import did_you_mean

RewardFunction = Callable[..., Any]

REWARDS: dict[str, RewardFunction] = {}
_BUILTIN_MODULES = ("accuracy", "format", "language", "repetition", "reasoning_gym")


def reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: registers a reward under a name that recipes can use."""

    def register(function: RewardFunction) -> RewardFunction:
        known = REWARDS.get(name)
        if known is not None and _dotted(known) != _dotted(function):
            raise ValueError(
                f"reward {name!r} is registered twice: {_dotted(known)} and {_dotted(function)}; rename one"
            )
        REWARDS[name] = function
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
    if function is None or function.__module__.startswith("r1fast.rewards."):
        return name
    if function.__module__ == "__main__" or "<locals>" in function.__qualname__:
        raise ValueError(
            f"reward {name!r} is defined in {_dotted(function)}, which a worker process cannot import; "
            "move it to the top level of a module, or name it 'path/to/file.py:function'"
        )
    return _dotted(function)


def _dotted(function: RewardFunction) -> str:
    return f"{function.__module__}:{function.__qualname__}"
