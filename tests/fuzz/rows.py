"""Data files of every kind, damaged at random: rows, how they are written, bytes. A case is a function of its seed."""

import csv
import gzip
import io
import json
import math
import random
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1fast.data.templates import BOS, EOS

KINDS = ("prompts", "sft", "pairs", "labels")
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
WORDS = (
    "red",
    "blue fox",
    "What is 1 + 2 ?",
    "yes\nno",
    "π ≠ 3",
    "数学 math",
    "🦊",
    "a\tb",
    '"quoted" \\n',
    "{% raw %}",
    "{x}",
)
Columns = dict[str, Any]


@dataclass(frozen=True)
class Case:
    kind: str
    name: str  # of the file
    content: bytes


def make_case(seed: int) -> Case:
    rng = random.Random(f"rows,{seed}")
    kind, suffix = rng.choice(KINDS), rng.choice(SUFFIXES)
    rows = [_row(kind, rng) for _ in range(rng.randint(1, 4))]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        _mutate(rng.choice(rows), rng)
    if suffix == ".parquet":
        content = _parquet(rows, rng)
    elif suffix in (".csv", ".tsv"):
        content = _table(rows, rng, "\t" if suffix == ".tsv" else ",")
    else:
        content = _json(rows, rng, lines=suffix == ".jsonl")
    if rng.random() < 0.25:
        content = _damaged(content, rng)
    return Case(kind, f"case{suffix}", content)


# Rows as people write them


def _text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3)))


def _turn(role: str, rng: random.Random) -> Columns:
    turn: Columns = {"role": role, "content": _text(rng)}
    if role == "assistant" and rng.random() < 0.3:
        turn[rng.choice(("reasoning_content", "reasoning", "thinking"))] = _text(rng)
    if rng.random() < 0.1:
        turn["content"] = [{"type": "text", "text": turn["content"]}]
    if rng.random() < 0.1:
        turn["tool_calls"] = None
    return turn


def _chat(rng: random.Random, *roles: str) -> list[Columns]:
    start = ["system"] if rng.random() < 0.3 else []
    turns = [_turn(role, rng) for role in (*start, *("user", "assistant") * rng.choice((0, 0, 1)), *roles)]
    for turn in turns[:-1]:  # R1's template leaves the reasoning of earlier turns out
        for name in ("reasoning_content", "reasoning", "thinking"):
            turn.pop(name, None)
    return turns


def _prompt(rng: random.Random) -> Columns:
    if rng.random() < 0.3:
        return {"prompt": _chat(rng, "user")}
    return {rng.choice(("prompt", "prompt", "problem", "question", "query")): _text(rng)}


def _row(kind: str, rng: random.Random) -> Columns:
    return {"prompts": _prompts_row, "sft": _sft_row, "pairs": _pairs_row, "labels": _labels_row}[kind](rng)


def _prompts_row(rng: random.Random) -> Columns:
    gold = rng.choice(("4", 4, 4.5, ["4", "5"], None, "x+1", {"target": 3}, math.nan))
    row = _prompt(rng) | {rng.choice(("answer", "solution", "ground_truth", "target")): gold}
    if rng.random() < 0.2:
        row |= {"domain": "math", "language": "en"}
    return row


def _sft_row(rng: random.Random) -> Columns:
    shape = rng.randrange(6)
    if shape == 0:
        return {"messages": _chat(rng, "user", "assistant")}
    if shape == 1:
        return {"instruction": _text(rng), "input": rng.choice(("", _text(rng))), "output": _text(rng)}
    if shape == 2:
        return {"prompt": [_turn("user", rng)], "completion": [_turn("assistant", rng)]}
    if shape == 3:
        return {"text": _text(rng), "source": "web"}
    return _prompt(rng) | {rng.choice(("completion", "response", "output")): _text(rng)}


def _pairs_row(rng: random.Random) -> Columns:
    if rng.random() < 0.5:
        before = _chat(rng, "user")
        row = {name: [*before, _turn("assistant", rng)] for name in ("chosen", "rejected")}
        return row if rng.random() < 0.5 else {"prompt": before, **row}
    return _prompt(rng) | {"chosen": _text(rng), "rejected": _text(rng), "score": rng.random()}


def _labels_row(rng: random.Random) -> Columns:
    answer: Any = [_turn("assistant", rng)] if rng.random() < 0.3 else _text(rng)
    label = {rng.choice(("label", "safe")): rng.choice((0, 1, True, False))}
    return _prompt(rng) | {rng.choice(("response", "completion")): answer} | label


# What goes wrong in them

ODD_VALUES = (
    None, math.nan, math.inf, True, 0, -1, 2.5, 10**30, "", " \n", "nan", "\0", "\ud83d", "a \udc00 b", "\u202e",
    "x" * 3000, [], {}, [[]], [None], {"a": {"b": [1, "x"]}}, [3], EOS, f"red{EOS}\n", BOS, "<think>",
    "<think>\nred</think>blue", "</think>",
    [{"role": "user"}], [{"role": "user", "content": "red"}], [{"role": "assistant", "content": "red"}],
    [{"role": "user", "content": [{"type": "image", "url": "red"}]}], [{"content": "red"}],
    "Digits5000", "Float400", "Deep60", "Deep300", "Deep3000",
)  # fmt: skip
ODD_FIELDS = (
    ("tool_calls", [{"name": "f"}]), ("function_call", {"name": "f"}), ("name", "Ann"), ("images", ["red"]),
    ("weight", 0), ("reasoning_content", "why"), ("reasoning", 3), ("thinking", "\ud83d"), ("role", "tool"),
    ("role", None), ("role", []), ("content", None), ("content", ""), ("content", 3),
    ("content", [{"type": "text", "text": "x", "image": "y"}]),
)  # fmt: skip
COLUMNS = (
    "prompt", "completion", "messages", "text", "chosen", "rejected", "response", "label", "answer", "solution",
    "question", "instruction", "input", "output", "domain", "language", "reward_model", "reasoning_content", "",
    "\u202e",
)  # fmt: skip


