"""One stage's record: metrics.jsonl, sample completions, the console line, the trackers."""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from r1fast.observe.progress import ChainProgress, active_progress
from r1fast.observe.trackers import Tracker

TABLE_STEPS = 10  # a table may be large: 58 layers of 256 experts are 90 kB


class StageLog:
    """Writes what one stage reports, on the main rank; on the others every call does nothing.

    with StageLog(run_dir / "zero", total_steps=60, trackers=trackers, is_main=dist.rank == 0) as log:
        log.log(1, {"reward": 0.2, "loss": 0.01})

    stage_dir: its name is the stage's name. total_steps: for the progress bar.
    trackers: from `open_trackers`; a tracker sees the metrics as `<stage>/<metric>`.
    resume_step: a resumed stage drops lines and samples after this step, which the killed run left; None appends.
    progress: the display to feed; the active one by default, else one made for this stage.
    """

    def __init__(
        self,
        stage_dir: Path,
        *,
        total_steps: int | None = None,
        trackers: Sequence[Tracker] = (),
        is_main: bool = True,
        resume_step: int | None = None,
        logging_steps: int = 1,
        progress: ChainProgress | None = None,
    ) -> None:
        if logging_steps < 1:
            raise ValueError(f"logging_steps: got {logging_steps}, expected at least 1 (1 prints every step)")
        self.stage_dir = Path(stage_dir)
        self.total_steps = total_steps
        self.trackers = tuple(trackers)
        self.is_main = is_main
        self.logging_steps = logging_steps
        self._progress = progress or active_progress()
        self._owns_progress = self._progress is None
        if is_main:
            self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        self.stage_dir.mkdir(parents=True, exist_ok=True)
        path = self.stage_dir / "metrics.jsonl"
        _repair(path, resume_step)
        if resume_step is not None:
            _drop_samples(self.stage_dir / "samples", resume_step)
        self._file = path.open("a", encoding="utf-8")
        if self._progress is None:
            self._progress = ChainProgress([self.stage_dir.name])
            self._progress.__enter__()
        self._progress.begin_steps(self.stage_dir.name, self.total_steps, done=resume_step or 0)

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
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self.trackers:
            tracker.log(self.stage_dir.name, step, numbers)
        assert self._progress is not None
        quiet = step % self.logging_steps != 0 and step != self.total_steps
        self._progress.step(step, self.total_steps, numbers, quiet=quiet)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path | None:
        """Write sample completions to samples/step_00010.parquet; rows may lack columns."""
        rows = list(rows)
        if not self.is_main or not rows:
            return None
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
        filled = [{"step": step, **row} for row in rows]
        table = pa.table({name: [_cell(row.get(name)) for row in filled] for name in names})
        path = self.stage_dir / "samples" / f"step_{step:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".tmp")
        pq.write_table(table, partial, compression="zstd")
        os.replace(partial, path)
        return path

    def close(self) -> None:
        if not self.is_main:
            return
        self._file.close()
        if self._owns_progress and self._progress is not None:
            self._progress.close()

    def __enter__(self) -> "StageLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _cell(value: Any) -> Any:
    """Parquet columns hold plain values; a chat prompt or a list goes in as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | tuple | dict) else value


def _repair(path: Path, resume_step: int | None) -> None:
    """Drop the half line of a killed writer, and the steps that a resumed stage does again."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n")]
    if resume_step is not None:
        kept = [line for line in kept if json.loads(line)["step"] <= resume_step]
    if len(kept) < len(lines):
        partial = path.with_suffix(".tmp")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)


def _drop_samples(directory: Path, resume_step: int) -> None:
    for path in directory.glob("step_*.parquet"):
        if int(path.stem.removeprefix("step_")) > resume_step:
            path.unlink()
