"""One stage's record: metrics.jsonl, sample completions, the console line, the trackers."""

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from r1fast.observe.progress import active_progress
from r1fast.observe.trackers import Trackers
from r1fast.run_folder import replace_file

TABLE_STEPS = 10  # a table may be large: 58 layers of 256 experts are 90 kB


@dataclass
class StageLog(AbstractContextManager["StageLog"]):
    """Writes what one stage reports, on the main rank; on the others every call does nothing.

    with StageLog(run_dir / "zero", total_steps=60, trackers=trackers, is_main=dist.rank == 0) as log:
        log.log(1, {"reward": 0.2, "loss": 0.01})
    """

    stage_dir: Path  # its name is the stage's
    _: KW_ONLY
    total_steps: int | None = None  # for the progress bar
    logging_steps: int = 1  # console and trackers get the means of that many steps; metrics.jsonl has every step
    trackers: Trackers = field(default_factory=Trackers)  # they see the metrics as `<stage>/<metric>`
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds so far by phase; each step says what it took
    is_main: bool = True
    # A resumed stage drops lines and samples after this step, which the killed run left, and says which lines before it
    # are damaged or gone: the curves then lack them, the training does not. None appends.
    resume_step: int | None = None
    # Gets the OSError of a line or samples that cannot be written, after which nothing more is. None: it is raised.
    on_failure: Callable[[OSError], None] | None = None

    def __post_init__(self) -> None:
        self._progress = active_progress()
        self._broken = False
        self._unsaid: list[dict[str, float]] = []  # steps of which console and trackers do not know yet
        self._before = dict(self.phases)
        self.step = self.resume_step or 0
        self._file: io.FileIO | None = None
        if self.is_main:
            self._try(self._open)
            if self._progress is not None:
                self._progress.begin_steps(self.total_steps, done=self.resume_step or 0)

    def _open(self) -> None:
        self.stage_dir.mkdir(exist_ok=True)  # without parents: a run folder that is gone is not made again
        path = self.stage_dir / "metrics.jsonl"
        for problem in _repair(path, self.resume_step):
            if self._progress is not None:
                self._progress.message(problem)
        for samples in self.stage_dir.glob("samples/step_*.parquet"):
            step = samples.stem.removeprefix("step_")
            if self.resume_step is not None and step.isdecimal() and int(step) > self.resume_step:
                samples.unlink()
        # Unbuffered: what a full disk did not take must not be tried again when the file is closed.
        self._file = io.FileIO(path, "a")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record one step. Values are numbers or 0-d tensors; a non-finite one is stored as null.

        A value may also be a table, a list of lists of numbers: metrics.jsonl alone has it, of every tenth step.
        """
        if not self.is_main:
            return
        tables = {name: value for name, value in metrics.items() if isinstance(value, list)}
        numbers = {name: float(x) for name, x in metrics.items() if x is not None and name not in tables}
        taken = {name: total - self._before.get(name, 0.0) for name, total in self.phases.items()}
        self._before = dict(self.phases)
        numbers |= {f"seconds/{name}": round(seconds, 4) for name, seconds in taken.items() if seconds > 0}
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if step == 1 or step % TABLE_STEPS == 0 or step == self.total_steps:
            row |= {name: [[round(x, 3) for x in line] for line in table] for name, table in tables.items()}
        self._try(lambda: self._write_line(json.dumps(row).encode() + b"\n"))
        self.step = step
        self._unsaid.append({name: value for name, value in numbers.items() if math.isfinite(value)})
        if step % self.logging_steps == 0 or step == self.total_steps:
            self._say()
        elif self._progress is not None:
            self._progress.step(step, None)

    def _say(self) -> None:
        names = dict.fromkeys(name for numbers in self._unsaid for name in numbers)
        known = {name: [numbers[name] for numbers in self._unsaid if name in numbers] for name in names}
        means = {
            name: max(values) if name.endswith("/max") else sum(values) / len(values) for name, values in known.items()
        }
        self._unsaid = []
        self.trackers.log(self.stage_dir.name, self.step, means)
        if self._progress is not None:
            self._progress.step(self.step, means)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path | None:
        """Write sample completions to samples/step_00010.parquet; rows may lack columns."""
        filled = [{"step": step, **row} for row in rows]
        if not self.is_main or not filled:
            return None
        path = self.stage_dir / "samples" / f"step_{step:05d}.parquet"
        self._try(lambda: write_parquet(path, filled))
        names = dict.fromkeys(name for row in filled for name in row)
        table = [{name: _cell(row.get(name)) for name in names} for row in filled]
        self.trackers.table(self.stage_dir.name, step, "samples", table)
        return path

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _write_line(self, line: bytes) -> None:
        assert self._file is not None
        while line:  # a disk that is nearly full takes a part, and raises at the next
            line = line[self._file.write(line) :]

    def _try(self, write: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            write()
        except OSError as error:
            self._broken = True
            if self.on_failure is None:
                raise
            self.on_failure(error)

    def close(self) -> None:
        if self._unsaid:  # the stage ended early
            self._say()
        if self._file is not None:
            self._file.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows may lack columns. Its folder is made, not that folder's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [_cell(row.get(name)) for row in rows] for name in names})
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    path.parent.mkdir(exist_ok=True)
    replace_file(path, content.getvalue())


def _cell(value: Any) -> Any:
    """Parquet columns hold plain values; a chat prompt or a list goes in as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | tuple | dict) else value


def _repair(path: Path, resume_step: int | None) -> list[str]:
    """Drop the half line of a killed writer, and the steps that a resumed stage does again; says what else is wrong."""
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    last = math.inf if resume_step is None else resume_step
    rows = {step: line for step, line in zip(steps, lines) if step is not None and step <= last}
    kept = b"".join(rows.values())
    if kept != content:
        replace_file(path, kept)
    problems = []
    if damaged := sum(step is None and line.endswith(b"\n") for step, line in zip(steps, lines)):
        problems.append(f"{path}: {damaged} damaged line{'s' * (damaged > 1)} dropped")
    if lacking := [step for step in range(1, (resume_step or 0) + 1) if step not in rows]:
        listed = ", ".join(map(str, lacking[:3])) + (" ..." if len(lacking) > 3 else "")
        problems.append(f"{path} lacks step{'s' * (len(lacking) > 1)} {listed}: the curves do, the training does not")
    return problems


def _step_of(line: bytes) -> int | None:
    """The step of a whole line, None for anything else."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None
