"""The small parts that every family shares: RMS norm, gated MLP, output head."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1fast_kernels import rms_norm
from r1fast_kernels.products import linear

HeadFn = Callable[[Tensor, Tensor], Any]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=bias)
        self.up_proj = Linear(hidden_size, width, bias=bias)
        self.down_proj = Linear(width, hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Head(nn.Module):
    """Vocabulary (or scalar) projection. A loss that fuses the product takes the weight here, inside forward, where a
    sharded weight is whole: `fn(hidden_TD, weight_VD)` runs in place of the product."""

    weight: Tensor
    in_fp32 = False  # both factors widened before the product

    def __init__(self, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden_size))

    def forward(self, hidden_TD: Tensor, fn: HeadFn | None = None) -> Any:
        factors = (hidden_TD.float(), self.weight.float()) if self.in_fp32 else (hidden_TD, self.weight)
        return (linear if fn is None else fn)(*factors)
