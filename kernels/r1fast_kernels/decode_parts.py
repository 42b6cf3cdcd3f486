"""What a decode step on a GPU does between its products and its attention, one kernel each; decode_layers in Triton.

    add_rms_norm       s = x + delta;   out = weight s / sqrt(mean(s^2) + eps)
    rotate_and_write   q, k, v of the joined product: norms of heads, rotation, k and v into their slots of the cache
    rotate_latents     the same of latent attention: the rotated part of its queries, the latent with its norm, its key
    swiglu             silu(gate) * up of the joined product

A dense layer is then nine launches: norm, q/k/v, rotate, attend, o, norm, gate/up, swiglu, down; its attention, of
latents, seven: norm, q/latent, absorb, rotate, attend, values, o (rollout/fused_decode.py).
Rounded where the modules round: the sum, a norm, each product of a rotation, silu(gate).

Bound by latency: 2 s to 4 s bytes of each number of a row, of B rows (s bytes a number).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import choose, register
from .launch import launch

Pair = tuple[Tensor, Tensor]

BLOCK_F = 1024  # channels of a program of swiglu
ROTATED = 1024  # numbers of a program of rotate_and_write
MOST_WARPS = 8


# ---- specification ----


def add_rms_norm_reference(x_BD: Tensor, delta_BD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sum_BD = x_BD + delta_BD
    return sum_BD, F.rms_norm(sum_BD, weight_D.shape, weight_D, eps)


def rotate_and_write_reference(
    qkv_BX: Tensor, cache: Pair, slots_B: Tensor, rope: Pair | None, norms: Pair | None, eps: float
) -> Tensor:
    k_SKd, v_SKd = cache
    _, K, d = k_SKd.shape
    q_BHd, k_BKd, v_BKd = qkv_BX.unflatten(1, (-1, d)).split((qkv_BX.shape[1] // d - 2 * K, K, K), dim=1)
    if norms is not None:
        q_BHd, k_BKd = (F.rms_norm(x, (d,), weight_d, eps) for x, weight_d in zip((q_BHd, k_BKd), norms))
    if rope is not None:
        cos, sin = (angles_BR[:, None] for angles_BR in rope)
        q_BHd, k_BKd = (_rotate(x, cos, sin) for x in (q_BHd, k_BKd))
    k_SKd.index_copy_(0, slots_B, k_BKd)
    v_SKd.index_copy_(0, slots_B, v_BKd)
    return q_BHd.contiguous()


def rotate_latents_reference(
    q_BHd: Tensor, kv_BC: Tensor, latent_S1C: Tensor, slots_B: Tensor, rope: Pair, norm_C: Tensor, eps: float,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    width, rotated = len(norm_C), 2 * rope[0].shape[1]
    cos, sin = (angles_BR[:, None] for angles_BR in rope)
    parts = (x[..., -rotated:] for x in (q_BHd, kv_BC[:, None]))
    if interleaved:
        parts = (x.unflatten(-1, (-1, 2)).mT.flatten(-2) for x in parts)
    q_BHR, k_B1R = (_rotate(x, cos, sin) for x in parts)
    latent_B1C = F.rms_norm(kv_BC[:, None, :width], (width,), norm_C, eps)
    latent_S1C.index_copy_(0, slots_B, torch.cat((latent_B1C, k_B1R), dim=-1))
    return torch.cat((q_BHR.new_empty(*q_BHR.shape[:2], width), q_BHR), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin)), dim=-1)


def swiglu_reference(gate_up_BX: Tensor) -> Tensor:
    gate_BF, up_BF = gate_up_BX.chunk(2, dim=1)
    return F.silu(gate_BF) * up_BF


# ---- kernels ----


@triton.jit
def _add_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr,  # [B, D], but weight [D]
    width, eps, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + offs_d, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    delta = tl.load(delta_ptr + row + offs_d, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    total = (x + delta).to(dtype)
    tl.store(sum_ptr + row + offs_d, total, mask=mask_d)
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    total = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(total * total, axis=0) / width + eps)
    tl.store(out_ptr + row + offs_d, (total * rstd * weight).to(dtype), mask=mask_d)


@triton.jit
def _rotate_and_write_kernel(
    qkv_ptr, slots_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,  # [B, (H + 2 K) d], [B], [B, d / 2] x 2, [d] x 2
    q_ptr, k_ptr, v_ptr,  # [B, H, d], and the slots of the cache [S, K, d] x 2
    stride_ks, stride_kh, stride_vs, stride_vh, num_heads, kv_heads, half, eps,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Some heads of a row: of queries, keys and values, in that order."""
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_r = tl.arange(0, BLOCK_R)
    dtype = qkv_ptr.dtype.element_ty
    mask_r = offs_r < half
    mask = (head < num_heads + 2 * kv_heads)[:, None] & mask_r
    is_query = (head < num_heads)[:, None]
    is_value = (head >= num_heads + kv_heads)[:, None]
    given_ptr = qkv_ptr + b * (num_heads + 2 * kv_heads) * 2 * half + (head * 2 * half)[:, None] + offs_r
    first, second = tl.load(given_ptr, mask=mask), tl.load(given_ptr + half, mask=mask)  # [BLOCK_H, BLOCK_R]
    x1, x2 = first.to(tl.float32), second.to(tl.float32)
    if q_norm_ptr is not None:
        squares = tl.where(mask, x1 * x1 + x2 * x2, 0.0)
        rstd = tl.rsqrt(tl.sum(squares, axis=1) / (2 * half) + eps)[:, None]
        q1 = tl.load(q_norm_ptr + offs_r, mask=mask_r).to(tl.float32)[None, :]  # [1, BLOCK_R]
        q2 = tl.load(q_norm_ptr + half + offs_r, mask=mask_r).to(tl.float32)[None, :]
        k1 = tl.load(k_norm_ptr + offs_r, mask=mask_r).to(tl.float32)[None, :]  # [1, BLOCK_R]
        k2 = tl.load(k_norm_ptr + half + offs_r, mask=mask_r).to(tl.float32)[None, :]
        x1 = (x1 * rstd * tl.where(is_query, q1, k1)).to(dtype).to(tl.float32)
        x2 = (x2 * rstd * tl.where(is_query, q2, k2)).to(dtype).to(tl.float32)
    if cos_ptr is not None:
        cos = tl.load(cos_ptr + b * half + offs_r, mask=mask_r).to(tl.float32)[None, :]  # [1, BLOCK_R]
        sin = tl.load(sin_ptr + b * half + offs_r, mask=mask_r).to(tl.float32)[None, :]
        turned = (x1 * cos).to(dtype).to(tl.float32) - x2 * sin
        x2 = (x2 * cos).to(dtype).to(tl.float32) + x1 * sin
        x1 = turned
    x1, x2 = x1.to(dtype), x2.to(dtype)
    out_ptr = q_ptr + b * num_heads * 2 * half + (head * 2 * half)[:, None] + offs_r
    tl.store(out_ptr, x1, mask=mask & is_query)
    tl.store(out_ptr + half, x2, mask=mask & is_query)
    slot = tl.load(slots_ptr + b)
    key_ptr = k_ptr + slot * stride_ks + ((head - num_heads).to(tl.int64) * stride_kh)[:, None] + offs_r
    is_key = mask & (~is_query) & (~is_value)
    tl.store(key_ptr, x1, mask=is_key)
    tl.store(key_ptr + half, x2, mask=is_key)
    value_ptr = v_ptr + slot * stride_vs + ((head - num_heads - kv_heads).to(tl.int64) * stride_vh)[:, None] + offs_r
    tl.store(value_ptr, first, mask=mask & is_value)
    tl.store(value_ptr + half, second, mask=mask & is_value)


