"""The GPU kernel of decode_attention: spans of 256 tokens side by side, then merged (Flash-Decoding, Dao et al. 2023).

    program (row, query heads of a key head, span)      scores, the largest, and sums over the span's tokens;
    the last of a row and its heads to end              the spans, each weighed by e^(its lse)

A span is 256 tokens whatever the batch, so that a row's bits are its own; of many heads, whose sums are as large as
what they are of, 512. How many there are follows from the width of the block table, which a caller narrows to its
longest row: nothing waits for the device, and a CUDA graph may hold the call. Programs behind a row's end, or before
its window, return.
Keys are read once, also where values are a part of them; the last channels of keys that are no power of two (576 = 512
+ 64) are a product of their own.

On a Hopper GPU 64 heads over one latent go together, as columns: wgmma has 64 rows at least, here tokens and channels.

    scores [t, h] = k q^T    two groups of warps, 32 heads each          p through shared memory
    sums   [e, h] = v^T p    two groups of warps, 256 channels each      no factor in registers
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .grouped_gemm import dot
from .launch import launch

BLOCK = 16  # tokens of a block of the cache
SPAN, MANY_SPAN = 256, 512  # tokens; of more than FEW_HEADS
FEW_HEADS = 16  # query heads of a key head: the rows that a tensor core takes at least
LOG2_E = 1.4426950408889634
UNROLL = tl.constexpr(4)  # spans that are loaded together


# The table is as wide as the longest sequence of a step: another width compiles nothing new. Where Triton 3.6
# knows that heads are one, or that 16 divides them, the assembler takes other registers, and spills 16 bytes.
@triton.jit(do_not_specialize=["stride_tb", "num_spans", "window", "num_heads", "group"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr,  # [B, H, d], [S, K, d], [S, K, e], [B, N], [B]
    out_ptr, parts_ptr,  # [B, H, e], [B, H, spans, e]
    lse_ptr, finished_ptr,  # [B, H, spans], of scores times log2(e); [B, tiles], 0; None for one span
    stride_qb, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh,
    stride_tb, num_heads, group, num_spans, scale, window,
    soft_cap,  # times log2(e), of scores that `scale` has divided by the cap; None for none
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    # Tiles of a row side by side: what they read is near, or of latents the same.
    pid, span = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(group, BLOCK_H)
    tiles_of_row = num_heads // group * tiles
    b = (pid // tiles_of_row).to(tl.int64)
    tile = pid % tiles_of_row
    kv_head = tile // tiles
    length = tl.load(lengths_ptr + b)
    first = tl.maximum(length - window, 0)  # token that is seen
    if (span * SPAN >= length) | ((span + 1) * SPAN <= first):
        return
    first_head = kv_head * group + tile % tiles * BLOCK_H
    heads = first_head + tl.arange(0, BLOCK_H)
    mask_h = heads < (kv_head + 1) * group
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_rows = q_ptr + b * stride_qb + heads[:, None] * stride_qh
    q = tl.load(q_rows + offs_d, mask=_inside(mask_h, offs_d, WIDTH, BLOCK_D), other=0.0)  # [BLOCK_H, BLOCK_D]
    if BLOCK_R:
        offs_r = BLOCK_D + tl.arange(0, BLOCK_R)
        mask_q = _inside(mask_h, offs_r, WIDTH, BLOCK_D + BLOCK_R)
        q_rest = tl.load(q_rows + offs_r, mask=mask_q, other=0.0)  # [BLOCK_H, BLOCK_R]
    if TURNED:
        q = tl.trans(q)
        if BLOCK_R:
            q_rest = tl.trans(q_rest)

    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    sums = tl.zeros([BLOCK_E, BLOCK_H] if TURNED else [BLOCK_H, BLOCK_E], tl.float32)
    # A step in which nothing is seen would make NaN of the maximum.
    seen = tl.maximum(span * SPAN, first // BLOCK_T * BLOCK_T)
    for start in range(seen, tl.minimum(length, (span + 1) * SPAN), BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        live = (offs_t >= first) & (offs_t < length)
        block = tl.load(table_ptr + b * stride_tb + offs_t // BLOCK, mask=live, other=0)  # [BLOCK_T]
        slot = block.to(tl.int64) * BLOCK + offs_t % BLOCK
        k_rows = k_ptr + slot[:, None] * stride_ks + kv_head.to(tl.int64) * stride_kh
        k = tl.load(k_rows + offs_d, mask=_inside(live, offs_d, WIDTH, BLOCK_D), other=0.0)  # [BLOCK_T, BLOCK_D]
        if BLOCK_R:
            mask_r = _inside(live, offs_r, WIDTH, BLOCK_D + BLOCK_R)
            k_rest = tl.load(k_rows + offs_r, mask=mask_r, other=0.0)  # [BLOCK_T, BLOCK_R]
        if TURNED:
            scores = dot(k, q, tl.zeros([BLOCK_T, BLOCK_H], tl.float32)) * scale
            if BLOCK_R:  # a sum that is scaled before: else Triton makes of both one product behind the other
                scores += dot(k_rest, q_rest, tl.zeros([BLOCK_T, BLOCK_H], tl.float32)) * scale
            if soft_cap is not None:
                scores = soft_cap * _tanh(scores)
            scores = tl.where(live[:, None], scores, -float("inf"))
            p = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
            kept = tl.full([BLOCK_H], 1.0, tl.float32)
            # Always. Where Triton sees that one product follows from another, both groups of warps make all scores.
            if start < length:
                p, kept, top, total = _fold(scores, top, total, 0)
            sums = dot(tl.trans(k), p.to(k.dtype), sums * kept[None, :])
        else:
            scores = dot(q, tl.trans(k), tl.zeros([BLOCK_H, BLOCK_T], tl.float32))
            if BLOCK_R:
                scores = dot(q_rest, tl.trans(k_rest), scores)
            scores *= scale
            if soft_cap is not None:
                scores = soft_cap * _tanh(scores)
            scores = tl.where(live[None, :], scores, -float("inf"))
            p, kept, top, total = _fold(scores, top, total, 1)
            if SHARED:
                v = k
            else:
                v_rows = v_ptr + slot[:, None] * stride_vs + kv_head.to(tl.int64) * stride_vh
                mask_v = _inside(live, offs_e, VALUE_WIDTH, BLOCK_E)
                v = tl.load(v_rows + offs_e, mask=mask_v, other=0.0)  # [BLOCK_T, BLOCK_E]
            sums = dot(p.to(v.dtype), v, sums * kept[:, None])

    out = tl.trans(sums / total[None, :]) if TURNED else sums / total[:, None]
    # Offsets of rows from the first in 32 bits: few registers beside the sums.
    row, offs_h = b * num_heads + first_head, tl.arange(0, BLOCK_H)
    mask = _inside(mask_h, offs_e, VALUE_WIDTH, BLOCK_E)
    if finished_ptr is None:
        own_ptr = out_ptr + row * VALUE_WIDTH
        tl.store(own_ptr + offs_h[:, None] * VALUE_WIDTH + offs_e, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        line = row * num_spans + span
        own_ptr = parts_ptr + line * VALUE_WIDTH
        tl.store(own_ptr + offs_h[:, None] * (num_spans * VALUE_WIDTH) + offs_e, out, mask=mask)
        tl.store(lse_ptr + line + offs_h * num_spans, top + tl.log2(total), mask=mask_h)
        # The last program to come here finds the parts of all others, and takes them in the order of the spans.
        first_span, end_span = first // SPAN, tl.cdiv(length, SPAN)
        tl.debug_barrier()
        if tl.atomic_add(finished_ptr + pid, 1, sem="acq_rel", scope="gpu") == end_span - first_span - 1:
            tl.debug_barrier()
            _merge(
                out_ptr + row * VALUE_WIDTH, parts_ptr + row * num_spans * VALUE_WIDTH, lse_ptr + row * num_spans,
                mask_h, num_spans, first_span, end_span, VALUE_WIDTH, BLOCK_H, BLOCK_E, CHUNK,
            )  # fmt: skip
            tl.store(finished_ptr + pid, 0)


@triton.jit
def _fold(scores, top, total, AXIS: tl.constexpr):
    """(weights, factor of what was summed before, largest score, sum of weights) with these scores, tokens on AXIS."""
    higher = tl.maximum(top, tl.max(scores, axis=AXIS))
    kept = tl.exp2(top - higher)
    p = tl.exp2(scores - tl.expand_dims(higher, AXIS))
    return p, kept, higher, total * kept + tl.sum(p, axis=AXIS)


@triton.jit
def _tanh(x):
    """To a few roundings. The quotient alone has none left of a small argument: there the series."""
    square = x * x
    near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    far = 1 - 2 / (1 + tl.exp2(x * 2.8853900817779268))
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def _inside(mask_rows, channels, WIDTH: tl.constexpr, END: tl.constexpr):
    """The mask of some rows' channels up to END, of which there are WIDTH."""
    if END <= WIDTH:
        return tl.broadcast_to(mask_rows[:, None], [mask_rows.shape[0], channels.shape[0]])
    else:
        return mask_rows[:, None] & (channels < WIDTH)


