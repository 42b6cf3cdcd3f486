"""JSON lines, JSON, CSV and Parquet files as located columns; what a library raises becomes one error with its row.

JSON is read as written: a key that is there twice, half of a surrogate pair, and a number that no float holds are
refused. NaN and the infinities, which Python's json writes and reads, mean "no value": None. Of a CSV file every value
is text, "007" and "1e5" too, and an empty field has none. Parquet's decimals and times become what people write: 4.50,
2024-01-31, 2024-01-31 05:00:00 (midnight without a zone is a date: many tables have no other type for one).
"""

import codecs
import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from r1fast.data.rows import shown
from r1fast.wording import one_line

Columns = dict[str, Any]
Located = tuple[str, Columns]  # ("train.jsonl:17", columns)
T = TypeVar("T")

MAX_DEPTH = 100  # lists and objects within each other; pickle and repr give up at some hundreds
MAX_DIGITS = 300  # of an integer: a float holds no more, and Python itself reads at most 4,300


def guarded(what: str, call: Callable[[], T]) -> T:
    """call(), with any exception as a ValueError that begins with `what`: readers raise dozens, of no common base."""
    try:
        return call()
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


# JSON


def read_jsonl(path: Path) -> Iterator[Located]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                where = f"{path}:{number}"
                yield _located(_decoded(content, where), where)


def read_json(path: Path) -> Iterator[Located]:
    content = _decoded(path.read_bytes().removeprefix(codecs.BOM_UTF8), str(path), has_rows=True)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise ValueError(f'{path}: got a JSON {type(content).__name__}, expected a list of rows or {{"data": [...]}}')
    for index, row in enumerate(content):
        yield _located(row, f"{path}: row {index}")


def _decoded(content: bytes, where: str, *, has_rows: bool = False) -> Any:
    """The JSON value of a line, or of a whole file of rows."""
    text = ""
    try:
        text = content.decode("utf-8")
        return _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "" if has_rows else "; expected one object"
        if has_rows and error.msg == "Extra data":
            hint = "; one object per line belongs in a .jsonl file"
        line = f":{error.lineno}" if has_rows else ""
        raise ValueError(f"{where}{line}: wrong JSON at column {error.colno}: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        too_deep = f"nested too deep, expected at most {MAX_DEPTH} levels; flatten it"
        problem = too_deep if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where}{_row_of_error(text) if has_rows else ''}: {problem}") from error


def _object(pairs: list[tuple[str, Any]]) -> Columns:
    if twice := _twice([name for name, _ in pairs]):
        raise ValueError(f"the key {twice[0]!r} is there twice, and which one counts is not known; take one out")
    return dict(pairs)


def _twice(names: list[str]) -> list[str]:
    return [] if len(set(names)) == len(names) else [name for name in names if names.count(name) > 1]


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; write it as a string")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value) or (value == 0 and re.search("[1-9]", re.split("[eE]", digits)[0])):
        than = "less" if value == 0 else "more"
        raise ValueError(f"the number {digits[:40]} is {than} than a float can be; write it as a string")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=lambda name: None
)


def _row_of_error(text: str) -> str:
    """': row 3' for the row of a list that cannot be decoded; up to it the text is valid."""
    start = re.match(r'\s*(?:\{\s*"data"\s*:\s*)?\[', text)
    if start is None:
        return ""
    position, index = start.end(), 0
    while True:
        while text[position] in " \t\r\n,":
            position += 1
        if text[position] == "]":  # past the rows
            return ""
        try:
            _, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            return f": row {index}"
        index += 1


def _located(row: Any, where: str) -> Located:
    if not isinstance(row, dict):
        raise ValueError(f'{where}: got a JSON {type(row).__name__}, expected an object like {{"prompt": ...}}')
    return where, plain_columns(row, where)


# CSV

MAX_FIELD = 1 << 30  # characters; csv's own limit of 131,072 is less than a long reasoning


def read_csv(path: Path, delimiter: str = "") -> Iterator[Located]:
    """Text with commas, or tabs in a .tsv file; the first line names the columns."""
    lines = _lines_of_csv(path, delimiter or ("\t" if path.suffix == ".tsv" else ","))
    where, names = next(lines, (str(path), []))
    names = [name.strip() for name in names]  # "prompt, answer"
    if twice := _twice(names):
        raise ValueError(
            f"{where}: two columns are named {twice[0]!r}, and which one counts is not known; take one out"
        )
    for where, fields in lines:
        if len(fields) != len(names):
            raise ValueError(f"{where}: {len(fields)} fields, expected one for each of the {len(names)} columns")
        yield where, plain_columns({name: field or None for name, field in zip(names, fields)}, where)


