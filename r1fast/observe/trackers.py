"""Experiment trackers by name: wandb, trackio, tensorboard. Imported only when asked for."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

PROJECT = "r1fast"


class Tracker(Protocol):
    """What `StageLog` calls. Each stage counts its own steps, so a tracker needs one axis per stage."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases; `<stage>/step` is the axis of a stage, for wandb's own step may not go back."""

    def __init__(self, run_dir: Path, run_name: str, config: Mapping[str, Any]) -> None:
        self.run = _import("wandb").init(project=PROJECT, name=run_name, config=dict(config), dir=str(run_dir))
        self.stages: set[str] = set()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/step")
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log(_of_stage(stage, {"step": step, **metrics}))

    def close(self) -> None:
        self.run.finish()


class TrackioTracker:
    """trackio, which keeps its database on this machine; the stage's step goes in as a metric."""

    def __init__(self, run_dir: Path, run_name: str, config: Mapping[str, Any]) -> None:
        self.trackio = _import("trackio")
        self.trackio.init(project=PROJECT, name=run_name, config=dict(config))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.trackio.log(_of_stage(stage, {"step": step, **metrics}))

    def close(self) -> None:
        self.trackio.finish()


class TensorboardTracker:
    """TensorBoard event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, run_name: str, config: Mapping[str, Any]) -> None:
        _import("tensorboard")
        self.writer = _import("torch.utils.tensorboard").SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in _of_stage(stage, metrics).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "wandb": WandbTracker, "trackio": TrackioTracker, "tensorboard": TensorboardTracker,
}  # fmt: skip


def open_trackers(
    names: Sequence[str], *, run_dir: Path, run_name: str, config: Mapping[str, Any], is_main: bool = True
) -> list[Tracker]:
    """Start the named trackers on the main rank. One that is not installed is an error before any work."""
    return [TRACKERS[name](run_dir, run_name, config) for name in names] if is_main else []


def _of_stage(stage: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{stage}/{name}": value for name, value in metrics.items()}


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.rpartition(".")[2]
        text = f"cannot be imported ({error}); pip install {name}, or take it out of report_to"
        raise ValueError(f"report_to: {name} {text}") from error
