from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast_kernels import rms_norm
from tests.kernels.backends import (
    BF16,
    FP32,
    FP64,
    assert_as_exact,
    assert_same_bits,
    needs_cpp,
    of_older_processor,
)  # fmt: skip

pytestmark = needs_cpp
EPS = 1e-5


def random_rows(num_rows: int, width: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, and the gradient from above."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, num_rows, width, generator=generator, dtype=FP64)
    return x.to(dtype), (1 + 0.3 * torch.randn(width, generator=generator, dtype=FP64)).to(dtype), grad.to(dtype)


def outputs(rows: tuple[Tensor, Tensor, Tensor], **options: Any) -> list[Tensor]:
    """The result and both gradients."""
    x, weight = (tensor.detach().requires_grad_() for tensor in rows[:2])
    out = rms_norm(x, weight, eps=EPS, **options)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), rows[2])]


# A row, a prime, one past a pair of vectors, many chunks of rows, a head.
SHAPES = [(1, 1), (1, 128), (7, 31), (65, 33), (300, 128), (3, 1031), (0, 16)]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_as_exact_as_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Against fp64 on the same rounded inputs: the output within 2x, gradients within 3x the error of plain torch."""
    rows = random_rows(*shape, dtype)
    exact = outputs(tuple(x.double() for x in rows), impl="reference")
    plain, got = outputs(rows, impl="reference"), outputs(rows, impl="cpp")
    for name, g, p, e, times in zip(("out", "grad x", "grad weight"), got, plain, exact, (2, 3, 3)):
        assert g.dtype == p.dtype and g.is_contiguous(), name
        assert_as_exact(g, p, e, times, name)


def test_zero_rows_large_rows_and_nan() -> None:
    x, weight, grad = random_rows(4, 40)
    x[0], x[1], x[2, 7] = 0, x[1] * 1e15, float("nan")
    got, want = (outputs((x, weight, grad), impl=impl)[0] for impl in ("cpp", "reference"))
    assert not got[0].any() and got[2].isnan().all()
    torch.testing.assert_close(got, want, equal_nan=True)


def test_views_and_more_dimensions() -> None:
    """A part of a wider row, as the latents of MLA; heads, as Qwen3's; an expanded gradient."""
    x, weight, _ = random_rows(23, 48)
    for view in (x[:, 5:37], x.view(23, 3, 16), x.T[:32].T):
        part = weight[: view.shape[-1]]
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (view, part)]
        got = rms_norm(view, part, impl="cpp")
        assert got.shape == view.shape
        torch.testing.assert_close(got, rms_norm(view, part, impl="reference"))
        gradients = [torch.autograd.grad(rms_norm(*leaves, impl=impl).sum(), leaves) for impl in ("cpp", "reference")]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("learned", [0, 1])
def test_one_side_may_be_frozen(learned: int) -> None:
    x, weight, grad = random_rows(9, 20)
    leaves = [x, weight]
    leaves[learned].requires_grad_()
    (got,) = torch.autograd.grad(rms_norm(x, weight, eps=EPS), leaves[learned], grad)
    assert torch.equal(got, outputs((x, weight, grad))[1 + learned])


def test_same_bits_every_time() -> None:
    rows = random_rows(1000, 96)
    assert_same_bits(lambda: outputs(rows, impl="cpp"))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_builds_for_older_processors_agree(capability: str, tmp_path: Any) -> None:
    rows = "[torch.linspace(*ends, 70 * 33).view(70, 33).to(dtype) for ends in ((1, 2), (2, -1))]"
    expression = (
        f"[outputs(({rows}[0], torch.linspace(0, 1, 33).to(dtype), {rows}[1])) for dtype in (FP32, BF16, FP64)]"
    )
    for got, want in zip(*of_older_processor(capability, "test_rms_norm", expression, tmp_path), strict=True):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-2 if w.dtype == BF16 else 1e-5, atol=1e-5)


def test_gradcheck_opcheck_and_compile() -> None:
    x, weight, _ = random_rows(5, 7, FP64)
    leaves = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=EPS), leaves)
    torch.library.opcheck(torch.ops.r1fast.rms_norm.default, (*leaves, EPS))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: rms_norm(x * 2, w), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(rms_norm(x * 2, weight).square().sum(), leaves))


def test_errors_say_what_was_expected() -> None:
    x, weight, _ = random_rows(5, 7)
    with pytest.raises(ValueError, match=r"expected \[\.\.\., D\] and \[D\]"):
        rms_norm(x, weight[1:])
