"""A run that a signal or a number ends: what is kept, what is said, and that a resume gives the bits of a whole run."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from r1fast.rollout.engine import RolloutEngine
from r1fast.run_folder import read_record
from r1fast.stages.training import Trainer
from r1fast.stopping import SIGNALS, Stop
from tests.stages.test_resume import CLOCK
from tests.tiny_checkpoint import PROMPTS, tree, write_jsonl, write_recipe

SFT: dict[str, Any] = {
    "name": "tuned", "kind": "sft", "train_files": ["sft.jsonl"], "batch_size": 4, "num_train_epochs": 3,
    "learning_rate": 1e-3,
}  # fmt: skip
GRPO: dict[str, Any] = {
    "name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], "prompt_template": "chat", "max_prompt_length": 40,
    "max_completion_length": 6, "num_generations": 4, "prompts_per_step": 3, "steps_per_generation": 2, "max_steps": 5,
    "learning_rate": 5e-3, "rewards": {"mine": {"function": "rewards.py:count"}}, "beta": 0.0,
}  # fmt: skip
REWARDS = "def count(completion_ids, **_):\n    return [len(set(ids)) / len(ids) for ids in completion_ids]\n"


@pytest.fixture
def start(command: Callable[..., int], base_model: Path, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a recipe of one stage in RUN."""
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    rows = [{"prompt": f"What is {i} ?", "completion": "red " * (1 + i % 4)} for i in range(8)]
    write_jsonl(tmp_path / "sft.jsonl", rows)
    (tmp_path / "rewards.py").write_text(REWARDS)

    def run(run_dir: str, stage: dict[str, Any], **sections: Any) -> int:
        sections = {"name": "same", "model": {"path": str(base_model)}, **sections}
        config = write_recipe(tmp_path / f"{run_dir}.yaml", stage, **sections)
        return command("--config", config, "--output-dir", run_dir)

    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield run
    for signum, handler in before.items():
        signal.signal(signum, handler)


def outcome(stage_dir: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k not in CLOCK and not k.startswith("seconds/")} for row in rows]
    found: dict[str, Any] = {"metrics": kept}
    return found | tree(stage_dir / "model")


