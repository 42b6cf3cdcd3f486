"""The process that runs reward functions: `python -m r1fast.rewards.worker TRAINER MEMORY`, started by process.py.

Standard input is a socket. Requests come pickled; replies are JSON, which runs nothing when it is read: a reward may
write there what it likes. Both have a header (id, bytes):

    ("load", name, location)          -> {"values": []}
    ("call", name, kwargs, num_rows)  -> {"values": [float | null], "rows": {row: why it has no value}}
    either                            -> {"error": text whose first line says all, "memory": bool}
"""

import inspect
import json
import math
import os
import pickle
import struct
import sys
import traceback
from collections.abc import Callable, Mapping, Set
from functools import cache
from itertools import islice
from numbers import Complex, Real
from typing import Any

from r1fast.rewards.keeper import keep
from r1fast.rewards.registry import resolve

HEADER = struct.Struct("<QQ")  # id of the request, bytes that follow
MAX_REPLY_BYTES = 1 << 18  # 64 values with a reason each take 20 kB
MAX_TEXT_CHARS, MAX_LINE_CHARS = 4000, 300
Scored = tuple[list[float | None], dict[int, str]]  # a value for each row, and by row why there is none
# Bound now: a reward may put other functions in their modules.
_dumps, _getpid, _exit, _isinf, _isnan = json.dumps, os.getpid, os._exit, math.isinf, math.isnan


def serve() -> None:
    socket = os.dup(0)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    requests, replies = os.fdopen(socket, "rb"), os.fdopen(socket, "wb", closefd=False)
    functions: dict[str, Callable[..., Any]] = {}
    own_pid = _getpid()
    while header := requests.read(HEADER.size):
        number, size = HEADER.unpack(header)
        reply = _answer(requests.read(size), functions)
        if _getpid() != own_pid:  # a child that a reward has forked, and that came back
            _exit(0)
        payload = _dumps(reply).encode()
        replies.write(HEADER.pack(number, len(payload)) + payload)
        replies.flush()


def _answer(message: bytes, functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    # BaseException: a reward that calls sys.exit, or a library's own timeout class, is a failed reward
    try:
        kind, name, *rest = pickle.loads(message)
        if kind == "load":
            functions[name] = resolve(rest[0])
            return {"values": []}
        values, reasons = _call(functions[name], name, *rest)
        return {"values": values, "rows": reasons}
    except MemoryError as error:
        traceback.clear_frames(error.__traceback__)  # what filled the memory is in their variables
        return {"error": _in_one_line(error), "memory": True}
    except BaseException as error:
        return {"error": _described(error), "memory": False}


def _described(error: BaseException) -> str:
    """In one line, then with its traceback."""
    try:
        return f"{_in_one_line(error)}\n{cut(traceback.format_exc())}"
    except BaseException:  # of an exception that is not made as its class is: a SyntaxError whose line is a number
        return cut(f"{type(error).__name__}, which cannot be shown", MAX_LINE_CHARS)


def _in_one_line(error: BaseException) -> str:
    lines = traceback.format_exception_only(error)  # of a SyntaxError the place comes first, notes come last
    return cut(" ".join(next(line for line in lines if not line.startswith(" ")).split()), MAX_LINE_CHARS)


def _call(function: Callable[..., Any], name: str, kwargs: dict[str, Any], num_rows: int) -> Scored:
    """One finite float or None (NaN counts as None) per row, and by row why another value is not taken.

    Raises ValueError naming the reward where there is not one value per row.
    """
    values = function(**kwargs)
    if inspect.isawaitable(values):
        values = _runner().run(_awaited(values))
    # Sets have no order, and of a mapping the keys would be taken.
    if isinstance(values, str | bytes | bytearray | Set | Mapping) or not hasattr(values, "__iter__"):
        raise ValueError(f"reward {name!r} returned {type(values).__name__}, expected a list of {num_rows} numbers")
    items = list(islice(values, num_rows + 1))  # a generator may go on for ever
    if len(items) != num_rows:
        count = len(items) if len(items) < num_rows else f"more than {num_rows}"
        raise ValueError(f"reward {name!r} returned {count} values for {num_rows} completions")
    checked: list[float | None] = [None] * num_rows
    reasons: dict[int, str] = {}
    for row, item in enumerate(items):
        try:
            checked[row] = _as_float(item)
        except (TypeError, ValueError, OverflowError):
            reason = f"reward {name!r} returned {item!r:.80}, expected a finite number or None"
            reasons[row] = cut(reason, MAX_LINE_CHARS)
    return checked, reasons


@cache
def _runner() -> Any:
    """One event loop for all calls: a client that a module keeps, of HTTP say, belongs to the loop that it began in."""
    import asyncio  # 50 ms that most rewards never need

    return asyncio.Runner()


async def _awaited(values: Any) -> Any:
    return await values


def _as_float(item: Any) -> float | None:
    if item is None:
        return None
    if isinstance(item, str | bytes | bytearray) or (isinstance(item, Complex) and not isinstance(item, Real)):
        raise TypeError  # float would read "1.0", and of NumPy's complex numbers the real part
    value = float(item)
    if _isinf(value):
        raise ValueError
    return None if _isnan(value) else value


def cut(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    """At most `limit` characters, the beginning and the end; printable anywhere."""
    if len(text) > limit:
        text = f"{text[: limit // 4]} [{len(text) - limit} characters cut] {text[-(limit - limit // 4) :]}"
    return text.encode("utf-8", "replace").decode()


if __name__ == "__main__":
    keep(int(sys.argv[1]), int(sys.argv[2]), serve)
