"""verl's compute_score behind our signature."""

import asyncio
import inspect

import pytest

from r1fast.rewards.registry import adapt_verl, is_adapted, is_verl_function, resolve


def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    assert data_source in ("", "gsm8k") and extra_info in ({}, {"index": 7})
    return {"score": float(solution_str == ground_truth) + bonus, "acc": 1}


def plain_score(solution_str, ground_truth):
    return solution_str == ground_truth


def anything_goes(solution_str, ground_truth, **kwargs):
    return len(kwargs)


def test_rows_are_scored_one_by_one():
    adapted = adapt_verl(compute_score)
    assert adapted(completions=["14", "13"], answer=["14", "14"]) == [1.0, 0.0]
    columns = {"data_source": ["gsm8k"], "extra_info": [{"index": 7}]}
    assert adapted(completions=["14"], answer=["14"], bonus=0.5, **columns) == [1.5]
    assert adapt_verl(plain_score)(completions=["14"], answer=["14"], **columns) == [True]
    assert adapt_verl(anything_goes)(completions=["14"], answer=["14"]) == [2]


def test_rows_without_extra_information_and_results_without_a_score():
    columns = {"data_source": ["gsm8k"] * 2, "extra_info": [None, {"index": 7}]}
    assert adapt_verl(compute_score)(completions=["14", "1"], answer=["14", "14"], **columns) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"keys \['acc'\], expected 'score'"):
        adapt_verl(lambda solution_str, ground_truth: {"acc": 1.0})(completions=["14"], answer=["14"])


def test_coroutines_run_together():
    met = asyncio.Barrier(2)

    async def compute_later(solution_str, ground_truth):
        await met.wait()  # needs both rows at once
        return {"score": float(solution_str == ground_truth)}

    reward = adapt_verl(compute_later)
    assert is_adapted(reward) and not is_adapted(compute_later)
    assert asyncio.run(reward(completions=["14", "1"], answer=["14", "14"])) == [1.0, 0.0]


def test_signature_shows_the_columns_and_the_options():
    assert set(inspect.signature(adapt_verl(compute_score)).parameters) == {
        "completions",
        "answer",
        "data_source",
        "extra_info",
        "bonus",
    }


def test_verl_functions_are_recognised(tmp_path):
    assert is_verl_function(compute_score) and is_verl_function(plain_score)
    assert not is_verl_function(lambda completions, **_: [])
    file = tmp_path / "verl_reward.py"
    file.write_text("def compute_score(data_source, solution_str, ground_truth, extra_info=None): return 1.0\n")
    assert resolve(f"{file}:compute_score")(completions=["a"], answer=["b"]) == [1.0]
