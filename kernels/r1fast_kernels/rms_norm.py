"""RMS norm over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    out = weight x / sqrt(mean(x^2) + eps);   n = x / sqrt(...), g = grad weight
    dx = (g - n mean(g n)) / sqrt(...),  dweight = sum over rows of grad n

Bound by memory: 2 s T D bytes forward, 3 s T D backward (s per element). On a CPU torch composes it from a handful of
passes, and keeps three tensors of its size for the backward pass; this keeps 4 bytes a row. A training step of
bench_train_step.py's model (fp32, AVX2, one thread) takes 6.5% more processor time with torch's. On a GPU torch's own
is one kernel, and runs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import choose, compute_dtype, empty_gradients, register, wanted


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The specification."""
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def _fake(x_TD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape[0], dtype=compute_dtype(x_TD))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward(ctx: Any, grad_TD: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
    needs = ctx.needs_input_grad[:2]
    grad_x, grad_weight = wanted(torch.ops.r1fast.rms_norm_backward(grad_TD, *ctx.saved_tensors, *needs), needs)
    return grad_x, grad_weight, None


register(
    "rms_norm",
    "(Tensor x_TD, Tensor weight_D, float eps) -> (Tensor out_TD, Tensor rstd_T)",
    fake=_fake, save=_save, backward=_backward,
)  # fmt: skip
register(
    "rms_norm_backward",
    "(Tensor grad_TD, Tensor x_TD, Tensor weight_D, Tensor rstd_T, bool needs_x, bool needs_weight) "
    "-> (Tensor, Tensor)",
    fake=lambda _, *given: empty_gradients(given[:2], given[-2:]),
)


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float = 1e-6, impl: str | None = None) -> Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension.

    x          [..., D]; weight_D [D]: of two dtypes both are taken to the wider one
    Returns the shape and dtype of x. Gradients flow to both.
    """
    if weight_D.dim() != 1 or x.dim() < 1 or x.shape[-1:] != weight_D.shape:
        raise ValueError(
            f"rms_norm: got x {tuple(x.shape)} and weight {tuple(weight_D.shape)}, expected [..., D] and [D]"
        )
    if x.dtype != weight_D.dtype:
        wide = torch.promote_types(x.dtype, weight_D.dtype)
        return rms_norm(x.to(wide), weight_D.to(wide), eps=eps, impl=impl).to(x.dtype)
    if choose("rms_norm", impl, x)[0] == "reference":
        return rms_norm_reference(x, weight_D, eps)
    out_TD, _ = torch.ops.r1fast.rms_norm(x.reshape(-1, x.shape[-1]), weight_D, eps)
    return out_TD.view(x.shape)
