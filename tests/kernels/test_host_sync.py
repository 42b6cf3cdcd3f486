"""No op waits for the device; where dropping tokens must, its docstring says so, and the tiny calls drop none."""

import pytest
import torch

from r1fast.doctor import tiny_calls
from r1fast_kernels import dispatch
from tests.kernels.backends import needs_gpu

FUSED = [op for op, exists in dispatch.IMPLEMENTATIONS.items() if "triton" in exists]


@pytest.mark.gpu
@needs_gpu[1]
@pytest.mark.parametrize("op", FUSED)
def test_no_wait_for_the_device(op: str) -> None:
    call = tiny_calls(torch.device("cuda"))[op]
    call()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_fused_op_is_called() -> None:
    assert len(FUSED) >= 6 and set(FUSED) <= set(tiny_calls(torch.device("cpu")))
