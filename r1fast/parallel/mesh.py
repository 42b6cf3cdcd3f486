"""The process group and the one-dimensional data-parallel mesh, the same object with one process and with many."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)  # the longest that one rank may wait for another (generation, rewards)


@dataclass(frozen=True)
class Dist:
    """Who this process is, and the few collectives that a stage calls itself."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh  # one axis, "dp"
    owns_group: bool = True  # False where the process group was there before
    before_close: ExitStack = field(default_factory=ExitStack)  # what has to end while the group is there

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, as a new tensor (on this rank's device)."""
        return self._all_reduce(tensor, torch_dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The element-wise maximum over ranks, as a new tensor (on this rank's device)."""
        return self._all_reduce(tensor, torch_dist.ReduceOp.MAX)

    def all_gather_objects(self, obj: Any) -> list[Any]:
        """One picklable object per rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(gathered, obj)
        return gathered

    def on_main(self, write: Callable[[], T], others: Callable[[], object] = lambda: None) -> T:
        """What rank 0's `write` returns; where it raises OSError every rank does, so that none waits. Collective.

        others: what the other ranks do meanwhile, for a `write` in which all meet.
        """
        result: Any = None
        failure: OSError | None = None
        try:
            result = write() if self.is_main else others()
        except OSError as error:
            failure = error
        problem, result = self.all_gather_objects((failure and str(failure), result))[0]
        if problem is not None:
            raise failure or OSError(problem)
        return result

    def on_all(self, read: Callable[[], T]) -> T:
        """What `read` returns on this rank; where it raises ValueError on any rank, every rank does. Collective."""
        failure: ValueError | None = None
        try:
            result = read()
        except ValueError as error:
            failure = error
        for problem in self.all_gather_objects(failure and str(failure)):
            if problem is not None:
                raise failure or ValueError(problem)
        return result

    def close(self) -> None:
        """End what is in `before_close`, and the process group if init_distributed started it."""
        self.before_close.close()
        if self.owns_group and torch_dist.is_initialized():
            torch_dist.destroy_process_group()

    def _all_reduce(self, tensor: torch.Tensor, op: Any) -> torch.Tensor:
        result = tensor.detach().to(self.device, copy=True)
        if self.world_size > 1:
            torch_dist.all_reduce(result, op=op)
        return result


def init_distributed(device: str | torch.device | None = None) -> Dist:
    """Start (or join) the process group of this run.

    device: default CUDA where there is one. Under torchrun rank and world size come from its environment; one process
    alone needs no launcher and opens no port that another run could hold.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if kind.index is None else kind.index)
        torch.cuda.set_device(kind)
    owns_group = not torch_dist.is_initialized()
    if owns_group:
        # The CPU backend beside NCCL serves checkpoints and gathered objects.
        backend = "cuda:nccl,cpu:gloo" if kind.type == "cuda" else "gloo"
        many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        alone: dict[str, Any] = {} if many else {"store": torch_dist.HashStore(), "rank": 0, "world_size": 1}
        torch_dist.init_process_group(backend, timeout=_TIMEOUT, **alone)
    world_size = torch_dist.get_world_size()
    mesh = init_device_mesh(kind.type, (world_size,), mesh_dim_names=("dp",))
    return Dist(torch_dist.get_rank(), world_size, kind, mesh, owns_group)
