"""pytest's side of the bench: `case` from cases.py by the stem of the file, `compare` to measure, print and keep it."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as train.py, before the first product

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness
from bench.cases import cases_of

OF_MODELS = ("train_step", "grpo_step", "generate", "decode_layers", "packed_attention")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("r1fast bench")
    group.addoption("--results", type=Path, help="folder, or file, for the rows as JSON; else nothing is written")
    group.addoption("--seconds", type=float, default=1.5, help="timed seconds of a case (three rounds at least)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = Path(metafunc.module.__file__).stem.removeprefix("bench_")
    cases = cases_of(op, "cuda" if harness.FAKE else harness.DEVICE)
    given = [case.small for case in cases] if harness.FAKE else cases
    metafunc.parametrize("case", given, ids=[case.name for case in cases])


def pytest_report_header() -> str:
    x = harness.environment()
    packages = ", ".join(f"{name} {version}" for name, version in x["versions"].items())
    return f"bench: {x['gpu'] or x['cpu']}, {x['threads']} threads, commit {x['commit']}, {packages}"


class Results:
    """One file per session, rewritten after every row: a run that is cut short keeps what it has."""

    def __init__(self, folder: Path | None, ops: set[str]) -> None:
        self.rows: list[dict[str, Any]] = []
        name = f"{harness.device_name()}-{ops.pop() if len(ops) == 1 else 'all'}.json"
        self.path = folder and (folder if folder.suffix == ".json" else folder / name)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"environment": harness.environment(), "rows": self.rows}, indent=1)
            part = self.path.with_suffix(".part")  # a run may be killed at any line
            part.write_text(f"{text}\n")
            part.replace(self.path)


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    ops = {item.path.stem.removeprefix("bench_") for item in request.session.items}
    return Results(request.config.getoption("--results"), ops)


def as_faked(problem: harness.Problem, held: ExitStack) -> harness.Problem:
    """Whole models run on the CPU. Of ops the kernels of a GPU are started and compute nothing."""
    contenders = {name: run for name, run in problem.contenders.items() if name != "compile"}  # ten seconds each
    if problem.case.op in OF_MODELS:
        return replace(problem, contenders=contenders)
    from tests.kernels.fake_gpu import fake_gpu

    held.enter_context(fake_gpu(values=True))
    return replace(problem, contenders=contenders, check=lambda name, outputs: None)


@pytest.fixture
def compare(
    benchmark: Any, results: Results, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Iterator[Callable[[harness.Problem], None]]:
    def run(problem: harness.Problem) -> None:
        if harness.FAKE:
            problem = as_faked(problem, held)
        row = harness.measure(problem, benchmark, request.config.getoption("--seconds"))
        results.add(row)
        with capsys.disabled():
            print(harness.show(row), flush=True)

    with ExitStack() as held:
        yield run
    gc.collect()  # graphs that a contender kept
    if harness.DEVICE == "cuda":
        torch.cuda.empty_cache()
