"""A kernel starts on the device of its tensors, and only there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from r1fast_kernels.launch import launch


class _Kernel:
    """Takes note of how it is started, as a JITFunction would be."""

    def __init__(self) -> None:
        self.fn = type(self)._sum_kernel
        self.seen: list[Any] = []

    def _sum_kernel(self) -> None: ...

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.seen.append((grid, args, options, list(devices)))


devices: list[torch.device] = []


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        devices.append(tensor.device)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)


def test_it_starts_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    kernel, x = _Kernel(), torch.zeros(2, device="meta")
    launch(kernel, (3,), None, x, 4, BLOCK=16)
    assert kernel.seen == [((3,), (None, x, 4), {"BLOCK": 16, "enable_fp_fusion": True}, [x.device])]
    assert devices == []


def test_tensors_of_two_devices_are_refused() -> None:
    kernel = _Kernel()
    with pytest.raises(ValueError, match=r"^sum: got tensors on cpu, meta, expected all on one device$"):
        launch(kernel, (1,), torch.zeros(1), torch.zeros(1, device="meta"))
    assert not kernel.seen
