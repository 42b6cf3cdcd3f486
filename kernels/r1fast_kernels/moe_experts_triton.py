"""The GPU kernels of moe_experts: gather, SwiGLU and routing weight inside the products, sums without atomics.

Where torch's products are faster, even with those beside them in passes over memory, moe_experts_vendor.py runs.

    forward    inner    = w silu(gate) up,  [gate; up] = gate_up_e x[token]       rows of x gathered by the product
               rows     = down_e inner                                            grouped_gemm
               out_t    = sum_k rows[slot_tk]                                     in fp32, in the order of k
    backward   g        = down_e^T d out[token]                                   gathered; its epilogue makes:
               d gate   = w g up silu'(gate),  d up = w g silu(gate),  d w = <g, silu(gate) up>,  inner again
               d x_t    = sum_k (gate_up_e^T d [gate; up])[slot_tk]               grouped_gemm, then the sum above
               d gate_up_e = sum d [gate; up] x[token]^T,  d down_e = sum d out[token] inner^T           gathered

M = T K: 6 M D F FLOPs forward and 12 backward. With s bytes a number, buffers of M (F + D) s are written and read
forward, M 2F s more with [gate; up] kept, and M (2F + F + D) s backward. x and d out are never copied per choice: their
rows come from L2.

A row of gate and its row of up stand side by side in the tile of a product, which is one product with one accumulator:

    columns of the tile   gate 0 | up 0 | gate 1 | up 1 ..      a tensor core leaves pairs of columns in one thread
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grouped_gemm_vendor, moe_experts_vendor
from .dispatch import empty_gradients
from .grouped_gemm import gemm_blocks, launch_gemm, launch_weight, multiply, read_tile
from .launch import launch
from .moe_dispatch import launch_dispatch, tile_table
from .moe_experts_rows import combine, swiglu_gradient

BLOCK_CHOICES, CHOICES_WARPS = 128, 4


@triton.jit
def _gate_up_kernel(
    hidden_ptr, gate_up_ptr, weights_ptr, order_ptr, tiles_ptr,  # [T, D], [E, 2F, D], [T K], [M], [3, I]
    inner_ptr, kept_ptr,  # [M, F], [M, 2F] or None
    num_experts, width, width_f, top_k,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = BLOCK_N // 2
    expert, first, end, column = read_tile(tiles_ptr, tl.cdiv(width_f, PAIRS), GROUP, BLOCK_M)
    if (expert < 0) | (expert == num_experts):
        return
    rows = first + tl.arange(0, BLOCK_M)
    choices = tl.load(order_ptr + tl.minimum(rows, end - 1))  # [BLOCK_M]
    row_ptr = hidden_ptr + (choices // top_k).to(tl.int64) * width
    place = tl.arange(0, BLOCK_N)
    columns = tl.minimum(column * PAIRS + place // 2, width_f - 1) + place % 2 * width_f
    acc = multiply(
        row_ptr, gate_up_ptr + expert * 2 * width_f * width, columns.to(tl.int64), width, 2 * width_f, True, EVEN_K,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    gate, up = tl.split(acc.reshape(BLOCK_M, PAIRS, 2))  # [BLOCK_M, PAIRS]

    offs_f = column * PAIRS + tl.arange(0, PAIRS)
    mask = (rows < end)[:, None] & (offs_f < width_f)[None, :]
    wide_m = rows.to(tl.int64)[:, None]
    if kept_ptr is not None:
        tile_ptr = kept_ptr + wide_m * 2 * width_f + offs_f[None, :]
        tl.store(tile_ptr, gate.to(kept_ptr.dtype.element_ty), mask=mask)
        tl.store(tile_ptr + width_f, up.to(kept_ptr.dtype.element_ty), mask=mask)
    weight = tl.load(weights_ptr + choices).to(tl.float32)
    inner = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(inner_ptr + wide_m * width_f + offs_f[None, :], inner.to(inner_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quarters(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Four tiles of COLUMNS / 4, left to right. What a thread holds, it keeps."""
    left, right = tl.split(x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
    a, b = tl.split(left.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1))
    c, d = tl.split(right.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1))
    return a, b, c, d


