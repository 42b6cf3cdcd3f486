"""Sums in one order on a GPU: a step then has the same bits every time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def ordered_sums(device: torch.device, wanted: bool) -> Iterator[None]:
    """Inside, torch takes kernels on a GPU that add in one order, flash attention among them (models/flash.py).

    On a CPU sums always have one. It is torch's own switch, and holds for the process: a sampler's thread runs under it
    too. An op that has no such kernel raises RuntimeError, and so does a product where CUBLAS_WORKSPACE_CONFIG was not
    set before the first one (train.py sets it).
    """
    if not wanted or device.type != "cuda":
        yield
        return
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False  # one more write of all tensors
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        memory.fill_uninitialized_memory = filled
