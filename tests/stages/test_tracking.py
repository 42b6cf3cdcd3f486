"""What a run tells its trackers: metrics of every few steps, evaluations, completions; and one that cannot start."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from r1fast.observe import trackers
from r1fast.observe.trackers import TrackedRun
from tests.stages.conftest import SHORT
from tests.tiny_checkpoint import write_recipe

pytestmark = pytest.mark.usefixtures("stage_files")
ZERO: dict[str, Any] = {
    "name": "zero", "kind": "grpo", "train_files": ["questions.jsonl"], "eval_files": ["questions.jsonl"], **SHORT,
    "eval_num_samples": 2, "eval_rewards": {"accuracy": {}, "mine": {"function": "format"}}, "prompts_per_step": 2,
    "num_generations": 2, "max_steps": 4, "eval_steps": 2, "logging_steps": 2, "log_completions": 4,
}  # fmt: skip


class Recorder:
    def __init__(self, run: TrackedRun) -> None:
        self.run, self.closed = run, list[bool]()
        self.told: list[tuple[int, str]] = []
        self.tables: list[tuple[int, str, int]] = []

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.told += [(step, name) for name in metrics]

    def table(self, stage: str, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        assert {"prompt", "gold", "completion"} <= rows[0].keys()
        self.tables.append((step, name, len(rows)))

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


def test_what_a_run_tells(
    command: Callable[..., int], taught_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Recorder] = []

    def record(run: TrackedRun) -> Recorder:
        opened.append(Recorder(run))
        return opened[-1]

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", record)
    tracking = {"project": "p", "group": "g"}
    sections = {"model": {"path": str(taught_model)}, "name": "mine", "report_to": "tensorboard", "tracking": tracking}
    config = write_recipe(tmp_path / "mine.yaml", ZERO, **sections)
    assert command("--config", config, "--output-dir", "run") == 0
    (found,) = opened
    assert (found.run.project, found.run.group, found.run.folder.name) == ("p", "g", "run")
    assert found.run.name.startswith("mine-seed0-20") and found.closed == [False]
    assert [step for step, name in found.told if name == "reward"] == [2, 4]
    for name in ("eval/pass@1", "eval/greedy", "eval/mine", "eval/greedy/mine"):
        assert [step for step, told in found.told if told == name] == [0, 2, 4, 4]  # before, under way, after
    assert [(step, rows) for step, name, rows in found.tables if name == "samples"] == [(1, 4)]
    assert [step for step, name, rows in found.tables if name == "eval/completions"] == [0, 2, 4, 4]


def test_one_that_cannot_start_ends_the_run_before_any_stage(
    command: Callable[..., int], taught_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fails(run: TrackedRun) -> Recorder:
        raise RuntimeError("no key")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", fails)
    stage = {"name": "test", "kind": "evaluate", "eval_files": ["questions.jsonl"], **SHORT, "eval_limit": 2}
    sections = {"model": {"path": str(taught_model)}, "report_to": ["tensorboard"]}
    config = write_recipe(tmp_path / "mine.yaml", stage, **sections)
    assert command("--config", config, "--output-dir", "run") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert (
        "report_to: tensorboard could not start (RuntimeError: no key); take it out of report_to; go on with" in error
    )
    assert not (tmp_path / "run" / "test").exists()
    assert command("--output-dir", "run", "--resume", "report_to=none") == 0
