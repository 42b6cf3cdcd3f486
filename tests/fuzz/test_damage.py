"""Damaged files, a full disk, a folder that cannot be written: one line each, nothing lost, bit-equal once mended."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.trials import (
    Trainers,
    differences,
    leftovers,
    outcome,
    read_only,
    remount,
    small_disk,
    wait_until,
    why_no_mount,
)

SEED = 20261128
NUM_DAMAGED = 200  # -m slow
FULL_DISK_SHARES = (0.02, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)  # of what a whole run takes
# Observations, which no later number depends on: what is left of them is kept, and the line says what is gone.
OBSERVED = ("metrics.jsonl", ".parquet", "report.html")
UNREAD = "tuned/checkpoints/"  # of a stage that is finished


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def make_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: list[Callable[[Path, random.Random], None]] = [truncate, flip_a_bit, empty, remove, make_a_folder]


@pytest.fixture(scope="module")
def trainers(one_process: Trainers) -> Trainers:
    return one_process


@pytest.fixture(scope="module")
def stopped(trainers: Trainers) -> Path:
    """A run that was killed in its second stage, which has two checkpoints."""
    (pid,) = trainers.begin("--config", "chain.yaml", "--output-dir", "stopped")
    assert wait_until((trainers.cwd / "stopped/zero/checkpoints/step_3").exists, 240)
    os.kill(pid, signal.SIGKILL)
    trainers.end()
    return trainers.cwd / "stopped"


def one_line(trainers: Trainers, code: int) -> None:
    said = trainers.said()
    assert "Traceback" not in said, said
    assert code in (1, 2) and len(trainers.complaints()) == 1, (code, said)


def damage_and_resume(trainers: Trainers, stopped: Path, expected: dict[str, Any], file: str, number: int) -> int:
    rng = random.Random(f"{SEED},{file},{number}")
    damage = DAMAGE[number % len(DAMAGE)]
    folder = trainers.cwd / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stopped, folder)
    damage(folder / file, rng)
    code = trainers.resume("damaged")
    where = (file, damage.__name__, code, trainers.said())
    if code != 0:
        one_line(trainers, code)
        if (folder / file).is_dir():
            (folder / file).rmdir()
        shutil.copy2(stopped / file, folder / file)
        assert trainers.resume("damaged") == 0, (where, trainers.said())
    assert "Traceback" not in where[-1], where
    still_damaged = {file} if code == 0 and (file.endswith(OBSERVED) or file.startswith(UNREAD)) else set()
    wrong = [n for n in differences(outcome(folder, still_damaged), expected) if n not in still_damaged]
    assert wrong == [] and leftovers(folder) == [], (wrong, where)
    return code


def test_damaged_files(trainers: Trainers, stopped: Path, expected: dict[str, Any]) -> None:
    """One that stands for each kind: a record that is made again, a checkpoint, a log."""
    assert damage_and_resume(trainers, stopped, expected, "summary.json", 1) == 0
    assert "made again from the stages' own records: tuned done, zero running" in trainers.said()
    newest = max((stopped / "zero" / "checkpoints").iterdir(), key=lambda path: path.name)
    assert damage_and_resume(trainers, stopped, expected, f"zero/checkpoints/{newest.name}/manifest.json", 4) == 0
    assert f"{newest.name} is not usable (manifest.json is no file" in trainers.said()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_damaged_files(trainers: Trainers, stopped: Path, expected: dict[str, Any]) -> None:
    """Every file of the folder, in every way, as long as they last."""
    files = sorted(str(path.relative_to(stopped)) for path in stopped.rglob("*") if path.is_file())
    files = [file for file in files if not file.endswith((".partial", "run.lock")) and "/tmp_" not in file]
    trials = [(file, number) for number in range(len(DAMAGE)) for file in files]
    assert len(trials) > 100
    for file, number in trials[:NUM_DAMAGED]:
        damage_and_resume(trainers, stopped, expected, file, number)


@pytest.fixture
def disk(tmp_path: Path) -> Callable[[int], Any]:
    if why := why_no_mount(tmp_path):
        pytest.skip(f"no tmpfs can be mounted here: {why}")
    return lambda kilobytes: small_disk(tmp_path / "disk", kilobytes)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 1024


def fill_and_resume(trainers: Trainers, expected: dict[str, Any], disk: Callable[[int], Any], share: float) -> None:
    """`expected` is what made RUN/whole, too."""
    total = size_of(trainers.cwd / "whole")
    with disk(int(total * share) + 16) as folder:
        code = trainers.start(str(folder / "run"))
        one_line(trainers, code)
        reasons = ("No space left", "os error 28", "(0 MiB are left on that disk)")
        assert any(reason in trainers.said() for reason in reasons), trainers.said()
        begun = (folder / "run" / "config.yaml").exists()
        assert trainers.said().rstrip().endswith("--resume" if begun else "start it again"), trainers.said()
        remount(folder, f"size={4 * total + 4096}k")
        code = trainers.resume(str(folder / "run")) if begun else trainers.start(str(folder / "run"))
        assert code == 0, (share, trainers.said())
        assert differences(outcome(folder / "run"), expected) == [], share
        assert leftovers(folder / "run") == []


def test_full_disk(trainers: Trainers, expected: dict[str, Any], disk: Callable[[int], Any]) -> None:
    fill_and_resume(trainers, expected, disk, 0.45)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("share", FULL_DISK_SHARES)
def test_full_disk_at_any_size(
    trainers: Trainers, expected: dict[str, Any], disk: Callable[[int], Any], share: float
) -> None:
    fill_and_resume(trainers, expected, disk, share)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_folder_that_becomes_read_only(
    trainers: Trainers, expected: dict[str, Any], disk: Callable[[int], Any]
) -> None:
    with disk(1 << 16) as folder:
        trainers.begin("--config", "chain.yaml", "--output-dir", str(folder / "run"))
        assert wait_until((folder / "run/zero/checkpoints/step_1").exists, 240)
        with read_only(folder):
            (code,) = trainers.end()
            one_line(trainers, code)
            assert trainers.resume(str(folder / "run")) == 2
            one_line(trainers, 2)
        assert trainers.resume(str(folder / "run")) == 0, trainers.said()
        assert differences(outcome(folder / "run"), expected) == []


@pytest.mark.slow
def test_new_run_in_a_read_only_folder(trainers: Trainers, disk: Callable[[int], Any]) -> None:
    with disk(1024) as folder, read_only(folder):
        assert trainers.start(str(folder / "run")) == 2
        one_line(trainers, 2)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_folder_that_vanishes(trainers: Trainers) -> None:
    trainers.begin("--config", "chain.yaml", "--output-dir", "gone")
    assert wait_until((trainers.cwd / "gone/zero/checkpoints/step_1").exists, 240)
    while (trainers.cwd / "gone").exists():
        shutil.rmtree(trainers.cwd / "gone", ignore_errors=True)
    (code,) = trainers.end()
    assert code == 1 and "Traceback" not in trainers.said(), trainers.said()
    assert not (trainers.cwd / "gone").exists()
