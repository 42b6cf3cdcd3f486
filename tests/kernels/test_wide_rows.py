"""Rows are read 16 bytes at a time, wherever they begin: right on every alignment, and that wide in machine code."""

from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from bench.limits import blocks_per_multiprocessor
from bench.machine_code import Code, compile_special
from r1fast_kernels import dispatch, selective_logprobs
from tests.kernels.backends import BF16, FP32, Backend
from tests.kernels.fake_gpu import fake_gpu

compiled = pytest.mark.skipif(dispatch.INTERPRETING, reason="the interpreter compiles nothing")


@pytest.mark.parametrize("vocab", [1, 7, 15, 41, 1101])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_every_alignment(backend: Backend, dtype: torch.dtype, vocab: int) -> None:
    """Rows an odd number of values apart begin on each. What lies between them is NaN, and stays."""
    around = torch.full((8, vocab + 2), float("nan"), dtype=dtype, device=backend.device)
    rows, ids = around[:, 1:-1], torch.arange(8, device=backend.device) * 7 % vocab
    rows.copy_(torch.randn(8, vocab, generator=torch.Generator().manual_seed(0)))
    leaf = rows.float().requires_grad_()
    want = selective_logprobs(leaf, ids, with_entropy=True, impl="reference")
    (want[0].sum() - 2 * want[1].sum()).backward()

    op = torch.ops.r1fast
    *got, stats = op.selective_logprobs(rows, ids, 1.0, True, False)
    torch.testing.assert_close(tuple(got), want, rtol=1e-5, atol=1e-5)
    given = ids, got[1], stats, torch.ones_like(got[0]), torch.full_like(got[0], -2.0), 1.0
    gradient = op.selective_logprobs_backward(rows, *given)  # its rows are aligned otherwise
    torch.testing.assert_close(gradient.float(), leaf.grad, rtol=1e-4 if dtype == FP32 else 2**-7, atol=1e-5)
    op.selective_logprobs_backward_(rows, *given)
    assert torch.equal(rows, gradient) and around[:, [0, -1]].isnan().all()


def codes(**options: bool) -> tuple[Code, Code]:
    """Of the fold and the gradient, of rows of 151,669 logits."""
    with fake_gpu() as gpu:
        logits = torch.empty(64, 151_669, dtype=BF16, requires_grad=True)
        found: Any = selective_logprobs(logits, torch.empty(64, dtype=torch.int64), **options)
        sum(x.sum() for x in ((found,) if isinstance(found, Tensor) else found)).backward()
    fold, gradient = (compile_special(launch.specialisation) for launch in gpu.launches)
    return fold, gradient


# A Hopper GPU that copies at 4.2 TB/s has time for 13.7 instructions a logit in the fold, 27 in the gradient.
@compiled
@pytest.mark.parametrize(("with_entropy", "fold_most", "gradient_most"), [(True, 10, 14), (False, 8, 12)])
def test_instructions_of_an_odd_vocabulary(with_entropy: bool, fold_most: float, gradient_most: float) -> None:
    for code, chunks, most in zip(codes(with_entropy=with_entropy), (4, 2), (fold_most, gradient_most)):
        assert code.hot is not None and code.hot.wide_share == 1 and code.hot.count("BAR") == 0
        assert len(code.hot) / (8 * chunks) <= most
        assert blocks_per_multiprocessor(code) >= 4 and code.spilled_bytes == 0


@compiled
def test_without_the_hint_loads_are_narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the test above could not fail. Triton's cache knows kernels by their source, which is the same here: what is
    compiled must not stay in it."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(tl, "multiple_of", lambda ptr, _: ptr)
    assert all(code.hot is not None and code.hot.wide_share < 0.5 for code in codes())
