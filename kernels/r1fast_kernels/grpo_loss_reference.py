"""`grpo_loss` in plain PyTorch, its specification; before it the arguments, checked, which all implementations share.

Formulas and names are those of grpo_loss.py, which holds the kernels and the public function; options: loss_options.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .dispatch import compute_dtype
from .group_advantages import group_advantages
from .ids import check_ids, check_offsets
from .loss_options import LOSS_TYPES, OPTIONS, LossOptions


@dataclass(frozen=True)
class LossArguments:
    """Every keyword argument of `grpo_loss` but impl: the options, and the tensors under their names."""

    options: LossOptions
    advantages_N: Tensor | None = None
    rewards_N: Tensor | None = None
    group_ids_N: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    sampler_logprobs_T: Tensor | None = None
    loss_mask_T: Tensor | None = None
    entropy_T: Tensor | None = None
    entropy_threshold: Tensor | None = None
    num_items: Tensor | float | None = None
    num_samples: Tensor | float | None = None
    counts_N: Tensor | None = None

    @staticmethod
    def of(op: str, arguments: dict[str, Any], num_tokens: int, cu_seqlens: Tensor) -> "LossArguments":
        """From keyword arguments, the options among them; ValueError, or TypeError for a name that there is not."""
        options = LossOptions(**{name: arguments[name] for name in LossOptions._fields if name in arguments})
        tensors = {name: value for name, value in arguments.items() if name not in LossOptions._fields}
        if unknown := [name for name in tensors if name not in TENSORS]:
            raise TypeError(f"{op}: got {', '.join(unknown)}, expected keyword arguments of grpo_loss")
        given = LossArguments(options, **tensors)
        given._check_options(op)
        given._check_tensors(op, num_tokens, cu_seqlens)
        return given

    def _check_options(self, op: str) -> None:
        o = self.options
        for option in OPTIONS:
            value = getattr(o, option.name)
            if problem := option.check(value):
                raise ValueError(f"{op}: got {option.name}={value!r}, {problem}")
            applies = option.about.derived or o.loss_type in (option.about.loss_types or LOSS_TYPES)
            if not applies and value != option.default:
                raise ValueError(f"{op}: {option.name} does not apply to loss_type={o.loss_type!r}; leave it out")
        if o.loss_type == "dr_grpo" and not o.max_completion_length:
            raise ValueError(f"{op}: loss_type='dr_grpo' divides by max_completion_length; pass it")
        for name, is_set, needed in (
            ("beta", o.beta, "ref_logprobs_T"),
            ("is_cap", o.is_cap is not None, "sampler_logprobs_T"),
            ("is_min", o.is_min is not None, "sampler_logprobs_T"),
            ("entropy_coef", o.entropy_coef, "entropy_T"),
            ("top_entropy_quantile", o.top_entropy_quantile < 1, "entropy_T"),
        ):
            if is_set and getattr(self, needed) is None:
                raise ValueError(f"{op}: {name}={getattr(o, name)} needs {needed}; pass it, or leave {name} out")
        names = [name for name in ("advantages_N", "rewards_N", "group_ids_N") if getattr(self, name) is not None]
        if names not in (["advantages_N"], ["rewards_N", "group_ids_N"]):
            raise ValueError(
                f"{op}: got {', '.join(names) or 'none of them'}, "
                "expected either advantages_N, or rewards_N with group_ids_N"
            )

    @property
    def clip_high(self) -> float:
        """epsilon_high; for cispo the cap itself."""
        return self.options.epsilon if self.options.epsilon_high is None else self.options.epsilon_high

    @property
    def weighs_samples(self) -> bool:
        """Whether importance weights, if there are any, are of whole samples."""
        return self.options.is_mode.startswith("sequence")

    @property
    def has_weights(self) -> bool:
        return self.options.is_cap is not None or self.options.is_min is not None

    @property
    def needs_whole_samples(self) -> bool:
        """Whether the gradient of a token depends on log-probs of others, which a slice of the tokens does not hold."""
        o = self.options
        return (
            o.importance_level == "sequence"
            or o.off_policy_mask_threshold is not None
            or (self.has_weights and self.weighs_samples)
        )

    def _check_tensors(self, op: str, num_tokens: int, cu_seqlens: Tensor) -> None:
        """Their shapes and, on a CPU, what the boundaries and the names of groups are."""
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(f"{op}: got cu_seqlens {tuple(cu_seqlens.shape)}, expected [N + 1]")
        num_samples = len(cu_seqlens) - 1
        for name in TENSORS:
            value = getattr(self, name)
            expected = {"_T": num_tokens, "_N": num_samples}.get(name[-2:])
            if isinstance(value, Tensor) and expected is not None and value.shape != (expected,):
                raise ValueError(
                    f"{op}: got {name} {tuple(value.shape)} for {num_tokens} tokens of {num_samples} samples, "
                    f"expected ({expected},)"
                )
        check_offsets(op, "cu_seqlens", cu_seqlens, num_tokens)
        if self.group_ids_N is not None:
            check_ids(op, "group_ids_N", self.group_ids_N, None)

    def threshold(self) -> Tensor | None:
        """Entropy from which on a token has a surrogate: as given, or the quantile of this call; NaN if none counts."""
        top = self.options.top_entropy_quantile
        if top == 1 or self.entropy_threshold is not None or self.entropy_T is None:
            return self.entropy_threshold
        entropy_T = self.entropy_T.detach().to(compute_dtype(self.entropy_T))
        if self.loss_mask_T is not None:
            entropy_T = entropy_T.masked_fill(~self.loss_mask_T.bool(), torch.nan)
        return entropy_T.nanquantile(1 - top) if entropy_T.numel() else entropy_T.new_full((), torch.nan)


TENSORS = tuple(field.name for field in fields(LossArguments) if field.name != "options")


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
        sample_T = torch.repeat_interleave(lengths_N, output_size=num_tokens)  # output_size spares a wait
        return Packing(sample_T, lengths_N, None if mask_T is None else mask_T.bool(), counts_N)

    def keep(self, values_T: Tensor) -> Tensor:
        """Values with masked positions set to 0: where, not a product, because they may hold NaN."""
        return values_T if self.mask_T is None else torch.where(self.mask_T, values_T, 0.0)

    def sum_samples(self, values_T: Tensor) -> Tensor:
        """Sum over each sample's tokens, in one order and without atomics."""
        return torch.segment_reduce(values_T, "sum", lengths=self.lengths_N, unsafe=True, initial=0)

    def mean_samples(self, values_T: Tensor) -> Tensor:
        return self.sum_samples(values_T) / self.counts_N(values_T.dtype).clamp(min=1)

    def counts_N(self, dtype: torch.dtype) -> Tensor:
        """Tokens of each sample that count."""
        if self.given_counts_N is not None:
            return self.given_counts_N.to(dtype)
        if self.mask_T is None:
            return self.lengths_N.to(dtype)
        return self.sum_samples(self.mask_T.to(dtype))