def _mutate(row: Columns, rng: random.Random) -> None:
    name = rng.choice(list(row) or ["prompt"])
    what = rng.randrange(6)
    chats = [value for value in row.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if what == 0:
        row[name] = rng.choice(ODD_VALUES)
    elif what == 1 and name in row:
        row[rng.choice(COLUMNS)] = row.pop(name)
    elif what == 2:
        row.pop(name, None)
    elif what == 3:
        row[rng.choice(COLUMNS)] = rng.choice((*ODD_VALUES, _text(rng)))
    elif chats:
        chat = rng.choice(chats)
        if what == 4:
            field, value = rng.choice(ODD_FIELDS)
            turn = rng.choice(chat)
            if isinstance(turn, dict):
                turn[field] = value
        else:
            chat.insert(
                rng.randrange(len(chat) + 1), rng.choice((_turn("assistant", rng), _turn("user", rng), None, {}))
            )


# Writing


def _json(rows: list[Columns], rng: random.Random, *, lines: bool) -> bytes:
    texts = [json.dumps(row, ensure_ascii=rng.random() < 0.5 or _has_halves(row)) for row in rows]
    if rng.random() < 0.05:
        texts[-1] = texts[-1].replace("{", '{"prompt": "red", "prompt": "blue", ', 1)
    ending = rng.choice(("\n", "\n", "\r\n", "\n\n"))
    text = ending.join(texts) + ending if lines else f"[{','.join(texts)}]"
    for odd, written in (
        ('"Digits5000"', "7" * 5000), ('"Float400"', "1e400"), ('"Deep60"', "[" * 60 + "]" * 60),
        ('"Deep300"', '{"a":' * 300 + "1" + "}" * 300), ('"Deep3000"', "[" * 3000 + "]" * 3000),
    ):  # fmt: skip
        text = text.replace(odd, written)
    return ("\ufeff" * (rng.random() < 0.1) + text).encode("utf-8", "surrogatepass")


def _has_halves(row: Columns) -> bool:
    text = json.dumps(row, ensure_ascii=False)
    return any("\ud800" <= character <= "\udfff" for character in text)


def _table(rows: list[Columns], rng: random.Random, delimiter: str) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    sink = io.StringIO(newline="")
    quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    writer = csv.writer(sink, delimiter=delimiter, quoting=quoting, lineterminator=rng.choice(("\n", "\r\n")))
    writer.writerows([names, *([row.get(name) for name in names] for row in rows)])
    return ("\ufeff" * (rng.random() < 0.1) + sink.getvalue()).encode("utf-8", "surrogatepass")


def _parquet(rows: list[Columns], rng: random.Random) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = [_array([row.get(name) for row in rows]) for name in names]
    if rng.random() < 0.3:
        names.append(rng.choice(COLUMNS))
        arrays.append(_odd_array(len(rows), rng))
    try:
        return _written(pa.Table.from_arrays(arrays, names=names))
    except (pa.ArrowException, UnicodeEncodeError):  # such as an object without fields
        return _written(pa.table({ascii(name): [ascii(row.get(name)) for row in rows] for name in names}))


def _written(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, TypeError, ValueError, OverflowError):  # types that do not mix
        return pa.array([None if value is None else ascii(value) for value in values])


def _odd_array(count: int, rng: random.Random) -> pa.Array:
    value, kind = rng.choice(
        (
            (b"\xff\x00", pa.binary()), (Decimal("4.50"), pa.decimal128(9, 2)), (date(2024, 1, 31), pa.date32()),
            (datetime(2024, 1, 31, 5), pa.timestamp("ns")), (timedelta(1), pa.duration("s")), (math.nan, pa.float64()),
            ([("a", 1)], pa.map_(pa.string(), pa.int64())), ([(1, 2), (1, 3)], pa.map_(pa.int64(), pa.int64())),
            ({"role": "user", "content": "red"}, pa.struct({"role": pa.string(), "content": pa.string()})),
            (10**15, pa.int64()), (2**50, pa.timestamp("s")), ([[1.0, math.nan]], pa.list_(pa.list_(pa.float64()))),
        )
    )  # fmt: skip
    return pa.array([value] * count, type=kind)


def _damaged(content: bytes, rng: random.Random) -> bytes:
    what = rng.randrange(7)
    data = bytearray(content)
    if what == 0 and data:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == 1:
        del data[rng.randrange(len(data) + 1) :]
    elif what == 2:
        data[rng.randrange(len(data) + 1) : 0] = rng.randbytes(rng.randint(1, 8))
    elif what == 3:
        return gzip.compress(content)
    elif what == 4:
        data += content
    elif what == 5:
        return rng.choice((b"", b"\n \n", b"[]", b"{}", b"null", b"3", b"\x00" * 20, b'{"data": [{"prompt": 1}]}'))
    else:
        start = rng.randrange(len(data) + 1)
        del data[start : start + rng.randint(1, 20)]
    return bytes(data)
