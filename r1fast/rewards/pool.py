"""Runs rewards in processes that can be killed: a reward that hangs or crashes costs the rows that make it do so.

A call is one reward on at most 64 rows, in a process (process.py, worker.py) that is killed at a time limit with all
that it started (keeper.py). A call that fails is taken apart until the rows at fault are known (isolation.py). The
rewards of r1fast share a process; one of the user's shares it with no other, so that it cannot change their values.
A reward with a parameter `group_ids` compares the samples of a prompt, so its calls take whole groups.
"""

import inspect
import logging
import math
import pickle
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from itertools import takewhile
from threading import Lock
from typing import Any, Self

import numpy as np

from r1fast.rewards.isolation import Isolation, Outcome
from r1fast.rewards.process import WorkerProcess, memory_share
from r1fast.rewards.registry import SECONDS_PER_ROW, is_builtin, locate, resolve, takes_messages
from r1fast.rewards.worker import Scored
from r1fast.wording import did_you_mean

logger = logging.getLogger(__name__)

MAX_CHUNK_ROWS = 64
_ALWAYS_THERE = {
    "prompts", "completions", "completion_ids", "group_ids", "response_format", "finish_reason", "prefilled",
}  # fmt: skip
_PER_COMPLETION = ("completions", "completion_ids", "finish_reason", "prefilled")
_ONLY_IN_TRL = ("trainer_state", "log_extra", "log_metric", "environments")  # TRL 1.16, GRPOTrainer
Table = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class RewardResult:
    """values: reward name -> float64 [N], NaN where it gave None or failed. failures: one text per reason, naming
    reward, rows and reason. failed_by, exceeded: reward name -> bool [N]: where this one failed, and where its value
    is 0 because the completion alone passed the limits of time or memory or ended the worker."""

    values: dict[str, np.ndarray]
    failures: list[str]
    failed_by: dict[str, np.ndarray]
    exceeded: dict[str, np.ndarray]

    @property
    def failed(self) -> np.ndarray:
        """bool [N], True where any reward failed: such a completion is not scored, rather than scored low."""
        return np.logical_or.reduce(list(self.failed_by.values()))


