"""Fixtures of the tests that run stages: a tiny checkpoint, and the command line in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 checkpoint folder. Tests must not write into it."""
    from tests.tiny_checkpoint import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "qwen2")


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