@dataclass(frozen=True)
class Inputs:
    """What the formulas read, in the dtype of the sums; 0 where masked. Only log-probs and entropy have a gradient."""

    logprobs_T: Tensor
    old_T: Tensor
    ref_T: Tensor | None
    sampler_T: Tensor | None
    entropy_T: Tensor | None
    advantages_N: Tensor
    packing: Packing
    given: LossArguments

    def of_tokens(self, values: Tensor, *, per_sample: bool) -> Tensor:
        return values[self.packing.sample_T] if per_sample else values


def importance_ratio(x: Inputs) -> Tensor:
    """[T], or [N] where it is one per sample."""
    log_ratio_T = x.logprobs_T - x.old_T
    return (log_ratio_T if x.given.options.importance_level == "token" else x.packing.mean_samples(log_ratio_T)).exp()


def surrogate_reference(x: Inputs, ratio_T: Tensor) -> Tensor:
    advantages_T, o = x.advantages_N[x.packing.sample_T], x.given.options
    if o.loss_type == "cispo":
        return -ratio_T.clamp(max=x.given.clip_high).detach() * advantages_T * x.logprobs_T
    clipped_T = ratio_T.clamp(1 - o.epsilon, 1 + x.given.clip_high)
    capped_T = ratio_T if o.delta is None else ratio_T.clamp(max=o.delta)
    return -torch.minimum(capped_T * advantages_T, clipped_T * advantages_T)


