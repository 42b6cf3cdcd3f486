"""The activation of gated MLPs: silu(gate) * up (Shazeer 2020, arXiv 2002.05202).

    d up = grad silu(gate),  d gate = grad up s (1 + gate (1 - s)),  s = sigmoid(gate)

Bound by memory: 3 s numel bytes forward, 5 s numel backward (s per element). Composed, torch writes silu(gate) and
three gradients more, and keeps one of them. On a GPU torch's own run.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import choose


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification."""
    return F.silu(gate) * up


torch.library.define("r1fast::swiglu", "(Tensor gate, Tensor up) -> Tensor")
torch.library.define("r1fast::swiglu_backward", "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")


@torch.library.register_fake("r1fast::swiglu")
def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("r1fast::swiglu_backward")
def _backward_fake(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.r1fast.swiglu_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("r1fast::swiglu", _backward, setup_context=_setup_context)


def swiglu(gate: Tensor, up: Tensor, *, impl: str | None = None) -> Tensor:
    """`silu(gate) * up`, in fp32 (fp64 for fp64) and rounded once.

    gate, up     of one shape
    Returns the same shape, in the wider dtype. Gradients flow to both.
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: got gate {tuple(gate.shape)} and up {tuple(up.shape)}, expected one shape")
    dtype = torch.promote_types(gate.dtype, up.dtype)
    gate, up = gate.to(dtype), up.to(dtype)
    if choose("swiglu", impl, gate)[0] == "reference":
        return swiglu_reference(gate, up)
    return torch.ops.r1fast.swiglu(gate, up)
