"""The GPU kernels of decode_attention: spans of 256 tokens side by side, then merged (Flash-Decoding, Dao et al. 2023).

    attend   program (row, 16 query heads of a key head, span): scores, the largest, and sums over the span's tokens
    merge    program (row, query head): the spans of the row, each weighed by e^(its lse); not run for a single span

A span is 256 tokens whatever the batch, so that a row's bits are its own. How many there are follows from the width of
the block table, which a caller narrows to its longest row: nothing waits for the device, and a CUDA graph may hold the
call. Programs behind a row's end, or before its window, return.
Keys are read once, also where values are a part of them; the last channels of keys that are no power of two (576 = 512
+ 64) are a product of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped_gemm import dot
from .launch import launch

BLOCK = 16  # tokens of a block of the cache
SPAN = 256
BLOCK_H = 16  # query heads of a program: the rows that a tensor core takes at least
BLOCK_T = {2: 64, 4: 16}  # tokens of a step, by the bytes of a number
WIDE_BLOCK_T = {2: 32, 4: 16}  # for 512 channels
NUM_WARPS, WIDE_WARPS, NUM_STAGES = 4, 8, 2
MERGE_WARPS = 4


# The table is as wide as the longest sequence of a step: another width compiles nothing new.
@triton.jit(do_not_specialize=["stride_tb", "num_spans", "window"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr,  # [B, H, d], [S, K, d], [S, K, e], [B, N], [B]
    out_ptr,  # [B, H, spans, e], or [B, H, e] for one span
    lse_ptr,  # [B, H, spans], of scores times log2(e); None for one span
    stride_qb, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh,
    stride_tb, num_heads, group, width, value_width, num_spans, scale, window,
    SHARED: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(group, BLOCK_H)
    kv_head = tl.program_id(1) // tiles
    span = tl.program_id(2)
    length = tl.load(lengths_ptr + b)
    first = tl.maximum(length - window, 0)  # token that is seen
    if (span * SPAN >= length) | ((span + 1) * SPAN <= first):
        return
    offs_g = tl.program_id(1) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    heads = kv_head * group + offs_g
    mask_h = offs_g < group
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_rows = q_ptr + b * stride_qb + heads[:, None] * stride_qh
    q = tl.load(q_rows + offs_d, mask=mask_h[:, None] & (offs_d < width), other=0.0)  # [BLOCK_H, BLOCK_D]
    if BLOCK_R:
        offs_r = BLOCK_D + tl.arange(0, BLOCK_R)
        q_rest = tl.load(q_rows + offs_r, mask=mask_h[:, None] & (offs_r < width), other=0.0)  # [BLOCK_H, BLOCK_R]

    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    sums = tl.zeros([BLOCK_H, BLOCK_E], tl.float32)
    # A step in which nothing is seen would make NaN of the maximum.
    seen = tl.maximum(span * SPAN, first // BLOCK_T * BLOCK_T)
    for start in range(seen, tl.minimum(length, (span + 1) * SPAN), BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        live = (offs_t >= first) & (offs_t < length)
        block = tl.load(table_ptr + b * stride_tb + offs_t // BLOCK, mask=live, other=0)  # [BLOCK_T]
        slot = block.to(tl.int64) * BLOCK + offs_t % BLOCK
        k_rows = k_ptr + slot[:, None] * stride_ks + kv_head.to(tl.int64) * stride_kh
        k = tl.load(k_rows + offs_d, mask=live[:, None] & (offs_d < width), other=0.0)  # [BLOCK_T, BLOCK_D]
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_H, BLOCK_T], tl.float32))
        if BLOCK_R:
            k_rest = tl.load(k_rows + offs_r, mask=live[:, None] & (offs_r < width), other=0.0)  # [BLOCK_T, BLOCK_R]
            scores = dot(q_rest, tl.trans(k_rest), scores)
        scores = tl.where(live[None, :], scores * scale, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        kept = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * kept + tl.sum(p, axis=1)
        if SHARED:
            v = k
        else:
            v_rows = v_ptr + slot[:, None] * stride_vs + kv_head.to(tl.int64) * stride_vh
            v = tl.load(v_rows + offs_e, mask=live[:, None] & (offs_e < value_width), other=0.0)  # [BLOCK_T, BLOCK_E]
        sums = dot(p.to(v.dtype), v, sums * kept[:, None])
        top = higher

    out = sums / total[:, None]
    row = b * num_heads + heads
    mask_out = mask_h[:, None] & (offs_e < value_width)
    if lse_ptr is None:
        tl.store(out_ptr + row[:, None] * value_width + offs_e, out.to(out_ptr.dtype.element_ty), mask=mask_out)
    else:
        line = row * num_spans + span
        tl.store(out_ptr + line[:, None] * value_width + offs_e, out, mask=mask_out)
        tl.store(lse_ptr + line, top + tl.log2(total), mask=mask_h)


@triton.jit(do_not_specialize=["num_spans", "window"])
def _merge_kernel(
    parts_ptr, lse_ptr, lengths_ptr, out_ptr,  # [B, H, spans, e], [B, H, spans], [B], [B, H, e]
    num_heads, value_width, num_spans, window, SPAN: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + row // num_heads)
    first = tl.maximum(length - window, 0)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < value_width
    top = -float("inf")
    total = 0.0
    sums = tl.zeros([BLOCK_E], tl.float32)
    for span in range(first // SPAN, tl.cdiv(length, SPAN)):
        line = row * num_spans + span
        lse = tl.load(lse_ptr + line)
        part = tl.load(parts_ptr + line * value_width + offs_e, mask=mask_e, other=0.0)  # [BLOCK_E]
        higher = tl.maximum(top, lse)
        kept, weight = tl.exp2(top - higher), tl.exp2(lse - higher)
        sums = sums * kept + part * weight
        total = total * kept + weight
        top = higher
    tl.store(out_ptr + row * value_width + offs_e, (sums / total).to(out_ptr.dtype.element_ty), mask=mask_e)


def blocks_of(width: int) -> tuple[int, int]:
    """A power of two of channels, and what is padded of the rest: 576 -> 512, 64; 128 -> 128, 0; 33 -> 32, 16."""
    main = max(16, 1 << (width.bit_length() - 1))
    rest = max(0, width - main)
    return main, max(16, triton.next_power_of_2(rest)) if rest else 0


def spans_of(num_tokens: int) -> int:
    return max(1, triton.cdiv(num_tokens, SPAN))


def scratch_bytes(num_rows: int, num_heads: int, value_width: int, num_tokens: int) -> int:
    """Of a call whose block table has room for so many tokens a row: the sums of each span, and their lse, in fp32."""
    num_spans = spans_of(num_tokens)
    return 0 if num_spans == 1 else 4 * num_rows * num_heads * num_spans * (value_width + 1)


def launch_decode(
    q_BHd: Tensor, k_SKd: Tensor, v_SKe: Tensor, block_table_BN: Tensor, lengths_B: Tensor, scale: float,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHd, k_SKd, v_SKe))
    # Of a wider table the first columns: the row's stride is its own, and nothing is copied.
    table, lengths = (x if x.stride(-1) == 1 else x.contiguous() for x in (block_table_BN, lengths_B))
    (B, H, d), K, e = q.shape, k.shape[1], v.shape[2]
    out_BHe = q.new_empty(B, H, e)
    num_spans = spans_of(table.shape[1] * BLOCK)
    if not B:
        return out_BHe
    one = num_spans == 1
    window = table.shape[1] * BLOCK if window is None else window
    parts = out_BHe if one else q.new_empty(B, H, num_spans, e, dtype=torch.float32)
    lse = None if one else q.new_empty(B, H, num_spans, dtype=torch.float32)
    block_d, block_r = blocks_of(d)
    shared = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and e <= block_d
    block_e = block_d if shared else max(16, triton.next_power_of_2(e))
    sizes = WIDE_BLOCK_T if block_d >= 512 else BLOCK_T
    launch(
        _attend_kernel, (B, K * triton.cdiv(H // K, BLOCK_H), num_spans),
        q, k, v, table, lengths, parts, lse, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], table.stride(0), H,
        H // K, d, e, num_spans, scale * 1.4426950408889634, window, SHARED=shared, BLOCK=BLOCK, SPAN=SPAN,
        BLOCK_H=BLOCK_H, BLOCK_T=sizes[q.element_size()], BLOCK_D=block_d, BLOCK_R=block_r, BLOCK_E=block_e,
        num_warps=WIDE_WARPS if block_d >= 512 else NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    if not one:
        launch(
            _merge_kernel, (B * H,),
            parts, lse, lengths, out_BHe, H, e, num_spans, window, SPAN=SPAN,
            BLOCK_E=max(16, triton.next_power_of_2(e)), num_warps=MERGE_WARPS,
        )  # fmt: skip
    return out_BHe