def _lines_of_csv(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(MAX_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        found = csv.reader(file, strict=True, delimiter=delimiter)
        while True:
            where = f"{path}:{found.line_num + 1}"
            try:
                fields = next(found, None)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
            except csv.Error as error:
                rule = "a field with quotes or line breaks stands in quotes, and its own quotes are doubled"
                raise ValueError(f"{where}: wrong CSV: {error}; {rule}") from error
            if fields is None:
                return
            if fields:  # no empty line
                yield where, fields


# Parquet


def read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow.parquet as pq

    what = f"{path}: not a readable parquet file"
    file = guarded(what, lambda: pq.ParquetFile(path))
    names = guarded(what, lambda: file.schema_arrow.names)
    if twice := _twice(names):
        raise ValueError(f"{path}: two columns are named {twice[0]!r}, and which one counts is not known; take one out")
    narrow = narrow_columns({field.name: field.type for field in file.schema_arrow})
    batches = file.iter_batches()
    index = 0
    while (batch := guarded(what, lambda: next(batches, None))) is not None:
        for row in _rows_of(batch, path, index):
            where = f"{path}: row {index}"
            yield where, plain_columns(as_written(row, narrow), where)
            index += 1


_FLOATS = {
    "halffloat": "float16", "float": "float32", "double": "float64",  # Arrow's words
    "float16": "float16", "float32": "float32", "float64": "float64",
}  # fmt: skip


def narrow_columns(types: Mapping[str, Any]) -> dict[str, str]:
    """The columns whose numbers, in lists and objects too, have 16 or 32 bits, and NumPy's name for these."""
    found = {
        name: {_FLOATS[word] for word in re.findall(r"\w+", str(kind)) if word in _FLOATS}
        for name, kind in types.items()
    }
    return {name: kinds.pop() for name, kinds in found.items() if kinds in ({"float16"}, {"float32"})}


def as_written(row: Columns, narrow: Mapping[str, str]) -> Columns:
    """With the numbers of `narrow_columns` as somebody wrote them: 0.1, not 0.10000000149011612."""
    return row | {name: _as_written(row[name], kind) for name, kind in narrow.items()}


def _as_written(value: Any, kind: str) -> Any:
    import numpy as np

    if isinstance(value, float):
        return float(str(np.dtype(kind).type(value)))
    if isinstance(value, list):
        return [_as_written(entry, kind) for entry in value]
    return {name: _as_written(entry, kind) for name, entry in value.items()} if isinstance(value, dict) else value


def _rows_of(batch: Any, path: Path, first: int) -> list[Columns]:
    try:
        return batch.to_pylist()
    except Exception:  # a text that is no UTF-8, a time that Python has not, ...: name the row
        for i in range(batch.num_rows):
            guarded(f"{path}: row {first + i}: cannot be read", batch.slice(i, 1).to_pylist)
        raise


# Values


def plain_columns(row: Columns, where: str) -> Columns:
    """A row with the values that JSON has; NaN and infinities are None."""
    try:
        return {_text(name): _plain(value, name, 2) for name, value in row.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _plain(value: Any, column: str, level: int) -> Any:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float | Decimal):
        return None if not math.isfinite(value) else value if isinstance(value, float) else f"{value:f}"
    if isinstance(value, datetime) and value.tzinfo is None and value.time() == time():
        value = value.date()
    if isinstance(value, date | time):
        return str(value)
    if level > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep; flatten it")
    if isinstance(value, list) and value and all(isinstance(entry, tuple) and len(entry) == 2 for entry in value):
        names = [name for name, _ in value]  # Arrow's map
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError(f"column {column!r} is a map whose keys are not different strings; convert or drop it")
        value = dict(value)
    if isinstance(value, list):
        return [_plain(entry, column, level + 1) for entry in value]
    if isinstance(value, dict):
        return {_text(name): _plain(entry, column, level + 1) for name, entry in value.items()}
    raise ValueError(f"column {column!r} holds {shown(value)}, which no stage can use; convert or drop it")


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{half} is half of a surrogate pair, no character; repair it") from None
    return text
