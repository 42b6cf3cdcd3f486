"""What a failed call costs: the rows at fault, and a stated time. The calls are scripted: nothing here waits."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from r1fast.rewards import isolation as module
from r1fast.rewards.isolation import BUDGET_LIMITS, Isolation
from r1fast.rewards.process import CallFailed

LIMIT_S = 30.0
CHUNK = range(64)


class Script:
    """A reward whose call is lost at its time limit, or raises, for the rows named; it scores row / 64."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        hangs: Sequence[int] = (),
        raises: Sequence[int] = (),
        hangs_without: Callable[[int], bool] = lambda row: False,
        group: int = 8,
        seconds: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.calls: list[tuple[list[int], bool, bool]] = []
        self.hangs, self.raises, self.hangs_without, self.seconds = set(hangs), set(raises), hangs_without, seconds
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        self.isolation = Isolation(self.call, LIMIT_S, lambda row: row // group)

    def call(self, rows: Sequence[int], timeout_s: float, *, empty: bool = False, fresh: bool = False) -> Any:
        self.calls.append((list(rows), empty, fresh))
        lost = any(self.hangs_without(row) if empty else row in self.hangs for row in rows)
        if lost or self.seconds > timeout_s:
            self.now += timeout_s
            raise CallFailed(f"no result after {timeout_s:g} s", lost=True)
        self.now += self.seconds
        if not empty and (bad := self.raises.intersection(rows)):
            raise CallFailed(f"KeyError: {len(bad)} of {len(rows)}", lost=False)
        return [row / 64 for row in rows], {}


def check_innocents(outcome: Any, guilty: set[int]) -> None:
    assert set(outcome.values) == {*CHUNK}
    assert {row: outcome.values[row] for row in CHUNK if row not in guilty} == {
        row: row / 64 for row in CHUNK if row not in guilty
    }


def test_nothing_fails(monkeypatch) -> None:
    script = Script(monkeypatch)
    outcome = script.isolation.score(CHUNK)
    check_innocents(outcome, set())
    assert script.calls == [([*CHUNK], False, False)] and not outcome.failed and not outcome.exceeded


@pytest.mark.parametrize("guilty", [[0], [63], [5, 6, 40]])
def test_completions_that_hang_score_0(monkeypatch, guilty: list[int]) -> None:
    script = Script(monkeypatch, hangs=guilty)
    outcome = script.isolation.score(CHUNK)
    check_innocents(outcome, set(guilty))
    assert [outcome.values[row] for row in guilty] == [0.0] * len(guilty)
    assert set(outcome.exceeded) == set(guilty) and not outcome.failed
    assert script.now <= LIMIT_S * (1 + 1.25 * len(guilty))
    verdicts = [rows for rows, empty, fresh in script.calls if fresh and not empty and len(rows) == 1]
    assert {row for rows in verdicts for row in rows} >= set(guilty), "judged in a process that has seen nothing else"


def test_a_fresh_worker_has_the_time_to_import(monkeypatch) -> None:
    """Each loss costs the process; what comes next must not be lost because it imports again."""
    script = Script(monkeypatch, hangs=[3, 20])
    inner = script.call

    def call(rows: Sequence[int], timeout_s: float, *, empty: bool = False, fresh: bool = False) -> Any:
        script.seconds = 0.8 * LIMIT_S if fresh and not empty else 0.0
        return inner(rows, timeout_s, empty=empty, fresh=fresh)

    outcome = Isolation(call, LIMIT_S, lambda row: row // 8).score(CHUNK)
    check_innocents(outcome, {3, 20})
    assert set(outcome.exceeded) == {3, 20} and not outcome.failed


def test_completions_that_raise_have_no_score(monkeypatch) -> None:
    script = Script(monkeypatch, raises=[7, 8])
    outcome = script.isolation.score(CHUNK)
    check_innocents(outcome, {7, 8})
    assert outcome.failed == {7: "KeyError: 1 of 1", 8: "KeyError: 1 of 1"} and not outcome.exceeded
    assert outcome.values[7] is None and len(script.calls) == 65
    assert script.calls[1][2], "an exception may have left something behind: from here on in another process"


def test_a_reward_that_always_raises_keeps_the_words_of_the_whole_call(monkeypatch) -> None:
    outcome = Script(monkeypatch, raises=CHUNK).isolation.score(CHUNK)
    assert outcome.failed == dict.fromkeys(CHUNK, "KeyError: 64 of 64")
    assert set(outcome.values.values()) == {None}


def test_a_gold_that_hangs_costs_its_rows(monkeypatch) -> None:
    """Not the completions' fault: no score, and they are not tried one by one."""
    script = Script(monkeypatch, hangs=range(8, 16), hangs_without=lambda row: row // 8 == 1)
    outcome = script.isolation.score(CHUNK)
    check_innocents(outcome, set(range(8, 16)))
    assert set(outcome.failed) == set(range(8, 16)) and not outcome.exceeded
    assert all("without its completion too" in reason for reason in outcome.failed.values())
    assert script.now <= LIMIT_S * (1 + 8 * 0.25 + 1)
    again = len(script.calls)
    script.isolation.score(range(8, 16))
    assert len(script.calls) == again + 1, "known by now"


def test_a_reward_that_always_hangs_is_given_up(monkeypatch) -> None:
    script = Script(monkeypatch, hangs=range(512), hangs_without=lambda row: True)
    for first in range(0, 512, 64):
        outcome = script.isolation.score(range(first, first + 64))
        assert set(outcome.failed) == set(range(first, first + 64)) and not outcome.exceeded
    assert script.now == 4 * LIMIT_S and len(script.calls) == 4
    assert "given up" in outcome.failed[511]


def test_small_calls_of_a_reward_that_always_hangs(monkeypatch) -> None:
    """One prompt a call: no single one proves anything."""
    script = Script(monkeypatch, hangs=range(512), hangs_without=lambda row: True)
    for first in range(0, 512, 8):
        script.isolation.score(range(first, first + 8))
    assert script.now == 6 * LIMIT_S


def test_many_bad_golds_do_not_give_up_a_reward_that_works(monkeypatch) -> None:
    script = Script(monkeypatch, hangs=range(64), hangs_without=lambda row: row < 64)
    script.isolation.score(range(64, 128))
    assert set(script.isolation.score(CHUNK).failed) == {*CHUNK}
    assert script.isolation.score(range(128, 192)).values == {row: row / 64 for row in range(128, 192)}


def test_the_time_is_bounded_whatever_hangs(monkeypatch) -> None:
    script = Script(monkeypatch, hangs=range(0, 512, 2))
    outcomes = [script.isolation.score(range(first, first + 64)) for first in range(0, 512, 64)]
    # One limit for each call of 64, the budget, and the one that was running when it was used up.
    assert script.now <= LIMIT_S * (8 + BUDGET_LIMITS + 1)
    assert all(len(outcome.values) == 64 for outcome in outcomes)
    assert all(outcomes[0].values[row] == row / 64 for row in range(1, 64, 2))
    assert not {row for outcome in outcomes for row in outcome.exceeded if row % 2}
    assert "used up" in outcomes[-1].failed[511]


def test_slow_is_not_lost(monkeypatch) -> None:
    """A row that takes longer alone than the first try has the whole limit."""
    script = Script(monkeypatch, raises=[3], seconds=0.9 * LIMIT_S)
    outcome = script.isolation.score(range(4))
    assert [outcome.values[row] for row in range(3)] == [0.0, 1 / 64, 2 / 64] and set(outcome.failed) == {3}
    assert not outcome.exceeded


def test_a_function_that_cannot_be_loaded_is_not_tried_again(monkeypatch) -> None:
    script = Script(monkeypatch)

    def call(rows: Sequence[int], timeout_s: float, **_: bool) -> Any:
        script.calls.append((list(rows), False, False))
        raise CallFailed("no such file", lost=False, loading=True)

    isolation = Isolation(call, LIMIT_S, lambda row: row)
    assert [isolation.score(range(i, i + 4)).failed[i] for i in (0, 4)] == ["no such file"] * 2
    assert len(script.calls) == 1


def test_values_of_a_wrong_kind_are_asked_for_alone(monkeypatch) -> None:
    def call(rows: Sequence[int], timeout_s: float, **_: bool) -> Any:
        bad = 2 in rows
        return [None if bad else row / 64 for row in rows], dict.fromkeys(range(len(rows)), "a list") if bad else {}

    outcome = Isolation(call, LIMIT_S, lambda row: row).score(range(4))
    assert outcome.values == {0: 0.0, 1: 1 / 64, 2: None, 3: 3 / 64} and outcome.failed == {2: "a list"}