@torch.no_grad()
def importance_weights(x: Inputs) -> Tensor | None:
    """What the sampler's distribution makes of a surrogate: [T], or [N]; None where nothing is asked for."""
    o = x.given.options
    if x.sampler_T is None or not x.given.has_weights:
        return None
    log_weight_T = x.old_T - x.sampler_T
    weight = (x.packing.sum_samples(log_weight_T) if x.given.weighs_samples else log_weight_T).exp()
    if o.is_mode.endswith("truncate"):
        return weight.clamp(o.is_min, o.is_cap)
    outside = torch.zeros_like(weight, dtype=torch.bool)
    outside = outside if o.is_cap is None else outside | (weight > o.is_cap)
    outside = outside if o.is_min is None else outside | (weight < o.is_min)
    return weight.masked_fill(outside, 0)


@torch.no_grad()
def off_policy_N(x: Inputs) -> Tensor | None:
    """Which samples leave the loss because they moved too far from who sampled them."""
    threshold = x.given.options.off_policy_mask_threshold
    if threshold is None:
        return None
    sampler_T = x.old_T if x.sampler_T is None else x.sampler_T
    distance_N = x.packing.mean_samples(sampler_T - x.logprobs_T)
    return (x.advantages_N < 0) & (distance_N > threshold)


def kl_reference(x: Inputs, ratio_T: Tensor) -> Tensor | None:
    if x.ref_T is None:
        return None
    d_T, estimator = x.ref_T - x.logprobs_T, x.given.options.kl_estimator
    if estimator == "k1":
        return -d_T
    if estimator == "k2":
        return d_T.square() / 2
    return (d_T.exp() - d_T - 1) * (ratio_T if estimator == "k3_unbiased" else 1)


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _reduce(x: Inputs, loss_T: Tensor) -> Tensor:
    packing, o, num_items, num_samples = x.packing, x.given.options, x.given.num_items, x.given.num_samples
    loss_T = packing.keep(loss_T)
    if o.loss_type in ("bnpo", "dapo", "cispo"):
        if num_items is None:
            num_items = len(loss_T) if packing.mask_T is None else packing.mask_T.sum()
        return loss_T.sum() / _at_least_one(num_items)
    samples = _at_least_one(len(packing.lengths_N) if num_samples is None else num_samples)
    if o.loss_type == "dr_grpo":
        assert o.max_completion_length is not None
        return loss_T.sum() / (samples * o.max_completion_length)
    weight_N = 1 / packing.counts_N(loss_T.dtype).clamp(min=1)
    return (loss_T * weight_N[packing.sample_T]).sum() / samples


def _largest(values: Tensor) -> Tensor:
    return values.amax() if values.numel() else values.new_zeros(())


@torch.no_grad()
def _metrics(
    x: Inputs, ratio: Tensor, kl_T: Tensor | None, weights: Tensor | None, dropped_N: Tensor | None
) -> dict[str, Tensor]:
    """TRL's names and means: over tokens that count; over samples where the value is one per sample."""
    packing, o, clip_high = x.packing, x.given.options, x.given.clip_high
    num_live = len(x.old_T) if packing.mask_T is None else packing.mask_T.sum()

    def token_mean(values_T: Tensor) -> Tensor:
        return packing.keep(values_T).sum() / _at_least_one(num_live)

    def sample_mean(values_N: Tensor) -> Tensor:
        return values_N.sum() / max(len(values_N), 1)

    per_token = o.importance_level == "token"
    mean = token_mean if per_token else sample_mean
    advantages = x.advantages_N[packing.sample_T] if per_token else x.advantages_N
    metrics = {
        "importance_ratio/mean": mean(ratio),
        "importance_ratio/max": _largest(packing.keep(ratio) if per_token else ratio),
    }
    if o.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean(((ratio > clip_high) & (advantages > 0)).to(ratio.dtype))
    else:
        capped = ratio if o.delta is None else ratio.clamp(max=o.delta)
        below = (capped < 1 - o.epsilon) & (advantages < 0)
        above = (capped > 1 + clip_high) & (advantages > 0)
        metrics["clip_ratio/low_mean"] = mean(below.to(ratio.dtype))
        metrics["clip_ratio/high_mean"] = mean(above.to(ratio.dtype))
        metrics["clip_ratio/region_mean"] = mean((below | above).to(ratio.dtype))
    if kl_T is not None:
        metrics["kl"] = token_mean(kl_T)
    if x.sampler_T is not None:
        difference_T = packing.keep((x.old_T - x.sampler_T).abs())
        metrics["sampling/sampling_logp_difference/mean"] = token_mean(difference_T)
        metrics["sampling/sampling_logp_difference/max"] = _largest(difference_T)
    if x.entropy_T is not None:
        metrics["entropy"] = token_mean(x.entropy_T)
    if weights is not None:
        weights_mean = sample_mean if x.given.weighs_samples else token_mean
        metrics["sampling/importance_sampling_ratio/mean"] = weights_mean(weights)
    if dropped_N is not None:
        metrics["off_policy_mask_ratio"] = sample_mean(dropped_N.to(ratio.dtype))
    return metrics


