"""Experiment trackers by name: wandb, trackio, tensorboard. Imported only when asked for.

One that cannot start ends the run before any stage, for whoever asked for it wants to know then. One that fails later
is left out from there on and said so once: it never ends a training. Each stage counts its own steps, so a tracker
needs one axis per stage.
"""

import importlib
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from r1fast.observe.progress import active_progress
from r1fast.run_folder import read_record, write_record

PROJECT = "r1fast"
RECORD = "trackers.json"  # of a run folder: what a resumed run continues
CLOSE_SECONDS = 60.0  # that a tracker may take for what it has not sent yet; it can be sent later
TABLE_ROWS = 1000  # of a table that is sent with all its rows each time
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run. project, group: None leaves them to the environment and the tracker."""

    folder: Path
    name: str  # unless the environment says another
    config: Mapping[str, Any]
    project: str | None = None
    group: str | None = None
    is_named: bool = False  # whether the recipe gives the name, which then counts more than the environment


class Tracker(Protocol):
    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def table(self, stage: str, step: int, name: str, rows: Sequence[Row]) -> None: ...

    def close(self, failed: bool) -> None: ...


class WandbTracker:
    """Weights & Biases; `<stage>/step` is the axis of a stage, for wandb's own step may not go back.

    WANDB_* count where the recipe says nothing. The id of the run is kept in its folder: a resume continues it.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.wandb, given = _import("wandb"), os.environ
        options: dict[str, Any] = {"config": dict(run.config), "id": _wandb_id(run.folder), "group": run.group}
        options["project"] = run.project or given.get("WANDB_PROJECT") or PROJECT
        options["name"] = run.name if run.is_named else given.get("WANDB_NAME") or run.name
        options["dir"] = given.get("WANDB_DIR") or str(run.folder)
        options["resume"] = given.get("WANDB_RESUME") or "allow"
        self.run = self.wandb.init(**options)
        self.stages: set[str] = set()
        self.rows: dict[tuple[str, str], list[Row]] = {}

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/step")
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log(_of_stage(stage, {"step": step, **metrics}))

    def table(self, stage: str, step: int, name: str, rows: Sequence[Row]) -> None:
        """With the rows of earlier steps: of a table that is logged again wandb shows the last one alone."""
        found = self.rows.setdefault((stage, name), [])
        found += [{"step": step, **row} for row in rows]
        del found[:-TABLE_ROWS]
        columns = list(dict.fromkeys(column for row in found for column in row))
        data = [[row.get(column) for column in columns] for row in found]
        self.log(stage, step, {name: self.wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def _wandb_id(folder: Path) -> str:
    """WANDB_RUN_ID, or the run's own, which is made once."""
    try:
        known = str(read_record(folder / RECORD)["wandb"])
    except (ValueError, KeyError):  # none yet; a damaged one is made anew
        known = uuid.uuid4().hex[:10]
    chosen = os.environ.get("WANDB_RUN_ID") or known
    write_record(folder / RECORD, {"wandb": chosen})
    return chosen


class TrackioTracker:
    """trackio, which keeps its database on this machine; the stage's step goes in as a metric."""

    def __init__(self, run: TrackedRun) -> None:
        self.trackio = _import("trackio")
        project = run.project or os.environ.get("TRACKIO_PROJECT") or PROJECT
        options: dict[str, Any] = {"config": dict(run.config), "group": run.group, "resume": "allow"}
        self.trackio.init(project=project, name=run.name, **options)

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        self.trackio.log(_of_stage(stage, {"step": step, **metrics}))

    def table(self, stage: str, step: int, name: str, rows: Sequence[Row]) -> None:
        self.log(stage, step, {name: self.trackio.Table(dataframe=_import("pandas").DataFrame(list(rows)))})

    def close(self, failed: bool) -> None:
        self.trackio.finish()


class TensorboardTracker:
    """TensorBoard event files in RUN/tensorboard."""

    def __init__(self, run: TrackedRun) -> None:
        _import("tensorboard")
        self.writer = _import("torch.utils.tensorboard").SummaryWriter(log_dir=str(run.folder / "tensorboard"))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in _of_stage(stage, metrics).items():
            self.writer.add_scalar(name, value, step)

    def table(self, stage: str, step: int, name: str, rows: Sequence[Row]) -> None:
        text = "\n\n".join("\n".join(f"{key}: {value}" for key, value in row.items()) for row in rows)
        lines = (f"    {line}" for line in text.splitlines())  # as code: nothing in it is Markdown
        self.writer.add_text(f"{stage}/{name}", "\n".join(lines), step)

    def close(self, failed: bool) -> None:
        self.writer.close()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": WandbTracker, "trackio": TrackioTracker, "tensorboard": TensorboardTracker,
}  # fmt: skip
_ADVICE = {"wandb": "set WANDB_API_KEY or run wandb login, or set WANDB_MODE=offline; or "}


class Trackers(AbstractContextManager["Trackers"]):
    """All trackers of a run, by name; without any, nothing happens. At the end of `with` they are closed."""

    def __init__(self, trackers: Mapping[str, Tracker] | None = None) -> None:
        self.trackers = dict(trackers or {})

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one step of a stage."""
        if metrics:
            self._each(lambda tracker: tracker.log(stage, step, metrics))

    def table(self, stage: str, step: int, name: str, rows: Sequence[Row]) -> None:
        """Rows with the same columns, plain values."""
        if rows:
            self._each(lambda tracker: tracker.table(stage, step, name, rows))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # of a network, a full disk, the tracker itself: none is worth a training
                del self.trackers[name]
                _say(f"{name} gets no more of this run: {_line(error)}; metrics.jsonl has everything")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        def close() -> None:
            self._each(lambda tracker: tracker.close(kind is not None))

        if self.trackers:
            closing = threading.Thread(target=close, daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)
            if closing.is_alive():
                names = ", ".join(self.trackers)
                _say(f"{names} did not end within {CLOSE_SECONDS:.0f} s and may lack the last of this run")


def open_trackers(names: Sequence[str], run: TrackedRun) -> Trackers:
    """Start the named trackers; ValueError with the first that cannot."""
    trackers = {}
    for name in names:
        try:
            trackers[name] = TRACKERS[name](run)
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith("report_to: "):
                raise
            advice = f"{_ADVICE.get(name, '')}take it out of report_to"
            raise ValueError(f"report_to: {name} could not start ({_line(error)}); {advice}") from error
    return Trackers(trackers)


def _say(text: str) -> None:
    if (progress := active_progress()) is not None:
        progress.message(text)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _of_stage(stage: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{stage}/{name}": value for name, value in metrics.items()}


def _import(module: str) -> Any:
    name = module.rpartition(".")[2]
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        text = f"cannot be imported ({error}); pip install {name}, or take it out of report_to"
        raise ValueError(f"report_to: {name} {text}") from error
    if getattr(found, "__file__", None) is None:  # a folder of that name, such as wandb leaves where it has run
        folder = next(iter(getattr(found, "__path__", [name])))
        text = (
            f"is not installed, and {folder} is a folder of its name; pip install {name}, or take it out of report_to"
        )
        raise ValueError(f"report_to: {name} {text}")
    return found
