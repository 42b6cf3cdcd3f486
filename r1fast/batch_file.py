"""The output of a batch: chunks of rows in a folder beside it, written whole one by one, and at last one file.

FILE.partial/    settings.json  chunk_00000.jsonl  chunk_00002.jsonl ..
FILE             JSON lines or Parquet, all rows in order, when the last chunk is there
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1fast.run_folder import PARTIAL, read_record, remove, replace_file, sync, write_record
from r1fast.wording import one_line

SUFFIXES = (".jsonl", ".parquet")
_SETTINGS = "settings.json"
_FAILED = "failed"
_BEGIN_ANEW = "or begin anew with --overwrite"
Columns = dict[str, Any]


def check_output(output: Path, *, overwrite: bool) -> None:
    """ValueError for a file that cannot be written, or would be written over without being asked."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: expected a file that ends with {' or '.join(SUFFIXES)}")
    if output.exists() and not (overwrite and output.is_file()):
        raise ValueError(f"--output {output} is there already; choose another file, or replace it with --overwrite")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")


def check_columns(rows: Sequence[Columns], added: Sequence[str], output: Path) -> None:
    """ValueError for columns that the output cannot hold beside those that are added."""
    if taken := next((name for name in added if any(name in row for row in rows)), None):
        raise ValueError(f"the input has a column {taken!r}, which is that of the output; rename it")
    if output.suffix == ".parquet":
        try:
            pq.write_table(_table(rows, _schema(rows)), BytesIO())
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            other = f"--output {output.with_suffix('.jsonl').name} takes any"
            raise ValueError(
                f"the input's columns do not fit into Parquet ({one_line(error)[:300]}); {other}"
            ) from error


@dataclass(frozen=True)
class BatchFile:
    output: Path
    num_rows: int
    rows_per_chunk: int

    @classmethod
    def open(cls, output: Path, settings: Columns, num_rows: int, most: int, *, overwrite: bool) -> "BatchFile":
        """Begun, with chunks of at most so many rows, or gone on with, in chunks as they are.

        settings: what completions depend on. Raises OSError for those of another batch, and for damage.
        """
        folder = _folder(output)
        if overwrite:
            remove(folder)
        if not (folder / _SETTINGS).exists():
            folder.mkdir(exist_ok=True)
            write_record(folder / _SETTINGS, {**settings, "num_rows": num_rows, "rows_per_chunk": most})
        try:
            found = read_record(folder / _SETTINGS)
        except ValueError as error:
            raise OSError(f"{folder}: {error}; {_BEGIN_ANEW}") from error
        if differing := [name for name, value in settings.items() if found.get(name) != value]:
            text = f"{folder} holds the beginning of a batch with another {' and '.join(differing)}"
            raise OSError(f"{text}; give the same command, choose another --output, {_BEGIN_ANEW}")
        for left in (*folder.glob("*.taken"), folder / _FAILED):  # by processes that are gone
            left.unlink(missing_ok=True)
        return cls(output, num_rows, found["rows_per_chunk"])

    def take(self, chunk: int) -> bool:
        """Whether no other process has taken it, or has failed."""
        if self._has_failed():
            return False
        try:
            (_folder(self.output) / f"{chunk:05}.taken").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def fail(self) -> None:
        """Let nobody wait for chunks that will not come."""
        (_folder(self.output) / _FAILED).touch()

    def wait(self) -> None:
        """For the chunks that others make; a collective would wait half an hour at most."""
        while self.missing() and not self._has_failed():
            time.sleep(0.1)

    def _has_failed(self) -> bool:
        return (_folder(self.output) / _FAILED).exists()

    def missing(self) -> list[int]:
        """Chunks that are still to be made."""
        return [chunk for chunk in range(-(-self.num_rows // self.rows_per_chunk)) if not self._path(chunk).exists()]

    def rows_of(self, chunk: int) -> range:
        start = chunk * self.rows_per_chunk
        return range(start, min(start + self.rows_per_chunk, self.num_rows))

    def num_done(self) -> int:
        return self.num_rows - sum(len(self.rows_of(chunk)) for chunk in self.missing())

    def write(self, chunk: int, rows: Sequence[Columns]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_file(self._path(chunk), lines.encode())

    def rows(self) -> Iterator[list[Columns]]:
        """Of each chunk, in order."""
        for chunk in range(-(-self.num_rows // self.rows_per_chunk)):
            with self._path(chunk).open(encoding="utf-8") as file:
                yield [json.loads(line) for line in file]

    def finish(self) -> None:
        """All chunks as one file, whole or not at all. Raises OSError."""
        folder = _folder(self.output)
        merged = folder / "merged"
        if self.output.suffix == ".parquet":
            _write_parquet(merged, self.rows)
        else:
            with merged.open("wb") as file:
                for chunk in range(-(-self.num_rows // self.rows_per_chunk)):
                    file.write(self._path(chunk).read_bytes())
        sync(merged)
        os.replace(merged, self.output)
        sync(self.output.parent)
        remove(folder)

    def _path(self, chunk: int) -> Path:
        return _folder(self.output) / f"chunk_{chunk:05}.jsonl"


def _folder(output: Path) -> Path:
    return output.with_name(output.name + PARTIAL)


def _write_parquet(path: Path, chunks: Callable[[], Iterator[list[Columns]]]) -> None:
    """A column has the type of all its values: chunks are read twice."""
    try:
        schema = pa.unify_schemas([_schema(rows) for rows in chunks()], promote_options="permissive")
        with pq.ParquetWriter(path, schema) as writer:
            for rows in chunks():
                writer.write_table(_table(rows, schema))
    except pa.ArrowException as error:
        text = f"{path.parent} holds all rows as JSON lines, which do not fit into one Parquet file"
        raise OSError(f"{text} ({one_line(error)[:300]})") from error


def _schema(rows: Sequence[Columns]) -> pa.Schema:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])


def _table(rows: Sequence[Columns], schema: pa.Schema) -> pa.Table:
    return pa.table({name: [row.get(name) for row in rows] for name in schema.names}, schema=schema)
