"""The display: plain lines, the live block, the sparkline."""

import io
import math

import pytest
from rich.console import Console

from r1fast.observe import progress as progress_module
from r1fast.observe.progress import ChainProgress, active_progress, key_numbers, sparkline


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
        "base (pretrain) 1/2  0.0 s, 0.0 s left  loss 5",
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


def test_key_numbers_are_every_reward_and_metric_of_ones_own_that_is_finite() -> None:
    metrics = {"loss": 0.25, "rewards/b/mean": math.nan, "rewards/a/mean": 0.5, "mine": 2.0, "grad_norm": 1.0}
    metrics |= {"sampling/x": 1.0, "tokens_per_second": 15_512.0, "learning_rate": 1e-6, "num_tokens": 1.0}
    assert key_numbers(metrics) == {"a": 0.5, "loss": 0.25, "mine": 2.0, "lr": 1e-6, "tok/s": 15_512.0}


def test_lines_of_steps_tell_the_time_and_are_seconds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    console = _console(terminal=False)
    with ChainProgress(["zero"], console=console) as progress:
        progress.start_stage("zero", "grpo")
        progress.begin_steps(100, done=20)  # resumed
        for step in range(21, 101):
            now[0] += 2.0
            progress.step(step, {"reward": 0.5} if step % 2 == 0 else None)
    lines = _printed(console).splitlines()[1:]
    assert lines[0] == "zero (grpo) 22/100  4.0 s, 2 m 36 s left  reward 0.5"
    assert lines[1] == "zero (grpo) 26/100  12.0 s, 2 m 28 s left  reward 0.5"  # 8 s later: 24 was too soon
    assert lines[-1] == "zero (grpo) 100/100  2 m 40 s  reward 0.5" and len(lines) == 21


def test_every_file_and_the_failures_stand_with_the_scores() -> None:
    console = _console(terminal=False)
    with ChainProgress(["zero", "r1"], console=console) as progress:
        progress.finish_stage("zero", evaluation={"pass@1": 0.5, "mine": 0.25, "n": 8, "failures": 3, "unscorable": 0})
        files = {"a.jsonl": {"pass@1": 0.5, "pass@1_ci": 0.1}, "b.jsonl": {"mine": 0.25}}
        progress.finish_stage("r1", evaluation={"pass@1": 0.5, "mine": 0.25, "files": files})
    assert _printed(console).splitlines() == [
        "✓ zero  done  pass@1 50.0  mine 25.0  3 samples with a failed reward (scored 0)",
        "✓ r1  done",
        "    a.jsonl: pass@1 50.0 ± 10.0",
        "    b.jsonl: mine 25.0",
    ]
