"""`grpo_loss` in plain PyTorch, its specification; before it the arguments, checked, which all implementations share.

Formulas and names are those of grpo_loss.py, which holds the kernels and the public function.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .dispatch import compute_dtype
from .group_advantages import SCALES, group_advantages
from .ids import check_ids, check_offsets

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


@dataclass(frozen=True)
class LossArguments:
    """Every keyword argument of `grpo_loss` but impl, under its name and with its default; scalars are checked."""

    advantages_N: Tensor | None = None
    rewards_N: Tensor | None = None
    group_ids_N: Tensor | None = None
    scale_rewards: str = "group"
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    sampler_logprobs_T: Tensor | None = None
    loss_mask_T: Tensor | None = None
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    loss_type: str = "grpo"
    importance_level: str = "token"
    is_cap: float | None = None
    max_completion_length: int | None = None
    num_items: Tensor | float | None = None
    num_samples: Tensor | float | None = None
    counts_N: Tensor | None = None
    entropy_T: Tensor | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"grpo_loss: got loss_type={self.loss_type!r}, expected one of {', '.join(LOSS_TYPES)}")
        if self.importance_level not in ("token", "sequence"):
            raise ValueError(
                f"grpo_loss: got importance_level={self.importance_level!r}, expected 'token' or 'sequence'"
            )
        if self.loss_type == "dr_grpo" and not self.max_completion_length:
            raise ValueError("grpo_loss: loss_type='dr_grpo' divides by max_completion_length; pass it")
        if self.loss_type == "cispo" and self.delta is not None:
            raise ValueError("grpo_loss: delta does not apply to loss_type='cispo'; leave it None")
        if self.beta and self.ref_logprobs_T is None:
            raise ValueError(f"grpo_loss: beta={self.beta} needs ref_logprobs_T; pass it, or beta=0.0")
        if self.is_cap is not None and self.sampler_logprobs_T is None:
            raise ValueError(f"grpo_loss: is_cap={self.is_cap} needs sampler_logprobs_T; pass it, or is_cap=None")
        if self.scale_rewards not in SCALES:
            raise ValueError(f"grpo_loss: got scale_rewards={self.scale_rewards!r}, expected group, batch or none")
        names = [name for name in ("advantages_N", "rewards_N", "group_ids_N") if getattr(self, name) is not None]
        if names not in (["advantages_N"], ["rewards_N", "group_ids_N"]):
            raise ValueError(
                f"grpo_loss: got {', '.join(names) or 'none of them'}, "
                "expected either advantages_N, or rewards_N with group_ids_N"
            )

    @property
    def clip_high(self) -> float:
        """epsilon_high; for cispo the cap itself."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def check_shapes(self, num_tokens: int, cu_seqlens: Tensor) -> None:
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(f"grpo_loss: got cu_seqlens {tuple(cu_seqlens.shape)}, expected [N + 1]")
        num_samples = len(cu_seqlens) - 1
        for name in LOSS_ARGUMENTS:
            value = getattr(self, name)
            expected = {"_T": num_tokens, "_N": num_samples}.get(name[-2:])
            if isinstance(value, Tensor) and expected is not None and value.shape != (expected,):
                raise ValueError(
                    f"grpo_loss: got {name} {tuple(value.shape)} for {num_tokens} tokens of {num_samples} "
                    f"samples, expected ({expected},)"
                )

    def check_values(self, op: str, num_tokens: int, cu_seqlens: Tensor) -> None:
        """What the boundaries and the names of groups are, on a CPU."""
        check_offsets(op, "cu_seqlens", cu_seqlens, num_tokens)
        if self.group_ids_N is not None:
            check_ids(op, "group_ids_N", self.group_ids_N, None)


LOSS_ARGUMENTS = tuple(field.name for field in fields(LossArguments))


@dataclass(frozen=True)
class Packing:
    """Where the tokens of each sample lie, and which of them count."""

    sample_T: Tensor  # the sample that owns each token
    lengths_N: Tensor
    mask_T: Tensor | None  # bool; None keeps every token
    given_counts_N: Tensor | None  # tokens of each whole sample that count; None: as the mask says

    @staticmethod
    def build(cu_seqlens: Tensor, mask_T: Tensor | None, counts_N: Tensor | None, num_tokens: int) -> "Packing":
        lengths_N = cu_seqlens.diff().long()
        # output_size spares a wait for the device.
        sample_T = torch.repeat_interleave(lengths_N, output_size=num_tokens)
        return Packing(sample_T, lengths_N, None if mask_T is None else mask_T.bool(), counts_N)

    def keep(self, values_T: Tensor) -> Tensor:
        """Values with masked positions set to 0: where, not a product, because they may hold NaN."""
        return values_T if self.mask_T is None else torch.where(self.mask_T, values_T, 0.0)

    def sum_samples(self, values_T: Tensor) -> Tensor:
        """Sum over each sample's tokens, in one order and without atomics."""
        return torch.segment_reduce(values_T, "sum", lengths=self.lengths_N, unsafe=True, initial=0)

    def counts_N(self, dtype: torch.dtype) -> Tensor:
        """Tokens of each sample that count."""
        if self.given_counts_N is not None:
            return self.given_counts_N.to(dtype)
        if self.mask_T is None:
            return self.lengths_N.to(dtype)
        return self.sum_samples(self.mask_T.to(dtype))


