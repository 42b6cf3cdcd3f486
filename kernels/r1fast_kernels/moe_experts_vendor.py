"""moe_experts by parts around torch's grouped products, where `grouped_gemm_vendor.takes` them.

    forward    rows = x[token] | [gate; up] = gate_up_e rows | inner = w silu(gate) up | down_e inner | sums over k
    backward   rows = d out[token] | g = down_e^T rows | d gate, d up, d w, inner | d down_e = rows^T inner
               d x = sums of gate_up_e^T d [gate; up] | d gate_up_e = d [gate; up]^T x[token]

What moe_experts_triton.py fuses into its products are passes over memory here, of 8 M (D + F) bytes forward and of
8 M D + 12 M F backward in bf16, and M D numbers more memory while they run. docs/LOG.md (2026-11-29) has the times of
both.
"""

from torch import Tensor

from . import grouped_gemm_vendor as vendor
from .moe_experts_rows import combine, gather, launch_swiglu_gradient, swiglu

Tensors = tuple[Tensor, ...]


def forward(
    hidden_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_TK: Tensor, dispatched: Tensors
) -> tuple[Tensor, Tensor]:
    """out_TD and gate_up_M2F. dispatched: order_M, slot_TK, offsets_E."""
    order_M, slot_TK, offsets_E = dispatched
    rows_MD = gather(hidden_TD, order_M, offsets_E, weights_TK.shape[1])
    gate_up_M2F = vendor.multiply(rows_MD, gate_up_E2FD, offsets_E, True)
    del rows_MD  # its memory is that of the next product's rows
    inner_MF = swiglu(gate_up_M2F, weights_TK, order_M, offsets_E)
    return combine(vendor.multiply(inner_MF, down_EDF, offsets_E, True), slot_TK, offsets_E), gate_up_M2F


def backward(
    grad_out_TD: Tensor, inputs: Tensors, dispatched: Tensors, gate_up_M2F: Tensor, needs: tuple[bool, ...]
) -> Tensors:
    """The gradients of inputs: hidden, gate_up, down and weights; empty where not needed."""
    (hidden_TD, gate_up_E2FD, down_EDF, weights_TK), (order_M, slot_TK, offsets_E) = inputs, dispatched
    needs_hidden, needs_gate_up, needs_down, needs_weights = needs
    top_k = weights_TK.shape[1]
    hidden, gate_up, down, weights = (x.new_empty(0) for x in inputs)
    rows_MD = gather(grad_out_TD, order_M, offsets_E, top_k)
    passes = needs_hidden or needs_gate_up
    grad_MF = vendor.multiply(rows_MD, down_EDF, offsets_E, False) if passes or needs_weights else None
    grad_M2F, inner_MF, grad_weights = launch_swiglu_gradient(
        grad_MF, gate_up_M2F, weights_TK, order_M, offsets_E, (passes, needs_down, needs_weights)
    )
    if inner_MF is not None:
        down = vendor.weight_gradient(inner_MF, rows_MD, offsets_E)
    del rows_MD, grad_MF, inner_MF
    if needs_hidden and grad_M2F is not None:
        hidden = combine(vendor.multiply(grad_M2F, gate_up_E2FD, offsets_E, False), slot_TK, offsets_E)
    if needs_gate_up and grad_M2F is not None:
        gate_up = vendor.weight_gradient(gather(hidden_TD, order_M, offsets_E, top_k), grad_M2F, offsets_E)
    return hidden, gate_up, down, weights if grad_weights is None else grad_weights