class RewardPool:
    """Named rewards, at most `num_workers` calls at a time with `timeout_s` seconds for each.

    rewards: name -> keyword arguments; names as in registry.resolve. memory_limit_gb: data of a worker, and of each
    process that it starts; None: its part of half of the machine's memory.
    Raises ValueError, naming the reward, for one that does not exist or does not take a keyword.
    """

    def __init__(
        self,
        rewards: Mapping[str, Mapping[str, Any]],
        *,
        num_workers: int = 1,
        timeout_s: float = 30.0,
        memory_limit_gb: float | None = None,
    ) -> None:
        if not rewards:
            raise ValueError("rewards is empty, expected at least one, such as {'accuracy': {}, 'format': {}}")
        if num_workers < 1 or not timeout_s > 0:
            raise ValueError(f"expected num_workers >= 1 and timeout_s > 0, got {num_workers=} and {timeout_s=}")
        if memory_limit_gb is not None and not memory_limit_gb > 0:
            raise ValueError(f"expected memory_limit_gb > 0 or None, got {memory_limit_gb=}")
        self.timeout_s = timeout_s
        self._memory_bytes = memory_share(num_workers) if memory_limit_gb is None else int(memory_limit_gb * 2**30)
        self._num_workers = num_workers
        self._rewards = [_Reward(name, options) for name, options in rewards.items()]
        self._lock = Lock()
        self._idle: dict[str, list[WorkerProcess]] = {}  # by what shares a process
        self._workers: list[WorkerProcess] = []
        self._told: set[tuple[str, str]] = set()  # reward and kind of the failures whose whole text has been logged
        # Also when the pool is dropped, or Python exits.
        self._closer = weakref.finalize(self, _kill_all, self._workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
            if missing := sorted(reward.required_columns - columns):
                hints = "".join(did_you_mean(name, columns) for name in missing)
                what = f"reward {reward.name!r} needs the columns {missing}, the data has {sorted(columns)}{hints}"
                raise ValueError(f"{what}; rename the columns, or set the value as a keyword of the reward")

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> RewardResult:
        """Scores N completions with every reward; each column holds one value per completion.

        Column `group_ids`: an integer that is the same for the samples of a prompt.
        """
        if not self._closer.alive:
            raise ValueError("this RewardPool is closed, make a new one")
        table = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        num_rows = len(completions)
        if wrong := {name: len(column) for name, column in table.items() if len(column) != num_rows}:
            raise ValueError(f"expected one value per completion ({num_rows}), got columns of other lengths: {wrong}")
        self._require(set(table))
        chunk_rows = max(1, min(MAX_CHUNK_ROWS, math.ceil(num_rows / self._num_workers)))
        chunks = [range(i, min(i + chunk_rows, num_rows)) for i in range(0, num_rows, chunk_rows)]
        group_chunks = _whole_groups(table["group_ids"], chunk_rows) if "group_ids" in table else []
        prompt_of = partial(_without_completion, table)
        with ThreadPoolExecutor(self._num_workers) as executor:
            parts = {}
            for reward in self._rewards:
                # More for one that bounds each row's time itself: it knows which row is slow, and goes on with others.
                timeout_s = self.timeout_s + chunk_rows * reward.seconds_per_row
                isolation = Isolation(partial(self._call, reward, table), timeout_s, prompt_of)
                if reward.compares:
                    parts[reward.name] = executor.map(isolation.score_groups, group_chunks)
                else:
                    parts[reward.name] = executor.map(isolation.score, chunks)
            outcomes = {name: reduce(Outcome.__or__, outcome, Outcome()) for name, outcome in parts.items()}
        return self._gather(outcomes, num_rows)

    def _call(
        self, reward: "_Reward", table: Table, rows: Sequence[int], timeout_s: float, *, empty: bool, fresh: bool
    ) -> Scored:
        if empty:  # completions of no tokens
            num_rows = len(table["completions"])
            table = {**table, "completions": [""] * num_rows, "completion_ids": [[]] * num_rows}
        kwargs = reward.arguments(table, rows)
        with self._lock:
            idle = self._idle.setdefault(reward.process, [])
            if not idle:
                idle.append(WorkerProcess(self._memory_bytes))
                self._workers.append(idle[-1])
            worker = idle.pop()
        try:
            if fresh and worker.used:
                worker.kill()
            worker.load(reward.name, reward.location)
            worker.used = worker.used or not empty
            return worker.call(reward.name, kwargs, len(rows), timeout_s)
        finally:
            with self._lock:
                idle.append(worker)

    def _gather(self, outcomes: dict[str, Outcome], num_rows: int) -> RewardResult:
        rows = range(num_rows)
        values = {name: np.array([each.values[row] for row in rows], dtype=float) for name, each in outcomes.items()}
        failed_by = {name: np.array([row in each.failed for row in rows], bool) for name, each in outcomes.items()}
        exceeded = {name: np.array([row in each.exceeded for row in rows], bool) for name, each in outcomes.items()}
        failures = [text for name, outcome in outcomes.items() for text in self._failures(name, outcome)]
        return RewardResult(values, failures, failed_by, exceeded)

    def _failures(self, name: str, outcome: Outcome) -> list[str]:
        """One text per kind of failure; each kind is logged once in the life of the pool."""
        why = outcome.failed | {
            row: f"{reason}; it is the completion alone, which scores 0" for row, reason in outcome.exceeded.items()
        }
        rows_by_kind: dict[str, list[int]] = defaultdict(list)
        for row, reason in why.items():
            rows_by_kind[_kind(reason)].append(row)
        texts = []
        for kind, rows in rows_by_kind.items():
            texts.append(f"reward {name!r}, {_row_text(rows)}: {why[rows[0]]}")
            if (name, kind) not in self._told:
                logger.warning("%s", texts[-1])
                self._told.add((name, kind))
        return texts


def headline(failure: str) -> str:
    """A failure on one line, which stands before a traceback."""
    return failure.partition("\n")[0]


def _kind(reason: str) -> str:
    """Equal for reasons that differ in the rows' own words: a traceback without the exception's message, say."""
    first, *lines = reason.split("\n")
    if lines:
        frames = takewhile(lambda line: line.startswith(" "), lines[1:])
        return "\n".join([first.partition(":")[0], *frames])
    return re.sub("returned .*, expected a finite", "", first)


def _row_text(rows: list[int]) -> str:
    """rows 0-63, 70 and 12 others"""
    spans: list[list[int]] = []
    for row in sorted(rows):
        if not spans or row != spans[-1][-1] + 1:
            spans.append([])
        spans[-1].append(row)
    shown = ", ".join(f"{span[0]}" if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans[:5])
    others = sum(map(len, spans[5:]))
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (f" and {others} others" if others else "")


def _without_completion(table: Table, row: int) -> bytes:
    """Equal for rows that differ in their completions only."""
    return pickle.dumps([column[row] for name, column in table.items() if name not in _PER_COMPLETION])


def _whole_groups(group_ids: Sequence[int], chunk_rows: int) -> list[list[list[int]]]:
    """For each call the rows of its groups: as many groups as chunk_rows hold, one at least."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(group_ids):
        groups[group].append(row)
    chunks: list[list[list[int]]] = []
    room = 0
    for rows in groups.values():
        if len(rows) > room:
            chunks.append([])
            room = chunk_rows
        chunks[-1].append(rows)
        room -= len(rows)
    return chunks


class _Reward:
    """How a reward is found, and what it is called with."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name, self.options = name, dict(options)
        function = resolve(name)
        parameters = _signature(name, function)
        named = {key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        allowed = sorted(named - {"prompts", "completions", "completion_ids", "group_ids"})
        if unknown := [key for key in self.options if key not in allowed]:
            what = f"reward {name!r} has no keyword {unknown[0]!r}, expected one of {allowed}"
            raise ValueError(what + did_you_mean(unknown[0], [*allowed, "weight", "domains", "function"]))
        # None: every column. `**_` is there to swallow columns, `**columns` to read them.
        takes_all = any(p.kind is p.VAR_KEYWORD and not key.startswith("_") for key, p in parameters.items())
        self.accepted = None if takes_all else named
        self.required_columns = {key for key in named if parameters[key].default is inspect.Parameter.empty}
        self.required_columns -= self.options.keys()
        self.compares = "group_ids" in named
        if absent := self.required_columns.intersection(_ONLY_IN_TRL):
            raise ValueError(
                f"reward {name!r} needs {sorted(absent)}, which only TRL's trainer passes; give the parameter a default"
            )
        self.location = locate(name)
        self.process = "r1fast" if is_builtin(function) else self.location  # shared by all with the same word here
        self.takes_messages = takes_messages(name, function)
        self.seconds_per_row = SECONDS_PER_ROW[name](**options) if name in SECONDS_PER_ROW else 0.0

    def arguments(self, table: Table, rows: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of the call on these rows."""
        taken = [name for name in table if self.accepted is None or name in self.accepted]
        kwargs: dict[str, Any] = {name: [table[name][row] for row in rows] for name in taken}
        if self.takes_messages and "completions" in kwargs:
            kwargs["completions"] = [
                [{"role": "assistant", "content": text}] if _is_chat(table["prompts"][row]) else text
                for row, text in zip(rows, kwargs["completions"], strict=True)
            ]
        return kwargs | self.options


def _is_chat(prompt: Any) -> bool:
    """A list of messages, as TRL's is_conversational has it."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict) and "role" in prompt[0]


def _signature(name: str, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        text = f"reward {name!r} has no readable signature ({error}); wrap it in a Python function"
        raise ValueError(text) from error
    for key, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(f"reward {name!r} takes {key!r} by position only; columns are passed by name")
    return parameters


def _kill_all(workers: list[WorkerProcess]) -> None:
    for worker in workers:
        worker.kill()
