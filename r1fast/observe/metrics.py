"""One stage's record: metrics.jsonl, sample completions, the console line, the trackers."""

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from r1fast.observe.progress import active_progress
from r1fast.observe.trackers import Tracker
from r1fast.run_folder import replace_file

TABLE_STEPS = 10  # a table may be large: 58 layers of 256 experts are 90 kB


class StageLog:
    """Writes what one stage reports, on the main rank; on the others every call does nothing.

    with StageLog(run_dir / "zero", total_steps=60, trackers=trackers, is_main=dist.rank == 0) as log:
        log.log(1, {"reward": 0.2, "loss": 0.01})

    stage_dir: its name is the stage's name. total_steps: for the progress bar.
    trackers: from `open_trackers`; a tracker sees the metrics as `<stage>/<metric>`.
    resume_step: a resumed stage drops lines and samples after this step, which the killed run left, and says which
    lines before it are damaged or gone: the curves then lack them, the training does not. None appends.
    on_failure: gets the OSError of a line or samples that cannot be written, after which nothing more is; by default
    it is raised.
    """

    def __init__(
        self,
        stage_dir: Path,
        *,
        total_steps: int | None = None,
        trackers: Sequence[Tracker] = (),
        is_main: bool = True,
        resume_step: int | None = None,
        on_failure: Callable[[OSError], None] | None = None,
    ) -> None:
        self.stage_dir = Path(stage_dir)
        self.total_steps = total_steps
        self.trackers = tuple(trackers)
        self.is_main = is_main
        self._progress = active_progress()
        self._on_failure = on_failure
        self._broken = False
        self._file: io.FileIO | None = None
        if is_main:
            self._try(lambda: self._open(resume_step))
            if self._progress is not None:
                self._progress.begin_steps(total_steps, done=resume_step or 0)

    def _open(self, resume_step: int | None) -> None:
        self.stage_dir.mkdir(exist_ok=True)  # without parents: a run folder that is gone is not made again
        path = self.stage_dir / "metrics.jsonl"
        for problem in _repair(path, resume_step):
            if self._progress is not None:
                self._progress.message(problem)
        if resume_step is not None:
            for samples in self.stage_dir.glob("samples/step_*.parquet"):
                step = samples.stem.removeprefix("step_")
                if step.isdecimal() and int(step) > resume_step:
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
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if step == 1 or step % TABLE_STEPS == 0 or step == self.total_steps:
            row |= {name: [[round(x, 3) for x in line] for line in table] for name, table in tables.items()}
        self._try(lambda: self._write_line(json.dumps(row).encode() + b"\n"))
        for tracker in self.trackers:
            tracker.log(self.stage_dir.name, step, numbers)
        if self._progress is not None:
            self._progress.step(step, numbers)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path | None:
        """Write sample completions to samples/step_00010.parquet; rows may lack columns."""
        filled = [{"step": step, **row} for row in rows]
        if not self.is_main or not filled:
            return None
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = dict.fromkeys(name for row in filled for name in row)
        table = pa.table({name: [_cell(row.get(name)) for row in filled] for name in names})
        path = self.stage_dir / "samples" / f"step_{step:05d}.parquet"
        content = io.BytesIO()
        pq.write_table(table, content, compression="zstd")

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            replace_file(path, content.getvalue())

        self._try(write)
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
            if self._on_failure is None:
                raise
            self._on_failure(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "StageLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _cell(value: Any) -> Any:
    """Parquet columns hold plain values; a chat prompt or a list goes in as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | tuple | dict) else value


def _repair(path: Path, resume_step: int | None) -> list[str]:
    """Drop the half line of a killed writer, and the steps that a resumed stage does again; says what else is wrong."""
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    rows = {
        step: line
        for step, line in zip(steps, lines)
        if step is not None and (resume_step is None or step <= resume_step)
    }
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
