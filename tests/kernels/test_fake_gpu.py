"""The fake GPU refuses what a GPU would, and every launcher keeps its rules: each of them broken once, and caught."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

import r1fast_kernels as kernels
from r1fast_kernels import dispatch
from tests.kernels.backends import BF16, FP32
from tests.kernels.fake_gpu import LaunchError, fake_gpu
from tests.test_imports import SOURCES, imported

pytestmark = pytest.mark.skipif(dispatch.INTERPRETING, reason="the interpreter asks no driver")

OP = "r1fast_kernels.selective_logprobs"
LAUNCH = sys.modules["r1fast_kernels.launch"].launch


@triton.jit
def _copy_kernel(source, out_ptr, num_rows, ROWS: tl.constexpr):
    offs = tl.arange(0, ROWS)
    tile = source.load([tl.program_id(0) * ROWS, 0])  # [ROWS, 64]
    tl.store(out_ptr + offs[:, None] * 64 + tl.arange(0, 64), tile, mask=offs[:, None] < num_rows)


def log_probs(num_tokens: int = 64, vocab: int = 8000) -> Tensor:
    logits = torch.empty(num_tokens, vocab, dtype=BF16, requires_grad=True)
    logprobs = kernels.selective_logprobs(logits, torch.zeros(num_tokens, dtype=torch.int64))
    logprobs.sum().backward()
    return logprobs


def unguarded(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    kernel[grid](*args, enable_fp_fusion=True, **options)


def turned(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Rows of the output on the second axis."""
    LAUNCH(kernel, grid[::-1] if len(grid) > 1 else (1, *grid), *args, **options)


def hungry(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    LAUNCH(kernel, grid, *args, **options | {"num_stages": 9})


def test_launches_and_kernels_of_torch_are_noted_in_order() -> None:
    with fake_gpu() as gpu:
        log_probs()
    assert gpu.kernels == ["zeros", "_fold_kernel", "sum", "ones_like", "_gradient_kernel"]
    fold, gradient = gpu.launches
    assert fold.grid == (64, 1, 1) and gradient.grid == (64, 1, 1) and fold.shared_bytes is None
    assert fold.arguments["logits_ptr"] == ((64, 8000), (8000, 1), BF16, 1) and fold.arguments["state_ptr"] is None
    assert fold.arguments["vocab"] == 8000 and fold.arguments["LANES"] == 256


def test_views_allocations_and_what_the_host_does_are_no_kernels() -> None:
    with fake_gpu() as gpu:
        x = torch.empty(8, 4)
        x.view(4, 8).T[1:].unbind()[0].new_empty(5)
        torch.arange(3, device="cpu") + 1
        torch.zeros(0) + 1
        assert torch.tensor([1]).device == torch.tensor(2).device == x.device != torch.tensor(1, device="cpu").device
        assert gpu.kernels == []
        torch.nn.functional.rms_norm(x, (4,)).mul_(torch.tensor(2))
    assert gpu.kernels == ["rms_norm", "mul_"]


def test_with_values_a_step_can_be_run_without_kernels() -> None:
    with fake_gpu(values=True) as gpu:
        logprobs = log_probs()
    assert [launch.name for launch in gpu.launches] == ["_fold_kernel", "_gradient_kernel"]
    assert type(logprobs) is Tensor and not logprobs.any()


def test_compiled_launches_know_their_shared_memory() -> None:
    with fake_gpu(compiles=True) as gpu:
        log_probs()
    fold, gradient = gpu.launches
    assert fold.shared_bytes and gradient.shared_bytes == 0


def test_a_descriptor_is_an_argument() -> None:
    with fake_gpu(compiles=True) as gpu:
        x, out = torch.empty(100, 64), torch.empty(100, 64)
        LAUNCH(_copy_kernel, (7,), TensorDescriptor.from_tensor(x, [16, 64]), out, 100, ROWS=16)
    (launch,) = gpu.launches
    assert launch.arguments["source"] == ((100, 64), (64, 1), FP32, 1) and launch.shared_bytes


def test_a_descriptor_of_odd_memory_is_refused() -> None:
    with fake_gpu():
        x, out = torch.empty(6401)[1:].view(100, 64), torch.empty(100, 64)
        with pytest.raises(LaunchError, match="no multiple of 16 bytes"):
            LAUNCH(_copy_kernel, (7,), TensorDescriptor.from_tensor(x, [16, 64]), out, 100, ROWS=16)


@pytest.mark.parametrize(
    ("mutant", "error", "says"),
    [
        (unguarded, LaunchError, "_fold_kernel: launched on device 0, with a tensor on device 1"),
        (turned, LaunchError, r"_fold_kernel: got a grid of \(1, 70000, 1\)"),
    ],
)
def test_a_wrong_launch_is_caught(
    mutant: Callable[..., None], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[OP], "launch", mutant)
    with fake_gpu(), pytest.raises(error, match=says):
        log_probs(num_tokens=70_000)


def test_tensors_of_two_devices_are_refused() -> None:
    with fake_gpu():
        logits, ids = torch.empty(64, 8000), torch.zeros(64, dtype=torch.int64, device="cpu:2")
        with pytest.raises(ValueError, match="fold: got tensors on cpu:1, cpu:2, expected all on one device"):
            kernels.selective_logprobs(logits, ids)


def test_a_descriptor_of_another_device_is_refused() -> None:
    with fake_gpu():
        x, out = torch.empty(100, 64, device="cpu:2"), torch.empty(100, 64)
        with pytest.raises(ValueError, match="copy: got tensors on cpu:1, cpu:2, expected all on one device"):
            LAUNCH(_copy_kernel, (7,), TensorDescriptor.from_tensor(x, [16, 64]), out, 100, ROWS=16)


def test_too_much_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["r1fast_kernels.grouped_gemm"], "launch", hungry)
    with fake_gpu(arch=80, compiles=True):
        x, weight = torch.empty(4000, 512, dtype=BF16), torch.empty(2, 256, 512, dtype=BF16)
        offsets = torch.empty(2, dtype=torch.int32)
        with pytest.raises(OutOfResources, match="shared memory"):
            kernels.grouped_gemm(x, weight, offsets)


def test_scratch_is_what_a_call_gives_back() -> None:
    def call() -> Tensor:
        torch.empty(200, dtype=torch.uint8)
        return torch.empty(300, dtype=torch.uint8) + torch.empty(10, dtype=torch.uint8)[:1]

    with fake_gpu() as gpu:
        assert gpu.scratch(call) == 310  # operands, while the result is made; the 200 were gone before
        assert gpu.scratch(lambda: torch.empty(8000, dtype=torch.uint8)) == 0


def starts_itself(path: Path, text: str) -> list[str]:
    """Lines with kernel[grid](..); in a file with kernels whatever it is called."""
    tree, has_kernels = ast.parse(text), any(name.startswith("triton") for _, name in imported(path))
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    started = [ast.unparse(func.value) for func in calls if isinstance(func, ast.Subscript)]
    return [name for name in started if has_kernels or name.endswith("kernel")]


def test_every_kernel_is_started_by_launch() -> None:
    assert starts_itself(Path(__file__), "started[(3,)](x)") == ["started"]
    assert starts_itself(SOURCES[0], "fold._fold_kernel[(3,)](x)") == ["fold._fold_kernel"]
    found = {path.name: starts_itself(path, path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: started for name, started in found.items() if started} == {"launch.py": ["kernel"]}