def surrogate_reference(
    logprobs_T: Tensor,
    old_T: Tensor,
    ref_T: Tensor | None,
    sampler_T: Tensor | None,
    advantages_N: Tensor,
    packing: Packing,
    s: LossArguments,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The specification, before the reduction: (loss_T, importance_ratio: [T] or [N], kl_T)."""
    advantages_T = advantages_N[packing.sample_T]
    log_ratio_T = logprobs_T - old_T
    if s.importance_level == "token":
        ratio = ratio_T = log_ratio_T.exp()
    else:
        counts_N = packing.counts_N(log_ratio_T.dtype).clamp(min=1)
        ratio = (packing.sum_samples(log_ratio_T) / counts_N).exp()
        ratio_T = ratio[packing.sample_T]
    if s.loss_type == "cispo":
        loss_T = -ratio_T.clamp(max=s.clip_high).detach() * advantages_T * logprobs_T
    else:
        clipped_T = ratio_T.clamp(1 - s.epsilon, 1 + s.clip_high)
        capped_T = ratio_T if s.delta is None else ratio_T.clamp(max=s.delta)
        loss_T = -torch.minimum(capped_T * advantages_T, clipped_T * advantages_T)
    if s.is_cap is not None and sampler_T is not None:
        loss_T = loss_T * (old_T - sampler_T).exp().clamp(max=s.is_cap)
    if ref_T is None:
        return loss_T, ratio, None
    kl_T = (ref_T - logprobs_T).exp() - (ref_T - logprobs_T) - 1
    return (loss_T + s.beta * kl_T if s.beta else loss_T), ratio, kl_T


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _reduce(
    loss_T: Tensor,
    packing: Packing,
    s: LossArguments,
    num_items: Tensor | float | None,
    num_samples: Tensor | float | None,
) -> Tensor:
    loss_T = packing.keep(loss_T)
    if s.loss_type in ("bnpo", "dapo", "cispo"):
        if num_items is None:
            num_items = len(loss_T) if packing.mask_T is None else packing.mask_T.sum()
        return loss_T.sum() / _at_least_one(num_items)
    samples = _at_least_one(len(packing.lengths_N) if num_samples is None else num_samples)
    if s.loss_type == "dr_grpo":
        assert s.max_completion_length is not None
        return loss_T.sum() / (samples * s.max_completion_length)
    weight_N = 1 / packing.counts_N(loss_T.dtype).clamp(min=1)
    return (loss_T * weight_N[packing.sample_T]).sum() / samples


def _largest(values: Tensor) -> Tensor:
    return values.amax() if values.numel() else values.new_zeros(())


@torch.no_grad()
def _metrics(
    ratio: Tensor,
    kl_T: Tensor | None,
    old_T: Tensor,
    sampler_T: Tensor | None,
    entropy_T: Tensor | None,
    advantages_N: Tensor,
    packing: Packing,
    s: LossArguments,
) -> dict[str, Tensor]:
    """TRL's names and means: over tokens that count; over samples where the ratio is one per sample."""
    num_live = len(old_T) if packing.mask_T is None else packing.mask_T.sum()

    def token_mean(values_T: Tensor) -> Tensor:
        return packing.keep(values_T).sum() / _at_least_one(num_live)

    per_token = s.importance_level == "token"

    def mean(values: Tensor) -> Tensor:
        return token_mean(values) if per_token else values.sum() / max(len(values), 1)

    advantages = advantages_N[packing.sample_T] if per_token else advantages_N
    metrics = {
        "importance_ratio/mean": mean(ratio),
        "importance_ratio/max": _largest(packing.keep(ratio) if per_token else ratio),
    }
    if s.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean(((ratio > s.clip_high) & (advantages > 0)).to(ratio.dtype))
    else:
        capped = ratio if s.delta is None else ratio.clamp(max=s.delta)
        below = (capped < 1 - s.epsilon) & (advantages < 0)
        above = (capped > 1 + s.clip_high) & (advantages > 0)
        metrics["clip_ratio/low_mean"] = mean(below.to(ratio.dtype))
        metrics["clip_ratio/high_mean"] = mean(above.to(ratio.dtype))
        metrics["clip_ratio/region_mean"] = mean((below | above).to(ratio.dtype))
    if kl_T is not None:
        metrics["kl"] = token_mean(kl_T)
    if sampler_T is not None:
        difference_T = packing.keep((old_T - sampler_T).abs())
        metrics["sampling/sampling_logp_difference/mean"] = token_mean(difference_T)
        metrics["sampling/sampling_logp_difference/max"] = _largest(difference_T)
    if entropy_T is not None:
        metrics["entropy"] = token_mean(entropy_T)
    return metrics


def grpo_loss_reference(
    logprobs_T: Tensor, cu_seqlens: Tensor, given: LossArguments
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of the public function, with autograd's own gradient."""
    advantages_N = given.advantages_N
    if advantages_N is None:
        assert given.rewards_N is not None and given.group_ids_N is not None
        advantages_N = group_advantages(given.rewards_N, given.group_ids_N, scale=given.scale_rewards, impl="reference")
    dtype = compute_dtype(logprobs_T)
    packing = Packing.build(cu_seqlens, given.loss_mask_T, given.counts_N, len(logprobs_T))
    logprobs_T = packing.keep(logprobs_T.to(dtype))
    old_T, ref_T, sampler_T, entropy_T = (
        None if values is None else packing.keep(values.detach().to(dtype))
        for values in (given.old_logprobs_T, given.ref_logprobs_T, given.sampler_logprobs_T, given.entropy_T)
    )
    old_T = logprobs_T.detach() if old_T is None else old_T
    advantages_N = advantages_N.detach().to(dtype)
    loss_T, ratio, kl_T = surrogate_reference(logprobs_T, old_T, ref_T, sampler_T, advantages_N, packing, given)
    loss = _reduce(loss_T, packing, given, given.num_items, given.num_samples)
    return loss, _metrics(ratio.detach(), kl_T, old_T, sampler_T, entropy_T, advantages_N, packing, given)
