"""Causal attention inside each of the sequences that are packed in a row, with the rotation of queries and keys.

    out_i = sum_{j <= i} p_ij v_j,   p_ij = softmax_j(scale q_i . k_j);   query head h reads key head h // (H / K)

With a window w only keys with i - j < w are seen (Beltagy et al. 2020, arXiv 2004.05150). With a soft cap c the softmax
is that of c tanh(scale q_i . k_j / c) (Gemma 2, arXiv 2408.00118, section 2).

RoPE (Su et al. 2021, arXiv 2104.09864) turns pair i of the last R channels of q and k by the angle of its token. In
multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) those channels of k are one vector for all heads: `k_pe_TR`.

Compute-bound: H (2 d + 2 e) FLOPs per visible pair forward, H (6 d + 4 e) backward, after FlashAttention-2 (Dao 2023,
arXiv 2307.08691), which also gives the way: scores stay in the cache, 4 bytes a head and token are kept. Rotated
queries, expanded keys and padded sequences, which composed torch writes to memory and keeps, do not exist here.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .dispatch import choose, compute_dtype, product_dtype, register, wanted
from .ids import check_offsets


def rotate_reference(x_THR: Tensor, cos_Tr: Tensor, sin_Tr: Tensor, interleaved: bool) -> Tensor:
    """Pairs (i, i + R/2), or interleaved (2i, 2i + 1), turned by their angles; the halves come out apart."""
    x1, x2 = (x_THR[..., 0::2], x_THR[..., 1::2]) if interleaved else x_THR.chunk(2, dim=-1)
    cos, sin = cos_Tr[:, None], sin_Tr[:, None]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def packed_attention_reference(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKe: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    k_pe_TR: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """The specification: one softmax per sequence."""
    if k_pe_TR is not None:
        k_TKd = torch.cat((k_TKd, k_pe_TR[:, None].expand(-1, k_TKd.shape[1], -1)), dim=-1)
    if rope is not None:
        R = 2 * rope[0].shape[-1]
        q_THd, k_TKd = (
            torch.cat((x[..., :-R], rotate_reference(x[..., -R:], *rope, interleaved)), dim=-1) for x in (q_THd, k_TKd)
        )
    group, outs = q_THd.shape[1] // k_TKd.shape[1], [v_TKe.new_empty(0, q_THd.shape[1], v_TKe.shape[2])]
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        q, k, v = (x[start:end].transpose(0, 1) for x in (q_THd, k_TKd, v_TKe))
        k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
        scores = (q @ k.transpose(1, 2)).to(compute_dtype(q)) * scale
        scores = scores if soft_cap is None else soft_cap * (scores / soft_cap).tanh()
        unseen = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        if window is not None:
            unseen = unseen.logical_not().tril(-window) | unseen
        outs.append((scores.masked_fill(unseen, -torch.inf).softmax(-1).to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(outs)


def check_soft_cap(op: str, soft_cap: float | None) -> None:
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"{op}: got {soft_cap=}, expected a finite number above 0, or None for no cap")


def _fake(q_THd: Tensor, _: Tensor, v_TKe: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
    out_THe = q_THd.new_empty(*q_THd.shape[:2], v_TKe.shape[2])
    return out_THe, q_THd.new_empty(q_THd.shape[:2], dtype=compute_dtype(q_THd))


def _backward_fake(_: Tensor, *given: Any) -> tuple[Tensor, ...]:
    q_THd, k_TKd, v_TKe, _, k_pe_TR = given[:5]
    shapes = (q_THd.shape, k_TKd.shape, v_TKe.shape, (0, 0) if k_pe_TR is None else k_pe_TR.shape)
    return tuple(q_THd.new_empty(shape) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.interleaved, ctx.window, ctx.soft_cap = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_THe: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    options = ctx.scale, ctx.interleaved, ctx.window, ctx.soft_cap
    found = torch.ops.r1fast.packed_attention_backward(grad_THe, *ctx.saved_tensors, *options)
    q, k, v, k_pe = wanted(found, (ctx.needs_input_grad[i] for i in (0, 1, 2, 4)))
    return q, k, v, None, k_pe, *(None,) * 6


_OPTIONS = "float scale, bool interleaved, int? window=None, float? soft_cap=None"
_INPUTS = "Tensor q_THd, Tensor k_TKd, Tensor v_TKe, Tensor cu_seqlens, Tensor? k_pe_TR, Tensor? cos_Tr, Tensor? sin_Tr"
register(
    "packed_attention",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor out_THe, Tensor lse_TH)",
    fake=_fake, save=_save, backward=_backward,
)  # fmt: skip
register(
    "packed_attention_backward",  # the last gradient is empty where k_pe_TR is None
    f"(Tensor grad_THe, {_INPUTS}, Tensor out_THe, Tensor lse_TH, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)


def packed_attention(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKe: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    k_pe_TR: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Causal attention over T packed tokens.

    q_THd        [T, H, d]; H a multiple of the K key heads
    k_TKd        [T, K, d], or with k_pe_TR [T, R] its first d - R channels; v_TKe [T, K, e]; one dtype
    cu_seqlens   int32 [N+1]: sequence n is tokens cu_seqlens[n] to cu_seqlens[n+1]
    scale        on the scores, above 0
    rope         cos and sin [T, R/2] in the dtype of q, of pairs in the last R channels; None: nothing is rotated
    interleaved  channels 2i and 2i + 1 are a pair, as in DeepSeek-V3, and not i and i + R/2
    window       tokens that a query sees, itself the last of them; None: all before it
    soft_cap     that scaled scores stay within, by a tanh; None: no bound
    Returns out_THe in the dtype of q. Gradients flow to q, k, v and k_pe. The kernel is C++; elsewhere runs the
    reference, a loop over the sequences.
    """
    R = 0 if rope is None else 2 * rope[0].shape[-1]
    (T, H, d), K = q_THd.shape, k_TKd.shape[1]
    shared = 0 if k_pe_TR is None else R
    if k_TKd.shape != (T, K, d - shared) or v_TKe.shape[:2] != (T, K) or K == 0 or H % K or d < R:
        raise ValueError(
            f"packed_attention: got q {tuple(q_THd.shape)}, k {tuple(k_TKd.shape)} and v {tuple(v_TKe.shape)} with "
            f"{R} rotated channels, {shared} of them apart; expected [T, H, d], [T, K, d - {shared}] and [T, K, e], "
            f"H a multiple of K and d at least {R}"
        )
    if k_pe_TR is not None and (rope is None or k_pe_TR.shape != (T, R)):
        raise ValueError(
            f"packed_attention: got k_pe {tuple(k_pe_TR.shape)} and {R} rotated channels; expected [T, R] and `rope`"
        )
    if rope is not None and not rope[0].shape == rope[1].shape == (T, R // 2):
        raise ValueError(
            f"packed_attention: got cos {tuple(rope[0].shape)} and sin {tuple(rope[1].shape)}, expected [{T}, R/2]"
        )
    dtype = product_dtype(q_THd)
    if torch.is_autocast_enabled(q_THd.device.type):  # it takes attention as it takes products
        q_THd, k_TKd, v_TKe = q_THd.to(dtype), k_TKd.to(dtype), v_TKe.to(dtype)
        k_pe_TR = None if k_pe_TR is None else k_pe_TR.to(dtype)
        rope = None if rope is None else (rope[0].to(dtype), rope[1].to(dtype))
    given = [x for x in (k_TKd, v_TKe, k_pe_TR, *(rope or ())) if x is not None]
    if any(x.dtype != q_THd.dtype for x in given):
        raise ValueError(
            f"packed_attention: got q in {q_THd.dtype} beside {[x.dtype for x in given]}, expected one dtype"
        )
    if scale <= 0 or (window is not None and window < 1):
        raise ValueError(f"packed_attention: got {scale=} and {window=}, expected more than 0")
    check_soft_cap("packed_attention", soft_cap)
    chosen, _ = choose("packed_attention", impl, q_THd)
    if chosen != "cpp":
        check_offsets("packed_attention", "cu_seqlens", cu_seqlens, T)
    if chosen == "reference":
        options = scale, k_pe_TR, rope, interleaved, window, soft_cap
        return packed_attention_reference(q_THd, k_TKd, v_TKe, cu_seqlens, *options)
    cos, sin = rope or (None, None)
    return torch.ops.r1fast.packed_attention(
        q_THd, k_TKd, v_TKe, cu_seqlens, k_pe_TR, cos, sin, scale, interleaved, window, soft_cap
    )[0]
