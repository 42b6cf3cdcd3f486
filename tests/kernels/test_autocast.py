"""Ops under torch.autocast, and of mixed dtypes without it: as torch's own products and norms."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import r1fast_kernels as kernels
from tests.kernels.backends import BF16, FP32, FP64, assert_as_exact, needs_cpp

pytestmark = needs_cpp

CU_SEQLENS = torch.tensor([0, 3, 8], dtype=torch.int32)
IDS_TK = torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2], [1, 0], [0, 1], [2, 1]])
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "rms_norm": ((8, 16), (16,)),
    "grouped_gemm": ((8, 16), (3, 12, 16)),
    "moe_experts": ((8, 16), (3, 24, 16), (3, 16, 12), (8, 2)),
    "packed_attention": ((8, 4, 16), (8, 2, 16), (8, 2, 16)),
    "linear_logprobs": ((8, 16), (31, 16)),
    "linear_cross_entropy": ((8, 16), (31, 16)),
}
CALLS: dict[str, Callable[..., Tensor]] = {
    "rms_norm": lambda x, weight, impl: kernels.rms_norm(x, weight, impl=impl),
    "grouped_gemm": lambda x, weight, impl: kernels.grouped_gemm(x, weight, torch.tensor([3, 3, 8]).int(), impl=impl),
    "moe_experts": lambda x, gate_up, down, weights, impl: kernels.moe_experts(
        x, gate_up, down, IDS_TK, weights, impl=impl
    ),
    "packed_attention": lambda q, k, v, impl: kernels.packed_attention(q, k, v, CU_SEQLENS, scale=0.25, impl=impl),
    "linear_logprobs": lambda x, weight, impl: kernels.linear_logprobs(x, weight, torch.arange(8), impl=impl),
    "linear_cross_entropy": lambda x, weight, impl: kernels.linear_cross_entropy(x, weight, torch.arange(8), impl=impl),
}
# What the op returns of (hidden or first input, weight or second), without and with autocast to bf16. None: an error.
DTYPES: dict[str, dict[tuple[torch.dtype, torch.dtype], tuple[torch.dtype | None, torch.dtype]]] = {
    "rms_norm": {(FP32, BF16): (FP32, FP32), (BF16, FP32): (BF16, BF16), (FP32, FP32): (FP32, FP32)},
    "grouped_gemm": {(FP32, BF16): (BF16, BF16), (BF16, FP32): (FP32, BF16), (FP32, FP32): (FP32, BF16)},
    "moe_experts": {(FP32, BF16): (FP32, FP32), (BF16, FP32): (BF16, BF16), (FP32, FP32): (FP32, FP32)},
    "packed_attention": {(FP32, FP32): (FP32, BF16), (FP32, BF16): (None, BF16)},
    "linear_logprobs": {(FP32, FP32): (FP32, FP32), (FP32, BF16): (None, FP32)},
    "linear_cross_entropy": {(FP32, FP32): (FP32, FP32), (BF16, FP32): (None, FP32)},
}


def leaves(op: str, first: torch.dtype, others: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES[op]]
    dtypes = [first, *[others] * (len(found) - 1)]
    if op == "moe_experts" and others == BF16:
        dtypes[-1] = FP32
    return [x.to(dtype).requires_grad_() for x, dtype in zip(found, dtypes)]


def run(op: str, inputs: list[Tensor], impl: str, autocast: bool) -> list[Tensor]:
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = CALLS[op](*inputs, impl)
    return [out, *torch.autograd.grad(out.to(inputs[0].dtype if out.dim() else out.dtype).sum(), inputs)]


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("op", CALLS)
def test_dtypes_and_numbers(op: str, autocast: bool) -> None:
    for (first, others), wanted in DTYPES[op].items():
        if wanted[autocast] is None:
            for impl in ("cpp", "reference"):
                with pytest.raises(ValueError, match="expected one dtype"):
                    run(op, leaves(op, first, others), impl, autocast)
            continue
        exact = run(op, leaves(op, FP64, FP64), "reference", False)
        plain, got = (run(op, leaves(op, first, others), impl, autocast) for impl in ("reference", "cpp"))
        assert got[0].dtype == plain[0].dtype == wanted[autocast]
        for g, p, e, leaf in zip(got, plain, exact, [got[0], *leaves(op, first, others)], strict=True):
            assert g.dtype == leaf.dtype
            narrow = BF16 in (first, others) or autocast
            assert_as_exact(g, p, e, 3, f"{op}, {first}, {others}")
            assert (g.double() - e).abs().max() <= (0.06 if narrow else 1e-5) * e.abs().max()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_cache_is_not_rounded(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, cache = torch.randn(1, 4, 8, generator=generator).bfloat16(), torch.randn(16, 2, 8, generator=generator)
    where = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    want = kernels.decode_attention(q.float(), cache, cache, *where, scale=0.3).bfloat16()
    with torch.autocast("cpu", BF16):
        got, plain = (
            kernels.decode_attention(q.to(dtype), cache, cache, *where, scale=0.3, impl=impl)
            for impl in ("cpp", "reference")
        )
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(plain, want, rtol=0.02, atol=0.02)


def test_as_torch_has_it() -> None:
    for first, others in DTYPES["rms_norm"]:
        x, weight = leaves("rms_norm", first, others)
        for autocast in (False, True):
            with torch.autocast("cpu", BF16, enabled=autocast):
                assert kernels.rms_norm(x, weight).dtype == F.rms_norm(x, (16,), weight).dtype
    x, weight = leaves("linear_logprobs", FP64, FP64)
    with torch.autocast("cpu", BF16):  # which leaves fp64 alone
        assert (x @ weight.T).dtype == FP64
        assert kernels.linear_logprobs(x, weight, torch.arange(8)).dtype == FP64


def test_attention_of_projections_that_autocast_rounded() -> None:
    """q, k and v come in bf16 out of their products, angles in fp32 as ever."""
    q, k, v = leaves("packed_attention", BF16, BF16)
    angles = torch.linspace(0, 3, 8 * 8).view(8, 8)
    rope = angles.cos(), angles.sin()
    with torch.autocast("cpu", BF16):
        got = kernels.packed_attention(q, k, v, CU_SEQLENS, scale=0.25, rope=rope)
    rounded = rope[0].bfloat16(), rope[1].bfloat16()
    assert torch.equal(got, kernels.packed_attention(q, k, v, CU_SEQLENS, scale=0.25, rope=rounded))
    with pytest.raises(ValueError, match="expected one dtype"):
        kernels.packed_attention(q, k, v, CU_SEQLENS, scale=0.25, rope=rope)
