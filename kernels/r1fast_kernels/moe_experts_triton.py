"""The GPU kernels of moe_experts: products around passes over memory (moe_experts_rows.py), sums without atomics.

    forward    inner    = w silu(gate) up,  [gate; up] = gate_up_e x[token]       one kernel, or gather, product, swiglu
               rows     = down_e inner                                            grouped_gemm
               out_t    = sum_k rows[slot_tk]                                     in fp32, in the order of k
    backward   g        = down_e^T rows,  rows = d out[token]                     gather, grouped_gemm; then one pass:
               d gate   = w g up silu'(gate),  d up = w g silu(gate),  d w = <g, silu(gate) up>,  inner again
               d down_e = sum rows inner^T                                        grouped_gemm
               d x_t    = sum_k (gate_up_e^T d [gate; up])[slot_tk]               grouped_gemm, then the sum above
               d gate_up_e = sum d [gate; up] x[token]^T                          gather, grouped_gemm

M = T K: 6 M D F FLOPs forward and 12 backward. With s bytes a number, buffers of M (F + D) s are written and read
forward, M 2F s more with [gate; up] kept, and M (D + 2F) s more where torch's product takes them, which is faster by
more than these passes (docs/LOG.md, 2026-11-29); M (3 D + 4 F) s backward.

A row of gate and its row of up stand side by side in the tile of a product, which is one product with one accumulator:

    columns of the tile   gate 0 | up 0 | gate 1 | up 1 ..      a tensor core leaves pairs of columns in one thread
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grouped_gemm_vendor as vendor
from .dispatch import empty_gradients
from .grouped_gemm import count_tiles, gemm_blocks, launch_product, launch_weight_gradient, multiply, read_tile
from .launch import launch
from .moe_dispatch import launch_dispatch
from .moe_experts_rows import combine, gather, swiglu, swiglu_gradients


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    hidden_ptr, gate_up_ptr, weights_ptr, order_ptr, offsets_ptr,  # [T, D], [E, 2F, D], [T K], [M], [E]
    inner_ptr, kept_ptr,  # [M, F], [M, 2F] or None
    num_rows, num_experts, width, width_f, top_k,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = BLOCK_N // 2
    expert, first, end, column = read_tile(
        offsets_ptr, num_rows, num_experts, tl.cdiv(width_f, PAIRS), GROUP, BLOCK_M, BLOCK_E
    )
    if expert >= num_experts:
        return
    rows = first + tl.arange(0, BLOCK_M)
    choices = tl.load(order_ptr + tl.minimum(rows, end - 1))  # [BLOCK_M]
    row_ptr = hidden_ptr + (choices // top_k).to(tl.int64) * width
    place = tl.arange(0, BLOCK_N)
    columns = tl.minimum(column * PAIRS + place // 2, width_f - 1) + place % 2 * width_f
    weight_ptr = gate_up_ptr + expert.to(tl.int64) * 2 * width_f * width
    acc = multiply(
        row_ptr, weight_ptr, columns.to(tl.int64), width, width, 2 * width_f, True, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
    )
    gate, up = tl.split(acc.reshape(BLOCK_M, PAIRS, 2))  # [BLOCK_M, PAIRS]

    offs_f = column * PAIRS + tl.arange(0, PAIRS)
    mask = (rows < end)[:, None] & (offs_f < width_f)[None, :]
    wide_m = rows.to(tl.int64)[:, None]
    choices = tl.load(order_ptr + tl.minimum(rows, end - 1))  # again: kept, they cost a block a multiprocessor
    weight = tl.load(weights_ptr + choices).to(tl.float32)
    inner = (gate * tl.sigmoid(gate) * up * weight[:, None]).to(inner_ptr.dtype.element_ty)
    if kept_ptr is not None:
        tile_ptr = kept_ptr + wide_m * 2 * width_f + offs_f[None, :]
        tl.store(tile_ptr, gate.to(kept_ptr.dtype.element_ty), mask=mask)
        tl.store(tile_ptr + width_f, up.to(kept_ptr.dtype.element_ty), mask=mask)
    tl.store(inner_ptr + wide_m * width_f + offs_f[None, :], inner, mask=mask)


def _launch_gate_up(
    hidden_TD: Tensor, gate_up_E2FD: Tensor, weights_TK: Tensor, order_M: Tensor, offsets_E: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """inner_MF, gate_up_M2F."""
    num_rows, (num_experts, two_f, width) = len(order_M), gate_up_E2FD.shape
    inner_MF = hidden_TD.new_empty(num_rows, two_f // 2)
    kept_M2F = hidden_TD.new_empty((num_rows, two_f) if keep else (0,))
    blocks = gemm_blocks(hidden_TD.dtype, num_rows, num_experts)
    num_columns = triton.cdiv(two_f // 2, blocks.n // 2)
    launch(
        _gate_up_kernel, (count_tiles(num_rows, num_experts, blocks) * num_columns,),
        hidden_TD, gate_up_E2FD, weights_TK, order_M, offsets_E, inner_MF, kept_M2F if keep else None, num_rows,
        num_experts, width, two_f // 2, weights_TK.shape[1], EVEN_K=width % blocks.k == 0,
        BLOCK_E=triton.next_power_of_2(num_experts + 1), **blocks.options,
    )  # fmt: skip
    return inner_MF, kept_M2F


def launch_forward(
    hidden_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out_TD, order_M, slot_TK, offsets_E, gate_up_M2F."""
    inputs = hidden_TD, gate_up_E2FD, down_EDF, weights_TK
    hidden_TD, gate_up_E2FD, down_EDF, weights_TK = (x.contiguous() for x in inputs)
    num_experts, two_f, _ = gate_up_E2FD.shape
    dispatched = order_M, slot_TK, offsets_E = launch_dispatch(expert_ids_TK, num_experts)
    if not len(order_M):
        return torch.zeros_like(hidden_TD), *dispatched, hidden_TD.new_empty((0, two_f) if keep else (0,))
    if vendor.takes(len(order_M), num_experts, hidden_TD, gate_up_E2FD, down_EDF):
        rows_MD = gather(hidden_TD, order_M, offsets_E, weights_TK.shape[1])
        gate_up_M2F = launch_product(rows_MD, gate_up_E2FD, offsets_E, True, zero_skipped=False)
        del rows_MD  # its memory is that of the next product's rows
        inner_MF = swiglu(gate_up_M2F, weights_TK, order_M, offsets_E)
        gate_up_M2F = gate_up_M2F if keep else gate_up_M2F.new_empty(0)
    else:
        inner_MF, gate_up_M2F = _launch_gate_up(hidden_TD, gate_up_E2FD, weights_TK, order_M, offsets_E, keep)
    rows_MD = launch_product(inner_MF, down_EDF, offsets_E, True, zero_skipped=False)
    return combine(rows_MD, slot_TK, offsets_E), *dispatched, gate_up_M2F


