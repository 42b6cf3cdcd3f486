"""Chats as people have them: ShareGPT, parts of a text, calls of tools; what nobody would see is refused."""

import json
from typing import Any

import pytest

from r1fast.data.rows import canonical

WHERE = "a.jsonl:7"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def said(who: str, value: Any) -> dict[str, Any]:
    return {"from": who, "value": value}


def part(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **fields}


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        (
            "sft",
            {"conversations": [said("system", "s"), said("human", "p"), said("gpt", "c")]},
            {"messages": [{"role": "system", "content": "s"}, user("p"), assistant("c")]},
        ),
        ("sft", {"conversations": [user("p"), assistant("c")]}, {"messages": [user("p"), assistant("c")]}),
        (
            "sft",
            {"messages": None, "conversations": [said("user", "p"), said("assistant", "c")], "system": "s"},
            {"messages": [{"role": "system", "content": "s"}, user("p"), assistant("c")]},
        ),
        (
            "sft",  # ShareGPT's tools, as LLaMA-Factory has them
            {
                "conversations": [
                    said("human", "2+3?"),
                    said("function_call", '{"name": "add", "arguments": {"a": 2, "b": 3}}'),
                    said("observation", "5"),
                    said("gpt", "It is 5."),
                ],
                "tools": json.dumps([TOOL["function"]]),
            },
            {
                "messages": [
                    user("2+3?"),
                    assistant("", tool_calls=[CALL]),
                    {"role": "tool", "content": "5"},
                    assistant("It is 5."),
                ],
                "tools": [TOOL["function"]],
            },
        ),
        ("prompts", {"conversations": [said("human", "p")], "answer": "4"}, {"prompt": [user("p")], "answer": "4"}),
        (
            "pairs",
            {"conversations": [said("human", "p")], "chosen": said("gpt", "c"), "rejected": said("gpt", "r")},
            {"prompt": [user("p")], "chosen": "c", "rejected": "r"},
        ),
        (
            "labels",
            {"conversations": [said("human", "p")], "response": [said("gpt", "c")], "label": 0},
            {"prompt": [user("p")], "response": "c"},
        ),
        (
            "sft",  # OpenAI's newer and older roles, Gemma's
            {
                "messages": [
                    {"role": "developer", "content": "s"},
                    user("p"),
                    {"role": "function", "name": "f", "content": "1"},
                    {"role": "model", "content": "c"},
                ]
            },
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    user("p"),
                    {"role": "tool", "name": "f", "content": "1"},
                    assistant("c"),
                ]
            },
        ),
        ("prompts", {"messages": json.dumps([user("p")])}, {"prompt": [user("p")]}),  # of a CSV file
        ("sft", {"messages": str([user("it's"), assistant("c")])}, {"messages": [user("it's"), assistant("c")]}),
        ("prompts", {"prompt": [part("2+"), part("2?", image=None)]}, {"prompt": "2+2?"}),
        ("sft", {"prompt": "p", "completion": [part("c")]}, {"completion": "c"}),
        (
            "sft",
            {"prompt": [user([part("p")])], "completion": [assistant([part("c"), part("d")])]},
            {"prompt": [user("p")], "completion": "cd"},
        ),
        (
            "prompts",  # OpenAI's, from Parquet: every field of every turn, every argument of every function
            {
                "messages": [
                    {**user("2+3?"), "tool_calls": None, "name": None, "tool_call_id": None},
                    {
                        **assistant(None),
                        "tool_calls": [
                            {
                                "id": "call_1",
                                "type": "function",
                                "function": {"name": "add", "arguments": {"a": 2, "b": 3, "city": None}},
                            }
                        ],
                    },
                    {"role": "tool", "content": "5", "tool_calls": None, "name": "add", "tool_call_id": "call_1"},
                ],
                "tools": [{**TOOL, "strict": None}],
            },
            {
                "prompt": [
                    user("2+3?"),
                    assistant("", tool_calls=[{"id": "call_1", **CALL}]),
                    {"role": "tool", "content": "5", "name": "add", "tool_call_id": "call_1"},
                ],
                "tools": [TOOL],
            },
        ),
        (
            "prompts",  # arguments as OpenAI sends them: their JSON
            {
                "prompt": [
                    user("p"),
                    assistant("so", tool_calls=[{"function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]),
                    {"role": "tool", "content": ""},
                    user("and?"),
                ]
            },
            {
                "prompt": [
                    user("p"),
                    assistant("so", tool_calls=[CALL]),
                    {"role": "tool", "content": ""},
                    user("and?"),
                ]
            },
        ),
    ],
)
def test_chats_are_read(kind: Any, row: dict, expected: dict) -> None:
    read = canonical(row, kind, WHERE)
    assert read | row | expected == read


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "sft",
            {"conversations": [said("human", "p")]},
            r"conversations ends with a turn of 'user', expected 'assistant'",
        ),
        ("sft", {"conversations": [said("gpt", "c")]}, r"conversations, without its last turn, ends before any turn"),
        ("sft", {"conversations": "human: p"}, r"column 'conversations' is str 'human: p', expected a list of"),
        (
            "sft",
            {"messages": [user("p"), assistant("c")], "conversations": [said("human", "p"), said("gpt", "d")]},
            r"'messages' and 'conversations' differ",
        ),
        (
            "sft",
            {"conversations": [said("critic", "p"), said("gpt", "c")]},
            r"conversations\[0\] is from str 'critic', exp",
        ),
        (
            "sft",
            {"conversations": [said("human", 3), said("gpt", "c")]},
            r"conversations\[0\] is dict .*content: string",
        ),
        (
            "sft",
            {"conversations": [{**said("human", "p"), "weight": 0.5}, said("gpt", "c")]},
            r"conversations\[0\] has 'weight' = float 0.5",
        ),
        ("prompts", {"conversations": [said("human", "p"), said("gpt", "c")]}, r"ends with a turn of 'assistant'"),
        ("prompts", {"messages": "hello"}, r"column 'messages' is str 'hello', expected a list of"),
        ("prompts", {"messages": "3"}, r"column 'messages' is int 3, expected"),
        ("prompts", {"prompt": [part("p"), {"type": "image", "url": "u"}]}, r"prompt\[1\] is dict .*read text only"),
        (
            "prompts",
            {"prompt": [user([{"type": "image_url", "image_url": {"url": "u"}}])]},
            r"content\[0\] .*text only",
        ),
        ("sft", {"messages": [{**user("p"), "tool_calls": [CALL]}, assistant("c")]}, r"messages\[0\] has 'tool_calls'"),
        (
            "sft",
            {"messages": [user("p"), assistant("", tool_calls=["add"]), assistant("c")]},
            r"messages\[1\] has the tool call str 'add', expected \{name, arguments\}",
        ),
        (
            "sft",
            {"conversations": [said("human", "p"), said("function_call", "add(2)"), said("gpt", "c")]},
            r"conversations\[1\]: the tool call is str 'add\(2\)', expected JSON",
        ),
        (
            "sft",
            {"messages": [user("p"), assistant("", tool_calls=[{"name": "f", "arguments": "[1]"}]), assistant("c")]},
            r"messages\[1\]: the arguments of f are list \[1\], expected an object",
        ),
        (
            "sft",
            {"conversations": [said("human", "p"), said("function_call", '{"name": "f"}')]},
            r"ends with a tool call",
        ),
        ("prompts", {"prompt": "p", "tools": "add"}, r"column 'tools' is str 'add', expected JSON"),
        ("prompts", {"prompt": "p", "tools": [{"type": "function"}]}, r"column 'tools' is list .*expected a list of"),
        ("prompts", {"prompt": "p", "tools": "{}"}, r"column 'tools' is str '\{\}', expected a list of"),
    ],
)
def test_chats_that_cannot_be_used_are_refused(kind: Any, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{WHERE}: .*{message}"):
        canonical(row, kind, WHERE)
