"""Kills at random moments: after a resume every number is that of a run that nobody killed, and nothing is left."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.forks import ROOT
from tests.fuzz.trials import (
    Trainers,
    differences,
    leftovers,
    outcome,
    processes_in,
    wait_until,
)

KILLS_IN_SHORT = 2
KILLS_ONE_PROCESS, KILLS_TWO_PROCESSES, KILLS_TORCHRUN = 200, 90, 10  # -m slow
SEED = 20261128
# What to wait for before the kill: any of these files of a run at work.
MOMENTS = {
    "first-file": "config.yaml.partial",
    "save": "*/checkpoints/tmp_step_*",
    "payload": "*/checkpoints/tmp_step_*/__0_0.distcp",
    "manifest": "*/checkpoints/tmp_step_*/manifest.json",
    "commit": "zero/checkpoints/step_2",
    "deletion": "zero/checkpoints/step_3",
    "model": "*/model.partial/model.safetensors",
    "model-renamed": "tuned/model",
    "samples": "zero/samples/*.partial",
    "stage-record": "zero/stage.json.partial",
    "summary": "summary.json.partial",
    "rows": "data/*.partial",
    "report": "report.html.partial",
    "report-written": "report.html",
}


def moment(rng: random.Random, run_dir: Path) -> tuple[str, Callable[[], bool]]:
    """A moment to kill at: when a file appears, or after a random time."""
    if rng.random() < 0.3:
        return "time", lambda: rng.random() < 1 / 4000  # asked about 2,000 times a second
    name = rng.choice(list(MOMENTS))
    return name, lambda: any(run_dir.glob(MOMENTS[name]))


def either(first: Callable[[], bool], second: Callable[[], bool]) -> bool:
    return first() or second()


def all_ended(pids: list[int]) -> bool:
    return all("Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2] for pid in pids)


def has_ended(process: subprocess.Popen) -> bool:
    return process.poll() is not None


def kill_once(trainers: Trainers, rng: random.Random, run_dir: str, *argv: object) -> str:
    """Begin a run and kill one or all of its processes; says when and which."""
    pids = trainers.begin(*argv)
    name, is_now = moment(rng, trainers.cwd / run_dir)
    assert wait_until(partial(either, is_now, partial(all_ended, pids)), 240), trainers.said()
    victims = pids if rng.random() < 0.5 else [rng.choice(pids)]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    codes = trainers.end()
    return f"{name}: killed {len(victims)} of {len(pids)}, exit {codes}"


def kill_and_compare(trainers: Trainers, expected: dict[str, Any], number: int) -> None:
    rng = random.Random(f"{SEED},{trainers.ranks},{number}")
    run_dir = f"killed_{number}"
    folder = trainers.cwd / run_dir
    said = [kill_once(trainers, rng, run_dir, "--config", "chain.yaml", "--output-dir", run_dir)]
    while rng.random() < 0.3 and (folder / "config.yaml").exists():
        said.append(kill_once(trainers, rng, run_dir, "--resume", "--output-dir", run_dir))
    if (folder / "config.yaml").exists():
        assert trainers.resume(run_dir) == 0, (number, said, trainers.said())
    else:  # nothing had begun: the folder is as good as new
        assert trainers.start(run_dir) == 0, (number, said, trainers.said())
    check(trainers.cwd, folder, expected, (number, said))
    shutil.rmtree(folder)


def check(cwd: Path, folder: Path, expected: dict[str, Any], where: Any) -> None:
    found = outcome(folder)
    assert differences(found, expected) == [], where
    for stage in ("tuned", "zero"):
        steps = [row["step"] for row in found[f"{stage}/metrics.jsonl"]]
        assert steps == list(range(1, len(steps) + 1)), where
    assert leftovers(folder) == [], where
    assert (folder / "report.html").is_file()
    assert wait_until(lambda: not processes_in(cwd), 20), (where, processes_in(cwd))


def test_kills(one_process: Trainers, expected: dict[str, Any]) -> None:
    for number in range(KILLS_IN_SHORT):
        kill_and_compare(one_process, expected, number)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_kills(one_process: Trainers, expected: dict[str, Any]) -> None:
    for number in range(KILLS_IN_SHORT, KILLS_ONE_PROCESS + KILLS_IN_SHORT):
        kill_and_compare(one_process, expected, number)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(0)
def test_many_kills_of_two_processes(two_processes: Trainers, expected_of_two: dict[str, Any]) -> None:
    """All at once, and one alone: the other ends by itself, or as torchrun ends it."""
    for number in range(KILLS_TWO_PROCESSES):
        kill_and_compare(two_processes, expected_of_two, number)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["config.yaml", "tuned/checkpoints/step_6", "zero/samples", "zero/checkpoints/step_2"])
def test_a_signal_to_one_of_two_processes(
    two_processes: Trainers, expected_of_two: dict[str, Any], rank: int, when: str
) -> None:
    """Both end at the same step, and say so once."""
    run_dir = f"signal_{rank}_{when.replace('/', '_')}"
    pids = two_processes.begin("--config", "chain.yaml", "--output-dir", run_dir)
    assert wait_until((two_processes.cwd / run_dir / when).exists, 240), two_processes.said()
    os.kill(pids[rank], signal.SIGTERM)
    assert two_processes.end() == [143, 143], two_processes.said()
    assert [line for line in two_processes.complaints() if "go on with" in line] == [two_processes.complaints()[-1]]
    assert "Traceback" not in two_processes.said()
    assert two_processes.resume(run_dir) == 0, two_processes.said()
    check(two_processes.cwd, two_processes.cwd / run_dir, expected_of_two, (rank, when))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(0)
def test_many_kills_under_torchrun(two_processes: Trainers, expected_of_two: dict[str, Any]) -> None:
    """The launcher itself: killed with its processes, or one of them alone."""
    cwd = two_processes.cwd
    for number in range(KILLS_TORCHRUN):
        rng = random.Random(f"{SEED},torchrun,{number}")
        run_dir = f"torchrun_{number}"
        launcher = torchrun(cwd, "--config", "chain.yaml", "--output-dir", run_dir)
        name, is_now = moment(rng, cwd / run_dir)
        assert wait_until(partial(either, is_now, partial(has_ended, launcher)), 240)
        if launcher.poll() is None:
            kill_under(launcher, rng)
        launcher.wait(timeout=120)
        assert wait_until(lambda: not processes_in(cwd), 60), processes_in(cwd)
        again = ["--resume"] if (cwd / run_dir / "config.yaml").exists() else ["--config", "chain.yaml"]
        assert torchrun(cwd, *again, "--output-dir", run_dir).wait(timeout=600) == 0
        check(cwd, cwd / run_dir, expected_of_two, (number, name))


def torchrun(cwd: Path, *argv: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "r1fast.train"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    with (cwd / "torchrun.log").open("a") as log:
        return subprocess.Popen([*command, *argv], cwd=cwd, env=environment, stdout=log, stderr=log)


def kill_under(launcher: subprocess.Popen, rng: random.Random) -> None:
    """All, or one trainer. The launcher stands still meanwhile, so that it reaps none whose id is to be killed."""
    launcher.send_signal(signal.SIGSTOP)
    status = Path(f"/proc/{launcher.pid}/stat")
    assert wait_until(lambda: " T " in status.read_text().rpartition(")")[2], 10)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    trainers = [int(child) for child in children]
    everything = rng.random() < 0.5 or not trainers
    for pid in trainers if everything else [rng.choice(trainers)]:
        os.kill(pid, signal.SIGKILL)
    launcher.send_signal(signal.SIGKILL if everything else signal.SIGCONT)
