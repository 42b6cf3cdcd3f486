"""Runs rewards in processes that can be killed: a reward that hangs or crashes costs its rows, not the run.

Each worker is a plain subprocess speaking length-prefixed pickles over its pipes (worker.py). A call that passes the
time limit, dies or raises is scored None for its rows, logged and listed in `RewardResult.failures`; the worker is
killed with everything that it started, and a new one starts with the next call.
"""

import contextlib
import inspect
import logging
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np

from r1fast.rewards.registry import did_you_mean, locate, resolve
from r1fast.rewards.worker import HEADER

logger = logging.getLogger(__name__)

MAX_CHUNK_ROWS = 64
LOAD_TIMEOUT_S = 120.0  # process start and the import of a user's module, which may pull in anything
_ALWAYS_THERE = {"prompts", "completions", "completion_ids", "response_format", "finish_reason", "prefilled"}


@dataclass(frozen=True)
class RewardResult:
    """values: reward name -> float64 [N], NaN where it gave None or failed. total: weighted sum over the rewards
    that applied, NaN where none did. failures: one text per failed call, naming reward, rows and reason.
    failed: bool [N], True where any reward's call failed: such a completion is not scored, rather than scored low."""

    values: dict[str, np.ndarray]
    total: np.ndarray
    failures: list[str]
    failed: np.ndarray


class RewardPool:
    """Named rewards with weights, run in `num_workers` processes with `timeout_s` seconds for each call.

    rewards: name -> weight, or {"weight": w, keyword: value, ...}; names as in registry.resolve. A call is one reward
    on at most 64 rows. Raises ValueError, naming the reward, for one that does not exist or does not take a keyword.
    """

    def __init__(
        self, rewards: Mapping[str, float | Mapping[str, Any]], *, num_workers: int = 1, timeout_s: float = 30.0
    ) -> None:
        if not rewards:
            raise ValueError("rewards is empty, expected at least one, such as {accuracy: 1.0, format: 1.0}")
        if num_workers < 1 or not timeout_s > 0:
            raise ValueError(f"expected num_workers >= 1 and timeout_s > 0, got {num_workers=} and {timeout_s=}")
        self.timeout_s = timeout_s
        self._num_workers = num_workers
        self._rewards = [_Reward.build(name, setting) for name, setting in rewards.items()]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        workers = [_Worker() for _ in range(num_workers)]
        for worker in workers:
            self._idle.put(worker)
        self._closer = weakref.finalize(self, _kill_all, workers)  # also when the pool is dropped, or Python exits

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers. A closed pool scores nothing more."""
        self._closer()

    def check(self, columns: set[str] | None) -> None:
        """Raises ValueError for a reward that needs a column which the data does not have. None: not known yet."""
        if columns is not None:
            self._require(columns | _ALWAYS_THERE)

    def _require(self, columns: set[str]) -> None:
        for reward in self._rewards:
            if missing := reward.required_columns - columns:
                hints = "".join(did_you_mean(name, columns) for name in sorted(missing))
                raise ValueError(
                    f"reward {reward.name!r} needs the columns {sorted(missing)}, the data has {sorted(columns)}"
                    f"{hints}; rename the columns, or set the value as a keyword of the reward"
                )

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> RewardResult:
        """Scores N completions with every reward; each column holds one value per completion."""
        if not self._closer.alive:
            raise ValueError("this RewardPool is closed, make a new one")
        table = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        num_rows = len(completions)
        if wrong := {name: len(column) for name, column in table.items() if len(column) != num_rows}:
            raise ValueError(f"expected one value per completion ({num_rows}), got columns of other lengths: {wrong}")
        self._require(set(table))
        values = {reward.name: np.full(num_rows, np.nan) for reward in self._rewards}
        chunk_rows = max(1, min(MAX_CHUNK_ROWS, math.ceil(num_rows / self._num_workers)))
        calls = [(reward, slice(i, i + chunk_rows)) for reward in self._rewards for i in range(0, num_rows, chunk_rows)]
        failures: list[str] = []
        failed = np.zeros(num_rows, dtype=bool)
        with ThreadPoolExecutor(self._num_workers) as executor:
            outcomes = executor.map(lambda call: self._run(call[0], table, call[1]), calls)
            for (reward, rows), outcome in zip(calls, outcomes, strict=True):
                if isinstance(outcome, str):
                    last = min(rows.stop, num_rows) - 1
                    failures.append(f"reward {reward.name!r}, rows {rows.start}-{last}: {outcome}")
                    failed[rows] = True
                    logger.warning("%s", failures[-1])
                else:
                    values[reward.name][rows] = [np.nan if value is None else value for value in outcome]
        return RewardResult(values, self._weighted_total(values, num_rows), failures, failed)

    def _run(self, reward: "_Reward", table: Mapping[str, Sequence[Any]], rows: slice) -> list[float | None] | str:
        """The chunk's values, or why there are none."""
        kwargs = {name: list(column[rows]) for name, column in table.items() if reward.takes(name)} | reward.options
        num_rows = len(table["completions"][rows])
        # CPU time counts once per core, so the worker's own limit stays behind the pool's whatever it runs.
        cpu_limit_s = self.timeout_s * (os.cpu_count() or 1) + 1.0
        worker = self._idle.get()
        try:
            worker.load(reward.name, reward.location)
            return worker.request(("call", reward.name, kwargs, num_rows, cpu_limit_s), self.timeout_s)
        except _CallFailed as error:
            return str(error)
        finally:
            self._idle.put(worker)

    def _weighted_total(self, values: dict[str, np.ndarray], num_rows: int) -> np.ndarray:
        total, applied = np.zeros(num_rows), np.zeros(num_rows, dtype=bool)
        for reward in self._rewards:
            scored = ~np.isnan(values[reward.name])
            total[scored] += reward.weight * values[reward.name][scored]
            applied |= scored
        return np.where(applied, total, np.nan)


