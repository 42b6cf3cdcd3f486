"""Fixtures of the tests that run stages: a tiny checkpoint, the command line in this process, and what it refuses."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.forks import Forks
from tests.tiny_checkpoint import PROMPTS, ZERO, tree, write_jsonl, write_recipe

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as train.py, before the first product on a GPU

REWARD_FILE = """
def needs_gold(completions, gold, **columns):
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """A stage collects garbage before it loads a model: a third of a second, among all that was imported until then."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """A folder that one of the processes that tests run in fills; the others wait for it. Tests only read it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not (done := shared / f"{name}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Trainers, and ranks of the tests of several."""
    with Forks(
        "pyarrow.parquet", "rich.console", "r1fast.pipeline", "r1fast.preflight", "r1fast.stages.reject",
        "transformers.models.qwen2", "tests.parallel.checkpoint_worker", "tests.stages.rank_cases",
    ) as forks:  # fmt: skip
        yield forks


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 checkpoint folder. Tests must not write into it."""
    from tests.tiny_checkpoint import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "qwen2")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes the text of a recipe; returns its path."""

    def write_recipe(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_recipe


@pytest.fixture
def zero(write: Callable[..., str]) -> str:
    return write(f"model: {{path: m}}\nstages: [{ZERO}]")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`python -m r1fast.train` in this process, in tmp_path, on one thread; returns its exit status."""
    import torch

    from r1fast.train import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*argv: object) -> int:
        try:
            return main([str(argument) for argument in argv])
        except SystemExit as stopped:
            return int(stopped.code or 0)

    yield run
    torch.set_num_threads(num_threads)


@pytest.fixture
def refuse(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused; returns the error's text."""

    def run(*argv: object) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        status = command(*argv)
        out, err = capsys.readouterr()
        assert status == 2, err
        assert tree(tmp_path) == before
        assert out == "" and "Traceback" not in err
        assert [line.startswith("r1fast: ") for line in err.splitlines()] == [True], err
        return err

    return run


@pytest.fixture
def refuse_recipe(refuse, base_model: Path, tmp_path: Path) -> Callable[..., str]:
    """Refuses a recipe of these stages, whose model is base_model unless the stage or `model` says otherwise."""
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "one ?", "completion": "two"}] * 4)
    (tmp_path / "rewards.py").write_text(REWARD_FILE)

    def run(*stages: dict, argv: tuple[object, ...] = (), model: object = base_model, **sections: Any) -> str:
        sections["model"] = {"path": str(model)}
        config = write_recipe(tmp_path / "mine.yaml", *stages, **sections)
        return refuse("--config", config, "--output-dir", tmp_path / "run", *argv)

    return run
