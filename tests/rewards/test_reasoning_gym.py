"""The reasoning_gym reward: what the data set's own verifier says of the whole entry."""

import pytest

from r1fast.data.sources import load_rows
from r1fast.rewards.registry import resolve

pytest.importorskip("reasoning_gym")


def score(name, final, row, **columns):
    columns = {"answer": [row["answer"]], "metadata": [row["metadata"]], "reasoning_gym": [name], **columns}
    return resolve("reasoning_gym")([row["prompt"]], [final], [[]], **columns)[0]


@pytest.fixture(scope="module", params=["basic_arithmetic", "tower_of_hanoi", "countdown", "time_intervals"])
def task(request):
    rows = load_rows([f"reasoning_gym:{request.param}?size=2&seed=1"], "prompts")
    return request.param, rows


def test_the_gold_scores_one_and_another_entrys_less(task):
    name, (row, other) = task
    assert score(name, f"<think>hm</think><answer>{row['answer']}</answer>", row) == 1.0
    assert score(name, f"<think>hm</think><answer>{other['answer']}</answer>", row) < 1.0
    assert score(name, "<think>hm</think><answer></answer>", row) == 0.0


def test_an_answer_that_is_not_the_gold_can_be_right():
    row = load_rows(["reasoning_gym:countdown?size=1&seed=1"], "prompts")[0]
    expression = f"({row['answer']})"  # the same value, another text
    assert score("countdown", f"<think></think><answer>{expression}</answer>", row) == 1.0


def test_only_the_answer_part_counts_and_a_cut_one_does_not(task):
    name, (row, _) = task
    gold = row["answer"]
    assert score(name, f"<think>{gold}</think>", row) == 0.0
    assert score(name, f"<think></think><answer>{gold}", row, finish_reason=["length"]) == 0.0
    assert score(name, f"<think></think>{gold}", row, strict=False) == 1.0


def test_other_rows_are_not_applicable_and_unknown_names_an_error():
    row = {"prompt": "1+1", "answer": "2", "metadata": None}
    assert score(None, "<think></think><answer>2</answer>", row) is None
    with pytest.raises(ValueError, match="'no_such_task' is no data set"):
        score("no_such_task", "<think></think><answer>2</answer>", row)
