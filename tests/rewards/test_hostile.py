"""Whatever a reward does: other rows and rewards keep their scores, nothing outlives the pool, and time is bounded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from r1fast.rewards.pool import RewardPool
from tests.rewards.hostile_rewards import EXPECTED

TIMEOUT_S = 1.0
INNOCENT = ["a", "bb", "ccc", "dddd", "eeeee"]
MIXED = [*INNOCENT[:3], "hostile", *INNOCENT[3:]]
WELL_FORMED = "<think>a thought</think><answer>1</answer>"
# One of each kind: a crash that leaves a daemon, memory, a forged reply, a thread left behind.
SHORT = ["kills_its_parent", "hog", "writes_a_reply", "thread_that_exits"]


@pytest.fixture
def relatives(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Processes that were started, at whatever distance, since this fixture was made: they inherit a variable."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("R1FAST_TEST_MARK", mark)

    def find() -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (path / "environ").read_bytes() and path.name != str(os.getpid()):
                    found.append(int(path.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    return find


def score(pool: RewardPool, completions: list[str]):
    return pool.score([f"p{i}" for i in range(len(completions))], completions, [[1]] * len(completions), {})


def check(name: str, folder: Path, relatives: Callable[[], list[int]]) -> None:
    path = shutil.copy(Path(__file__).with_name("hostile_rewards.py"), folder / "hostile_rewards.py")
    reward = f"{path}:{name}"
    start = time.monotonic()
    with RewardPool({reward: {}, "format": {}}, timeout_s=TIMEOUT_S, memory_limit_gb=0.5) as pool:
        result = score(pool, MIXED)
        again = score(pool, [*INNOCENT, WELL_FORMED])
        assert relatives(), "the pool's own processes at least"
    assert not relatives(), "something outlived the pool"
    # A limit for each call, for the completion alone a quarter and a whole one, and process starts.
    assert time.monotonic() - start < 30.0

    values, at = result.values[reward], MIXED.index("hostile")
    assert np.delete(values, at).tolist() == [len(text) / 8 for text in INNOCENT]
    assert not np.delete(result.failed_by[reward] | result.exceeded[reward], at).any()
    assert result.values["format"].tolist() == [0.0] * len(MIXED) and not result.failed_by["format"].any()
    outcome = (
        "failed"
        if result.failed_by[reward][at]
        else "lost"
        if result.exceeded[reward][at]
        else "none"
        if np.isnan(values[at])
        else "scored"
    )
    assert outcome in EXPECTED[name], result.failures
    np.testing.assert_equal(values[at], {"lost": 0.0, "scored": len("hostile") / 8}.get(outcome, np.nan))
    assert all(len(failure) < 10_000 for failure in result.failures)
    "".join(result.failures).encode()

    assert again.failures == []
    assert again.values[reward].tolist() == [len(text) / 8 for text in [*INNOCENT, WELL_FORMED]]
    assert again.values["format"].tolist() == [0.0] * len(INNOCENT) + [1.0]


@pytest.mark.parametrize("name", SHORT)
def test_one_of_each_kind(name: str, tmp_path: Path, relatives) -> None:
    check(name, tmp_path, relatives)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in SHORT])
def test_hostile(name: str, tmp_path: Path, relatives) -> None:
    assert len(EXPECTED) >= 60
    check(name, tmp_path, relatives)


TRAINER = """
import json, sys
from r1fast.rewards.pool import RewardPool
[path, *names] = json.loads(sys.argv[1])
pool = RewardPool({f"{path}:{name}": {} for name in names}, num_workers=len(names), timeout_s=60.0)
print("ready", flush=True)
pool.score(["p"] * 2, ["a", "hostile"], [[1]] * 2, {})
"""


def test_nothing_outlives_a_killed_trainer(tmp_path: Path, relatives) -> None:
    names = ["daemon_and_hang", "new_session_and_hang", "every_signal_blocked"]
    arguments = json.dumps([str(Path(__file__).with_name("hostile_rewards.py")), *names])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, arguments], env=environment, stdout=subprocess.PIPE)
    try:
        # The trainer, a keeper, a shield and a worker for each, a daemon, a session.
        wait_until(lambda: len(relatives()) >= 1 + 3 * len(names) + 2)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        wait_until(lambda: not relatives())
    finally:
        for pid in relatives():
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