@dataclass(frozen=True)
class _Reward:
    name: str
    location: str
    weight: float
    options: dict[str, Any]
    accepted: frozenset[str] | None  # None: takes every column
    required_columns: frozenset[str]

    @classmethod
    def build(cls, name: str, setting: float | Mapping[str, Any]) -> "_Reward":
        options = dict(setting) if isinstance(setting, Mapping) else {"weight": setting}
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"reward {name!r} has weight {weight!r}, expected a finite number or {{weight: 1.0, ...}}")
        parameters = _signature(name, resolve(name))
        named = {key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        for key in options:
            if key not in named or key in ("prompts", "completions", "completion_ids"):
                allowed = sorted(named - {"prompts", "completions", "completion_ids"})
                raise ValueError(
                    f"reward {name!r} has no keyword {key!r}, expected one of {allowed}{did_you_mean(key, allowed)}"
                )
        # `**_` is there to swallow columns, `**columns` to read them.
        takes_all = any(p.kind is p.VAR_KEYWORD and not key.startswith("_") for key, p in parameters.items())
        required = {key for key in named if parameters[key].default is inspect.Parameter.empty} - set(options)
        accepted = None if takes_all else frozenset(named)
        return cls(name, locate(name), float(weight), options, accepted, frozenset(required))

    def takes(self, column: str) -> bool:
        return self.accepted is None or column in self.accepted


def _signature(name: str, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward {name!r} has no readable signature ({error}); wrap it in a Python function"
        ) from error
    for key, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(f"reward {name!r} takes {key!r} by position only; columns are passed by name")
    return parameters


class _CallFailed(Exception):
    """Why a call has no values: a time limit, a dead worker, or the traceback of the reward."""


class _Worker:
    """One process, started by the first request and again by the first request after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: set[str] = set()

    def load(self, name: str, location: str) -> None:
        if name not in self._loaded:
            self.request(("load", name, location), LOAD_TIMEOUT_S)
            self._loaded.add(name)

    def request(self, message: tuple[Any, ...], timeout_s: float) -> Any:
        """Sends a message and waits for its reply; kills the process if none comes in time."""
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        deadline = time.monotonic() + timeout_s
        process = self._process = self._process or _start()
        try:
            _write(process, HEADER.pack(len(payload)) + payload, deadline)
            (num_bytes,) = HEADER.unpack(_read(process, HEADER.size, deadline))
            status, value = pickle.loads(_read(process, num_bytes, deadline))
        except TimeoutError:
            self.kill()
            raise _CallFailed(f"no result after {timeout_s:g} s, worker killed") from None
        except (EOFError, BrokenPipeError):
            raise _CallFailed(f"the worker died: {_describe_exit(self.kill())}") from None
        except BaseException:  # an interrupt leaves half a message in the pipe
            self.kill()
            raise
        if status == "error":
            raise _CallFailed(value)
        return value

    def kill(self) -> int:
        """Kills the process and all that it started; returns its exit code."""
        process, self._process = self._process, None
        self._loaded.clear()
        if process is None:
            return 0
        # It leads a session of its own. Before wait(): until then nobody else can get its process id.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        return process.returncode


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()


def _start() -> subprocess.Popen[bytes]:
    # The worker must find what this process finds: r1fast itself and the user's reward modules.
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", "r1fast.rewards.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    return process


def _write(process: subprocess.Popen[bytes], data: bytes, deadline: float) -> None:
    assert process.stdin is not None
    rest = memoryview(data)
    while rest:
        _wait(process.stdin.fileno(), select.POLLOUT, deadline)
        rest = rest[os.write(process.stdin.fileno(), rest) :]


def _read(process: subprocess.Popen[bytes], num_bytes: int, deadline: float) -> bytes:
    assert process.stdout is not None
    data = bytearray()
    while len(data) < num_bytes:
        _wait(process.stdout.fileno(), select.POLLIN, deadline)
        piece = os.read(process.stdout.fileno(), min(num_bytes - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Waits until the pipe is ready; TimeoutError after the deadline. poll: select fails above descriptor 1023."""
    poller = select.poll()
    poller.register(descriptor, event)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"signal {-code} ({signal.strsignal(-code)})"
    return f"exit code {code}"
