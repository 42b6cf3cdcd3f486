"""Causal attention over packed sequences: T tokens in a row, `cu_seqlens` says where each sequence begins.

On a CPU our kernel takes the packed tensors as they are; on a GPU in half precision flash attention does (flash.py).
Elsewhere sequences of like length share one padded call, and thousands of short ones cost a handful of calls:

    packed   a a a|b b b b b b|c c c c c c c|d d d      T = 19
    bucket 0 b b b b b b .                              2 x 7
             c c c c c c c
    bucket 1 a a a                                      2 x 3
             d d d
Padding is on the right and attention causal, so no real token sees a pad slot and no key mask is needed.
"""

from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import r1fast_kernels as kernels
from r1fast.models import flash
from r1fast.models.cache import BlockCache
from r1fast.models.rope import Rope, Ropes
from r1fast.models.shared_tokens import SharedTokens
from r1fast_kernels.dispatch import choose, in_use, log_choice

# A bucket takes sequences down to this share of its longest (or within this many tokens): at most 20% of its
# rows are padding beyond very short sequences, and lengths 79-383 make seven buckets.
_MIN_FILL = 0.8
_MIN_SLACK = 8


class AttentionPlan:
    """Where every packed token sits; built once per batch and shared by all layers.

    rows_T, positions_T: the sequence of each token and its place in it; lengths_N, max_length: of the sequences.
    shared: where sequences have tokens in common. A layer then runs on fewer tokens than these.
    flash: the libraries of the device, found here because layers may be compiled.
    """

    def __init__(
        self, cu_seqlens: Tensor, num_tokens: int, device: torch.device, shared: SharedTokens | None = None
    ) -> None:
        ends = cu_seqlens.detach().to("cpu", torch.int64)
        self.lengths_cpu_N = ends.diff()
        ok = cu_seqlens.dim() == 1 and len(ends) > 0 and ends[0] == 0 and ends[-1] == num_tokens
        if not ok or bool((self.lengths_cpu_N < 0).any()):
            raise ValueError(
                f"cu_seqlens={ends.tolist()[:8]}... ({tuple(cu_seqlens.shape)}), expected [N+1] rising from 0 to the "
                f"{num_tokens} packed tokens"
            )
        rows = torch.repeat_interleave(self.lengths_cpu_N)
        self.device, self.shared, self.flash = device, shared, flash.libraries(device)
        self.num_sequences = len(ends) - 1
        self.max_length = int(self.lengths_cpu_N.max()) if self.num_sequences else 0
        self.cu_seqlens = cu_seqlens.to(device, torch.int32)
        self.rows_T = rows.to(device)
        self.positions_T = (torch.arange(num_tokens) - ends[rows]).to(device)

    @cached_property
    def lengths_T(self) -> Tensor:
        """Of the sequence of each token."""
        return self.cu_seqlens.diff()[self.rows_T]

    def repeat(self, x: Tensor) -> Tensor:
        """From the tokens that a layer runs on to those of the sequences."""
        return x if self.shared is None else self.shared.repeat(x)

    def once(self, x_T: Tensor) -> Tensor:
        """And back."""
        return x_T if self.shared is None else self.shared.once(x_T)

    @cached_property
    def padded(self) -> "PaddedLayout":
        return PaddedLayout(self)


class ForwardPass(NamedTuple):
    """What every layer of one packed forward pass shares."""

    plan: AttentionPlan
    ropes: Ropes
    cache: tuple[BlockCache, Tensor] | None  # takes the keys of every token, in its slot
    balance_scale: Tensor | None


class PaddedLayout:
    """The buckets, from long to short, as one row of slots, of which every token has its own: slot_T."""

    def __init__(self, plan: AttentionPlan) -> None:
        lengths, order = plan.lengths_cpu_N.sort(descending=True, stable=True)
        slot_N = torch.empty(plan.num_sequences, dtype=torch.int64)
        self.buckets: list[tuple[int, int]] = []  # sequences, padded length
        self.num_slots = first = 0
        while first < plan.num_sequences and (width := int(lengths[first])) > 0:
            shortest = max(1, min(int(width * _MIN_FILL), width - _MIN_SLACK))
            count = int((lengths[first:] >= shortest).sum())
            slot_N[order[first : first + count]] = self.num_slots + width * torch.arange(count)
            self.buckets.append((count, width))
            self.num_slots += count * width
            first += count
        self.slot_T = slot_N.to(plan.device)[plan.rows_T] + plan.positions_T