@triton.jit
def _inner_gradient_kernel(
    grad_out_ptr, down_ptr, kept_ptr,  # [T, D], [E, D, F], [M, 2F]
    weights_ptr, order_ptr, tiles_ptr,  # [T K], [M], [3, I]
    grad_gate_up_ptr, inner_ptr, partials_ptr,  # [M, 2F], [M, F], [M, tiles of F]: shares of d w; or None
    num_experts, width, width_f, top_k,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_columns = tl.cdiv(width_f, BLOCK_N)
    expert, first, end, column = read_tile(tiles_ptr, num_columns, GROUP, BLOCK_M)
    if (expert < 0) | (expert == num_experts):
        return
    rows = first + tl.arange(0, BLOCK_M)
    choices = tl.load(order_ptr + tl.minimum(rows, end - 1))  # [BLOCK_M]
    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if grad_gate_up_ptr is not None or partials_ptr is not None:
        grad = multiply(
            grad_out_ptr + (choices // top_k).to(tl.int64) * width, down_ptr + expert * width * width_f,
            column * BLOCK_N + tl.arange(0, BLOCK_N), width, width_f, False, EVEN_K, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
    # By quarters: gate, up and what is made of them do not fit into registers beside the whole tile.
    weight = tl.load(weights_ptr + choices).to(tl.float32)
    wide_m = rows.to(tl.int64)
    mask_m = rows < end
    share = tl.zeros([BLOCK_M], tl.float32)
    quarters = _quarters(grad, BLOCK_M, BLOCK_N)
    for i in tl.static_range(4):
        offs_f = column * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        share += swiglu_gradient(
            quarters[i], weight, wide_m, offs_f, mask_m, width_f, kept_ptr, grad_gate_up_ptr, inner_ptr
        )
    if partials_ptr is not None:
        tl.store(partials_ptr + wide_m * num_columns + column, share, mask=mask_m)


@triton.jit(do_not_specialize=["num_choices"])
def _weights_gradient_kernel(
    partials_ptr, slot_ptr, offsets_ptr, out_ptr,  # [M, J], [T K], [E], [T K]
    num_choices, num_experts, num_partials, BLOCK: tl.constexpr,
):  # fmt: skip
    choices = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = choices < num_choices
    slot = tl.load(slot_ptr + choices, mask=mask, other=0)
    exists = mask & (slot < tl.load(offsets_ptr + num_experts - 1))
    row_ptr = partials_ptr + slot.to(tl.int64) * num_partials
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(num_partials):
        total += tl.load(row_ptr + j, mask=exists, other=0.0)
    tl.store(out_ptr + choices, total.to(out_ptr.dtype.element_ty), mask=mask)


def launch_forward(
    hidden_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out_TD, order_M, slot_TK, offsets_E, gate_up_M2F."""
    inputs = hidden_TD, gate_up_E2FD, down_EDF, weights_TK
    hidden_TD, gate_up_E2FD, down_EDF, weights_TK = (x.contiguous() for x in inputs)
    num_experts, two_f, width = gate_up_E2FD.shape
    dispatched = order_M, slot_TK, offsets_E = launch_dispatch(expert_ids_TK, num_experts)
    num_rows = len(order_M)
    if grouped_gemm_vendor.takes(num_rows, num_experts, hidden_TD, gate_up_E2FD, down_EDF):
        out_TD, kept_M2F = moe_experts_vendor.forward(hidden_TD, gate_up_E2FD, down_EDF, weights_TK, dispatched)
        return out_TD, *dispatched, kept_M2F if keep else kept_M2F.new_empty(0)
    kept_M2F = hidden_TD.new_empty((num_rows, two_f) if keep else (0,))
    if not num_rows:
        return torch.zeros_like(hidden_TD), *dispatched, kept_M2F
    blocks = gemm_blocks(hidden_TD.dtype, num_rows, num_experts)
    tiles_3I = tile_table(offsets_E, num_rows, blocks.m)
    inner_MF = hidden_TD.new_empty(num_rows, two_f // 2)
    launch(
        _gate_up_kernel, (tiles_3I.shape[1] * triton.cdiv(two_f // 2, blocks.n // 2),),
        hidden_TD, gate_up_E2FD, weights_TK, order_M, tiles_3I, inner_MF, kept_M2F if keep else None, num_experts,
        width, two_f // 2, weights_TK.shape[1], EVEN_K=width % blocks.k == 0, **blocks.options,
    )  # fmt: skip
    rows_MD = launch_gemm(inner_MF, down_EDF, tiles_3I, True, blocks, zero_skipped=False)
    return combine(rows_MD, slot_TK, offsets_E), *dispatched, kept_M2F


def launch_backward(grad_out_TD: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """The gradients of hidden, gate_up, down and weights; empty where not needed."""
    inputs, (order_M, slot_TK, offsets_E, gate_up_M2F), needs = given[:4], given[4:8], given[8:]
    num_rows, needs_hidden, needs_gate_up, needs_down, needs_weights = len(order_M), *needs
    if not num_rows or not any(needs):
        return tuple(x.zero_() for x in empty_gradients(inputs, needs))
    grad_out_TD, hidden_TD, gate_up_E2FD, down_EDF, weights_TK = (x.contiguous() for x in (grad_out_TD, *inputs))
    if grouped_gemm_vendor.takes(num_rows, len(offsets_E), grad_out_TD, hidden_TD, gate_up_E2FD, down_EDF):
        inputs = hidden_TD, gate_up_E2FD, down_EDF, weights_TK
        return moe_experts_vendor.backward(grad_out_TD, inputs, given[4:7], gate_up_M2F, needs)
    (num_experts, width, width_f), top_k = down_EDF.shape, weights_TK.shape[1]
    blocks = gemm_blocks(hidden_TD.dtype, num_rows, num_experts)
    tiles_3I, num_columns = tile_table(offsets_E, num_rows, blocks.m), triton.cdiv(width_f, blocks.n)
    grad_M2F = torch.empty_like(gate_up_M2F) if needs_hidden or needs_gate_up else None
    inner_MF = hidden_TD.new_empty(num_rows, width_f) if needs_down else None
    partials_MJ = hidden_TD.new_empty(num_rows, num_columns, dtype=torch.float32) if needs_weights else None
    launch(
        _inner_gradient_kernel, (tiles_3I.shape[1] * num_columns,),
        grad_out_TD, down_EDF, gate_up_M2F, weights_TK, order_M, tiles_3I, grad_M2F, inner_MF, partials_MJ, num_experts,
        width, width_f, top_k, EVEN_K=width % blocks.k == 0, **blocks.options,
    )  # fmt: skip

    hidden, gate_up, down, weights = (x.new_empty(0) for x in inputs)
    token_M = order_M // top_k
    if needs_hidden and grad_M2F is not None:
        rows_MD = launch_gemm(grad_M2F, gate_up_E2FD, tiles_3I, False, blocks, zero_skipped=False)
        hidden = combine(rows_MD, slot_TK, offsets_E)
    if needs_gate_up and grad_M2F is not None:
        gate_up = launch_weight(hidden_TD, grad_M2F, offsets_E, token_M, gather="x")
    if inner_MF is not None:
        down = launch_weight(inner_MF, grad_out_TD, offsets_E, token_M, gather="y")
    if partials_MJ is not None:
        weights = torch.empty_like(weights_TK)
        launch(
            _weights_gradient_kernel, (triton.cdiv(num_rows, BLOCK_CHOICES),),
            partials_MJ, slot_TK, offsets_E, weights, num_rows, num_experts, num_columns, BLOCK=BLOCK_CHOICES,
            num_warps=CHOICES_WARPS,
        )  # fmt: skip
    return hidden, gate_up, down, weights
