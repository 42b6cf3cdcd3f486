"""The routed experts of a mixture-of-experts layer: K SwiGLU networks per token, weighted and summed.

    out_t = sum_k weight_tk down_e (silu(gate_e x_t) * up_e x_t),  e = expert_ids_tk;   gate_up_e = [gate_e; up_e]

Compute-bound: 6 T K D F FLOPs forward, twice that backward. Rows are sorted by expert, so each expert is one product:

    token-major  t0k0 t0k1 t1k0 t1k1 ...  --order-->  | expert 0 | expert 1 | ... | ids >= E (skipped) |
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import choose


def _gather(rows_TD: Tensor, token_M: Tensor) -> Tensor:
    return rows_TD.index_select(0, token_M)


def _gather_sum(rows_MD: Tensor, slot_TK: Tensor) -> Tensor:
    # An embedding bag adds the K rows of a token in order, without a [T, K, D] buffer and without atomics.
    return F.embedding_bag(slot_TK, rows_MD, mode="sum")


class _Dispatch(torch.autograd.Function):
    """Copy each token to its K slots; the gradient is `_Combine`, where autograd would scatter-add."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, token_M: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        return _gather(hidden_TD, token_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _gather_sum(grad_MD, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    """Sum each token's K slots; the gradient is `_Dispatch`."""

    @staticmethod
    def forward(ctx: Any, out_MD: Tensor, token_M: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_M)
        return _gather_sum(out_MD, slot_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _gather(grad_TD, *ctx.saved_tensors), None, None


def moe_experts_reference(
    hidden_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """The specification. M = T K slots, sorted by expert."""
    num_experts = len(gate_up_E2FD)
    expert_M = expert_ids_TK.flatten().clamp(max=num_experts)
    order_M = expert_M.argsort(stable=True)
    token_M = order_M // expert_ids_TK.shape[1]
    slot_TK = order_M.argsort().view_as(expert_ids_TK)  # the inverse: where each choice of a token lies
    *sizes, skipped = torch.bincount(expert_M, minlength=num_experts + 1).tolist()  # the only wait for the device

    # unbind and split: their gradients are one stack and one cat, where indexing would fill E tensors with zeros.
    rows = _Dispatch.apply(hidden_TD, token_M, slot_TK).split([*sizes, skipped])
    gate_MF, up_MF = torch.cat([x_mD @ w_2FD.T for x_mD, w_2FD in zip(rows, gate_up_E2FD.unbind())]).chunk(2, dim=-1)
    # Weighted here and not after `down`: the same sum, over F numbers a row and not D.
    weights_M = weights_TK.flatten().index_select(0, order_M[: len(gate_MF)])
    inner_MF = (F.silu(gate_MF) * up_MF * weights_M[:, None]).to(hidden_TD.dtype)
    out = [h_mF @ w_DF.T for h_mF, w_DF in zip(inner_MF.split(sizes), down_EDF.unbind())]
    out_MD = torch.cat([*out, hidden_TD.new_zeros(skipped, hidden_TD.shape[1])]) if skipped else torch.cat(out)
    return _Combine.apply(out_MD, token_M, slot_TK)


def moe_experts(
    hidden_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Apply each token's experts and sum what they return.

    hidden_TD       [T, D]
    gate_up_E2FD    [E, 2F, D], gate rows then up rows; down_EDF [E, D, F]; same dtype as hidden
    expert_ids_TK   [T, K] int64 >= 0; an id >= E is skipped (padding, or an expert that lives on another rank)
    weights_TK      [T, K] fp32
    Returns out_TD in the dtype of hidden. Gradients flow to hidden, both weights and `weights_TK`.
    """
    num_experts, two_f, width = gate_up_E2FD.shape
    if hidden_TD.shape[1:] != (width,) or down_EDF.shape != (num_experts, width, two_f // 2):
        raise ValueError(
            f"moe_experts: got hidden {tuple(hidden_TD.shape)}, gate_up {tuple(gate_up_E2FD.shape)}, down "
            f"{tuple(down_EDF.shape)}, expected [T, D], [E, 2F, D], [E, D, F]"
        )
    if expert_ids_TK.shape != weights_TK.shape or expert_ids_TK.shape[0] != hidden_TD.shape[0]:
        raise ValueError(
            f"moe_experts: got expert ids {tuple(expert_ids_TK.shape)} and weights {tuple(weights_TK.shape)} for "
            f"{hidden_TD.shape[0]} tokens, expected both [T, K]"
        )
    choose("moe_experts", impl, hidden_TD)
    return moe_experts_reference(hidden_TD, gate_up_E2FD, down_EDF, expert_ids_TK, weights_TK)
