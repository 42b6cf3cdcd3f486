"""Tensors that are in host memory while their device needs the room for something else (`trainer.offload`).

A storage gives its bytes up and gets them back, so that tensors stay the objects they are, with every alias: DTensors
on whatever mesh, and FSDP's flat views of its shards. While it is away nothing may read it.

    device   [bytes]   away()        -           here()   [the same bytes]
    host        -              [pinned copy]                 kept for next time
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from r1fast.parallel.parallelize import local_tensor, reshard
from r1fast_kernels import torch_private


class Offloaded:
    """Tensors that are away from now on, but for the time inside `here`."""

    @torch.no_grad()
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = [local_tensor(tensor).untyped_storage() for tensor in tensors]
        self._storages = list({storage.data_ptr(): storage for storage in storages if storage.nbytes()}.values())
        pinned = any(storage.device.type == "cuda" for storage in self._storages)  # else a copy waits for pages
        self._hosts = [torch.empty(x.nbytes(), dtype=torch.uint8, pin_memory=pinned) for x in self._storages]
        self._leave(changed=True)

    @contextmanager
    def here(self, *, changed: bool = True) -> Iterator[None]:
        """Inside, the tensors are on their device. changed: what they hold at the end is kept."""
        for storage, host in zip(self._storages, self._hosts, strict=True):
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host, non_blocking=True)
        try:
            yield
        finally:
            self._leave(changed)

    def _leave(self, changed: bool) -> None:
        # In the order of the device's stream: the bytes are read before anything new can be given their room.
        for storage, host in zip(self._storages, self._hosts, strict=True):
            if changed:
                host.copy_(_bytes_of(storage), non_blocking=True)
            storage.resize_(0)


class OffloadedModel:
    """A frozen, parallelized model whose weights are away, but for the time inside `here`."""

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, FSDPModule)
        torch_private.initialize_fsdp(model)  # it may replace shards, by padded ones
        reshard(model)
        self._model, self._weights = model, Offloaded(model.parameters())

    @contextmanager
    def here(self, *, changed: bool = False) -> Iterator[None]:
        """Inside, it can run. changed: its weights are written."""
        with self._weights.here(changed=changed):
            yield
            reshard(self._model)  # the gathered copies would stay


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
