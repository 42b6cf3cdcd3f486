"""The display: plain lines, the live block, the sparkline, the final table."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from r1fast.observe.progress import ChainProgress, active_progress, key_numbers, sparkline, summary_table


def _console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def _printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _run_two_stages(progress: ChainProgress) -> None:
    progress.start_stage("base", "pretrain")
    progress.begin_steps(2)
    progress.step(1, {"loss": 5.0})
    progress.finish_stage("base", seconds=57.0, evaluation={"pass@1": 0.081})
    progress.start_stage("zero", "grpo")
    progress.finish_stage("zero", status="failed")


def test_plain_lines_outside_a_terminal() -> None:
    console = _console(terminal=False)
    with ChainProgress(["base", "zero"], console=console) as progress:
        assert active_progress() is progress
        _run_two_stages(progress)
    assert active_progress() is None
    assert _printed(console).splitlines() == [
        "base (pretrain) starts",
        "base (pretrain) 1/2  loss 5",
        "✓ base (pretrain)  done  57.0 s  pass@1 8.1",
        "zero (grpo) starts",
        "✗ zero (grpo)  failed",
    ]


def test_other_ranks_print_nothing() -> None:
    console = _console(terminal=True)
    with ChainProgress(["base", "zero"], is_main=False, console=console) as progress:
        _run_two_stages(progress)
        progress.message("hidden")
    assert _printed(console) == ""


def test_live_block_shows_stages_bars_and_key_numbers() -> None:
    progress = ChainProgress(["base", "zero", "cold"], title="tiny", console=_console(terminal=True))
    progress.finish_stage("base", seconds=1.0)
    progress.start_stage("zero", "grpo")
    progress.begin_steps(40, done=10)
    for step in range(11, 21):
        progress.step(step, {"reward": step / 20, "kl": 0.001})
    console = _console(terminal=False)
    console.print(progress)
    text = _printed(console)
    assert "tiny  ✓ base  ● zero  · cold" in text
    assert "1/3" in text and "20/40" in text and "left" in text
    assert "reward ▁▂▃▃▄▅▆▆▇█ 1" in text and "kl 0.001" in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([0.0] * 50 + [1.0] * 50, "▁▁██"),
    ],
    ids=["one", "constant", "longer-than-width"],
)
def test_sparkline(values: list[float], expected: str) -> None:
    assert sparkline(values, width=4) == expected


def test_key_numbers_take_the_first_name_that_has_a_finite_value() -> None:
    metrics = {"loss": 0.25, "rewards/accuracy/mean": math.nan, "accuracy": 0.5, "tokens_per_second": 15_512.0}
    assert key_numbers(metrics) == {"accuracy": 0.5, "loss": 0.25, "tok/s": 15_512.0}


def test_summary_table_has_a_row_per_stage_and_only_columns_with_content(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    summary = json.loads((write_run(tmp_path, stop_in="dev2") / "summary.json").read_text())
    console = Console(file=io.StringIO(), width=160)
    console.print(summary_table(summary))
    text = _printed(console)
    assert "8.1 → 79.1" in text and "75.1–83.1" in text
    assert "dev2 running" in text and "r1 pending" in text
    assert "cons@k" in text and "harmless" not in text


def test_summary_table_of_an_empty_summary() -> None:
    assert summary_table({}).row_count == 0


def test_every_reward_and_the_failures_stand_with_the_scores() -> None:
    console = _console(terminal=False)
    evaluation = {"pass@1": 0.5, "n": 8, "mine": 0.25, "failures": 3, "unscorable": 0}
    with ChainProgress(["zero"], console=console) as progress:
        progress.finish_stage("zero", evaluation=evaluation)
    assert _printed(console) == "✓ zero  done  pass@1 50.0  3 samples with a failed reward (scored 0)\n"
    stages = [{"name": "zero", "kind": "grpo", "status": "done", "seconds": 1.0, "eval_after": evaluation}]
    console.print(summary_table({"recipe": "mine", "seconds": 1.0, "stages": stages}))
    assert "failures" in _printed(console) and "unscorable" not in _printed(console)
    assert "mine" in _printed(console) and "25.0" in _printed(console)
    console = _console(terminal=False)
    stages[0]["eval_after"] = {**evaluation, "failures": 0}
    console.print(summary_table({"recipe": "mine", "seconds": 1.0, "stages": stages}))
    assert "failures" not in _printed(console)