def packed_attention(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    plan: AttentionPlan,
    rope: Rope | None,
    scale: float,
    *,
    k_pe_TR: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention inside each sequence, of queries and keys that are not yet rotated.

    Inputs and result are of the tokens that a layer runs on.
    """
    qkv = plan.repeat(q_THd), plan.repeat(k_TKd), plan.repeat(v_TKd)
    k_pe_TR = None if k_pe_TR is None else plan.repeat(k_pe_TR)
    return plan.once(_attend(*qkv, plan, rope, k_pe_TR, flash.Scores(scale, window, soft_cap)))


def _attend(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, plan: AttentionPlan, rope: Rope | None,
    k_pe_TR: Tensor | None, scores: flash.Scores,
) -> Tensor:  # fmt: skip
    """As r1fast_kernels.packed_attention, which runs on a CPU and, as "reference", anywhere. Else torch rotates, and
    flash attention or, padded, torch's scaled_dot_product_attention, which has no soft cap, does the rest.
    """
    ours = in_use() is not None or (not plan.flash and choose("packed_attention", None, q_THd)[0] == "cpp")
    value_dim, capped = v_TKd.shape[-1], scores.soft_cap is not None
    ordered = torch.are_deterministic_algorithms_enabled()
    chosen, reason = flash.choose(plan.flash, q_THd, value_dim, deterministic=ordered, capped=capped)
    if plan.flash and not ours:
        log_choice("packed_attention", chosen.name if chosen else "reference" if capped else "padded", reason)
    if ours or (capped and chosen is None):
        return kernels.packed_attention(
            q_THd, k_TKd, v_TKd, plan.cu_seqlens, **scores._asdict(), k_pe_TR=k_pe_TR, rope=rope[:2] if rope else None,
            interleaved=rope is not None and rope.interleaved,
        )  # fmt: skip
    if rope is not None:
        q_THd = rope.rotate(q_THd)
    if rope is not None and k_pe_TR is None:
        k_TKd = rope.rotate(k_TKd)
    elif rope is not None and k_pe_TR is not None:
        k_pe_TKR = rope.rotate(k_pe_TR[:, None]).expand(-1, k_TKd.shape[1], -1)
        k_TKd = torch.cat((k_TKd, k_pe_TKR), dim=-1)
    if chosen is not None and plan.max_length > 0:  # no kernel is launched for nothing
        return flash.attend(chosen, q_THd, k_TKd, v_TKd, plan.cu_seqlens, plan.max_length, scores)
    # Of values of another width than that of the queries an S x S matrix would be stored, on the CPU too.
    if value_dim < q_THd.shape[-1]:
        v_TKd = F.pad(v_TKd, (0, q_THd.shape[-1] - value_dim))
    return _bucketed(q_THd, k_TKd, v_TKd, scores.scale, plan.padded, scores.window)[..., :value_dim]


def _bucketed(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float, layout: PaddedLayout, window: int | None
) -> Tensor:
    def padded(x_T: Tensor) -> tuple[Tensor, ...]:
        x_P = x_T.new_zeros(layout.num_slots, *x_T.shape[1:]).index_copy(0, layout.slot_T, x_T)
        return x_P.split([count * width for count, width in layout.buckets])

    outs, enable_gqa = [], q_THd.shape[1] != k_TKd.shape[1]
    for bucket, *slots in zip(layout.buckets, padded(q_THd), padded(k_TKd), padded(v_TKd), strict=True):
        q, k, v = (x_P.unflatten(0, bucket).transpose(1, 2) for x_P in slots)
        mask = None
        if window is not None and window < bucket[1]:
            mask = torch.ones(bucket[1], bucket[1], dtype=torch.bool, device=q.device).tril().triu(1 - window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, layout.slot_T) if outs else q_THd