def read_inputs(logprobs_T: Tensor, cu_seqlens: Tensor, given: LossArguments) -> Inputs:
    advantages_N = given.advantages_N
    if advantages_N is None:
        assert given.rewards_N is not None and given.group_ids_N is not None
        advantages_N = group_advantages(
            given.rewards_N, given.group_ids_N, scale=given.options.scale_rewards, impl="reference"
        )
    dtype = compute_dtype(logprobs_T)
    advantages_N = advantages_N.detach().to(dtype)
    positive_N = advantages_N * given.options.positive_advantage_weight
    advantages_N = torch.where(advantages_N > 0, positive_N, advantages_N)
    packing = Packing.build(cu_seqlens, given.loss_mask_T, given.counts_N, len(logprobs_T))

    def read(values_T: Tensor | None) -> Tensor | None:
        return None if values_T is None else packing.keep(values_T.to(dtype))

    logprobs_T = packing.keep(logprobs_T.to(dtype))
    old_T, ref_T, sampler_T = (
        read(None if values_T is None else values_T.detach())
        for values_T in (given.old_logprobs_T, given.ref_logprobs_T, given.sampler_logprobs_T)
    )
    old_T = logprobs_T.detach() if old_T is None else old_T
    return Inputs(logprobs_T, old_T, ref_T, sampler_T, read(given.entropy_T), advantages_N, packing, given)


def grpo_loss_reference(
    logprobs_T: Tensor,
    cu_seqlens: Tensor,
    given: LossArguments,
    surrogate: Callable[[Inputs, Tensor], Tensor] = surrogate_reference,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of the public function, with autograd's own gradient. surrogate: loss_T from the ratios."""
    x = read_inputs(logprobs_T, cu_seqlens, given)
    ratio = importance_ratio(x)
    ratio_T = x.of_tokens(ratio, per_sample=given.options.importance_level == "sequence")
    weights, dropped_N, kl_T = importance_weights(x), off_policy_N(x), kl_reference(x, ratio_T)
    factor_T = torch.ones_like(x.old_T)
    factor_T = factor_T if weights is None else factor_T * x.of_tokens(weights, per_sample=given.weighs_samples)
    factor_T = factor_T if dropped_N is None else factor_T.masked_fill(dropped_N[x.packing.sample_T], 0)
    threshold = given.threshold()
    has_surrogate_T = None if threshold is None or x.entropy_T is None else x.entropy_T.detach() >= threshold
    factor_T = factor_T if has_surrogate_T is None else factor_T.where(has_surrogate_T, 0)
    loss_T = torch.where(factor_T == 0, 0, surrogate(x, ratio_T) * factor_T)
    if kl_T is not None and given.options.beta:
        loss_T = loss_T + given.options.beta * kl_T
    if x.entropy_T is not None and given.options.entropy_coef:
        bonus_T = x.entropy_T if has_surrogate_T is None else x.entropy_T.where(has_surrogate_T, 0)
        loss_T = loss_T - given.options.entropy_coef * bonus_T
    return _reduce(x, loss_T), _metrics(x, ratio.detach(), kl_T, weights, dropped_N)
