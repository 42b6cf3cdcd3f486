"""Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2), with the conventions of TRL.

    A_i = (R_i - mean_g) / (std_g + eps)      mean and unbiased std over the scorable rewards of the group of i
    scale="batch": std over all scorable rewards;   scale="none": A_i = R_i - mean_g  (Dr. GRPO, arXiv 2503.20783)

A few kilobytes and as many FLOPs: bound by the number of launches. C++ sorts, O(N log N). On a GPU each sample reads
all others, 16 N^2 bytes from the L2 cache and no second launch: 0.1 ms at 10^4 samples, and not meant for above 10^5.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import choose, compute_dtype, register
from .ids import check_ids
from .launch import launch

SCALES = ("group", "batch", "none")


def group_advantages_reference(rewards_N: Tensor, group_ids_N: Tensor, scale: str, eps: float) -> Tensor:
    """The specification. Sums run over sorted segments, in one order: the same bits every time, without atomics."""
    scorable_N = ~rewards_N.isnan()
    # Unscorable rewards form one more group of their own, -1, so that they touch nobody's mean.
    group_ids_N = group_ids_N.masked_fill(~scorable_N, -1)
    rewards_N = rewards_N.to(torch.float64).masked_fill(~scorable_N, 0.0)
    _, group_N, size_G = torch.unique(group_ids_N, return_inverse=True, return_counts=True)
    order_N = group_N.argsort(stable=True)

    def reduce(values_N: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(values_N[order_N], how, lengths=size_G, unsafe=True)

    # Measured from the group's minimum, equal rewards are exactly 0, and so are their advantages.
    above_N = rewards_N - reduce(rewards_N, "min")[group_N]
    centred_N = above_N - (reduce(above_N, "sum") / size_G)[group_N]
    if scale == "group":
        variance_G = reduce(centred_N.square(), "sum") / (size_G - 1).clamp(min=1)
        centred_N = centred_N / (variance_G.sqrt() + eps)[group_N]
    elif scale == "batch":
        num_scorable = scorable_N.sum()
        spread_N = (rewards_N - rewards_N.sum() / num_scorable).masked_fill(~scorable_N, 0.0)
        centred_N = centred_N / ((spread_N.square().sum() / (num_scorable - 1).clamp(min=1)).sqrt() + eps)
    return centred_N.masked_fill(~scorable_N, 0.0)


BLOCK_N, NUM_WARPS = 1024, 4


@triton.jit
def advantage_of(rewards_ptr, group_ids_ptr, n, num_samples, eps, SCALE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The advantage of sample n, fp64. Rewards are measured from its own, so that equal ones give exactly 0."""
    own = tl.load(rewards_ptr + n).to(tl.float64)
    group = tl.load(group_ids_ptr + n)
    group_sum = tl.zeros([BLOCK_N], tl.float64)
    group_size = tl.zeros([BLOCK_N], tl.float64)
    batch_sum = tl.zeros([BLOCK_N], tl.float64)
    batch_size = tl.zeros([BLOCK_N], tl.float64)
    for start in range(0, num_samples, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_samples
        above = tl.load(rewards_ptr + offs_n, mask=mask_n, other=float("nan")).to(tl.float64) - own  # [BLOCK_N]
        scorable = above == above
        peer = scorable & (tl.load(group_ids_ptr + offs_n, mask=mask_n, other=0) == group)
        group_sum += tl.where(peer, above, 0.0)
        group_size += tl.where(peer, 1.0, 0.0)
        if SCALE == "batch":
            batch_sum += tl.where(scorable, above, 0.0)
            batch_size += tl.where(scorable, 1.0, 0.0)
    size = tl.sum(group_size, axis=0)
    mean = tl.sum(group_sum, axis=0) / tl.maximum(size, 1.0)
    advantage = 0.0 - mean
    if SCALE != "none":
        center = mean
        if SCALE == "batch":
            size = tl.sum(batch_size, axis=0)
            center = tl.sum(batch_sum, axis=0) / tl.maximum(size, 1.0)
        squares = tl.zeros([BLOCK_N], tl.float64)
        for start in range(0, num_samples, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < num_samples
            above = tl.load(rewards_ptr + offs_n, mask=mask_n, other=float("nan")).to(tl.float64) - own  # [BLOCK_N]
            counts = above == above
            if SCALE == "group":
                counts = counts & (tl.load(group_ids_ptr + offs_n, mask=mask_n, other=0) == group)
            squares += tl.where(counts, (above - center) * (above - center), 0.0)
        std = tl.sqrt(tl.sum(squares, axis=0) / tl.maximum(size - 1, 1.0))
        advantage = advantage / (std + eps)
    return tl.where(own == own, advantage, 0.0)


@triton.jit(do_not_specialize=["num_samples"])
def _advantages_kernel(
    rewards_ptr, group_ids_ptr, out_ptr,  # [N] each
    num_samples, eps, SCALE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    advantage = advantage_of(rewards_ptr, group_ids_ptr, n, num_samples, eps, SCALE, BLOCK_N)
    tl.store(out_ptr + n, advantage.to(tl.float32))


def _launch(rewards_N: Tensor, group_ids_N: Tensor, scale: str, eps: float) -> Tensor:
    advantages_N = _fake(rewards_N)
    if num_samples := len(rewards_N):
        launch(
            _advantages_kernel, (num_samples,),
            rewards_N.contiguous(), group_ids_N.contiguous(), advantages_N, num_samples, eps,
            SCALE=scale, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
        )  # fmt: skip
    return advantages_N


def _fake(rewards_N: Tensor, *_: Any) -> Tensor:
    return rewards_N.new_empty(rewards_N.shape, dtype=compute_dtype(rewards_N))


_SCHEMA = "(Tensor rewards_N, Tensor group_ids_N, str scale, float eps) -> Tensor"
register("group_advantages", _SCHEMA, fake=_fake, launch=_launch)


def group_advantages(
    rewards_N: Tensor, group_ids_N: Tensor, *, scale: str = "group", eps: float = 1e-4, impl: str | None = None
) -> Tensor:
    """How much better each sample did than the others of its group. Call it before any split into minibatches.

    rewards_N     [N] float; NaN = unscorable: left out of every mean and std, its advantage is 0
    group_ids_N   [N] int64 >= 0; equal ids form a group, in any order; samples of one prompt share an id
    Returns advantages_N, fp32 (fp64 for fp64 rewards). A group of one, or of equal rewards, gets exactly 0.
    """
    if rewards_N.dim() != 1 or group_ids_N.shape != rewards_N.shape:
        raise ValueError(
            f"group_advantages: got rewards {tuple(rewards_N.shape)} and group ids {tuple(group_ids_N.shape)}, "
            "expected both [N]"
        )
    if scale not in SCALES:
        raise ValueError(f"group_advantages: got scale={scale!r}, expected group, batch or none")
    check_ids("group_advantages", "group_ids_N", group_ids_N, None)
    rewards_N = rewards_N.detach()
    if choose("group_advantages", impl, rewards_N)[0] == "reference":
        return group_advantages_reference(rewards_N, group_ids_N, scale, eps).to(compute_dtype(rewards_N))
    return torch.ops.r1fast.group_advantages(rewards_N, group_ids_N, scale, eps)
