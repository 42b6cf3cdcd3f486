"""What the checks before a run read once, and keep until `forget`: rows, tokenizers, checkpoints."""

from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

from r1fast.data.rows import Kind
from r1fast.data.sources import load_rows

P = ParamSpec("P")
T = TypeVar("T")
_CACHES: list[Any] = []


def once(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which answers the same question only once until `forget`."""
    cached = cache(function)
    _CACHES.append(cached)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Let go of it all: a file may be another by the next time."""
    for cached in _CACHES:
        cached.cache_clear()


@once
def rows_of(source: str, kind: Kind) -> list[dict]:
    """Rows of one source. ValueError, OSError."""
    return load_rows([source], kind)
