"""Rows from anywhere, under one set of column names; every error says which file, which row, and what was expected.

A source is one of
    train.jsonl  train.json  train.parquet     files
    some/folder                                written by datasets.save_to_disk, or holding such files
    task:NAME/SPLIT                            embedded tasks
    reasoning_gym:NAME?size=100&seed=0         generated (needs the extra `tasks`)
    org/name  or  org/name:split               a data set of the Hub (split: train)
Canonical columns (aliases are those of TRL, open-r1 and verl); every other column is kept:
    prompts {prompt, answer}   sft {messages} | {prompt, completion} | {text}   pairs {prompt, chosen, rejected}
    labels {prompt, response, label (1 = safe)}   text {text}
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

Row = dict[str, Any]
Kind = Literal["prompts", "sft", "pairs", "labels", "text"]
Located = tuple[str, Row]  # ("train.jsonl:17", row)

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
# Canonical column -> other names for it, tried in order.
_PROMPT = ("problem", "question", "instruction", "query", "messages")
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "prompts": {"prompt": _PROMPT, "answer": ("solution", "ground_truth", "gold", "target")},
    "sft": {"prompt": _PROMPT[:-1], "completion": ("response", "output", "answer", "solution")},
    "pairs": {"prompt": _PROMPT[:-1], "chosen": (), "rejected": ()},
    "labels": {"prompt": _PROMPT[:-1], "response": ("completion", "output"), "label": ("safe", "is_safe")},
    "text": {"text": ("content",)},
}
_ROLES = ("system", "user", "assistant", "tool")


def load_rows(sources: list[str], kind: Kind, *, limit: int | None = None) -> list[Row]:
    """All rows of the sources in order (the first `limit` of them), checked and with canonical columns.

    Prompt columns hold a string or a chat ([{"role", "content"}]). Wrong rows, missing columns, unreadable files and
    sources without rows are ValueErrors.
    """
    if kind not in ALIASES:
        raise ValueError(f"unknown kind of rows {kind!r}; expected one of {', '.join(ALIASES)}")
    if isinstance(sources, str) or not sources:
        raise ValueError(f"load_rows got sources={sources!r}; expected a list of at least one file, folder, id or task")
    rows: list[Row] = []
    for source in sources:
        before = len(rows)
        wanted = None if limit is None else limit - before
        rows.extend(_canonical(row, kind, where) for where, row in islice(_read(source), wanted))
        if len(rows) == before and wanted != 0:
            raise ValueError(f"{source} has no rows")
    return rows


def _read(source: str) -> Iterator[Located]:
    if source.startswith("task:"):
        return _read_task(source)
    if source.startswith("reasoning_gym:"):
        return _read_reasoning_gym(source)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in FILE_SUFFIXES:
        if not path.is_file():
            raise ValueError(f"{source}: there is no such file{_nearest_file(path)}")
        return _FILE_READERS[path.suffix](path)
    if path.exists():
        raise ValueError(f"{source}: unknown kind of file {path.suffix!r}; expected {', '.join(FILE_SUFFIXES)}")
    return _read_hub(source)


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor the folder {path.parent}"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _read_jsonl(path: Path) -> Iterator[Located]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _parse_object(line, where)


def _parse_object(content: bytes, where: str) -> Row:
    try:
        row = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: wrong JSON at column {error.colno}: {error.msg}; expected one object") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    return _require_object(row, where)


def _require_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f'{where}: got a JSON {type(row).__name__}, expected an object like {{"prompt": ...}}')
    return row


def _read_json(path: Path) -> Iterator[Located]:
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}:{error.lineno}: wrong JSON at column {error.colno}: {error.msg}{hint}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise ValueError(f'{path}: got a JSON {type(content).__name__}, expected a list of rows or {{"data": [...]}}')
    for index, row in enumerate(content):
        where = f"{path}: row {index}"
        yield where, _require_object(row, where)


def _read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches()
        index = 0
        for batch in batches:
            for row in batch.to_pylist():
                yield f"{path}: row {index}", row
                index += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from error


_FILE_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _read_folder(path: Path) -> Iterator[Located]:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{path} holds several splits; name one of {', '.join(str(path / s) for s in splits)}")
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        from datasets import load_from_disk

        return _numbered(str(path), load_from_disk(str(path)))
    files = sorted(file for file in path.iterdir() if file.suffix in FILE_SUFFIXES)
    if not files:
        raise ValueError(f"{path}: neither a folder of datasets.save_to_disk nor one with {', '.join(FILE_SUFFIXES)}")
    return (located for file in files for located in _FILE_READERS[file.suffix](file))


def _read_hub(source: str) -> Iterator[Located]:
    name, _, split = source.partition(":")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{source}: there is no such file or folder")
    from datasets import load_dataset

    try:
        return _numbered(source, load_dataset(name, split=split or "train"))
    except Exception as error:  # the Hub client has dozens, of no common base
        raise ValueError(
            f"{source}: no such file or folder here, and as a Hub data set it failed: {type(error).__name__}: {error}"
        ) from error


def _read_task(source: str) -> Iterator[Located]:
    name, _, split = source.removeprefix("task:").partition("/")
    if not name or not split:
        raise ValueError(f"{source}: expected task:NAME/SPLIT")
    return _numbered(source, importlib.import_module("r1fast.data.tasks").load(name, split))


def _read_reasoning_gym(source: str) -> Iterator[Located]:
    name, _, query = source.removeprefix("reasoning_gym:").partition("?")
    options = {key: _number_or_text(value) for key, value in parse_qsl(query)}
    try:
        reasoning_gym = importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise ValueError(f"{source} needs the package reasoning-gym: pip install 'r1fast[tasks]'") from error
    try:
        entries = reasoning_gym.create_dataset(name, **options)
    except (ValueError, TypeError, AssertionError) as error:
        known = importlib.import_module("reasoning_gym.factory").DATASETS
        near = (
            "" if name in known else f"; nearest names: {', '.join(difflib.get_close_matches(name, known, cutoff=0.4))}"
        )
        raise ValueError(f"{source}: {error}{near}") from error
    # The verifier needs the whole entry back: reasoning_gym.get_score_answer_fn(name)(answer, entry).
    rows = (
        {"prompt": e["question"], "answer": e["answer"], "metadata": e.get("metadata", {}), "reasoning_gym": name}
        for e in entries
    )
    return _numbered(source, rows)


def _number_or_text(value: str) -> Any:
    for convert in (int, float):
        try:
            return convert(value)
        except ValueError:
            continue
    return value


def _numbered(source: str, rows: Iterable[Any]) -> Iterator[Located]:
    return ((f"{source}: row {index}", dict(row)) for index, row in enumerate(rows))


def _canonical(row: Row, kind: Kind, where: str) -> Row:
    """Rename aliased columns, unpack verl rows, check types."""
    row = dict(row)
    if kind == "prompts" and isinstance(row.get("reward_model"), dict) and _absent(row, "answer"):
        row["answer"] = row["reward_model"].get("ground_truth")  # verl; the original column stays for its reward
    if kind == "sft" and not _absent(row, "messages"):
        _check_chat(row["messages"], "messages", where)
        if row["messages"][-1].get("role") != "assistant":
            raise ValueError(
                f"{where}: messages ends with a turn of {row['messages'][-1].get('role')!r}, expected 'assistant': "
                "its last turn is what is learned"
            )
        return row
    if kind == "sft" and not _absent(row, "text") and _absent(row, "completion"):
        _check_text(row["text"], "text", where)
        return row
    for column, aliases in ALIASES[kind].items():
        if _absent(row, column):
            alias = next((name for name in aliases if not _absent(row, name)), None)
            if alias is not None:
                row[column] = row.pop(alias)
        # RL prompts need no answer where rewards do without one (format, preference model).
        if _absent(row, column) and not (kind == "prompts" and column == "answer"):
            raise ValueError(_missing(row, kind, column, aliases, where))
        if not _absent(row, column):
            row[column] = _CHECKS.get(column, _check_text_or_chat)(row[column], column, where)
    if kind == "prompts":
        row.setdefault("answer", None)
    return row


def _absent(row: Row, column: str) -> bool:
    return row.get(column) is None


def _missing(row: Row, kind: str, column: str, aliases: tuple[str, ...], where: str) -> str:
    present = [name for name in row if row[name] is not None]
    listed = ", ".join(present) or "none"
    near = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
    also = f" (or {', '.join(aliases)})" if aliases else ""
    if kind == "sft":
        also += "; sft rows have messages, or prompt and completion, or text"
    empty = f" ({column} is null)" if column in row else ""
    return f"{where}: no column {column!r}{empty}{also}; columns present: {listed}" + (
        f"; did you mean {near[0]!r}?" if near else ""
    )


def _check_text(value: Any, column: str, where: str) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} is {_shown(value)}, expected a string")
    return value


def _check_chat(value: Any, column: str, where: str) -> Any:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: column {column!r} is {_shown(value)}, expected a list of {{role, content}}")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: {column}[{index}] is {_shown(message)}, expected {{role, content: string}}")
        if message.get("role") not in _ROLES:
            raise ValueError(
                f"{where}: {column}[{index}] has role {message.get('role')!r}, expected {', '.join(_ROLES)}"
            )
    return value


def _check_text_or_chat(value: Any, column: str, where: str) -> Any:
    return _check_text(value, column, where) if isinstance(value, str) else _check_chat(value, column, where)


def _check_answer(value: Any, column: str, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float | list | dict):
        raise ValueError(f"{where}: column {column!r} is {_shown(value)}, expected a string or a number")
    return str(value) if isinstance(value, int | float) else value


def _check_label(value: Any, column: str, where: str) -> int:
    if value not in (0, 1):  # True and False too
        raise ValueError(f"{where}: column {column!r} is {_shown(value)}, expected 1 (safe) or 0")
    return int(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


_CHECKS: dict[str, Callable[[Any, str, str], Any]] = {
    "answer": _check_answer,
    "label": _check_label,
    "text": _check_text,
}
