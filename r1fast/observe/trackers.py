"""Experiment trackers by name: wandb, trackio, tensorboard. Imported only when asked for."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """What `StageLog` calls. Each stage counts its own steps, so a tracker needs one axis per stage."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases; `<stage>/step` is the axis of a stage, for wandb's own step may not go back."""

    def __init__(self, run_dir: Path, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        wandb = _import("wandb")
        self.run = wandb.init(project=project, name=run_name, config=dict(config), dir=str(run_dir))
        self.stages: set[str] = set()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/step")
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({f"{stage}/step": step} | _prefixed(stage, metrics))

    def close(self) -> None:
        self.run.finish()


class TrackioTracker:
    """trackio, which keeps its database on this machine; the stage's step goes in as a metric."""

    def __init__(self, run_dir: Path, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        self.trackio = _import("trackio")
        self.trackio.init(project=project, name=run_name, config=dict(config))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.trackio.log({f"{stage}/step": step} | _prefixed(stage, metrics))

    def close(self) -> None:
        self.trackio.finish()


class TensorboardTracker:
    """TensorBoard event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        _import("tensorboard")
        writer_module = _import("torch.utils.tensorboard")
        self.writer = writer_module.SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in _prefixed(stage, metrics).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


TRACKERS: dict[str, type[WandbTracker] | type[TrackioTracker] | type[TensorboardTracker]] = {
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "tensorboard": TensorboardTracker,
}


def open_trackers(
    names: Sequence[str],
    *,
    run_dir: Path,
    project: str = "r1fast",
    run_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    is_main: bool = True,
) -> list[Tracker]:
    """Start the named trackers on the main rank. Unknown or uninstalled ones are an error before any work."""
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ValueError(f"report_to: got {unknown[0]!r}, expected any of {', '.join(TRACKERS)}")
    if not is_main:
        return []
    run_dir = Path(run_dir)
    return [TRACKERS[name](run_dir, project, run_name or run_dir.name, config or {}) for name in names]


def _prefixed(stage: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{stage}/{name}": value for name, value in metrics.items()}


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.rpartition(".")[2]
        raise ValueError(
            f"report_to: {name} cannot be imported ({error}); pip install {name}, or take it out of report_to"
        ) from error
