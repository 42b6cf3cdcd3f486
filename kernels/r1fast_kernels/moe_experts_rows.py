"""What moe_experts does between and after products, in one pass over memory each (s bytes a number):

    gather       rows[m] = x[token of m]                                     reads and writes M D s
    swiglu       inner = w silu(gate) up                                     reads M 2F s, writes M F s
    its gradient d gate = w g up silu'(gate),  d up = w g silu(gate),        reads M 3F s, writes M 3F s
                 d w = <g, silu(gate) up>,  inner again                      (g: gradient of silu(gate) up w before w)
    combine      out_t = sum_k rows[slot_tk], in fp32, in the order of k     reads M D s, writes T D s

Rows of skipped choices stand behind the last expert's: they are not read, and their d w is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

# 16 values a thread: rows of a program and its columns at a time.
WIDE_ROWS, WIDE_COLUMNS, ROWS, COLUMNS, NUM_WARPS = 4, 512, 8, 256, 4
GRADIENT_COLUMNS = 128  # three numbers come and three go: 64 registers with 8 values a thread, 119 with 16


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    x_ptr, order_ptr, offsets_ptr, out_ptr,  # [T, D], [M], [E], [M, D]
    num_rows, num_experts, width, top_k, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = rows < tl.minimum(num_rows, tl.load(offsets_ptr + num_experts - 1))
    tokens = (tl.load(order_ptr + rows, mask=exists, other=0) // top_k).to(tl.int64)
    mask = exists[:, None] & (offs_d < width)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * width + offs_d[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    tl.store(out_ptr + rows[:, None] * width + offs_d[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_kernel(
    rows_ptr, slot_ptr, offsets_ptr, out_ptr,  # [M, D], [T, K], [E], [T, D]
    num_tokens, num_experts, width, top_k, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask_d = (offs_d < width)[None, :]
    end = tl.load(offsets_ptr + num_experts - 1)  # behind it stand the skipped choices, whose rows nobody wrote
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in range(top_k):
        slot = tl.load(slot_ptr + offs_t * top_k + k, mask=mask_t, other=0)
        mask = (mask_t & (slot < end))[:, None] & mask_d
        row_ptr = rows_ptr + slot.to(tl.int64)[:, None] * width
        acc += tl.load(row_ptr + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    tile_ptr = out_ptr + offs_t[:, None] * width + offs_d[None, :]
    tl.store(tile_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_d)


@triton.jit(do_not_specialize=["num_rows"])
def _expert_swiglu_kernel(
    gate_up_ptr, weights_ptr, order_ptr, offsets_ptr, inner_ptr,  # [M, 2F], [T K], [M], [E], [M, F]
    num_rows, num_experts, width_f, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    exists = rows < tl.minimum(num_rows, tl.load(offsets_ptr + num_experts - 1))
    mask = exists[:, None] & (offs_f < width_f)[None, :]
    tile_ptr = gate_up_ptr + rows[:, None] * 2 * width_f + offs_f[None, :]
    gate = tl.load(tile_ptr, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_F]
    up = tl.load(tile_ptr + width_f, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_F]
    choices = tl.load(order_ptr + rows, mask=exists, other=0)
    weight = tl.load(weights_ptr + choices).to(tl.float32)
    inner = gate * tl.sigmoid(gate) * up * weight[:, None]
    tile_ptr = inner_ptr + rows[:, None] * width_f + offs_f[None, :]
    tl.store(tile_ptr, inner.to(inner_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _expert_swiglu_gradient_kernel(
    grad_ptr, kept_ptr, weights_ptr, order_ptr, offsets_ptr,  # [M, F] or None, [M, 2F], [T K], [M], [E]
    grad_gate_up_ptr, inner_ptr, grad_weights_ptr,  # [M, 2F], [M, F], [T K]; or None
    num_rows, num_experts, width_f, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    exists = mask_m & (rows < tl.load(offsets_ptr + num_experts - 1))
    choices = tl.load(order_ptr + rows, mask=mask_m, other=0)
    weight = tl.load(weights_ptr + choices).to(tl.float32)
    share = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, width_f, BLOCK_F):
        offs_f = start + tl.arange(0, BLOCK_F)
        mask = exists[:, None] & (offs_f < width_f)[None, :]
        offs_inner = rows[:, None] * width_f + offs_f[None, :]
        offs_gate = rows[:, None] * 2 * width_f + offs_f[None, :]
        gate = tl.load(kept_ptr + offs_gate, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_F]
        up = tl.load(kept_ptr + offs_gate + width_f, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_F]
        odds = tl.sigmoid(gate)
        silu = gate * odds
        if inner_ptr is not None:
            inner = silu * up * weight[:, None]
            tl.store(inner_ptr + offs_inner, inner.to(inner_ptr.dtype.element_ty), mask=mask)
        if grad_ptr is not None:
            grad = tl.load(grad_ptr + offs_inner, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_F]
            share += tl.sum(grad * silu * up, axis=1)
            if grad_gate_up_ptr is not None:
                grad_gate = grad * up * odds * (1.0 + gate * (1.0 - odds)) * weight[:, None]
                grad_up = grad * silu * weight[:, None]
                tile_ptr = grad_gate_up_ptr + offs_gate
                tl.store(tile_ptr, grad_gate.to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
                tl.store(tile_ptr + width_f, grad_up.to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
    if grad_weights_ptr is not None:
        tl.store(grad_weights_ptr + choices, share.to(grad_weights_ptr.dtype.element_ty), mask=mask_m)


def gather(x_TD: Tensor, order_M: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    """[M, D]: the row of each choice's token."""
    num_rows, width = len(order_M), x_TD.shape[1]
    out_MD = x_TD.new_empty(num_rows, width)
    launch(
        _gather_kernel, (triton.cdiv(num_rows, WIDE_ROWS), triton.cdiv(width, WIDE_COLUMNS)),
        x_TD, order_M, offsets_E, out_MD, num_rows, len(offsets_E), width, top_k, BLOCK_M=WIDE_ROWS,
        BLOCK_D=WIDE_COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out_MD


def combine(rows_MD: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[T, D]: the sum of each token's rows."""
    (num_tokens, top_k), width = slot_TK.shape, rows_MD.shape[1]
    out_TD = rows_MD.new_empty(num_tokens, width)
    block_d = min(WIDE_COLUMNS, triton.next_power_of_2(width))
    block_t = WIDE_ROWS * WIDE_COLUMNS // block_d
    launch(
        _combine_kernel, (triton.cdiv(num_tokens, block_t), triton.cdiv(width, block_d)),
        rows_MD, slot_TK, offsets_E, out_TD, num_tokens, len(offsets_E), width, top_k, BLOCK_T=block_t,
        BLOCK_D=block_d, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out_TD


def swiglu(gate_up_M2F: Tensor, weights_TK: Tensor, order_M: Tensor, offsets_E: Tensor) -> Tensor:
    """[M, F]"""
    num_rows, width_f = len(gate_up_M2F), gate_up_M2F.shape[1] // 2
    inner_MF = gate_up_M2F.new_empty(num_rows, width_f)
    launch(
        _expert_swiglu_kernel, (triton.cdiv(num_rows, ROWS), triton.cdiv(width_f, COLUMNS)),
        gate_up_M2F, weights_TK, order_M, offsets_E, inner_MF, num_rows, len(offsets_E), width_f, BLOCK_M=ROWS,
        BLOCK_F=COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return inner_MF


def swiglu_gradients(
    grad_MF: Tensor | None, gate_up_M2F: Tensor, weights_TK: Tensor, order_M: Tensor, offsets_E: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """d [gate; up], inner and d weights, each where needed."""
    num_rows, width_f = len(gate_up_M2F), gate_up_M2F.shape[1] // 2
    grad_M2F = torch.empty_like(gate_up_M2F) if needs[0] else None
    inner_MF = gate_up_M2F.new_empty(num_rows, width_f) if needs[1] else None
    grad_weights = torch.empty_like(weights_TK) if needs[2] else None
    launch(
        _expert_swiglu_gradient_kernel, (triton.cdiv(num_rows, ROWS),),
        grad_MF, gate_up_M2F, weights_TK, order_M, offsets_E, grad_M2F, inner_MF, grad_weights, num_rows,
        len(offsets_E), width_f, BLOCK_M=ROWS, BLOCK_F=GRADIENT_COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_M2F, inner_MF, grad_weights
