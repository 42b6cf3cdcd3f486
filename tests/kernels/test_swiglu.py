from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast_kernels import swiglu
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


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype = FP32) -> list[Tensor]:
    """gate, up, and the gradient from above."""
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(shape, generator=generator, dtype=FP64).to(dtype) for _ in range(3)]


def outputs(inputs: list[Tensor], impl: str | None = None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:2]]
    out = swiglu(*leaves, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[2])]


# One number, a prime, past a pair of vectors, more dimensions, nothing.
SHAPES = [(1,), (31,), (7, 65), (3, 5, 40), (0, 8)]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = random_inputs(shape, dtype)
    exact = outputs([x.double() for x in inputs], "reference")
    plain, got = outputs(inputs, "reference"), outputs(inputs, "cpp")
    for name, g, p, e, times in zip(("out", "grad gate", "grad up"), got, plain, exact, (2, 3, 3), strict=True):
        assert g.dtype == dtype and g.is_contiguous(), name
        assert_as_exact(g, p, e, times, name)


def test_large_gates_nan_and_views() -> None:
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4, torch.nan])
    up = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    got = swiglu(gate, up, impl="cpp")
    assert got[:2].abs().max() < 1e-30 and got[2] == 0 and got[3:5].tolist() == [180, 2e4] and got[5].isnan()
    wide = random_inputs((9, 64))
    halves = [x[:, :32] for x in wide[:2]] + [wide[2][:1, :32].expand(9, -1)]
    for g, w in zip(outputs(halves, "cpp"), outputs([x.contiguous() for x in halves], "cpp"), strict=True):
        assert torch.equal(g, w)


def test_same_bits_every_time() -> None:
    inputs = random_inputs((1000, 96))
    assert_same_bits(lambda: outputs(inputs, "cpp"))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_builds_for_older_processors_agree(capability: str, tmp_path: Any) -> None:
    expression = "[outputs(random_inputs((70, 33), dtype), 'cpp') for dtype in (FP32, BF16, FP64)]"
    for got, want in zip(*of_older_processor(capability, "test_swiglu", expression, tmp_path), strict=True):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-2 if w.dtype == BF16 else 1e-5, atol=1e-5)


def test_gradcheck_opcheck_and_errors() -> None:
    leaves = [x.requires_grad_() for x in random_inputs((5, 7), FP64)[:2]]
    assert torch.autograd.gradcheck(swiglu, leaves)
    torch.library.opcheck(torch.ops.r1fast.swiglu.default, leaves)
    with pytest.raises(ValueError, match="expected one shape"):
        swiglu(leaves[0], leaves[1][1:])
