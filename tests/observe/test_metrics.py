"""The stage log: what is written, what a resume keeps, who writes."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from r1fast.observe.metrics import StageLog
from r1fast.observe.progress import ChainProgress
from r1fast.observe.trackers import Trackers


class _Recorder(Trackers):
    """Keeps what trackers are told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.tables: list[tuple[str, int, str, Sequence[Mapping[str, Any]]]] = []

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((stage, step, dict(metrics)))

    def table(self, stage: str, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.tables.append((stage, step, name, rows))


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_step_with_non_finite_values_as_null(tmp_path: Path) -> None:
    tracker = _Recorder()
    with StageLog(tmp_path / "zero", total_steps=2, trackers=tracker) as log:
        log.log(1, {"reward": 0.5, "kl": math.nan, "loss": torch.tensor(0.25)})
        log.log(2, {"reward": math.inf, "entropy": None})
    first, second = _lines(tmp_path / "zero" / "metrics.jsonl")
    assert {key: first[key] for key in ("step", "reward", "kl", "loss")} == {
        "step": 1, "reward": 0.5, "kl": None, "loss": 0.25,
    }  # fmt: skip
    assert second["reward"] is None and "entropy" not in second
    assert [(stage, step) for stage, step, _ in tracker.rows] == [("zero", 1), ("zero", 2)]


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    log = StageLog(tmp_path / "zero", total_steps=2)
    log.log(1, {"reward": 0.5})
    assert len(_lines(tmp_path / "zero" / "metrics.jsonl")) == 1  # before close: a SIGKILL may come now
    log.close()


def test_resume_drops_what_the_killed_run_did_after_the_checkpoint(tmp_path: Path) -> None:
    with StageLog(tmp_path / "zero", total_steps=9) as log:
        for step in range(1, 6):
            log.log(step, {"reward": float(step)})
            log.samples(step, [{"prompt": "p"}])
    path = tmp_path / "zero" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 6, "rew')
    with StageLog(tmp_path / "zero", total_steps=9, resume_step=3) as log:
        log.log(4, {"reward": 40.0})
    assert [(row["step"], row["reward"]) for row in _lines(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    names = sorted(file.name for file in (tmp_path / "zero" / "samples").iterdir())
    assert names == ["step_00001.parquet", "step_00002.parquet", "step_00003.parquet"]


def test_without_resume_step_a_half_line_goes_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "zero" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "reward": 0.1}\n{"step": 2, "re')
    with StageLog(tmp_path / "zero") as log:
        log.log(2, {"reward": 0.2})
    assert [row["reward"] for row in _lines(path)] == [0.1, 0.2]


def test_samples_with_ragged_rows_and_chat_prompts(tmp_path: Path) -> None:
    tracker = _Recorder()
    with StageLog(tmp_path / "zero", trackers=tracker) as log:
        path = log.samples(10, [{"prompt": [{"role": "user", "content": "饭"}], "accuracy": 1.0}, {"prompt": "q"}])
        assert log.samples(11, []) is None
    assert path is not None and path.name == "step_00010.parquet"
    rows = pq.read_table(path).to_pylist()
    assert json.loads(rows[0]["prompt"]) == [{"role": "user", "content": "饭"}]
    assert rows[1] == {"step": 10, "prompt": "q", "accuracy": None}
    assert tracker.tables == [("zero", 10, "samples", rows)]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with StageLog(tmp_path / "zero", is_main=False) as log:
        log.log(1, {"reward": 0.5})
        assert log.samples(1, [{"prompt": "p"}]) is None
    assert list(tmp_path.iterdir()) == []


def test_console_and_trackers_get_the_means_of_logging_steps(tmp_path: Path) -> None:
    tracker = _Recorder()
    with StageLog(tmp_path / "zero", total_steps=9, logging_steps=3, trackers=tracker) as log:
        for step in range(1, 9):  # the stage ends early
            log.log(step, {"loss": float(step), "x/max": float(step), "kl": math.nan if step % 3 else 1.0})
    assert tracker.rows == [
        ("zero", 3, {"loss": 2.0, "x/max": 3.0, "kl": 1.0}),
        ("zero", 6, {"loss": 5.0, "x/max": 6.0, "kl": 1.0}),
        ("zero", 8, {"loss": 7.5, "x/max": 8.0}),
    ]
    assert [row["step"] for row in _lines(tmp_path / "zero" / "metrics.jsonl")] == list(range(1, 9))


def test_each_step_says_how_long_its_phases_took(tmp_path: Path) -> None:
    phases = {"evaluate": 5.0}  # before the first step
    with StageLog(tmp_path / "zero", phases=phases) as log:
        for step in (1, 2):
            phases["update"] = 2.0 * step
            log.log(step, {"loss": 1.0})
    assert [row.get("seconds/update") for row in _lines(tmp_path / "zero" / "metrics.jsonl")] == [2.0, 2.0]
    assert "seconds/evaluate" not in _lines(tmp_path / "zero" / "metrics.jsonl")[0]


def test_first_and_last_step_are_lines_of_the_display(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ChainProgress(["zero"]) as progress:
        progress.start_stage("zero", "grpo")
        with StageLog(tmp_path / "zero", total_steps=2) as log:
            for step in (1, 2):
                log.log(step, {"reward": 0.5, "learning_rate": 5e-4, "completions/mean_length": 21.34})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "zero (grpo) starts",
        "zero (grpo) 1/2  0.0 s, 0.0 s left  reward 0.5  length 21.3  lr 5e-4",
        "zero (grpo) 2/2  0.0 s  reward 0.5  length 21.3  lr 5e-4",
    ]


def test_tables_are_kept_of_every_tenth_step(tmp_path: Path) -> None:
    tracker = _Recorder()
    with StageLog(tmp_path / "zero", total_steps=13, trackers=tracker) as log:
        for step in range(1, 14):
            log.log(step, {"reward": 0.5, "moe/load": [[1.23456, 0.5], [1.0, 2.0]]})
    rows = _lines(tmp_path / "zero" / "metrics.jsonl")
    assert [row["step"] for row in rows if "moe/load" in row] == [1, 10, 13]
    assert rows[0]["moe/load"] == [[1.235, 0.5], [1.0, 2.0]]
    assert all(metrics == {"reward": 0.5} for _, _, metrics in tracker.rows)
