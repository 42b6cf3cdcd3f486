"""Length rewards by hand-computed numbers, and what must not pay."""

import math
from typing import Any

import pytest

from r1fast.rewards.cosine import cosine
from r1fast.rewards.length import length
from r1fast.rewards.pool import RewardPool

RIGHT, WRONG = ("<think>some thought</think><answer>14</answer>", "<think>some thought</think><answer>13</answer>")
OPEN = "<think>some thought</think><answer>14"


def scored(reward: Any, completions: list[str], lengths: list[int], answer: Any = "14", **options: Any) -> list:
    golds = answer if isinstance(answer, list) else [answer] * len(completions)
    return reward([""] * len(completions), completions, [[0] * n for n in lengths], answer=golds, **options)


def test_length_is_that_of_kimi() -> None:
    """Tokens 10, 20, 30 and 50 of one prompt: 0.5 - (n - 10) / 40; a wrong answer gets at most 0."""
    completions = [RIGHT, RIGHT, WRONG, WRONG, RIGHT, WRONG]
    values = scored(length, completions, [10, 20, 10, 40, 50, 30], group_ids=[7] * 6)
    assert values == pytest.approx([0.5, 0.25, 0.0, -0.25, -0.5, 0.0])


def test_length_compares_within_a_group_only() -> None:
    """Of a batch of two prompts the longest of one is not measured against the shortest of the other."""
    values = scored(length, [RIGHT] * 4, [10, 1000, 20, 2000], group_ids=[0, 1, 0, 1])
    assert values == [0.5, 0.5, -0.5, -0.5]


@pytest.mark.parametrize(
    ("completions", "lengths", "answer", "expected"),
    [
        ([RIGHT, WRONG], [10, 10], "14", [0.0, 0.0]),  # as long
        ([RIGHT], [10], "14", [0.0]),
        (["", RIGHT], [0, 10], "14", [0.0, -0.5]),  # the shortest of all says nothing
        ([RIGHT, RIGHT], [10, 20], None, [None, None]),
        ([RIGHT, RIGHT], [10, 20], "by induction it is clear that we have a proof", [None, None]),
        ([], [], "14", []),
    ],
)
def test_length_that_must_not_pay(completions: Any, lengths: Any, answer: Any, expected: Any) -> None:
    assert scored(length, completions, lengths, answer, group_ids=[0] * len(completions)) == expected


def test_length_of_what_was_cut_off() -> None:
    columns = {"group_ids": [0, 0], "finish_reason": ["length", "stop"]}
    assert scored(length, [OPEN, RIGHT], [10, 20], **columns) == [0.0, -0.5]


@pytest.mark.parametrize(
    ("completion", "tokens", "expected"),
    [
        (RIGHT, 0, 1.0),
        (RIGHT, 250, 0.5 + 0.25 * (1 + math.sqrt(0.5))),
        (RIGHT, 500, 0.75),
        (RIGHT, 1000, 0.5),
        (WRONG, 0, -1.0),
        (WRONG, 500, -0.75),
        (WRONG, 1000, -0.5),
        (RIGHT, 2000, 0.5),  # the cosine itself would be back at 1.0
        (WRONG, 1700, -0.5),
        ("", 0, -1.0),
    ],
)
def test_cosine_is_that_of_trl_up_to_max_len(completion: str, tokens: int, expected: float) -> None:
    assert scored(cosine, [completion], [tokens], max_len=1000) == pytest.approx([expected])


def test_cosine_with_bounds_and_without_a_gold() -> None:
    bounds = {"min_value_wrong": -10, "max_value_wrong": 0, "min_value_correct": 2, "max_value_correct": 4}
    values = scored(cosine, [RIGHT, WRONG], [4, 4], max_len=8, **bounds)
    assert values == pytest.approx([3.0, -5.0])
    assert scored(cosine, [RIGHT], [4], None, max_len=8) == [None]
    assert scored(cosine, [OPEN], [8], max_len=8, finish_reason="length") == [-0.5]
    with pytest.raises(ValueError, match="max_len must be >= 1, got 0"):
        scored(cosine, [RIGHT], [4], max_len=0)


def test_cosine_asks_for_the_longest_length() -> None:
    with RewardPool({"cosine": {}}) as pool, pytest.raises(ValueError, match=r"needs the columns \['max_len'\].*keyw"):
        pool.check({"prompt", "answer"})


def test_the_pool_gives_length_whole_groups() -> None:
    """More rows than a call takes, their groups mixed: calls are cut between groups."""
    groups = [row % 7 for row in range(140)]
    lengths = [10 + (row // 7) for row in range(140)]  # each group has 10 to 29
    with RewardPool({"length": {}}, num_workers=2) as pool:
        columns = {"answer": ["14"] * 140, "group_ids": groups}
        result = pool.score([""] * 140, [RIGHT] * 140, [[0] * n for n in lengths], columns)
    assert result.failures == []
    assert result.values["length"] == pytest.approx([0.5 - (n - 10) / 19 for n in lengths])
