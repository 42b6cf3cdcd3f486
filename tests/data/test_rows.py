"""What rows hold is used, kept beside, or refused with its place; chats, aliases, reasoning, values of other types."""

import math
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest

from r1fast.data.files import plain_columns
from r1fast.data.rows import Row, canonical, location

WHERE = "a.jsonl:7"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


VERL = {
    "data_source": "gsm8k",
    "prompt": [user("2+2?")],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 0},
}


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("prompts", {"problem": "p", "solution": "s"}, {"prompt": "p", "answer": "s"}),
        ("prompts", {"question": "p", "ground_truth": 4}, {"prompt": "p", "answer": 4}),
        ("prompts", {"prompt": "p", "problem": "q", "answer": "a"}, {}),
        ("prompts", {"prompt": "p"}, {"answer": None}),
        ("prompts", {"messages": [user("p")], "answer": "4"}, {"prompt": [user("p")]}),
        ("prompts", VERL, {"answer": "4"}),
        ("sft", {"prompt": "p", "completion": "c"}, {}),
        ("sft", {"messages": [user("p"), assistant("c")], "prompt": "kept"}, {}),
        ("sft", {"text": "t"}, {}),
        ("pairs", {"question": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p"}),
        ("labels", {"prompt": "p", "response": "r", "safe": True}, {"label": 1}),
        ("prompts", {"prompt": "p", "answer": True}, {"answer": True}),
        ("labels", {"prompt": "p", "response": "r", "safe": "False"}, {"label": 0}),
        ("labels", {"prompt": "p", "response": "r", "label": "1"}, {"label": 1}),
        ("prompts", {"prompt": "p", "answer": math.nan}, {"answer": None}),
        ("prompts", {"prompt": "p", "answer": ["4", 5]}, {"answer": ["4", 5]}),
        ("prompts", {"prompt": "p", "answer": {"target": 3}}, {"answer": {"target": 3}}),
        ("prompts", {"prompt": "p", "solution": "prose", "ground_truth": "4"}, {"answer": "prose"}),
        ("prompts", {"prompt": "p", "answer": "4", "solution": "prose"}, {"answer": "4", "solution": "prose"}),
        ("prompts", {"messages": [user("p")], "question": "p"}, {"prompt": "p"}),
        ("sft", {"instruction": "i", "input": "x", "output": "o"}, {"prompt": "i\n\nx", "completion": "o"}),
        ("sft", {"instruction": "i", "input": "", "output": "o"}, {"prompt": "i", "completion": "o"}),
        ("sft", {"prompt": "p", "response": "long", "answer": "4"}, {"completion": "long"}),
        ("sft", {"text": "t", "instruction": "i", "output": "o"}, {"prompt": "i", "completion": "o"}),
        ("sft", {"prompt": [user("p")], "completion": [assistant("c")]}, {"prompt": [user("p")], "completion": "c"}),
        ("sft", {"prompt": "p", "completion": [user("p"), assistant("c")]}, {"prompt": "p", "completion": "c"}),
        ("sft", {"completion": [user("p"), assistant("c")]}, {"prompt": [user("p")], "completion": "c"}),
        (
            "sft",
            {"prompt": "p", "completion": [assistant("a"), user("q"), assistant("c")]},
            {"prompt": [user("p"), assistant("a"), user("q")], "completion": "c"},
        ),
        (
            "sft",
            {"prompt": "p", "completion": "c", "reasoning_content": "r"},
            {"completion": [assistant("c", reasoning_content="r")]},
        ),
        (
            "sft",
            {"prompt": "p", "completion": "<think>s</think>c", "reasoning_content": "r"},
            {"completion": "<think>s</think>c"},
        ),
        (
            "sft",
            {"messages": [user("p"), assistant("c", thinking="r", tool_calls=None)]},
            {"messages": [user("p"), assistant("c", reasoning_content="r")]},
        ),
        (
            "sft",
            {"messages": [user("p"), assistant("<think>r</think>c", reasoning="r")]},
            {"messages": [user("p"), assistant("<think>r</think>c")]},
        ),
        (
            "sft",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "p"}]}, assistant("c")]},
            {"messages": [user("p"), assistant("c")]},
        ),
        (
            "pairs",
            {"prompt": "p", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
            {"prompt": "p", "chosen": "c", "rejected": "r"},
        ),
        (
            "pairs",
            {"chosen": [system("s"), user("p"), assistant("c")], "rejected": [system("s"), user("p"), assistant("r")]},
            {"prompt": [system("s"), user("p")], "chosen": "c", "rejected": "r"},
        ),
        (
            "pairs",
            {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
            {"prompt": [user("p")], "chosen": "c", "rejected": "r"},
        ),
        (
            "sft",
            {"messages": [user("p"), assistant("c")], "reasoning": "r"},
            {"messages": [user("p"), assistant("c", reasoning_content="r")]},
        ),
        (
            "sft",
            {"instruction": "i", "context": "x", "history": [], "system": "s", "response": "o"},
            {"prompt": [system("s"), user("i\n\nx")], "completion": "o"},
        ),
        (
            "pairs",
            {"system_prompt": "s", "query": "p", "chosen": [system("s"), user("p"), assistant("c")], "rejected": "r"},
            {"prompt": [system("s"), user("p")], "chosen": "c", "rejected": "r"},
        ),
        ("prompts", {"prompt": [system("s"), user("p")], "system": "s"}, {"prompt": [system("s"), user("p")]}),
        ("prompts", {"prompt": "p", "system": "", "images": []}, {"prompt": "p"}),
        (
            "labels",
            {"completion": [user("p"), assistant("c")], "label": True},
            {"prompt": [user("p")], "response": "c", "label": 1},
        ),
    ],
)
def test_what_rows_hold_is_taken(kind: Any, row: dict, expected: dict) -> None:
    """And what the row held stays beside it, under its own name."""
    read = canonical(row, kind, WHERE)
    assert read | row | expected == read
    assert location(read, 3) == WHERE and location(dict(read), 3) == "row 4"


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("prompts", {"prompt": None, "problem": None}, r"no column 'prompt' \(prompt is null\)"),
        ("prompts", {"promt": "a", "id": 1}, r"columns present: promt, id; did you mean 'promt'\?"),
        ("prompts", {"prompt": []}, r"column 'prompt' is list \[\], expected a list of"),
        ("prompts", {"problem": "p", "question": "q"}, r"'problem' and 'question' differ"),
        (
            "prompts",
            {"prompt": [user("p"), assistant("c")]},
            r"prompt ends with a turn of 'assistant', expected 'user'",
        ),
        ("sft", {"problem": "p", "solution": "long", "answer": "4"}, r"'answer' and 'solution' differ.*'completion'"),
        ("sft", {"messages": [user("p"), assistant("c")], "completion": "d"}, r"'messages' and 'completion' differ"),
        ("sft", {"prompt": "p", "text": "t"}, r"no column 'completion'.*; sft rows have messages, or prompt and comp"),
        ("sft", {"prompt": "p", "completion": " "}, r"completion is empty"),
        ("sft", {"text": ""}, r"text is empty"),
        ("sft", {"messages": [assistant("c")]}, r"messages, without its last turn, ends before any turn"),
        (
            "sft",
            {"messages": [user("p"), assistant("", tool_calls=[{"name": "f"}])]},
            r"messages ends with a tool call",
        ),
        ("sft", {"messages": [{**user("p"), "name": "Ann"}, assistant("c")]}, r"messages\[0\] has 'name' = str 'Ann'"),
        (
            "sft",
            {"messages": [{"role": "critic", "content": "x"}, assistant("c")]},
            r"messages\[0\] has role 'critic', exp",
        ),
        ("sft", {"messages": [{**user("p"), "thinking": "r"}, assistant("c")]}, r"'thinking' and role 'user'"),
        (
            "sft",
            {"messages": [user("p"), assistant("<think>s</think>c", reasoning="r")]},
            r"messages\[1\] has 'reasoning', and another reasoning in content",
        ),
        (
            "sft",
            {"messages": [user("p"), assistant("c", reasoning="r", thinking="s")]},
            r"messages\[1\] has dict .*expected one reasoning",
        ),
        (
            "sft",
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}, assistant("c")]},
            r"messages\[0\].content\[0\] is dict .*the models read text only",
        ),
        ("sft", {"instruction": "i", "input": 3, "output": "o"}, r"column 'input' is int 3"),
        ("sft", {"instruction": "i", "history": [["a", "b"]], "output": "o"}, r"column 'history' would be lost"),
        ("sft", {"prompt": "p", "completion": "c", "thinking": ["r"]}, r"the row has dict .*expected one reasoning"),
        ("prompts", {"prompt": "p", "image": "a.png"}, r"column 'image' is str 'a.png', which no prompt would show"),
        ("prompts", {"prompt": [system("s"), user("p")], "system": "t"}, r"column 'system' is not the prompt's system"),
        ("prompts", {"prompt": "p", "system": 3}, r"column 'system' is int 3, expected a string"),
        ("sft", {"prompt": "q", "completion": [user("p"), assistant("c")]}, r"completion begins with other turns"),
        (
            "pairs",
            {"chosen": [user("p"), assistant("c")], "rejected": [user("q"), assistant("r")]},
            r"chosen and rejected differ before their last turn",
        ),
        ("pairs", {"chosen": "c", "rejected": "r"}, r"no column 'prompt'"),
        ("pairs", {"prompt": "p", "chosen": "c"}, r"no column 'rejected'; columns present: prompt, chosen"),
        ("sft", {"messages": [{"role": "user"}]}, r"messages\[0\] is dict .*expected \{role, content: string\}"),
        ("labels", {"prompt": "p", "lable": 1}, r"no column 'response' \(or completion, output\);"),
        ("labels", {"prompt": "p", "response": "r", "label": math.nan}, r"'label' is float nan, expected 1 \(safe\)"),
        ("labels", {"prompt": "p", "response": "r", "label": [1]}, r"column 'label' is list"),
        ("labels", {"prompt": "p", "response": "r", "label": "safe"}, r"column 'label' is str 'safe', expected 1"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_its_place(kind: Any, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{WHERE}: .*{message}"):
        canonical(row, kind, WHERE)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, None),
        ([1.5, math.nan, {"a": math.inf}], [1.5, None, {"a": None}]),
        (Decimal("4.50"), "4.50"),
        (Decimal("1E+3"), "1000"),
        (Decimal("-0.0000001"), "-0.0000001"),
        (date(2024, 1, 31), "2024-01-31"),
        (datetime(2024, 1, 31, 5), "2024-01-31 05:00:00"),
        (datetime(2024, 1, 31), "2024-01-31"),
        (datetime(2024, 1, 31, tzinfo=UTC), "2024-01-31 00:00:00+00:00"),
        (time(5, 30), "05:30:00"),
        ([("a", 1), ("b", 2)], {"a": 1, "b": 2}),
        ([], []),
    ],
    ids=repr,
)
def test_values_of_tables_become_those_of_json(value: Any, expected: Any) -> None:
    assert plain_columns({"x": value}, WHERE) == {"x": expected}


@pytest.mark.parametrize("value", [b"\xff", timedelta(1), {1, 2}, [(1, 2), (1, 3)], [[b"x"]]], ids=repr)
def test_values_that_no_stage_can_use(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{WHERE}: column 'x' "):
        plain_columns({"x": value}, WHERE)


def test_a_row_is_its_columns() -> None:
    import pickle

    row = Row({"a": 1}, WHERE)
    assert row == {"a": 1} and pickle.loads(pickle.dumps(row)).where == WHERE
