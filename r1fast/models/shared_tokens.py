"""Tokens that several packed sequences begin with, as the prompt of a group: what a layer does token by token it does
once for all of them. Only attention takes every sequence whole.

inputs  p p p c c d d d      sequences  p p p c c | p p p d d d      shared_S  0 1 2 3 4 0 1 2 5 6 7
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SharedTokens:
    """T inputs in S tokens of sequences: token s is input shared_S[s] (int64), and every input is some token."""

    def __init__(self, shared_S: Tensor, num_inputs: int) -> None:
        shared = shared_S.detach().to("cpu", torch.int64)
        count_T = shared.bincount(minlength=num_inputs)
        if len(count_T) != num_inputs or not bool(count_T.all()):
            raise ValueError(f"shared_S names {int(count_T.count_nonzero())} inputs, expected each of {num_inputs}")
        order_S, begins_T = shared.argsort(stable=True), count_T.cumsum(0) - count_T
        first_T = order_S[begins_T]  # the token that stands for an input
        stands_S = torch.zeros_like(shared).index_fill(0, first_T, 1)
        repeat, once = (shared, order_S, begins_T), (first_T, first_T.argsort(), stands_S.cumsum(0) - stands_S)
        self._repeat, self._once = (tuple(x.to(shared_S.device) for x in way) for way in (repeat, once))

    def repeat(self, x_T: Tensor) -> Tensor:
        """Of every token of the sequences."""
        return _Gather.apply(x_T, *self._repeat)

    def once(self, x_S: Tensor) -> Tensor:
        """Of every input."""
        return _Gather.apply(x_S, *self._once)


class _Gather(torch.autograd.Function):
    """x[index]. The gradient sums the rows of a place in their order: the same bits every time, on a GPU too.

    order, begins: those rows place by place, and where each place begins.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, order: Tensor, begins: Tensor) -> Tensor:
        ctx.save_for_backward(order, begins)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        order, begins = ctx.saved_tensors
        sums = F.embedding_bag(order, grad.flatten(1), begins, mode="sum")
        return sums.view(-1, *grad.shape[1:]), None, None, None
