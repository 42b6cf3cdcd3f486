"""pytest's side of the bench: `case` from cases.py by the stem of the file, `compare` to measure, print and keep it."""

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness
from bench.cases import cases_of


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("r1fast bench")
    group.addoption("--results", type=Path, help="folder for the rows as JSON; without it nothing is written")
    group.addoption("--seconds", type=float, default=1.5, help="timed seconds of a case (three rounds at least)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = Path(metafunc.module.__file__).stem.removeprefix("bench_")
    metafunc.parametrize("case", cases_of(op, harness.DEVICE), ids=lambda case: case.name)


def pytest_report_header() -> str:
    x = harness.environment()
    packages = ", ".join(f"{name} {version}" for name, version in x["versions"].items())
    return f"bench: {x['gpu'] or x['cpu']}, {x['threads']} threads, commit {x['commit']}, {packages}"


class Results:
    """One file per session, rewritten after every row: a run that is cut short keeps what it has."""

    def __init__(self, folder: Path | None, ops: set[str]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.path = folder and folder / f"{harness.device_name()}-{ops.pop() if len(ops) == 1 else 'all'}.json"

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"environment": harness.environment(), "rows": self.rows}, indent=1) + "\n")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    ops = {item.path.stem.removeprefix("bench_") for item in request.session.items}
    return Results(request.config.getoption("--results"), ops)


@pytest.fixture
def compare(
    benchmark: Any, results: Results, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Iterator[Callable[[harness.Problem], None]]:
    def run(problem: harness.Problem) -> None:
        row = harness.measure(problem, benchmark, request.config.getoption("--seconds"))
        results.add(row)
        with capsys.disabled():
            print(harness.show(row), flush=True)

    yield run
    gc.collect()  # graphs that a contender kept
    if harness.DEVICE == "cuda":
        torch.cuda.empty_cache()
