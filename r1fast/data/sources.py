"""Rows from anywhere, under one set of column names; every error says which file, which row, and what was expected.

A source is one of
    train.jsonl  .json  .parquet  .csv  .tsv   files
    some/folder  or  some/folder:split         written by datasets.save_to_disk, or holding such files (folders.py)
    task:NAME/SPLIT                            embedded tasks
    reasoning_gym:NAME?size=100&seed=0         generated (needs the extra `tasks`)
    org/name  org/name:split  org/name:config:split    a data set of the Hub (split: train)
What a row must hold, and under which names: rows.py.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from r1fast.data.files import (
    Located,
    as_written,
    guarded,
    narrow_columns,
    plain_columns,
    read_csv,
    read_json,
    read_jsonl,
    read_parquet,
)  # fmt: skip
from r1fast.data.folders import files_by_split, split_folder
from r1fast.data.rows import ALIASES, Kind, canonical
from r1fast.recipe_yaml import load_yaml
from r1fast.wording import did_you_mean, one_line

_FILE_READERS = {
    ".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet, ".csv": read_csv, ".tsv": read_csv,
}  # fmt: skip
FILE_SUFFIXES = tuple(_FILE_READERS)


def load_rows(sources: list[str], kind: Kind) -> list[dict]:
    """All rows of the sources in order, checked and with canonical columns.

    Prompt columns hold a string or a chat ([{"role", "content"}]). Each row is a rows.Row, which says where it stands.
    Wrong rows, missing columns, unreadable files and sources without rows are ValueErrors.
    """
    if kind not in ALIASES:
        raise ValueError(f"unknown kind of rows {kind!r}; expected one of {', '.join(ALIASES)}")
    if isinstance(sources, str) or not sources:
        raise ValueError(f"load_rows got sources={sources!r}; expected a list of at least one file, folder, id or task")
    rows: list[dict] = []
    for source in sources:
        before = len(rows)
        try:
            rows.extend(canonical(columns, kind, where) for where, columns in read_source(source))
        except OSError as error:  # no permission, a name of 5,000 characters, a disk that fails
            raise ValueError(f"{source[:200]}: cannot be read: {error.strerror or one_line(error)}") from error
        if len(rows) == before:
            raise ValueError(f"{source} has no rows")
    return rows


def read_source(source: str) -> Iterator[Located]:
    """Rows as they are, with where they stand."""
    if not source or "\0" in source:
        raise ValueError(f"{source!r} names nothing; expected a file, a folder, a task or a data set of the Hub")
    if source.startswith("task:"):
        return _read_task(source)
    if source.startswith("reasoning_gym:"):
        return _read_reasoning_gym(source)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in FILE_SUFFIXES:
        if not path.parent.is_dir():
            raise ValueError(f"{source}: there is no such file, nor the folder {path.parent}")
        if not path.is_file():
            hint = did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
            raise ValueError(f"{source}: there is no such file{hint}")
        return _FILE_READERS[path.suffix](path)
    if found := split_folder(source):
        return _read_folder(*found)
    if path.exists():
        raise ValueError(f"{source}: unknown kind of file {path.suffix!r}; expected {', '.join(FILE_SUFFIXES)}")
    return _read_hub(source)


def _read_folder(path: Path, split: str = "") -> Iterator[Located]:
    """split: "" for all that is there, which is an error where that is several splits."""
    if (path / "dataset_dict.json").is_file():
        what = f"{path}: cannot be read"
        splits = guarded(what, lambda: list(json.loads((path / "dataset_dict.json").read_bytes())["splits"]))
        return _read_folder(path / _chosen(path, split, splits))
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        from datasets import load_from_disk

        return _of_data_set(str(path), guarded(f"{path}: cannot be read", lambda: load_from_disk(str(path))))
    by_split = files_by_split(path, FILE_SUFFIXES)
    if not by_split:
        kinds = ", ".join(FILE_SUFFIXES)
        raise ValueError(f"{path}: neither a folder of datasets.save_to_disk nor one that holds {kinds}")
    named = [name for name in by_split if name]
    if split or len(named) > 1:
        by_split = {split: by_split[_chosen(path, split, named)]}
    files = sorted(file for files in by_split.values() for file in files)
    return (located for file in files for located in _FILE_READERS[file.suffix](file))


def _chosen(path: Path, split: str, splits: list[str]) -> str:
    if split in splits:
        return split
    if not split and len(splits) == 1:
        return splits[0]
    holds = f"holds the splits {', '.join(splits)}" if splits else "holds no splits"
    listed = f"; name one of {', '.join(f'{path}:{name}' for name in splits)}" if splits else f"; name {path} alone"
    raise ValueError(f"{path}{f' has no split {split!r}: it' if split else ''} {holds}{listed}")


def _read_hub(source: str) -> Iterator[Located]:
    name, *rest = source.split(":")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or len(rest) > 2:
        raise ValueError(f"{source}: there is no such file or folder")
    config, split = [*[None] * (2 - len(rest)), *rest] if rest else (None, None)
    what = f"{source}: no such file or folder here, and as a Hub data set it failed"
    return _of_data_set(source, guarded(what, lambda: load_hub(name, config, split or "train")))


def load_hub(name: str, config: str | None, split: str) -> Iterable[Any]:
    from datasets import DownloadManager, load_dataset, load_dataset_builder

    how = {} if config is None else {"name": config}
    files = load_dataset_builder(name, **how).config.data_files
    if files is None or not all(str(file).endswith((".csv", ".tsv")) for file in files.get(split, [""])):
        return load_dataset(name, split=split, **how)
    # pandas would read the text 007 as the number 7, and None and N/A as no value.
    found = zip(files[split], DownloadManager().download(list(files[split])))
    read = [read_csv(Path(path), "\t" if str(file).endswith(".tsv") else ",") for file, path in found]
    return (columns for located in read for _, columns in located)


def _of_data_set(source: str, rows: Iterable[Any]) -> Iterator[Located]:
    narrow = narrow_columns(getattr(rows, "features", None) or {})
    return ((where, plain_columns(as_written(row, narrow), where)) for where, row in _each(source, rows))


def _read_task(source: str) -> Iterator[Located]:
    name, _, split = source.removeprefix("task:").partition("/")
    if not name or not split:
        raise ValueError(f"{source}: expected task:NAME/SPLIT")
    from r1fast.data.tasks import load

    return _each(source, load(name, split))


def _read_reasoning_gym(source: str) -> Iterator[Located]:
    name, _, query = source.removeprefix("reasoning_gym:").partition("?")
    options = _options(source, query)
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise ValueError(f"{source} needs the package reasoning-gym: pip install 'r1fast[tasks]'") from error
    try:
        entries = create_dataset(name, **options)
    except Exception as error:  # a data set checks its options by assert, or not at all
        hint = "" if name in DATASETS else did_you_mean(name, DATASETS)
        raise ValueError(f"{source}: {error}{hint}") from error
    # The verifier needs the whole entry back: reasoning_gym.get_score_answer_fn(name)(answer, entry).
    rows = (
        {"prompt": e["question"], "answer": e["answer"], "metadata": e.get("metadata", {}), "reasoning_gym": name}
        for e in entries
    )
    return _each(source, rows)


def _options(source: str, query: str) -> dict[str, Any]:
    """What follows the question mark; the values are YAML's, as in a recipe."""
    options: dict[str, Any] = {}
    what = f"{source}: expected NAME?key=value&key=value"
    for key, value in guarded(what, lambda: parse_qsl(query, True, strict_parsing=bool(query))):
        if key in options:
            raise ValueError(f"{source}: {key} is given twice; drop one")
        options[key] = guarded(f"{source}: {key}", partial(load_yaml, value))
    return options


def _each(source: str, rows: Iterable[Any]) -> Iterator[Located]:
    """Numbered rows; whatever a library raises on the way to one is an error of that row."""
    found = iter(rows)
    for index in count():
        where = f"{source}: row {index}"
        row = guarded(f"{where}: cannot be read", lambda: next(found, None))
        if row is None:
            return
        yield where, dict(row)