def launch_backward(grad_out_TD: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """The gradients of hidden, gate_up, down and weights; empty where not needed."""
    inputs, (order_M, slot_TK, offsets_E, gate_up_M2F), needs = given[:4], given[4:8], given[8:]
    if not len(order_M) or not any(needs):
        return tuple(x.zero_() for x in empty_gradients(inputs, needs))
    needs_hidden, needs_gate_up, needs_down, needs_weights = needs
    grad_out_TD, hidden_TD, gate_up_E2FD, down_EDF, weights_TK = (x.contiguous() for x in (grad_out_TD, *inputs))
    top_k, needs_product = weights_TK.shape[1], needs_hidden or needs_gate_up
    rows_MD = gather(grad_out_TD, order_M, offsets_E, top_k)
    grad_MF = None
    if needs_product or needs_weights:
        grad_MF = launch_product(rows_MD, down_EDF, offsets_E, False, zero_skipped=False)
    grad_M2F, inner_MF, grad_weights = swiglu_gradients(
        grad_MF, gate_up_M2F, weights_TK, order_M, offsets_E, (needs_product, needs_down, needs_weights)
    )

    hidden, gate_up, down, weights = (x.new_empty(0) for x in inputs)
    if inner_MF is not None:
        down = launch_weight_gradient(inner_MF, rows_MD, offsets_E)
    del rows_MD, grad_MF, inner_MF
    if needs_hidden and grad_M2F is not None:
        rows_MD = launch_product(grad_M2F, gate_up_E2FD, offsets_E, False, zero_skipped=False)
        hidden = combine(rows_MD, slot_TK, offsets_E)
        del rows_MD
    if needs_gate_up and grad_M2F is not None:
        gate_up = launch_weight_gradient(gather(hidden_TD, order_M, offsets_E, top_k), grad_M2F, offsets_E)
    return hidden, gate_up, down, weights if grad_weights is None else grad_weights
