"""Dense products that torch leaves to a slower library than it has.

MKL multiplies fp32 by AVX2 on processors that are not Intel's. On one with AVX512 (an EPYC of two cores) oneDNN, which
torch carries too but keeps for bf16, takes 47 to 59% of its time, and its rows and threads change no bit of a result.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import in_use
from .torch_private import onednn_linear


@cache
def onednn_is_faster() -> bool:
    """Whether fp32 products on this CPU should be oneDNN's."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def _takes_onednn(x: Tensor) -> bool:
    if in_use() == "reference" or x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0:
        return False
    return onednn_is_faster() and not torch.is_autocast_enabled("cpu")


def save_factors(ctx: Any, x: Tensor, weight: Tensor, *others: Tensor) -> None:
    """The first two of an op's inputs, each where the other has a gradient: a frozen weight keeps no activations."""
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, *others)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        save_factors(ctx, x_TK, weight_NK)
        return onednn_linear(x_TK, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad_TN,), (x_TK, weight_NK) = grads, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            onednn_linear(grad_TN, weight_NK.T) if needs_x else None,
            onednn_linear(grad_TN.T, x_TK.T) if needs_weight else None,
            grad_TN.sum(0) if needs_bias else None,
        )


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of [T, K] and [N, K]; but for the reference about twice as fast on some CPUs."""
    if _takes_onednn(x_TK):
        return _Linear.apply(x_TK, weight_NK, bias_N)
    return F.linear(x_TK, weight_NK, bias_N)


# Rows of a half-precision input that are widened at a time on a CPU: they stay in its cache.
_PIECE = 2048


class _LinearFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        save_factors(ctx, x_TK, weight_NK)
        ctx.dtype = x_TK.dtype
        return torch.cat([F.linear(x_MK.float(), weight_NK) for x_MK in x_TK.split(_PIECE)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad_TN,), (x_TK, weight_NK) = grads, ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = grad_TN.new_empty(len(grad_TN), weight_NK.shape[1], dtype=ctx.dtype) if needs_x else None
        grad_weight = grad_TN.new_zeros(grad_TN.shape[1], x_TK.shape[1]) if needs_weight else None
        for start in range(0, len(grad_TN), _PIECE):
            rows = slice(start, start + _PIECE)
            if grad_x is not None:
                grad_x[rows] = grad_TN[rows] @ weight_NK
            if grad_weight is not None:
                grad_weight.addmm_(grad_TN[rows].T, x_TK[rows].float())
        return grad_x, grad_weight


def _sums(a_TK: Tensor, b_KN: Tensor) -> Tensor:
    """fp32 a b of bf16 factors, on tensor cores: products of bf16 are exact in fp32."""
    return torch.mm(a_TK, b_KN, out_dtype=torch.float32)


class _LinearOfHalves(torch.autograd.Function):
    """The gradient from above is fp32: it is multiplied as a sum of two bf16 numbers, which have 16 of its 24 bits."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        save_factors(ctx, x_TK, weight_NK)
        return _sums(x_TK, weight_NK.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad_TN,), (x_TK, weight_NK) = grads, ctx.saved_tensors
        high_TN = grad_TN.to(torch.bfloat16)
        # Beside each other, for one product: torch.compile has no addmm of bf16 factors with a sum in fp32.
        both_T2N = torch.cat((high_TN, (grad_TN - high_TN).to(torch.bfloat16)), dim=1)
        grad_x = grad_weight = None
        if weight_NK is not None:
            grad_x = _sums(both_T2N, weight_NK.repeat(2, 1)).to(torch.bfloat16)
        if x_TK is not None:
            grad_weight = _sums(both_T2N.T, x_TK).unflatten(0, (2, -1)).sum(0).to(torch.bfloat16)
        return grad_x, grad_weight


def linear_fp32(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """fp32 x weight^T of factors of any precision, as routers want it. No widened copy of x is kept on a CPU; on a GPU
    none is made of bf16 factors, whose product then runs on tensor cores."""
    if in_use() == "reference":
        return F.linear(x_TK.float(), weight_NK.float())
    if x_TK.is_cuda and x_TK.dtype == weight_NK.dtype == torch.bfloat16:
        return _LinearOfHalves.apply(x_TK, weight_NK)
    if x_TK.device.type == "cpu" and x_TK.dtype in (torch.bfloat16, torch.float16) and len(x_TK):
        return _LinearFp32.apply(x_TK, weight_NK.float())
    return linear(x_TK.float(), weight_NK.float())
