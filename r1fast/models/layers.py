"""The small parts that every family shares: embedding, RMS norm, gated MLP, output head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1fast_kernels import rms_norm
from r1fast_kernels.products import linear

HeadFn = Callable[[Tensor, Tensor], Any]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class RMSNorm(nn.Module):
    """offset + weight times the normed x; Gemma's weights are small numbers around 0, and are added in fp32."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.offset:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset
        return rms_norm(x, weight, eps=self.eps)


class Embedding(nn.Embedding):
    """Rows times `scale`, which is rounded to their dtype first, as in Gemma."""

    def __init__(self, vocab_size: int, hidden_size: int, scale: float = 1.0) -> None:
        super().__init__(vocab_size, hidden_size)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        x = super().forward(input)
        return x if self.scale == 1.0 else x * torch.tensor(self.scale, dtype=x.dtype, device="cpu")


class Linear(nn.Linear):
    weight_lora: nn.Module | None

    def __init__(self, num_in: int, num_out: int, bias: bool = True) -> None:
        super().__init__(num_in, num_out, bias=bias)
        self.register_module("weight_lora", None)  # a place for an adapter (lora.py)

    def forward(self, input: Tensor) -> Tensor:
        out = linear(input, self.weight, self.bias)
        return out if self.weight_lora is None else self.weight_lora(input, out)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU, or GeGLU."""

    def __init__(self, hidden_size: int, width: int, bias: bool = False, activation: str = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(hidden_size, width, bias=bias)
        self.up_proj = Linear(hidden_size, width, bias=bias)
        self.down_proj = Linear(width, hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(_ACTIVATIONS[self.activation](self.gate_proj(x_TD)) * self.up_proj(x_TD))


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