@triton.jit
def _rotate_latents_kernel(
    q_ptr, kv_ptr, slots_ptr, cos_ptr, sin_ptr, norm_ptr,  # [B, H, n + R], [B, C + R], [B], [B, R / 2] x 2, [C]
    query_ptr, latent_ptr,  # [B, H, C + R], and the slots of the cache [S, 1, C + R]
    stride_qb, stride_qh, stride_kvb, stride_ls, num_heads, passed, width, half, eps,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some heads of a row; behind the last of them its latent and its key, which is the same for all heads."""
    b = tl.program_id(0).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < half
    dtype = q_ptr.dtype.element_ty
    cos = tl.load(cos_ptr + b * half + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_R]
    sin = tl.load(sin_ptr + b * half + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    first = offs_r * 2 if INTERLEAVED else offs_r
    second = first + (1 if INTERLEAVED else half)
    is_latent = tl.program_id(1) == tl.num_programs(1) - 1
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if is_latent:
        given_ptr = kv_ptr + b * stride_kvb + width + tl.zeros([BLOCK_H, 1], tl.int64)
        out_ptr = latent_ptr + tl.load(slots_ptr + b) * stride_ls + width + tl.zeros([BLOCK_H, 1], tl.int64)
        mask_h = tl.arange(0, BLOCK_H) < 1
    else:
        given_ptr = q_ptr + b * stride_qb + passed + head[:, None].to(tl.int64) * stride_qh
        out_ptr = query_ptr + (b * num_heads + head[:, None]) * (width + 2 * half) + width
        mask_h = head < num_heads
    mask = mask_h[:, None] & mask_r
    x1 = tl.load(given_ptr + first, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_R]
    x2 = tl.load(given_ptr + second, mask=mask, other=0.0).to(tl.float32)
    turned = (x1 * cos).to(dtype).to(tl.float32) - x2 * sin
    x2 = (x2 * cos).to(dtype).to(tl.float32) + x1 * sin
    tl.store(out_ptr + offs_r, turned.to(dtype), mask=mask)
    tl.store(out_ptr + half + offs_r, x2.to(dtype), mask=mask)
    if is_latent:
        offs_c = tl.arange(0, BLOCK_C)
        mask_c = offs_c < width
        latent = tl.load(kv_ptr + b * stride_kvb + offs_c, mask=mask_c, other=0.0).to(tl.float32)  # [BLOCK_C]
        weight = tl.load(norm_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(latent * latent, axis=0) / width + eps)
        own_ptr = latent_ptr + tl.load(slots_ptr + b) * stride_ls
        tl.store(own_ptr + offs_c, (latent * rstd * weight).to(dtype), mask=mask_c)


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK_F: tl.constexpr):  # [B, 2 F], [B, F]
    row = tl.program_id(0).to(tl.int64)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < width
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + row * 2 * width + offs_f, mask=mask_f, other=0.0).to(tl.float32)  # [BLOCK_F]
    up = tl.load(gate_up_ptr + row * 2 * width + width + offs_f, mask=mask_f, other=0.0).to(tl.float32)  # [BLOCK_F]
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * width + offs_f, (silu * up).to(dtype), mask=mask_f)


# ---- launchers ----


def warps_for(numbers: int) -> int:
    """Of a program that has this many at work: 16 bytes a thread at least."""
    return max(1, min(MOST_WARPS, numbers // 256))


def _launch_add_norm(x_BD: Tensor, delta_BD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, delta = x_BD.contiguous(), delta_BD.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    if len(x):
        launch(
            _add_norm_kernel, (len(x),), x, delta, weight_D, total, out, x.shape[1], eps, BLOCK_D=block,
            num_warps=warps_for(block),
        )  # fmt: skip
    return total, out


def _launch_rotate_and_write(
    qkv_BX: Tensor, k_SKd: Tensor, v_SKd: Tensor, slots_B: Tensor, cos_BR: Tensor | None, sin_BR: Tensor | None,
    q_norm_d: Tensor | None, k_norm_d: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    qkv, (_, K, d) = qkv_BX.contiguous(), k_SKd.shape
    heads = qkv.shape[1] // d
    q_BHd = qkv.new_empty(len(qkv), heads - 2 * K, d)
    block_r = triton.next_power_of_2(d // 2)
    block_h = max(1, min(triton.next_power_of_2(heads), ROTATED // (2 * block_r)))
    if len(qkv):
        launch(
            _rotate_and_write_kernel, (len(qkv), triton.cdiv(heads, block_h)), qkv, slots_B, cos_BR, sin_BR, q_norm_d,
            k_norm_d, q_BHd, k_SKd, v_SKd, *k_SKd.stride()[:2], *v_SKd.stride()[:2], heads - 2 * K, K, d // 2, eps,
            BLOCK_H=block_h, BLOCK_R=block_r, num_warps=warps_for(2 * block_h * block_r),
        )  # fmt: skip
    return q_BHd


def _launch_rotate_latents(
    q_BHd: Tensor, kv_BC: Tensor, latent_S1C: Tensor, slots_B: Tensor, cos_BR: Tensor, sin_BR: Tensor, norm_C: Tensor,
    eps: float, interleaved: bool,
) -> Tensor:  # fmt: skip
    (B, H, d), width, half = q_BHd.shape, len(norm_C), cos_BR.shape[1]
    query_BHC = q_BHd.new_empty(B, H, width + 2 * half)
    block_r = triton.next_power_of_2(half)
    block_h = max(1, min(triton.next_power_of_2(H), ROTATED // (2 * block_r)))
    if B:
        launch(
            _rotate_latents_kernel, (B, triton.cdiv(H, block_h) + 1), q_BHd, kv_BC, slots_B, cos_BR, sin_BR, norm_C,
            query_BHC, latent_S1C, *q_BHd.stride()[:2], kv_BC.stride(0), latent_S1C.stride(0), H, d - 2 * half, width,
            half, eps, INTERLEAVED=interleaved, BLOCK_H=block_h, BLOCK_R=block_r,
            BLOCK_C=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return query_BHC


def _launch_swiglu(gate_up_BX: Tensor) -> Tensor:
    gate_up, width = gate_up_BX.contiguous(), gate_up_BX.shape[1] // 2
    out_BF = gate_up.new_empty(len(gate_up), width)
    if out_BF.numel():
        grid = len(gate_up), triton.cdiv(width, BLOCK_F)
        launch(_swiglu_kernel, grid, gate_up, out_BF, width, BLOCK_F=BLOCK_F, num_warps=warps_for(BLOCK_F))
    return out_BF


register(
    "add_rms_norm", "(Tensor x_BD, Tensor delta_BD, Tensor weight_D, float eps) -> (Tensor sum_BD, Tensor out_BD)",
    fake=lambda x_BD, *_: (torch.empty_like(x_BD), torch.empty_like(x_BD)), launch=_launch_add_norm,
)  # fmt: skip
register(
    "rotate_and_write",
    "(Tensor qkv_BX, Tensor(a!) k_SKd, Tensor(b!) v_SKd, Tensor slots_B, Tensor? cos_BR, Tensor? sin_BR, "
    "Tensor? q_norm_d, Tensor? k_norm_d, float eps) -> Tensor",
    fake=lambda qkv_BX, k_SKd, *_: qkv_BX.new_empty(
        len(qkv_BX), qkv_BX.shape[1] // k_SKd.shape[2] - 2 * k_SKd.shape[1], k_SKd.shape[2]
    ),
    launch=_launch_rotate_and_write,
)
register(
    "rotate_latents",
    "(Tensor q_BHd, Tensor kv_BC, Tensor(a!) latent_S1C, Tensor slots_B, Tensor cos_BR, Tensor sin_BR, Tensor norm_C, "
    "float eps, bool interleaved) -> Tensor",
    fake=lambda q_BHd, kv_BC, *_: q_BHd.new_empty(*q_BHd.shape[:2], kv_BC.shape[1]),
    launch=_launch_rotate_latents,
)
register(
    "swiglu", "(Tensor gate_up_BX) -> Tensor",
    fake=lambda gate_up_BX: gate_up_BX.new_empty(len(gate_up_BX), gate_up_BX.shape[1] // 2), launch=_launch_swiglu,
)  # fmt: skip


# ---- what a decode step calls ----


def add_rms_norm(
    x_BD: Tensor, delta_BD: Tensor, weight_D: Tensor, *, eps: float, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """x + delta [B, D], and its RMS norm; all of one dtype."""
    assert x_BD.shape == delta_BD.shape and x_BD.dtype == delta_BD.dtype == weight_D.dtype, f"{x_BD.dtype=}"
    if choose("decode_layers", impl, x_BD)[0] == "triton":
        return torch.ops.r1fast.add_rms_norm(x_BD, delta_BD, weight_D, eps)
    return add_rms_norm_reference(x_BD, delta_BD, weight_D, eps)


def rotate_and_write(
    qkv_BX: Tensor,
    cache: Pair,
    slots_B: Tensor,
    *,
    rope: Pair | None,
    norms: Pair | None = None,
    eps: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Queries [B, H, d], rotated; keys, rotated, and values of the row are in its slot of the cache then.

    qkv_BX    [B, (H + 2 K) d]: what the joined product gives
    cache     keys and values [S, K, d], with channels side by side
    slots_B   int64 [B]; of two rows with one slot either may be what it holds then
    rope      cos and sin [B, d / 2]; None: no rotation
    norms     weights [d] of the RMS norms of every query and key head, with `eps`; None: none
    """
    k_SKd, v_SKd = cache
    assert k_SKd.stride(2) == v_SKd.stride(2) == 1 and k_SKd.dtype == qkv_BX.dtype, f"{k_SKd.dtype=} {qkv_BX.dtype=}"
    if choose("decode_layers", impl, qkv_BX)[0] == "triton":
        given = *(rope or (None, None)), *(norms or (None, None)), eps
        return torch.ops.r1fast.rotate_and_write(qkv_BX, k_SKd, v_SKd, slots_B, *given)
    return rotate_and_write_reference(qkv_BX, cache, slots_B, rope, norms, eps)


def rotate_latents(
    q_BHd: Tensor,
    kv_BC: Tensor,
    latent_S1C: Tensor,
    slots_B: Tensor,
    *,
    rope: tuple[Tensor, Tensor, bool],
    norm_C: Tensor,
    eps: float,
    impl: str | None = None,
) -> Tensor:
    """Queries [B, H, C + R] whose last R channels are set, rotated; the row's latent and key are in its slot then.

    q_BHd        [B, H, n + R], the last R channels to be rotated
    kv_BC        [B, C + R]: latent and key
    latent_S1C   the cache, [S, 1, C + R]; slots_B int64 [B]
    rope         cos and sin [B, R / 2], and whether neighbours are pairs; rotated halves come out side by side
    norm_C, eps  of the latent
    """
    assert q_BHd.stride(2) == kv_BC.stride(1) == latent_S1C.stride(2) == 1 and latent_S1C.dtype == kv_BC.dtype
    cos_BR, sin_BR, interleaved = rope
    if choose("decode_layers", impl, q_BHd)[0] == "triton":
        given = (q_BHd, kv_BC, latent_S1C, slots_B, cos_BR, sin_BR, norm_C, eps, interleaved)
        return torch.ops.r1fast.rotate_latents(*given)
    return rotate_latents_reference(q_BHd, kv_BC, latent_S1C, slots_B, (cos_BR, sin_BR), norm_C, eps, interleaved)


def swiglu(gate_up_BX: Tensor, *, impl: str | None = None) -> Tensor:
    """silu(gate) * up [B, F] of [B, 2 F], gate first."""
    if choose("decode_layers", impl, gate_up_BX)[0] == "triton":
        return torch.ops.r1fast.swiglu(gate_up_BX)
    return swiglu_reference(gate_up_BX)
