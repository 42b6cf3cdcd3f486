"""One workspace and one run that was left in peace, for all tests of this folder."""

from typing import Any

import pytest

from tests.forks import Forks
from tests.fuzz.trials import Trainers, outcome, write_workspace


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Trainers:
    return Trainers(write_workspace(tmp_path_factory.mktemp("one")), forks)


@pytest.fixture(scope="session")
def expected(one_process: Trainers) -> dict[str, Any]:
    """The outcome of a run of one process that was left in peace: RUN/whole."""
    return whole(one_process)


def whole(trainers: Trainers) -> dict[str, Any]:
    assert trainers.start("whole") == 0, trainers.said()
    found = outcome(trainers.cwd / "whole")
    assert {"tuned", "zero", "data"} == {name.split("/")[0] for name in found}
    return found


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Trainers:
    return Trainers(write_workspace(tmp_path_factory.mktemp("two")), forks, ranks=2)


@pytest.fixture(scope="session")
def expected_of_two(two_processes: Trainers) -> dict[str, Any]:
    return whole(two_processes)
