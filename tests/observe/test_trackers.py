"""Trackers: by name, only when asked for, named and continued as asked; a fault is an error at the start alone."""

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r1fast.observe import trackers as module
from r1fast.observe.progress import ChainProgress
from r1fast.observe.trackers import TrackedRun, Trackers, open_trackers
from tests.test_imports import ROOT

ROWS = [{"prompt": "1 + 1", "reward": 1.0}, {"prompt": "# 2\n# 3", "reward": None}]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)


def run_in(folder: Path, **options: Any) -> TrackedRun:
    return TrackedRun(folder, options.pop("name", "mine-seed0-20260302-101407"), {"seed": 0}, **options)


class Wandb(SimpleNamespace):
    """The part of wandb that is used; `calls` has what it was told."""

    def __init__(self) -> None:
        super().__init__(__file__="wandb/__init__.py", calls=[], Table=lambda **table: table["data"])

    def init(self, **options: Any) -> Any:
        self.calls.append(options)
        return SimpleNamespace(
            define_metric=lambda name, step_metric=None: self.calls.append((name, step_metric)),
            log=self.calls.append,
            finish=lambda exit_code: self.calls.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_missing_package_says_what_to_install(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}, or take it out of report_to"):
        open_trackers([name], run_in(tmp_path))


def test_a_folder_of_its_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb leaves one wherever it has run, and Python imports it as a package without anything in it."""
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"a_tracker is not installed, and .*a_tracker is a folder of its name"):
        module._import("a_tracker")


def test_wandb_gets_one_step_axis_per_stage_and_tables(tmp_path: Path, wandb: Wandb) -> None:
    with open_trackers(["wandb"], run_in(tmp_path)) as trackers:
        trackers.log("zero", 1, {"reward": 0.5})
        trackers.log("zero", 2, {"reward": 0.6})
        trackers.table("zero", 1, "samples", ROWS)
        trackers.table("zero", 2, "samples", [{"prompt": "3", "language": 0.5}])
        trackers.table("zero", 2, "samples", [])
    assert wandb.calls[1:] == [
        ("zero/step", None),
        ("zero/*", "zero/step"),
        {"zero/step": 1, "zero/reward": 0.5},
        {"zero/step": 2, "zero/reward": 0.6},
        {"zero/step": 1, "zero/samples": [[1, "1 + 1", 1.0], [1, "# 2\n# 3", None]]},
        {
            "zero/step": 2,
            "zero/samples": [[1, "1 + 1", 1.0, None], [1, "# 2\n# 3", None, None], [2, "3", None, 0.5]],
        },
        0,
    ]


def test_a_resumed_run_continues_that_of_wandb(tmp_path: Path, wandb: Wandb) -> None:
    for _ in range(2):
        open_trackers(["wandb"], run_in(tmp_path))
    first, second = wandb.calls
    assert first["id"] == second["id"] and first["resume"] == "allow"
    (other := tmp_path / "other").mkdir()
    open_trackers(["wandb"], run_in(other))
    assert wandb.calls[2]["id"] != first["id"]


def test_the_recipe_and_the_environment_name_a_run_of_wandb(
    tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_trackers(["wandb"], run_in(tmp_path))
    names = ("project", "name", "group", "dir")
    assert [wandb.calls[0][name] for name in names] == ["r1fast", "mine-seed0-20260302-101407", None, str(tmp_path)]
    given = {"PROJECT": "p", "NAME": "n", "DIR": "/d", "RUN_ID": "i", "RESUME": "must", "RUN_GROUP": "g"}
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    open_trackers(["wandb"], run_in(tmp_path))
    found = wandb.calls[1]
    assert [found[name] for name in (*names, "id", "resume")] == ["p", "n", None, "/d", "i", "must"]  # group: wandb's
    open_trackers(["wandb"], run_in(tmp_path, name="mine", is_named=True, project="q", group="h"))
    assert [wandb.calls[2][name] for name in names] == ["q", "mine", "h", "/d"]
    monkeypatch.delenv("WANDB_RUN_ID")
    open_trackers(["wandb"], run_in(tmp_path))
    assert wandb.calls[3]["id"] == "i"  # as it was


def test_one_that_cannot_start_is_an_error(tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**options: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty).\n call wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", fails)
    with pytest.raises(
        ValueError, match=r"^report_to: wandb could not start \(RuntimeError: api_key not .* WANDB_MODE"
    ):
        open_trackers(["wandb"], run_in(tmp_path))


class Broken:
    """Fails from its second metric on."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, *arguments: Any) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("the network is gone")

    def table(self, *arguments: Any) -> None:
        self.calls += 1

    def close(self, failed: bool) -> None:
        self.calls += 1


def test_one_that_fails_later_is_left_out_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    broken, sound = Broken(), Broken()
    sound.log = lambda *arguments: None  # type: ignore[method-assign]
    with ChainProgress(["zero"]), Trackers({"wandb": broken, "tensorboard": sound}) as trackers:
        for step in range(1, 5):
            trackers.log("zero", step, {"loss": 1.0})
        trackers.table("zero", 4, "samples", ROWS)
    assert broken.calls == 2 and sound.calls == 2
    error = capsys.readouterr().err
    assert (
        error == "wandb gets no more of this run: ConnectionError: the network is gone; metrics.jsonl has everything\n"
    )


def test_one_that_does_not_end_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.05)
    slow, ended = Broken(), threading.Event()
    slow.close = lambda failed: bool(ended.wait())  # type: ignore[assignment]
    with ChainProgress(["zero"]), Trackers({"wandb": slow}):
        pass
    ended.set()
    assert "wandb did not end within" in capsys.readouterr().err


def test_tensorboard_writes_an_event_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with open_trackers(["tensorboard"], run_in(tmp_path)) as trackers:
        trackers.log("zero", 1, {"reward": 0.5})
        trackers.table("zero", 1, "samples", ROWS)
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("zero/reward")] == [(1, 0.5)]
    (text,) = events.Tensors("zero/samples/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert "    # 3" in lines and all(line.startswith("    ") for line in lines)


OFFLINE = """
import sys
from pathlib import Path
from r1fast.observe.trackers import TrackedRun, open_trackers
with open_trackers([sys.argv[1]], TrackedRun(Path("."), "mine", {"seed": 0}, "project", "group")) as trackers:
    trackers.log("zero", 1, {"reward": 0.5})
    trackers.table("zero", 1, "samples", [{"prompt": "p", "reward": 1.0}, {"prompt": "q", "reward": None}])
    assert trackers.trackers, "it was left out"
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_ones_offline(name: str, tmp_path: Path) -> None:
    """Twice, as a run that is resumed."""
    pytest.importorskip(name)
    places = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    environment = os.environ | places | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
    for _ in range(2):
        command = [sys.executable, "-c", OFFLINE, name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert name != "wandb" or len({run.name.rpartition("-")[2] for run in runs}) == 1
