"""The process that runs reward functions: `python -m r1fast.rewards.worker`, started and killed by pool.py.

It reads length-prefixed pickles from its standard input and answers each on its standard output:
    ("load", name, location)                        -> ("ok", None)                 | ("error", text)
    ("call", name, kwargs, num_rows, cpu_limit_s)   -> ("ok", list of float | None) | ("error", text)
Both streams are moved away before any reward is imported, so that whatever a reward prints goes to stderr.
"""

import inspect
import math
import os
import pickle
import signal
import struct
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from r1fast.rewards.registry import resolve

HEADER = struct.Struct("<Q")


def main() -> None:
    requests, replies = _claim_streams()
    functions: dict[str, Callable[..., Any]] = {}
    while header := requests.read(HEADER.size):
        message = requests.read(HEADER.unpack(header)[0])
        # BaseException: a reward that calls sys.exit, or a library's own timeout class, is a failed reward
        try:
            reply: tuple[str, Any] = ("ok", _serve(pickle.loads(message), functions))
        except BaseException:
            reply = ("error", traceback.format_exc())
        payload = pickle.dumps(reply, protocol=pickle.HIGHEST_PROTOCOL)
        replies.write(HEADER.pack(len(payload)) + payload)
        replies.flush()


def _claim_streams() -> tuple[BinaryIO, BinaryIO]:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


def _serve(message: tuple[Any, ...], functions: dict[str, Callable[..., Any]]) -> list[float | None] | None:
    if message[0] == "load":
        _, name, location = message
        functions[name] = resolve(location)
        return None
    _, name, kwargs, num_rows, cpu_limit_s = message
    # The pool kills this process at its limit. If the pool itself is gone by then, SIGPROF ends an endless loop.
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        values = functions[name](**kwargs)
        if inspect.isawaitable(values):
            values = _run_async(values)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return checked_values(values, num_rows, name)


def _run_async(awaitable: Any) -> Any:
    import asyncio  # 50 ms that most rewards never need

    async def wait() -> Any:
        return await awaitable

    return asyncio.run(wait())


def checked_values(values: Any, num_rows: int, name: str) -> list[float | None]:
    """One finite float or None (NaN counts as None) per row; ValueError naming the reward otherwise."""
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__iter__"):
        raise ValueError(f"reward {name!r} returned {type(values).__name__}, expected a list of {num_rows} numbers")
    items = list(values)
    if len(items) != num_rows:
        raise ValueError(f"reward {name!r} returned {len(items)} values for {num_rows} completions")
    checked: list[float | None] = []
    for row, item in enumerate(items):
        try:
            value = _as_float(item)
        except (TypeError, ValueError):
            raise ValueError(
                f"reward {name!r} returned {item!r:.80} for row {row}, expected a finite number or None"
            ) from None
        checked.append(value)
    return checked


def _as_float(item: Any) -> float | None:
    if item is None:
        return None
    if isinstance(item, str | bytes):
        raise TypeError  # float would read "1.0"
    value = float(item)
    if math.isinf(value):
        raise ValueError
    return None if math.isnan(value) else value


if __name__ == "__main__":
    main()