def before_update(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Calls act just before that update of the process."""
    calls = iter(range(1, 1000))
    update = Trainer.update

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            act()
        return update(*args, **kwargs)

    monkeypatch.setattr(Trainer, "update", counted)


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "ctrl-c"])
def test_a_signal_ends_the_run_after_the_step(
    start, whole, command, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path, signum, code
) -> None:
    whole(SFT)
    with monkeypatch.context() as patch:
        before_update(patch, 2, send(signum))
        capsys.readouterr()
        assert start("stopped", SFT) == code
    name = signal.Signals(signum).name
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("r1fast: ")]
    go_on = "python -m r1fast.train --output-dir stopped --resume"
    assert lines[-1] == f"r1fast: stopped by {name}; go on with: {go_on}"
    tuned = tmp_path / "stopped" / "tuned"
    assert [path.name for path in (tuned / "checkpoints").iterdir()] == ["step_2"]  # save_steps is 100
    (entry,) = read_record(tmp_path / "stopped" / "summary.json")["stages"]
    assert entry["status"] == "stopped" and "stopped at step 2" in (tmp_path / "stopped/report.html").read_text()
    assert command("--resume", "--output-dir", "stopped") == 0
    assert outcome(tuned) == outcome(tmp_path / "whole" / "tuned")


@pytest.mark.parametrize("refills", [0, 1])
def test_sampling_is_interrupted_and_the_steps_before_are_kept(
    start, whole, command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refills: int
) -> None:
    stage = {**GRPO, "dynamic_sampling_refills": refills}
    whole(stage)
    generate, calls = RolloutEngine.generate, iter(range(1, 1000))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 4:
            send(signal.SIGTERM)()
            pytest.fail("the signal's handler lets sampling go on")
        return generate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutEngine, "generate", interrupted)
        assert start("stopped", stage) == 143
    zero = tmp_path / "stopped" / "zero"
    assert len(list((zero / "checkpoints").iterdir())) == 1
    assert command("--resume", "--output-dir", "stopped") == 0
    assert outcome(zero) == outcome(tmp_path / "whole" / "zero")


def test_a_signal_during_an_evaluation_leaves_the_stage_to_be_resumed(
    start, command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = {**SFT, "eval_files": ["train.jsonl"], "eval_before": False, "eval_limit": 2, "max_completion_length": 4}
    with monkeypatch.context() as patch:
        patch.setattr(RolloutEngine, "generate", lambda *args, **kwargs: send(signal.SIGTERM)())
        assert start("stopped", stage) == 143
    before = tree(tmp_path / "stopped" / "tuned" / "model")
    assert command("--resume", "--output-dir", "stopped") == 0
    (entry,) = read_record(tmp_path / "stopped" / "summary.json")["stages"]
    assert entry["status"] == "done" and "pass@1" in entry["eval_after"]
    assert tree(tmp_path / "stopped" / "tuned" / "model") == before


def test_without_a_signal_the_handlers_are_as_before() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with Stop():
        assert [signal.getsignal(signum) for signum in SIGNALS] != before
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_a_second_signal_ends_at_once(start, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with Stop() as stop:
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()  # the launcher's copy of the first
        assert stop.asked == signal.SIGTERM and codes == []
        stop._since -= 10
        send(signal.SIGINT)()
        assert codes == [130]


@pytest.fixture
def not_finite(monkeypatch: pytest.MonkeyPatch) -> Callable[[pytest.MonkeyPatch, int], None]:
    """Makes the gradient norm of an update NaN."""

    def arrange(patch: pytest.MonkeyPatch, number: int) -> None:
        from r1fast.stages import training

        calls = iter(range(1, 1000))
        measure = training.grad_norm_and_clip
        broken = lambda *args: torch.tensor(torch.nan) if next(calls) == number else measure(*args)  # noqa: E731
        patch.setattr(training, "grad_norm_and_clip", broken)

    return arrange


@pytest.mark.parametrize(
    ("stage", "number", "saved"),
    [(SFT, 4, ["step_3"]), (GRPO, 5, ["step_2"]), ({**GRPO, "save_steps": 1}, 6, ["step_1", "step_2"])],
    ids=["sft", "grpo", "second-minibatch"],
)
def test_a_loss_that_is_not_finite_keeps_the_last_good_step(
    start, whole, command, not_finite, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path, stage, number, saved
) -> None:
    whole(stage)
    with monkeypatch.context() as patch:
        not_finite(patch, number)
        capsys.readouterr()
        assert start("broken", stage) == 1
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("r1fast: ")]
    assert len(lines) == 1 and "Traceback" not in err
    assert f"stages {stage['name']}" not in lines[0] and "gradient norm nan" in lines[0]
    assert lines[0].endswith("--output-dir broken --resume")
    folder = tmp_path / "broken" / stage["name"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == saved
    assert read_record(tmp_path / "broken" / "summary.json")["stages"][0]["status"] == "failed"
    assert command("--resume", "--output-dir", "broken") == 0
    assert outcome(folder) == outcome(tmp_path / "whole" / stage["name"])


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_times_of_a_resumed_stage_add_up(start, command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of a killed process too, up to its last checkpoint; and each phase."""
    from r1fast.stages.context import StageContext

    clock = StageContext.clock
    with monkeypatch.context() as patch:
        before_update(patch, 4, lambda: (_ for _ in ()).throw(Killed))
        # As if each process had taken 100 s until it saved.
        slow = lambda ctx: {**clock(ctx), "seconds": 100.0, "phases": {"update": 60.0}}  # noqa: E731
        patch.setattr(StageContext, "clock", slow)
        with pytest.raises(Killed):
            start("killed", {**SFT, "save_steps": 2})
    path = tmp_path / "killed" / "summary.json"
    from r1fast.run_folder import write_record

    summary = read_record(path)
    summary["stages"][0] = {k: v for k, v in summary["stages"][0].items() if k not in ("seconds", "phases")}
    write_record(path, summary | {"stages": [summary["stages"][0] | {"status": "running"}]})  # what SIGKILL leaves
    assert command("--resume", "--output-dir", "killed") == 0
    summary = read_record(path)
    (entry,) = summary["stages"]
    assert 100 < entry["seconds"] < 160 and 60 < entry["phases"]["update"] < 100
    assert summary["seconds"] == entry["seconds"]


def test_a_log_that_cannot_be_written_ends_the_run(start, whole, command, monkeypatch, capsys, tmp_path: Path) -> None:
    """On every rank: rank 0 tells the others with the next update, or before anything is saved."""
    from r1fast.observe.metrics import StageLog

    whole(SFT)
    write_line, calls = StageLog._write_line, iter(range(1, 1000))

    def full(log: StageLog, line: bytes) -> None:
        if next(calls) == 3:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        write_line(log, line)

    with monkeypatch.context() as patch:
        patch.setattr(StageLog, "_write_line", full)
        capsys.readouterr()
        assert start("full", {**SFT, "save_steps": 2}) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and "r1fast: No space left on device: metrics.jsonl; what was saved" in err
    assert [path.name for path in (tmp_path / "full/tuned/checkpoints").iterdir()] == ["step_2"]
    assert command("--resume", "--output-dir", "full") == 0
    assert outcome(tmp_path / "full" / "tuned") == outcome(tmp_path / "whole" / "tuned")
