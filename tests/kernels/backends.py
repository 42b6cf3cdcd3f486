"""Where an op is tested, and by how much it may be off.

    cpp       C++ on CPU tensors                            make test
    triton    Triton through its interpreter, on CPU        make test, in a process of its own (test_interpreter.py)
    cuda      Triton on a GPU                               make test-gpu

A test that takes the fixture `backend` runs in each. The interpreter takes about 5 ms per loop iteration of a program:
keep T x V small there, and give `backend.small` where a case has a smaller twin.
"""

import importlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast_kernels import dispatch

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Backend:
    name: str
    impl: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def interpreted(self) -> bool:
        return self.name == "triton"

    def to(self, value: Any) -> Any:
        """Tensors, in dictionaries and sequences too, on this backend's device."""
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, dict):
            return {key: self.to(x) for key, x in value.items()}
        return tuple(self.to(x) for x in value) if isinstance(value, (tuple, list)) else value


CPP = Backend("cpp", "cpp", "cpu", (FP32, BF16, FP64))
TRITON = Backend("triton", "triton", "cpu", (FP32, BF16, FP16))
CUDA = Backend("cuda", "triton", "cuda", (FP32, BF16, FP16))

needs_cpp = pytest.mark.skipif(not dispatch.HAS_EXTENSION, reason="the C++ extension is not built")
# In the interpreter's process everything else is left out, not skipped: it ran in the main one.
ON_CPU = (
    [pytest.param(TRITON, id="triton")] if dispatch.INTERPRETING else [pytest.param(CPP, id="cpp", marks=needs_cpp)]
)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
EVERYWHERE = [*ON_CPU, pytest.param(CUDA, id="cuda", marks=needs_gpu)]


# Of tests and parameters that are worth less than their minute there: what they guard is Python above the kernels, that
# C++ runs too, or the same path once more.
SLOW_INTERPRETED = [pytest.mark.slow] if dispatch.INTERPRETING else []


def slow_when_interpreted(test: Any) -> Any:
    return pytest.mark.slow(test) if dispatch.INTERPRETING else test


def assert_as_exact(got: Tensor, plain: Tensor, exact: Tensor, times: float, name: str = "") -> None:
    """The 2x/3x rule: got's error against `exact` is at most `times` that of plain torch in the same dtype.

    exact: fp64. Infinities and NaN stand where they stand in `exact`. A few ulps are allowed where torch is exact.
    """
    got, plain, exact = (x.detach().double().cpu() for x in (got, plain, exact))
    assert got.shape == exact.shape, f"{name}: {got.shape=} {exact.shape=}"
    finite = exact.isfinite()
    assert torch.equal(got[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0)), f"{name}: not the same inf or nan"
    got, plain, exact = got[finite], plain[finite], exact[finite]
    if not exact.numel():
        return
    error, allowed = (got - exact).abs(), times * (plain - exact).abs().max() + 1e-6 * exact.abs().clamp(min=1)
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name}: off by {error[worst]:.3g} at {exact[worst]:.3g}, allowed {allowed[worst]:.3g} ({times} x plain torch)"
    )


def page_by_page(num_bytes: int) -> mmap.mmap:
    """Zeros of any size, of which only the pages that are touched take memory."""
    no_reserve = 0x4000  # MAP_NORESERVE, for which mmap has a name from Python 3.13 on
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)


def far_apart(values: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values, with strides that may pass 2^31, on a CPU."""
    end = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    memory = torch.frombuffer(page_by_page(end * values.element_size()), dtype=values.dtype)
    return memory.as_strided(values.shape, strides).copy_(values)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits(run: Callable[[], Sequence[Tensor]]) -> None:
    """Three runs, and one and two threads, give the same bits; tensors are compared with NaN equal to NaN.

    Twice where Triton is interpreted: one program after another, on one thread.
    """
    outputs = []
    for count in (1, 1) if dispatch.INTERPRETING else (1, 1, 1, 2):
        with threads(count):
            outputs.append([x.detach().clone() for x in run()])
    for other in outputs[1:]:
        for first, second in zip(outputs[0], other, strict=True):
            torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)


_EVALUATE = """
import importlib, json, sys, torch
sys.path[:0] = sys.argv[1:]
for line in sys.stdin:
    module, expression, out = json.loads(line)
    torch.save(eval(expression, vars(importlib.import_module(module))), out)
    print("saved", flush=True)
"""


@cache
def _process(capability: str) -> subprocess.Popen[str]:
    """torch reads ATEN_CPU_CAPABILITY once. It ends with this process, as its input does."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _EVALUATE, root, root / "kernels"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def of_older_processor(capability: str, module: str, expression: str, folder: Path) -> tuple[Any, Any]:
    """`expression`, with the names of tests.kernels.<module>, by the build for `capability` and by the best build."""
    module, out = f"tests.kernels.{module}", folder / f"{capability}.pt"
    process = _process(capability)
    assert process.stdin is not None and process.stdout is not None
    print(json.dumps([module, expression, str(out)]), file=process.stdin, flush=True)
    best = eval(expression, vars(importlib.import_module(module)))
    assert process.stdout.readline() == "saved\n", expression
    return torch.load(out), best
