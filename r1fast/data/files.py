"""JSON lines, JSON and Parquet files as located columns; what a library raises becomes one error with file and row.

JSON is read as written: a key that is there twice, half of a surrogate pair, and a number that no float holds are
refused. NaN and the infinities, which Python's json writes and reads, mean "no value": None.
"""

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from r1fast.data.rows import shown

Columns = dict[str, Any]
Located = tuple[str, Columns]  # ("train.jsonl:17", columns)
T = TypeVar("T")

MAX_DEPTH = 100  # lists and objects within each other; pickle and repr give up at some hundreds
MAX_DIGITS = 300  # of an integer: a float holds no more, and Python itself reads at most 4,300
_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # or a whole pair: the row has to be looked at


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


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
            if not content.strip():
                continue
            where = f"{path}:{number}"
            text = _decoded(content, where)
            try:
                row = _DECODER.decode(text)
            except json.JSONDecodeError as error:
                problem = f"wrong JSON at column {error.colno}: {error.msg}; expected one object"
                raise ValueError(f"{where}: {problem}") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {_refusal(error)}") from error
            yield where, _checked(row, _needed_checks(text), where)


def read_json(path: Path) -> Iterator[Located]:
    text = _decoded(path.read_bytes().removeprefix(codecs.BOM_UTF8), str(path))
    try:
        content = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}:{error.lineno}: wrong JSON at column {error.colno}: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}{_row_of_error(text)}: {_refusal(error)}") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise ValueError(f'{path}: got a JSON {type(content).__name__}, expected a list of rows or {{"data": [...]}}')
    checks = _needed_checks(text)
    for index, row in enumerate(content):
        where = f"{path}: row {index}"
        yield where, _checked(row, checks, where)


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _object(pairs: list[tuple[str, Any]]) -> Columns:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice, and which one counts is not known; take one out")
    return columns


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


def _refusal(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return f"nested too deep, expected at most {MAX_DEPTH} levels; flatten it"
    return str(error)


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


Check = Callable[[Columns], str | None]


def _needed_checks(text: str) -> list[Check]:
    """Those that the text of a row, or of a whole file, gives cause for: most need no look at their values."""
    checks: list[Check] = []
    if text.count("[") + text.count("{") > MAX_DEPTH:
        checks.append(_too_deep)
    if "\\u" in text and _HALF_OF_A_PAIR.search(text):
        checks.append(_half_of_a_pair)
    return checks


def _checked(row: Any, checks: list[Check], where: str) -> Columns:
    if not isinstance(row, dict):
        raise ValueError(f'{where}: got a JSON {type(row).__name__}, expected an object like {{"prompt": ...}}')
    if problem := next(filter(None, (check(row) for check in checks)), None):
        raise ValueError(f"{where}: {problem}")
    return row


def _too_deep(row: Columns) -> str | None:
    def deeper(value: Any, levels: int) -> bool:
        if not isinstance(value, dict | list):
            return False
        return levels == 0 or any(deeper(e, levels - 1) for e in (value.values() if isinstance(value, dict) else value))

    return f"nested more than {MAX_DEPTH} levels deep; flatten it" if deeper(row, MAX_DEPTH) else None


def _half_of_a_pair(row: Columns) -> str | None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x} is half of a surrogate pair, no character; repair it"
    return None


# Parquet


def read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow.parquet as pq

    what = f"{path}: not a readable parquet file"
    file = guarded(what, lambda: pq.ParquetFile(path))
    names = guarded(what, lambda: file.schema_arrow.names)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path}: two columns are named {twice!r}, and which one counts is not known; take one out")
    batches = file.iter_batches()
    index = 0
    while (batch := guarded(what, lambda: next(batches, None))) is not None:
        for row in _rows_of(batch, path, index):
            where = f"{path}: row {index}"
            yield where, plain_columns(row, where)
            index += 1


def _rows_of(batch: Any, path: Path, first: int) -> list[Columns]:
    try:
        return batch.to_pylist()
    except Exception:  # a text that is no UTF-8, a time that Python has not, ...: name the row
        for i in range(batch.num_rows):
            guarded(f"{path}: row {first + i}: cannot be read", batch.slice(i, 1).to_pylist)
        raise


def plain_columns(row: Columns, where: str) -> Columns:
    """A row of Parquet or of a data set as JSON would hold it; NaN and infinities are None."""
    try:
        return {name: _plain(value, f"column {name!r}") for name, value in row.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _plain(value: Any, column: str, depth: int = 0) -> Any:
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float | Decimal):
        return None if not math.isfinite(value) else value if isinstance(value, float) else str(value)
    if isinstance(value, date | time):  # datetime is a date
        return value.isoformat()
    if depth > MAX_DEPTH:
        raise ValueError(f"{column} is nested more than {MAX_DEPTH} levels deep; flatten it")
    if isinstance(value, list) and value and all(isinstance(entry, tuple) and len(entry) == 2 for entry in value):
        names = [name for name, _ in value]  # Arrow's map
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError(f"{column} is a map whose keys are not different strings; convert or drop it")
        value = dict(value)
    if isinstance(value, list):
        return [_plain(entry, column, depth + 1) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry, column, depth + 1) for key, entry in value.items()}
    raise ValueError(f"{column} holds {shown(value)}, which no stage can use; convert or drop it")
