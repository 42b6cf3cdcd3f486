"""The routed experts of a mixture-of-experts layer: K SwiGLU networks per token, weighted and summed.

    out_t = sum_k weight_tk down_e (silu(gate_e x_t) * up_e x_t),  e = expert_ids_tk;   gate_up_e = [gate_e; up_e]

Compute-bound: 6 T K D F FLOPs forward, twice that backward. Rows are sorted by expert, so each expert is one product:

    token-major  t0k0 t0k1 t1k0 t1k1 ...  --order-->  | expert 0 | expert 1 | ... | ids >= E (skipped) |
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import choose, compute_dtype, empty_gradients, product_dtype, register, wanted
from .moe_dispatch import check_expert_ids, moe_dispatch_reference
from .moe_dispatch import fake as fake_dispatch
from .moe_experts_triton import launch_backward, launch_forward


class MoveRows(torch.autograd.Function):
    """Copy each token to its K slots, or sum each token's K slots: either is the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_M: Tensor, slot_TK: Tensor, to_slots: bool) -> Tensor:
        ctx.save_for_backward(token_M, slot_TK)
        ctx.to_slots = to_slots
        # An embedding bag adds the K rows of a token in order, without a [T, K, D] buffer and without atomics.
        return x.index_select(0, token_M) if to_slots else F.embedding_bag(slot_TK, x, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return MoveRows.apply(grad, *ctx.saved_tensors, not ctx.to_slots), None, None, None


def moe_experts_reference(
    hidden_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """The specification. M = T K slots, sorted by expert."""
    order_M, slot_TK, offsets_E = moe_dispatch_reference(expert_ids_TK, len(gate_up_E2FD))
    token_M = order_M // expert_ids_TK.shape[1]
    ends = offsets_E.tolist()  # the only wait for the device
    *sizes, skipped = (end - start for start, end in zip([0, *ends], [*ends, len(order_M)]))

    # unbind and split: their gradients are one stack and one cat, where indexing would fill E tensors with zeros.
    rows = MoveRows.apply(hidden_TD, token_M, slot_TK, True).split([*sizes, skipped])
    gate_MF, up_MF = torch.cat([x_mD @ w_2FD.T for x_mD, w_2FD in zip(rows, gate_up_E2FD.unbind())]).chunk(2, dim=-1)
    # Weighted here and not after `down`: the same sum, over F numbers a row and not D.
    weights_M = weights_TK.flatten().index_select(0, order_M[: len(gate_MF)])
    inner_MF = (F.silu(gate_MF) * up_MF * weights_M[:, None]).to(hidden_TD.dtype)
    out = [h_mF @ w_DF.T for h_mF, w_DF in zip(inner_MF.split(sizes), down_EDF.unbind())]
    out_MD = torch.cat([*out, hidden_TD.new_zeros(skipped, hidden_TD.shape[1])]) if skipped else torch.cat(out)
    return MoveRows.apply(out_MD, token_M, slot_TK, False)


def _fake(
    hidden_TD: Tensor, gate_up_E2FD: Tensor, _: Tensor, expert_ids_TK: Tensor, __: Tensor, keep: bool
) -> tuple[Tensor, ...]:
    num_experts, two_f = gate_up_E2FD.shape[:2]
    kept = (expert_ids_TK.numel(), two_f) if keep else (0,)
    out_TD = hidden_TD.new_empty(hidden_TD.shape)
    return out_TD, *fake_dispatch(expert_ids_TK, num_experts), hidden_TD.new_empty(kept)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_TD, gate_up_E2FD, down_EDF, _, weights_TK, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden_TD, gate_up_E2FD, down_EDF, weights_TK, *output[1:])


def _backward(ctx: Any, grad_out_TD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    found = torch.ops.r1fast.moe_experts_backward(grad_out_TD.contiguous(), *ctx.saved_tensors, *needs)
    hidden, gate_up, down, weights = wanted(found, needs)
    return hidden, gate_up, down, None, weights, None


register(
    "moe_experts",
    "(Tensor hidden_TD, Tensor gate_up_E2FD, Tensor down_EDF, Tensor expert_ids_TK, Tensor weights_TK, bool keep) "
    "-> (Tensor out_TD, Tensor order_M, Tensor slot_TK, Tensor offsets_E, Tensor gate_up_M2F)",
    fake=_fake, launch=launch_forward, save=_save, backward=_backward,
)  # fmt: skip
register(
    "moe_experts_backward",
    "(Tensor grad_out_TD, Tensor hidden_TD, Tensor gate_up_E2FD, Tensor down_EDF, Tensor weights_TK, Tensor order_M, "
    "Tensor slot_TK, Tensor offsets_E, Tensor gate_up_M2F, bool needs_hidden, bool needs_gate_up, bool needs_down, "
    "bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda _, *given: empty_gradients(given[:4], given[-4:]),
    launch=launch_backward,
)


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
    gate_up_E2FD    [E, 2F, D], gate rows then up rows; down_EDF [E, D, F], same dtype. Computed in it, or in autocast's
                    where that is on, whatever the dtype of hidden
    expert_ids_TK   [T, K] int64 >= 0; an id >= E is skipped (padding, or an expert that lives on another rank)
    weights_TK      [T, K] fp32 (fp64 for fp64)
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
    if gate_up_E2FD.dtype != down_EDF.dtype:
        raise ValueError(
            f"moe_experts: got gate_up in {gate_up_E2FD.dtype} and down in {down_EDF.dtype}, expected one dtype"
        )
    out_dtype, dtype = hidden_TD.dtype, product_dtype(gate_up_E2FD)
    hidden_TD, gate_up_E2FD, down_EDF = (x.to(dtype) for x in (hidden_TD, gate_up_E2FD, down_EDF))
    weights_TK = weights_TK.to(compute_dtype(hidden_TD))
    inputs = hidden_TD, gate_up_E2FD, down_EDF, expert_ids_TK, weights_TK
    chosen, _ = choose("moe_experts", impl, hidden_TD)
    if chosen != "cpp":
        check_expert_ids("moe_experts", expert_ids_TK, num_experts)
    if chosen == "reference":
        return moe_experts_reference(*inputs).to(out_dtype)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return torch.ops.r1fast.moe_experts(*inputs, learns)[0].to(out_dtype)
