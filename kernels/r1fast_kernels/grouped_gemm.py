"""One product per expert, over rows that are sorted by expert.

    out_m = W_e x_m   (weight [E, N, D], transpose_weight=True, as a linear layer)   or   x_m W_e   (weight [E, D, N])
    rows of expert e: offsets_E[e - 1] <= m < offsets_E[e];   rows from offsets_E[-1] on are 0

2 M D N FLOPs, and as many for each gradient. Each expert's dW is summed in fp32 and rounded once; without rows it is 0.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import choose


def grouped_gemm_reference(x_MD: Tensor, weight: Tensor, offsets_E: Tensor, transpose_weight: bool) -> Tensor:
    """The specification. Waits for the device: the sizes decide every shape."""
    ends = offsets_E.tolist()
    rows = x_MD.split([end - start for start, end in zip([0, *ends], [*ends, len(x_MD)])])
    out = [x_mD @ (w.T if transpose_weight else w) for x_mD, w in zip(rows, weight.unbind())]
    skipped = x_MD.new_zeros(len(rows[-1]), weight.shape[1 if transpose_weight else 2])
    return torch.cat([*out, skipped])


torch.library.define(
    "r1fast::grouped_gemm", "(Tensor x_MD, Tensor weight, Tensor offsets_E, bool transpose_weight) -> Tensor"
)
# [E, N, D]: y_e^T x_e over the rows of each expert.
torch.library.define("r1fast::grouped_gemm_weight", "(Tensor x_MD, Tensor y_MN, Tensor offsets_E) -> Tensor")


@torch.library.register_fake("r1fast::grouped_gemm")
def _fake(x_MD: Tensor, weight: Tensor, offsets_E: Tensor, transpose_weight: bool) -> Tensor:
    return x_MD.new_empty(x_MD.shape[0], weight.shape[1 if transpose_weight else 2])


@torch.library.register_fake("r1fast::grouped_gemm_weight")
def _weight_fake(x_MD: Tensor, y_MN: Tensor, offsets_E: Tensor) -> Tensor:
    return x_MD.new_empty(offsets_E.shape[0], y_MN.shape[1], x_MD.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.transpose_weight = inputs[3]


def _backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x_MD, weight, offsets_E = ctx.saved_tensors
    grad_MN = grad_MN.contiguous()  # `.sum().backward()` sends an expanded scalar
    ops, grad_x, grad_weight = torch.ops.r1fast, None, None
    if ctx.needs_input_grad[0]:
        grad_x = ops.grouped_gemm(grad_MN, weight, offsets_E, not ctx.transpose_weight)
    if ctx.needs_input_grad[1]:
        sides = (x_MD, grad_MN) if ctx.transpose_weight else (grad_MN, x_MD)
        grad_weight = ops.grouped_gemm_weight(*sides, offsets_E)
    return grad_x, grad_weight, None, None


torch.library.register_autograd("r1fast::grouped_gemm", _backward, setup_context=_setup_context)


def grouped_gemm(
    x_MD: Tensor, weight: Tensor, offsets_E: Tensor, *, transpose_weight: bool = True, impl: str | None = None
) -> Tensor:
    """Each row times the weight of its expert.

    x_MD        [M, D], sorted by expert (`moe_dispatch`)
    weight      [E, N, D] with transpose_weight, as `torch.nn.Linear` keeps it; else [E, D, N]; same dtype as x
    offsets_E   [E] int32, where each expert's rows end, as in torch.nn.functional.grouped_mm
    Returns [M, N] in the dtype of x; rows from offsets_E[-1] on are 0 (grouped_mm leaves them uninitialised).
    """
    inner = 2 if transpose_weight else 1
    if x_MD.dim() != 2 or weight.dim() != 3 or weight.shape[inner] != x_MD.shape[1] or len(offsets_E) != len(weight):
        raise ValueError(
            f"grouped_gemm: got x {tuple(x_MD.shape)}, weight {tuple(weight.shape)} and offsets "
            f"{tuple(offsets_E.shape)}, expected [M, D], {'[E, N, D]' if transpose_weight else '[E, D, N]'} and [E]"
        )
    if x_MD.dtype != weight.dtype:
        raise ValueError(f"grouped_gemm: got x in {x_MD.dtype} and weight in {weight.dtype}, expected one dtype")
    if choose("grouped_gemm", impl, x_MD) == "reference":
        return grouped_gemm_reference(x_MD, weight, offsets_E, transpose_weight)
    return torch.ops.r1fast.grouped_gemm(x_MD, weight, offsets_E.int(), transpose_weight)
