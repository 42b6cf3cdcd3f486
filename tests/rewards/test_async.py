"""`async def` rewards, and rewards that compare the samples of a prompt: awaited, limited and taken apart as others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1fast.rewards import isolation
from r1fast.rewards.isolation import Isolation
from r1fast.rewards.pool import RewardPool, RewardResult
from r1fast.rewards.process import CallFailed

REWARDS_PY = """
import asyncio
import os

lock = asyncio.Lock()  # as a client of HTTP is: kept by the module, of the loop that first waits for it


async def judge(prompts, completions, gold, **columns):
    met = asyncio.Barrier(len(completions))

    async def one(completion, gold):
        await met.wait()  # all rows are under way at once
        if completion == "hang":
            await asyncio.sleep(600)
        if completion == "raise":
            raise ConnectionError("no such server")
        return None if completion == "none" else float(completion == gold)

    return await asyncio.gather(*(one(*row) for row in zip(completions, gold)))


async def with_client(completions, **_):
    async with lock:
        waiting = asyncio.create_task(lock.acquire())
        await asyncio.sleep(0)
        if waiting.done():
            waiting.result()
        waiting.cancel()
    return [os.getpid()] * len(completions)


def best_of(completions, group_ids, **_):
    if "exit" in completions:
        os._exit(3)
    if "raise" in completions:
        raise KeyError("no")
    longest = {group: max(len(c) for c, g in zip(completions, group_ids) if g == group) for group in group_ids}
    return [float(len(c) == longest[g]) for c, g in zip(completions, group_ids)]
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file: Path = tmp_path_factory.mktemp("rewards") / "async_rewards.py"
    file.write_text(REWARDS_PY)
    return str(file)


def score(pool: RewardPool, completions: list[str], **columns: Any) -> RewardResult:
    return pool.score(["p"] * len(completions), completions, [[1]] * len(completions), columns)


def test_rows_of_a_coroutine_function_run_together(path: str) -> None:
    with RewardPool({f"{path}:judge": {}}, timeout_s=5.0) as pool:
        result = score(pool, ["a", "b", "none"], gold=["a", "a", "a"])
        np.testing.assert_array_equal(next(iter(result.values.values())), [1.0, 0.0, np.nan])
        result = score(pool, ["a", "raise"], gold=["a", "a"])
        np.testing.assert_array_equal(next(iter(result.values.values())), [1.0, np.nan])
    assert "ConnectionError: no such server" in result.failures[0] and "row 1" in result.failures[0]


def test_a_hanging_coroutine_costs_its_row(path: str) -> None:
    with RewardPool({f"{path}:judge": {}}, timeout_s=1.0) as pool:
        result = score(pool, ["a", "hang", "b"], gold=["a"] * 3)
    assert next(iter(result.values.values())).tolist() == [1.0, 0.0, 0.0] and "no result after" in result.failures[0]
    assert next(iter(result.exceeded.values())).tolist() == [False, True, False]


def test_what_a_module_keeps_works_in_every_call(path: str) -> None:
    with RewardPool({f"{path}:with_client": {}}) as pool:
        pids = {float(next(iter(score(pool, ["a"]).values.values()))[0]) for _ in range(3)}
    assert len(pids) == 1, "no call failed, was tried again on a fresh worker, and had its value there"


def test_a_group_that_fails_costs_no_other_group(path: str) -> None:
    completions = ["a", "exit", "b", "bb", "raise", "ccc", "d", "dd"]
    with RewardPool({f"{path}:best_of": {}}) as pool:
        result = score(pool, completions, group_ids=[0, 0, 1, 1, 2, 2, 3, 3])
    (values,) = result.values.values()
    np.testing.assert_array_equal(values, [np.nan, np.nan, 0, 1, np.nan, np.nan, 0, 1])
    assert result.failed.tolist() == [True, True, False, False, True, True, False, False]
    assert [any(word in text for text in result.failures) for word in ("exit code 3", "KeyError")] == [True, True]


def test_groups_are_not_passed_by_option(path: str) -> None:
    with pytest.raises(ValueError, match="has no keyword 'group_ids'"):
        RewardPool({f"{path}:best_of": {"group_ids": [1]}})
    with (
        RewardPool({f"{path}:best_of": {}}) as pool,
        pytest.raises(ValueError, match=r"needs the columns .'group_ids'"),
    ):
        score(pool, ["a"])


def test_groups_that_all_hang_take_a_stated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def call(rows: Any, timeout_s: float, **_: Any) -> Any:
        nonlocal now, calls
        now, calls = now + timeout_s, calls + 1
        raise CallFailed("no result", lost=True)

    monkeypatch.setattr(isolation.time, "monotonic", lambda: now)
    judged = Isolation(call, 30.0, lambda row: row)
    outcome = judged.score_groups([[2 * i, 2 * i + 1] for i in range(32)])
    assert set(outcome.failed) == set(range(64)) and calls == 1 + isolation.BUDGET_LIMITS
    assert "time for taking failed calls apart is used up" in outcome.failed[63]


def test_a_reward_that_cannot_be_loaded_fails_for_all_groups() -> None:
    def call(*_: Any, **__: Any) -> Any:
        raise CallFailed("no such file", lost=False, loading=True)

    judged = Isolation(call, 30.0, lambda row: row)
    assert judged.score_groups([[0], [1, 2]]).failed == dict.fromkeys(range(3), "no such file")
    assert judged.score_groups([[3]]).failed == {3: "no such file"}
