"""Trackers: by name, only when asked for, with a clear error when missing."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r1fast.observe.trackers import open_trackers


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_missing_package_says_what_to_install(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}, or take it out of report_to"):
        open_trackers([name], run_dir=tmp_path, run_name="mine", config={})


def test_other_ranks_open_nothing(tmp_path: Path) -> None:
    assert open_trackers(["tensorboard"], run_dir=tmp_path, run_name="mine", config={}, is_main=False) == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_writes_an_event_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tracker,) = open_trackers(["tensorboard"], run_dir=tmp_path, run_name="mine", config={})
    tracker.log("zero", 1, {"reward": 0.5})
    tracker.close()
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("zero/reward")] == [(1, 0.5)]


def test_wandb_gets_one_step_axis_per_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    run = SimpleNamespace(
        define_metric=lambda name, step_metric=None: calls.append((name, step_metric)),
        log=lambda metrics: calls.append((metrics,)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: run))
    (tracker,) = open_trackers(["wandb"], run_dir=tmp_path, run_name="mine", config={"seed": 0})
    tracker.log("zero", 1, {"reward": 0.5})
    tracker.log("zero", 2, {"reward": 0.6})
    tracker.close()
    assert calls == [
        ("zero/step", None),
        ("zero/*", "zero/step"),
        ({"zero/step": 1, "zero/reward": 0.5},),
        ({"zero/step": 2, "zero/reward": 0.6},),
        ("finish",),
    ]
