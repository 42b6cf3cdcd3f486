"""Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2), with the conventions of TRL.

    A_i = (R_i - mean_g) / (std_g + eps)      mean and unbiased std over the scorable rewards of the group of i
    scale="batch": std over all scorable rewards;   scale="none": A_i = R_i - mean_g  (Dr. GRPO, arXiv 2503.20783)

A few kilobytes and as many FLOPs: bound by the number of launches.
"""

import torch
from torch import Tensor

from .dispatch import choose


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
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"group_advantages: got scale={scale!r}, expected group, batch or none")
    choose("group_advantages", impl, rewards_N)
    dtype = torch.float64 if rewards_N.dtype == torch.float64 else torch.float32
    return group_advantages_reference(rewards_N, group_ids_N, scale, eps).to(dtype)
