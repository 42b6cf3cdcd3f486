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


@cache
def onednn_is_faster() -> bool:
    """Whether fp32 products on this CPU should be oneDNN's."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def _takes_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and onednn_is_faster()


def _onednn(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x weight^T + bias."""
    return torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        return _onednn(x_TK, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad_TN,), (x_TK, weight_NK) = grads, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _onednn(grad_TN, weight_NK.T) if needs_x else None,
            _onednn(grad_TN.T, x_TK.T) if needs_weight else None,
            grad_TN.sum(0) if needs_bias else None,
        )


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of [T, K] and [N, K], and on some CPUs about twice as fast in fp32."""
    if _takes_onednn(x_TK):
        return _Linear.apply(x_TK, weight_NK, bias_N)
    return F.linear(x_TK, weight_NK, bias_N)
