"""Takes a failed call apart, so that a row that fails costs itself and no other row.

A call is one reward on up to 64 rows. When it fails:

1. It may be the reward, or a gold. If the call was lost (time, memory, a crash), rows of up to three different prompts
   are tried without their completions. Three prompts lost like that in a step that has scored nothing: the reward is
   given up for the step. A prompt lost like that: its rows have no score, and are not tried.
2. Each other row alone: on a fresh worker, which may have to import, with the whole time limit, and after that with a
   quarter of it. An exception leaves its row without a score.
3. Each row that was lost on a worker in use, alone on a fresh one, with the whole limit. Lost again, or lost on a fresh
   worker at once, it is the completion's own doing, which then scores 0, if the row is not lost without it.

Time: one limit for each call, and for steps 1 to 3 of a reward BUDGET_LIMITS limits (a minute at least) in one step of
training; rows that are not tried by then have no score.

A reward that compares the samples of a prompt would give a row alone another value: after a failed call each group is
tried by itself, on a fresh worker, and fails as a whole.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from r1fast.rewards.process import CallFailed
from r1fast.rewards.worker import Scored

BUDGET_LIMITS = 16.0
LOWEST_BUDGET_S = 60.0  # short limits end before a fresh worker has started
LATER_TRY = 0.25  # of the limit
MAX_PROBES = 3

# call(rows, timeout_s, *, empty, fresh) scores rows, and says by place in `rows` why a value is missing; CallFailed.
# empty: without completions. fresh: in a process that has seen no completion.
RewardCall = Callable[..., Scored]


@dataclass
class Outcome:
    """By row: the value, why there is none, and why it is 0 (the completion alone was lost)."""

    values: dict[int, float | None] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    exceeded: dict[int, str] = field(default_factory=dict)

    def __or__(self, other: "Outcome") -> "Outcome":
        return Outcome(self.values | other.values, self.failed | other.failed, self.exceeded | other.exceeded)


class Isolation:
    """The calls of one reward in one step. Its methods may run in several threads, each with rows of its own."""

    def __init__(self, call: RewardCall, timeout_s: float, prompt_of: Callable[[int], Hashable]) -> None:
        """prompt_of: what is the same for rows that differ in nothing but their completions."""
        self._call, self._timeout_s, self._prompt_of = call, timeout_s, prompt_of
        self._lock = threading.Lock()
        self._left_s = max(BUDGET_LIMITS * timeout_s, LOWEST_BUDGET_S)
        self._without_completion: dict[Hashable, str | None] = {}  # why its call was lost
        self._has_scored = False
        self._given_up: str | None = None  # why no further row is tried

    def score(self, rows: Sequence[int]) -> Outcome:
        outcome = Outcome()
        if self._given_up is None:
            try:
                self._keep(outcome, rows, self._call(rows, self._timeout_s, empty=False, fresh=False))
                if outcome.failed and len(rows) > 1:  # values of a wrong kind: perhaps because of one row
                    self._alone(outcome, sorted(outcome.failed))
            except CallFailed as error:
                self._take_apart(outcome, rows, error)
        return self._completed(outcome, rows)

    def score_groups(self, groups: Sequence[Sequence[int]]) -> Outcome:
        """The same for a reward that needs the rows of each group together."""
        outcome = Outcome()
        rows = [row for group in groups for row in group]
        if self._given_up is None:
            try:
                self._keep(outcome, rows, self._call(rows, self._timeout_s, empty=False, fresh=False))
            except CallFailed as error:
                if error.loading:
                    self._given_up = str(error)
                else:
                    self._groups_alone(outcome, groups)
        return self._completed(outcome, rows)

    def _groups_alone(self, outcome: Outcome, groups: Sequence[Sequence[int]]) -> None:
        for group in groups:
            try:
                self._keep(outcome, group, self._try(group))
            except CallFailed as error:
                outcome.failed |= dict.fromkeys(group, str(error))

    def _completed(self, outcome: Outcome, rows: Sequence[int]) -> Outcome:
        for row in rows:
            if row not in outcome.values:
                outcome.values[row] = None
                outcome.failed.setdefault(row, self._given_up or "not tried")
        return outcome

    def _take_apart(self, outcome: Outcome, rows: Sequence[int], error: CallFailed) -> None:
        if error.loading:
            self._given_up = str(error)
        elif error.lost:
            self._probe(rows, error)
        if self._given_up is None:
            self._alone(outcome, rows)
            if not error.lost and all(row in outcome.failed for row in rows):  # its words are about the whole call
                outcome.failed = dict.fromkeys(rows, str(error))

    def _probe(self, rows: Sequence[int], error: CallFailed) -> None:
        firsts = list({self._prompt_of(row): row for row in reversed(rows)}.values())[::-1]
        for row in sorted({firsts[i * (len(firsts) - 1) // (MAX_PROBES - 1)] for i in range(MAX_PROBES)}):
            try:
                return self._check_prompt(row)
            except _NoTimeLeft:
                return
            except CallFailed:
                continue
        lost = [reason for reason in self._without_completion.values() if reason is not None]
        if len(lost) >= MAX_PROBES and not self._has_scored:
            self._given_up = f"{error}; without completions too, so the reward is given up for this step"

    def _alone(self, outcome: Outcome, rows: Sequence[int]) -> None:
        """Scores each row alone, and then once more those that were lost on a worker that had seen others."""
        suspects = []
        fresh = True
        for row in rows:
            outcome.failed.pop(row, None)
            if self._without_completion.get(self._prompt_of(row)) is not None:
                suspects.append(row)  # no need to try
                continue
            try:
                self._keep(outcome, [row], self._try([row], share=1.0 if fresh else LATER_TRY, fresh=fresh))
                fresh = False
            except CallFailed as error:
                if error.lost and not fresh:
                    suspects.append(row)
                else:
                    self._blame(outcome, row, error)
                fresh = error.lost
        for row in suspects:
            try:
                self._check_prompt(row)
                self._keep(outcome, [row], self._try([row]))
            except CallFailed as error:
                self._blame(outcome, row, error)

    def _blame(self, outcome: Outcome, row: int, error: CallFailed) -> None:
        """Of a row that failed for itself."""
        try:
            if error.lost:
                self._check_prompt(row)
                outcome.values[row], outcome.exceeded[row] = 0.0, str(error)
                return
        except CallFailed as prompt_failed:
            error = prompt_failed
        outcome.failed[row] = str(error)

    def _check_prompt(self, row: int) -> None:
        """CallFailed if a row is lost even with an empty completion; an exception is a reward that expects one."""
        prompt = self._prompt_of(row)
        if prompt not in self._without_completion:
            try:
                self._try([row], empty=True)
                self._without_completion[prompt] = None
            except _NoTimeLeft:
                raise
            except CallFailed as error:
                self._without_completion[prompt] = str(error) if error.lost else None
        if (reason := self._without_completion[prompt]) is not None:
            raise CallFailed(f"without its completion too: {reason}", lost=False)

    def _try(self, rows: Sequence[int], *, share: float = 1.0, empty: bool = False, fresh: bool = True) -> Scored:
        if self._left_s <= 0:
            raise _NoTimeLeft
        start = time.monotonic()
        try:
            return self._call(rows, self._timeout_s * share, empty=empty, fresh=fresh)
        finally:
            with self._lock:
                self._left_s -= time.monotonic() - start

    def _keep(self, outcome: Outcome, rows: Sequence[int], scored: Scored) -> None:
        values, reasons = scored
        self._has_scored = True
        outcome.values |= dict(zip(rows, values, strict=True))
        outcome.failed |= {rows[place]: reason for place, reason in reasons.items()}


class _NoTimeLeft(CallFailed):
    def __init__(self) -> None:
        super().__init__("not tried alone: the time for taking failed calls apart is used up", lost=False)