@triton.jit
def _merge(
    out_ptr, parts_ptr, lse_ptr, mask_h, num_spans, first_span, end_span,
    VALUE_WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The spans of rows that begin at these addresses, each weighed by e^(its lse); CHUNK channels at a time. From L2,
    where others wrote them."""
    offs_h = tl.arange(0, BLOCK_H)
    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    for span in range(first_span, end_span):
        lse = tl.load(lse_ptr + offs_h * num_spans + span, mask=mask_h, other=0.0, cache_modifier=".cg")  # [BLOCK_H]
        top = tl.maximum(top, lse)
    for chunk in range(0, BLOCK_E, CHUNK):
        offs_e = chunk + tl.arange(0, CHUNK)
        mask = mask_h[:, None] & (offs_e < VALUE_WIDTH)
        total = tl.zeros([BLOCK_H], tl.float32)
        sums = tl.zeros([BLOCK_H, CHUNK], tl.float32)
        for span in tl.range(first_span, end_span, loop_unroll_factor=UNROLL):
            line = offs_h * num_spans + span
            lse = tl.load(lse_ptr + line, mask=mask_h, other=0.0, cache_modifier=".cg")
            part_ptr = parts_ptr + line[:, None] * VALUE_WIDTH + offs_e
            part = tl.load(part_ptr, mask=mask, other=0.0, cache_modifier=".cg")  # [BLOCK_H, CHUNK]
            weight = tl.exp2(lse - top)
            sums += part * weight[:, None]
            total += weight
        out = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_h[:, None] * VALUE_WIDTH + offs_e, out, mask=mask)


def blocks_of(width: int) -> tuple[int, int]:
    """A power of two of channels, and what is padded of the rest: 576 -> 512, 64; 128 -> 128, 0; 33 -> 32, 16."""
    main = max(16, 1 << (width.bit_length() - 1))
    rest = max(0, width - main)
    return main, max(16, triton.next_power_of_2(rest)) if rest else 0


@dataclass(frozen=True)
class Blocks:
    """h query heads of a program, t tokens of a step."""

    h: int
    t: int
    num_warps: int
    num_stages: int
    turned: bool = False  # heads are columns


def blocks_for(width: int, group: int, element_size: int, *, latents: bool, by_wgmma: bool) -> Blocks:
    """From what a row is alone. 5 stages: those that wait for the block table leave two tiles of keys on their way.

    Many heads over one latent are bound by L2 and shared memory, through which each tile of heads takes it anew: 64 of
    them as columns by wgmma, faster than 16 also where half are not there (docs/LOG.md).
    """
    if element_size > 2:
        return Blocks(FEW_HEADS, 16, 8 if width >= 512 else 4, 2 if width >= 256 else 3)
    if by_wgmma and latents and width == 512 and group > FEW_HEADS:
        return Blocks(64, 64, 8, 3, turned=True)
    few = width >= 512 and not latents  # values of their own take registers for their addresses
    return Blocks(FEW_HEADS, 16 if few else 32 if width >= 256 else 64, 4, 5)


def span_of(group: int) -> int:
    return MANY_SPAN if group > FEW_HEADS else SPAN


def scratch_bytes(num_rows: int, num_heads: int, num_kv_heads: int, value_width: int, num_tokens: int) -> int:
    """Of a call whose block table has room for so many tokens a row: the sums of each span and their lse, in fp32,
    and counters."""
    num_spans = triton.cdiv(num_tokens, span_of(num_heads // num_kv_heads))
    return 0 if num_spans <= 1 else 4 * num_rows * num_heads * (num_spans * (value_width + 1) + 1)


def launch_decode(
    q_BHd: Tensor, k_SKd: Tensor, v_SKe: Tensor, block_table_BN: Tensor, lengths_B: Tensor, scale: float,
    window: int | None = None, soft_cap: float | None = None, finished: Tensor | None = None,
) -> Tensor:  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHd, k_SKd, v_SKe))
    # Of a wider table the first columns: the row's stride is its own, and nothing is copied.
    table, lengths = (x if x.stride(-1) == 1 else x.contiguous() for x in (block_table_BN, lengths_B))
    (B, H, d), K, e = q.shape, k.shape[1], v.shape[2]
    out_BHe = q.new_empty(B, H, e)
    if not B:
        return out_BHe
    block_d, block_r = blocks_of(d)
    shared = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and e <= block_d
    block_e = block_d if shared else max(16, triton.next_power_of_2(e))
    by_wgmma = block_r <= 64 and (dispatch.INTERPRETING or dispatch.capability(q.device)[0] == 9)
    blocks = blocks_for(block_d, H // K, q.element_size(), latents=shared, by_wgmma=by_wgmma)
    tiles, span = K * triton.cdiv(H // K, blocks.h), span_of(H // K)
    num_spans = max(1, triton.cdiv(table.shape[1] * BLOCK, span))
    window = table.shape[1] * BLOCK if window is None else window
    # In powers of two; a cap is what is scaled so, behind the tanh.
    scales = (scale * LOG2_E, window, None) if soft_cap is None else (scale / soft_cap, window, soft_cap * LOG2_E)
    parts = lse = None
    if num_spans > 1:
        parts = q.new_empty(B, H, num_spans, e, dtype=torch.float32)
        lse = q.new_empty(B, H, num_spans, dtype=torch.float32)
        finished = q.new_zeros(B * H, dtype=torch.int32) if finished is None else finished
    launch(
        _attend_kernel, (B * tiles, num_spans),
        q, k, v, table, lengths, out_BHe, parts, lse, None if num_spans == 1 else finished, *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], table.stride(0), H, H // K, num_spans, *scales, WIDTH=d, VALUE_WIDTH=e,
        SHARED=shared, BLOCK=BLOCK, SPAN=span, BLOCK_H=blocks.h, BLOCK_T=blocks.t, BLOCK_D=block_d,
        BLOCK_R=block_r, BLOCK_E=block_e, CHUNK=min(block_e, 128), TURNED=blocks.turned, num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )  # fmt: skip
    return out_BHe
