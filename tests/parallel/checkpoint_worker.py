"""For test_checkpoint.py: `killed` kills itself in its second save; `two_ranks` saves, loads, and fails to save."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from r1fast.parallel import checkpoint
from r1fast.parallel.mesh import Dist, init_distributed
from r1fast.parallel.optim import build_optimizer
from tests.parallel.tiny_model import full_state_dict, sharded, train


def start(dist: Dist) -> tuple[Any, Any]:
    model = sharded(dist, one_unit_numel=0)
    return model, build_optimizer(model, name="muon", learning_rate=1e-2)


def killed(directory: Path) -> None:
    dist = init_distributed("cpu")
    model, optimizer = start(dist)
    for step in (1, 2):
        train(model, dist, 1, optimizer)
        if step == 2:  # everything is written, the folder is not yet renamed
            checkpoint.sync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save(directory, step, model=model, optimizer=optimizer, extra={"step": step}, dist=dist)


def two_ranks(directory: Path) -> None:
    dist = init_distributed("cpu")
    model, optimizer = start(dist)
    train(model, dist, 2, optimizer)
    random.seed(dist.rank)
    torch.manual_seed(dist.rank)
    common = {"model": model, "optimizer": optimizer, "dist": dist}
    path = checkpoint.save(directory, 2, extra={"tokens": 40}, **common)
    expected = (random.random(), torch.rand(1).item())
    train(model, dist, 1, optimizer)
    after_3 = full_state_dict(model, dist)

    model, optimizer = start(dist)
    assert checkpoint.latest(directory, dist) == path
    assert checkpoint.load(path, model=model, optimizer=optimizer, dist=dist) == {"tokens": 40}
    assert (random.random(), torch.rand(1).item()) == expected
    train(model, dist, 1, optimizer)
    resumed = full_state_dict(model, dist)
    assert all(torch.equal(resumed[name], after_3[name]) for name in after_3)

    # Rank 1 cannot write one of its files: both ranks must hear of it, and the old checkpoint must stay.
    common |= {"model": model, "optimizer": optimizer}
    write = checkpoint.write_plain

    def full_disk(file: Path, value: Any) -> list[str]:
        if file.name == "rank_00001":
            raise OSError(28, "No space left on device")
        return write(file, value)

    checkpoint.write_plain = full_disk
    with pytest.raises(OSError, match="rank 1: OSError"):
        checkpoint.save(directory, 3, extra={}, **common)
    assert checkpoint.latest(directory, dist) == path

    # The same inside torch.save, which raises a RuntimeError of its own.
    def no_space(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    checkpoint.write_plain = write
    torch_save = torch.save
    if dist.rank == 1:
        torch.save = no_space
    with pytest.raises(OSError, match=r"rank .: RuntimeError: .*inline_container"):
        checkpoint.save(directory, 3, extra={}, **common)
    torch.save = torch_save
    assert checkpoint.latest(directory, dist) == path
    if dist.is_main:
        torch.save(after_3, directory / "after_3.pt")
    dist.close()


def main(argv: list[str]) -> None:
    {"killed": killed, "two_ranks": two_ranks}[argv[0]](Path(argv[1]))
