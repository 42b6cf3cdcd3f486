"""GRPO's policy loss and its relatives, from packed log-probabilities of completion tokens. Formulas are TRL's.

    w   = exp(logprob - old_logprob)                          token; sequence: exp of the sample's mean, one per sample
    L   = -min(min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A)                grpo, bnpo, dr_grpo, dapo
    L   = -stopgrad(min(w, epsilon_high)) A logprob                                      cispo (the cap is epsilon_high)
    L  *= f, no gradient: 1, or the product of
          bounded exp(old_logprob - sampler_logprob)          is_cap, is_min; of a token, or of a sample's sum (is_mode)
          0 for a sample with A < 0 and mean(sampler_logprob - logprob) > off_policy_mask_threshold
          0 for a token whose entropy is below the quantile    top_entropy_quantile
    L  += beta k,  d = ref_logprob - logprob,  k = -d (k1), d^2 / 2 (k2), exp(d) - d - 1 (k3), w k3 (k3_unbiased)
    L  -= entropy_coef entropy                                where the token has a surrogate; in the same mean (verl)

    grpo     sum_n [ sum_t L / tokens_n ] / num_samples       each sample weighs the same (arXiv 2402.03300)
    dr_grpo  sum L / (num_samples max_completion_length)      no length bias               (arXiv 2503.20783)
    bnpo, dapo, cispo   sum L / num_items                     each token weighs the same   (arXiv 2503.14476)

Counts and sums run over tokens that `loss_mask_T` keeps. The gradient, s being 1 where the minimum passes it, else 0:

    dL/dlogprob = -A w s f + beta (1 - exp(d));   cispo: -min(w, epsilon_high) A f in place of -A w s f
    sequence: all tokens of a sample share -A w s sum_t(f) / tokens_n

One launch gives loss, gradients and metrics: 4 bytes read for each of logprob, old, ref, sampler and entropy that is
given, 1 for the mask, 4 written (8 with entropy_coef); up to 3 exponentials and 40 FLOPs a token. What is of whole
samples reads twice. A million tokens are 25 MB, on a GPU about the time of the launch.

    packing    | sample 0      | sample 1 | sample 2        |   completion tokens only
    cu_seqlens 0               6          10                17
    program    0               1          2                     one a sample leaves partial sums; the last adds them up
"""

import inspect
import math
from collections import namedtuple
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import HAS_EXTENSION, choose, compute_dtype, register
from .group_advantages import advantage_of
from .grpo_loss_reference import TENSORS, LossArguments, grpo_loss_reference
from .head import times
from .launch import launch
from .loss_options import NUMBERS, OPTIONS, TABLE, WORDS, LossOptions

# Columns 2.. of the partial sums of a sample, after its loss and its tokens that count; csrc/cpu/grpo_loss.cpp has them
# in the same order. For cispo "high" is "cispo_clip_ratio".
METRICS = (
    "importance_ratio/mean", "importance_ratio/max", "clip_ratio/low_mean", "clip_ratio/high_mean",
    "clip_ratio/region_mean", "kl", "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    "entropy", "sampling/importance_sampling_ratio/mean", "off_policy_mask_ratio",
)  # fmt: skip
ADVANTAGE_EPS = 1e-4
# Two tokens a thread: with four, ptxas spills in some of the settings.
BLOCK_T, BLOCK_N, NUM_WARPS = 512, 64, 8
MOST_REGISTERS = 64  # four blocks a multiprocessor: the assembler aims at five, and spills in some of the settings

Numbers = namedtuple("Numbers", NUMBERS)  # type: ignore[misc]  # what the kernel reads as o.beta; None is a constant


@triton.jit
def _surrogate(ratio, advantage, logprob, clip_low, clip_high, o, CISPO: tl.constexpr):
    """(loss, slope, clipped below, clipped above); NaN passes through every `where`, which tl.minimum would drop."""
    # The bounds that count as clipping, for the sign of this advantage.
    above_bound = tl.where(advantage > 0, clip_high, float("inf"))
    # One return: of an early one the compiler types both branches, which differ where the log-prob is a constant.
    if CISPO:
        slope = -tl.where(ratio > clip_high, clip_high, ratio) * advantage
        loss = slope * logprob
        below = ratio < -float("inf")
        above = ratio > above_bound
    else:
        delta = float("inf") if o.delta is None else o.delta
        below_bound = tl.where(advantage < 0, clip_low, -float("inf"))
        capped = tl.where(ratio > delta, delta, ratio)
        clipped = tl.where(ratio < clip_low, clip_low, tl.where(ratio > clip_high, clip_high, ratio))
        a = capped * advantage
        b = clipped * advantage
        # As autograd has it: on an edge clamp passes the gradient, and a tie of the minimum gives half to each side.
        share = tl.where(a == b, 0.5, 1.0)
        passes = tl.where((a > b) | (ratio > delta), 0.0, share)
        passes += tl.where((b > a) | (ratio < clip_low) | (ratio > clip_high), 0.0, share)
        # A ratio of infinity that is clipped has slope 0: select, 0 times infinity is NaN.
        slope = tl.where(passes == 0, 0.0, -(passes * ratio * advantage))
        loss = -tl.where(a > b, b, a)
        below = capped < below_bound
        above = capped > above_bound
    return loss, slope, below, above


@triton.jit
def _importance(log_weight, o, MASKS: tl.constexpr):
    """exp(log_weight), clamped to is_min .. is_cap, or 0 outside."""
    weight = tl.exp(log_weight)
    if o.is_min is not None:
        weight = tl.where(weight < o.is_min, 0.0 if MASKS else o.is_min, weight)
    if o.is_cap is not None:
        weight = tl.where(weight > o.is_cap, 0.0 if MASKS else o.is_cap, weight)
    return weight


@triton.jit
def _kl(distance, ratio, KL: tl.constexpr, SEQUENCE: tl.constexpr):
    """(estimate, its slope but for what a ratio of the whole sample adds)."""
    if KL == "k1":
        kl = -distance
        slope = tl.where(distance == distance, 1.0, distance)
    elif KL == "k2":
        kl = 0.5 * distance * distance
        slope = -distance
    else:
        odds = tl.exp(distance)
        kl = odds - distance - 1.0
        slope = 1.0 - odds
        if KL == "k3_unbiased":
            slope = ratio * (slope if SEQUENCE else slope + kl)
            kl = ratio * kl
    return kl, slope


@triton.jit
def _live(mask_ptr, offs_t, end):
    """Which of these tokens belong to the sample and count."""
    live = offs_t < end
    if mask_ptr is not None:
        live = tl.load(mask_ptr + offs_t, mask=live, other=0) != 0
    return live


@triton.jit
def _read(values_ptr, offs_t, live):
    """fp32; a masked position, which may hold NaN, is not read."""
    return tl.load(values_ptr + offs_t, mask=live, other=0.0).to(tl.float32)


# Samples begin anywhere, so that it helps nobody where tensors do; those of a tile of linear_grpo_loss are slices.
_TOKENS_PTRS = [
    f"{name}_ptr" for name in ("logprobs", "old", "ref", "sampler", "mask", "entropy", "grad", "grad_entropy")
]


@triton.jit(do_not_specialize=["default_count", "num_samples"], do_not_specialize_on_alignment=_TOKENS_PTRS)
def _grpo_kernel(
    logprobs_ptr, cu_seqlens_ptr,  # [T], [N + 1]
    advantages_ptr, rewards_ptr, group_ids_ptr,  # [N]; advantages None: from the other two
    old_ptr, ref_ptr, sampler_ptr, mask_ptr, entropy_ptr,  # [T] or None
    threshold_ptr, counts_ptr,  # [] of the entropy, [N]; or None
    total_count_ptr,  # [], num_items or num_samples; None: default_count
    loss_ptr, grad_ptr, grad_entropy_ptr, metrics_ptr,  # [], [T], [T] or None where entropy_coef is 0, [11]
    partials_ptr, finished_ptr,  # [13, N] fp64, [1] int32 of 0
    default_count, num_samples, advantage_eps, clip_low, clip_high,
    divisor_factor,  # max_completion_length of dr_grpo, else 1
    o,  # Numbers
    SCALE: tl.constexpr, CISPO: tl.constexpr, SAMPLE_MEAN: tl.constexpr,  # of grpo: by the sample's tokens too
    SEQUENCE: tl.constexpr, TOKEN_WEIGHTS: tl.constexpr, SAMPLE_WEIGHTS: tl.constexpr, MASKS: tl.constexpr,
    KL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + n).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + n + 1).to(tl.int64)
    length = (end - begin).to(tl.int32)
    if advantages_ptr is not None:
        advantage = tl.load(advantages_ptr + n)
    else:
        advantage = advantage_of(rewards_ptr, group_ids_ptr, n, num_samples, advantage_eps, SCALE, BLOCK_T)
    advantage = advantage.to(tl.float32)
    advantage *= tl.where(advantage > 0, o.positive_advantage_weight, 1.0)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr).to(tl.float32)

    # What the terms of a token need to know of its whole sample.
    OFF_POLICY: tl.constexpr = o.off_policy_mask_threshold is not None
    WEIGHS_KL: tl.constexpr = SEQUENCE and KL == "k3_unbiased" and ref_ptr is not None
    count = length.to(tl.float32) if counts_ptr is None else tl.load(counts_ptr + n).to(tl.float32)
    none_T = tl.zeros([BLOCK_T], tl.float32)
    if SEQUENCE or SAMPLE_WEIGHTS or OFF_POLICY or (SAMPLE_MEAN and mask_ptr is not None and counts_ptr is None):
        kept_T, factor_T, kl_T = none_T, none_T, none_T
        log_ratio_T, log_weight_T, distance_T = none_T, none_T, none_T
        for start in range(0, length, BLOCK_T):
            offs_t = begin + start + tl.arange(0, BLOCK_T)
            live = _live(mask_ptr, offs_t, end)
            kept_T += tl.where(live, 1.0, 0.0)
            logprob = _read(logprobs_ptr, offs_t, live)  # [BLOCK_T]
            old = logprob if old_ptr is None else _read(old_ptr, offs_t, live)  # [BLOCK_T]
            sampler = old if sampler_ptr is None else _read(sampler_ptr, offs_t, live)  # [BLOCK_T]
            log_ratio_T += logprob - old
            log_weight_T += old - sampler
            distance_T += sampler - logprob
            if SEQUENCE:
                factor = tl.where(live, _importance(old - sampler, o, MASKS) if TOKEN_WEIGHTS else 1.0, 0.0)
                if threshold_ptr is not None:
                    factor = tl.where(_read(entropy_ptr, offs_t, live) >= threshold, factor, 0.0)
                factor_T += factor
            if WEIGHS_KL:
                kl_T += _kl(_read(ref_ptr, offs_t, live) - logprob, 1.0, "k3", SEQUENCE)[0]
        if counts_ptr is None:
            count = tl.sum(kept_T, axis=0)
    count = tl.maximum(count, 1.0)
    sample_factor, sample_weight, dropped = 1.0, 1.0, 0.0
    if SAMPLE_WEIGHTS:
        sample_weight = _importance(tl.sum(log_weight_T, axis=0), o, MASKS)
        sample_factor = sample_weight
    if OFF_POLICY:
        moved = tl.sum(distance_T, axis=0) / count > o.off_policy_mask_threshold
        dropped = tl.where((advantage < 0) & moved, 1.0, 0.0)
        sample_factor = tl.where(dropped != 0, 0.0, sample_factor)
    if SEQUENCE:
        sample_ratio = tl.exp(tl.sum(log_ratio_T, axis=0) / count)
        _, sample_slope, sample_below, sample_above = _surrogate(
            sample_ratio, advantage, 0.0, clip_low, clip_high, o, CISPO
        )  # fmt: skip
        # What each token's log-prob does to the loss through the mean.
        shared = tl.sum(factor_T, axis=0) / count * sample_factor
        sample_slope = tl.where(shared == 0, 0.0, sample_slope * shared)
        if WEIGHS_KL:
            sample_kl_slope = sample_ratio * tl.sum(kl_T, axis=0) / count

    divisor = default_count.to(tl.float32) if total_count_ptr is None else tl.load(total_count_ptr).to(tl.float32)
    scale = 1.0 / (tl.maximum(divisor, 1.0) * divisor_factor)
    if SAMPLE_MEAN:
        scale /= count

    loss_T, live_T, kl_T, entropy_T, weight_T = none_T, none_T, none_T, none_T, none_T
    ratio_T, ratio_max_T, below_T, above_T, gap_T, gap_max_T = none_T, none_T, none_T, none_T, none_T, none_T
    for start in range(0, length, BLOCK_T):
        offs_t = begin + start + tl.arange(0, BLOCK_T)
        live = _live(mask_ptr, offs_t, end)
        live_T += tl.where(live, 1.0, 0.0)
        logprob = _read(logprobs_ptr, offs_t, live)  # [BLOCK_T]
        old = logprob if old_ptr is None else _read(old_ptr, offs_t, live)  # [BLOCK_T]
        if SEQUENCE:
            ratio = sample_ratio
        elif old_ptr is not None:
            ratio = tl.exp(logprob - old)
        else:
            ratio = 1.0 + (logprob - old)  # 1, or NaN where the log-prob is
        loss, slope, below, above = _surrogate(ratio, advantage, logprob, clip_low, clip_high, o, CISPO)
        factor = none_T + sample_factor
        if sampler_ptr is not None:
            sampler = _read(sampler_ptr, offs_t, live)  # [BLOCK_T]
            if TOKEN_WEIGHTS:
                weight = _importance(old - sampler, o, MASKS)
                factor *= weight
                weight_T += tl.where(live, weight, 0.0)
            gap = tl.abs(old - sampler)
            gap_T += gap
            gap_max_T = tl.maximum(gap_max_T, gap)
        bonus = 0.0
        if entropy_ptr is not None:
            entropy = _read(entropy_ptr, offs_t, live)  # [BLOCK_T]
            entropy_T += entropy
            bonus = tl.where(live, o.entropy_coef, 0.0)
            if threshold_ptr is not None:
                factor = tl.where(entropy >= threshold, factor, 0.0)
                bonus = tl.where(entropy >= threshold, bonus, 0.0)
        loss = tl.where(factor == 0, 0.0, loss * factor)
        slope = sample_slope if SEQUENCE and not CISPO else tl.where(factor == 0, 0.0, slope * factor)
        if ref_ptr is not None:
            kl, kl_slope = _kl(_read(ref_ptr, offs_t, live) - logprob, ratio, KL, SEQUENCE)  # [BLOCK_T]
            if WEIGHS_KL:
                kl_slope += sample_kl_slope
            kl_T += tl.where(live, kl, 0.0)
            loss += tl.where(o.beta != 0, o.beta * kl, 0.0)
            slope += tl.where(o.beta != 0, o.beta * kl_slope, 0.0)
        if grad_entropy_ptr is not None:
            loss -= bonus * entropy
            tl.store(grad_entropy_ptr + offs_t, -bonus * scale, mask=offs_t < end)
        if not SEQUENCE:
            kept_ratio = tl.where(live, ratio, 0.0)
            ratio_T += kept_ratio
            ratio_max_T = tl.maximum(ratio_max_T, kept_ratio)
            below_T += tl.where(live & below, 1.0, 0.0)
            above_T += tl.where(live & above, 1.0, 0.0)
        loss_T += tl.where(live, loss, 0.0)
        tl.store(grad_ptr + offs_t, tl.where(live, slope * scale, 0.0), mask=offs_t < end)

    if SEQUENCE:
        ratio_sum, ratio_max = sample_ratio, sample_ratio
        num_below, num_above = tl.where(sample_below, 1.0, 0.0), tl.where(sample_above, 1.0, 0.0)
    else:
        ratio_sum, ratio_max = tl.sum(ratio_T, axis=0), tl.max(ratio_max_T, axis=0)
        num_below, num_above = tl.sum(below_T, axis=0), tl.sum(above_T, axis=0)
    gap_sum = tl.sum(gap_T, axis=0)
    # tl.max drops NaN; of values that are not negative, the sum is NaN exactly when one of them is.
    partials = (
        tl.sum(loss_T, axis=0).to(tl.float64) * scale, tl.sum(live_T, axis=0),
        ratio_sum, tl.where(ratio_sum != ratio_sum, ratio_sum, ratio_max),
        num_below, num_above, num_below + num_above, tl.sum(kl_T, axis=0),
        gap_sum, tl.where(gap_sum != gap_sum, gap_sum, tl.max(gap_max_T, axis=0)),
        tl.sum(entropy_T, axis=0), sample_weight if SAMPLE_WEIGHTS else tl.sum(weight_T, axis=0), dropped,
    )  # fmt: skip
    for column in tl.static_range(13):
        tl.store(partials_ptr + n + column * num_samples, partials[column])

    # The last program to come here finds the partial sums of all others, and adds them in the order of the samples.
    tl.debug_barrier()
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel", scope="gpu") == num_samples - 1:
        tl.debug_barrier()
        _add_up(loss_ptr, metrics_ptr, partials_ptr, num_samples, SEQUENCE, SAMPLE_WEIGHTS, BLOCK_N)


@triton.jit
def _add_up(
    loss_ptr, metrics_ptr, partials_ptr, num_samples,
    SEQUENCE: tl.constexpr, SAMPLE_WEIGHTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, 16)
    is_max = (column == 3) | (column == 9)
    total = tl.zeros([16, BLOCK_N], tl.float64)
    most = tl.zeros([16, BLOCK_N], tl.float64)
    for start in range(0, num_samples, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        here = (column[:, None] < 13) & (offs_n[None, :] < num_samples)
        row_ptr = partials_ptr + column[:, None] * num_samples + offs_n[None, :]
        # From the L2 cache, where the other programs have written it.
        partial = tl.load(row_ptr, mask=here, other=0.0, cache_modifier=".cg")  # [16, BLOCK_N]
        total += partial
        most = tl.maximum(most, partial)
    total = tl.sum(total, axis=1)
    most = tl.where(total != total, total, tl.max(most, axis=1))
    tokens = tl.maximum(tl.sum(tl.where(column == 1, total, 0.0), axis=0), 1.0)
    of_samples = column == 12
    if SEQUENCE:
        of_samples = of_samples | (column < 7)
    if SAMPLE_WEIGHTS:
        of_samples = of_samples | (column == 11)
    mean = total / tl.where(of_samples, num_samples.to(tl.float64), tokens)
    tl.store(loss_ptr + column, total.to(tl.float32), mask=column == 0)
    tl.store(metrics_ptr + column - 2, tl.where(is_max, most, mean).to(tl.float32), mask=(column >= 2) & (column < 13))


def _launch(logprobs_T: Tensor, cu_seqlens: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *advantages, old_T, ref_T, sampler_T, mask_T, entropy_T, threshold, counts_N, num_items, num_samples = given[:12]
    numbers: Any = Numbers(*(None if math.isnan(x) else x for x in given[12]))
    words = dict(zip(WORDS, given[13]))
    mask_T = None if mask_T is None else mask_T.bool()
    loss_type, N = words["loss_type"], len(cu_seqlens) - 1
    loss, grad_T, grad_entropy_T, metrics_M = _fake(logprobs_T, cu_seqlens, *given)
    if N == 0:
        return loss.zero_(), grad_T, grad_entropy_T, metrics_M.zero_()
    if loss_type in ("grpo", "dr_grpo"):
        total_count, default_count = num_samples, N
    else:
        total_count, default_count = num_items, len(logprobs_T)
        if num_items is None and mask_T is not None:
            total_count = mask_T.sum()
    inputs = (
        None if x is None else x.contiguous()
        for x in (logprobs_T, cu_seqlens, *advantages, old_T, ref_T, sampler_T, mask_T, entropy_T, threshold, counts_N,
                  total_count)
    )  # fmt: skip
    partials = torch.empty(2 + len(METRICS), N, dtype=torch.float64, device=loss.device)
    finished = torch.zeros(1, dtype=torch.int32, device=loss.device)
    cispo = loss_type == "cispo"
    has_weights = numbers.is_cap is not None or numbers.is_min is not None
    of_samples = words["is_mode"].startswith("sequence")
    launch(
        _grpo_kernel, (N,),
        *inputs, loss, grad_T, grad_entropy_T if numbers.entropy_coef else None, metrics_M, partials, finished,
        default_count, N, ADVANTAGE_EPS, 1 - numbers.epsilon, numbers.epsilon_high + (0 if cispo else 1),
        float(numbers.max_completion_length) if loss_type == "dr_grpo" else 1.0, numbers,
        SCALE=words["scale_rewards"], CISPO=cispo, SAMPLE_MEAN=loss_type == "grpo",
        SEQUENCE=words["importance_level"] == "sequence", TOKEN_WEIGHTS=has_weights and not of_samples,
        SAMPLE_WEIGHTS=has_weights and of_samples, MASKS=words["is_mode"].endswith("mask"), KL=words["kl_estimator"],
        BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return loss, grad_T, grad_entropy_T, metrics_M


# The arguments that linear_grpo_loss shares: tensors, then the options in the order of their table, NaN for None.
LOSS_SCHEMA = (
    "Tensor cu_seqlens, Tensor? advantages_N, Tensor? rewards_N, Tensor? group_ids_N, Tensor? old_T, Tensor? ref_T, "
    "Tensor? sampler_T, Tensor? mask_T, Tensor? entropy_T, Tensor? entropy_threshold, Tensor? counts_N, "
    "Tensor? num_items, Tensor? num_samples, float[] numbers, str[] words"
)
ENTROPY = 9  # its place among the arguments of grpo_loss
if HAS_EXTENSION and torch.ops.r1fast.grpo_loss_table() != TABLE:
    raise ImportError(
        "r1fast_kernels._C was built with other options of the loss than loss_options.py has. Build it again: "
        "pip install --no-build-isolation -e ."
    )


def _fake(logprobs_T: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entropy's gradient is empty where entropy_coef is 0."""
    new = partial(logprobs_T.new_empty, dtype=compute_dtype(logprobs_T))
    has_bonus = given[-2][NUMBERS.index("entropy_coef")] != 0
    return new(()), new(logprobs_T.shape), new(logprobs_T.shape if has_bonus else 0), new(len(METRICS))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad_T, grad_entropy_T, metrics_M = output
    ctx.mark_non_differentiable(grad_T, grad_entropy_T, metrics_M)
    ctx.save_for_backward(grad_T, grad_entropy_T)
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], inputs[ENTROPY])]
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_T, grad_entropy_T = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    gradients[0] = times(grad_T, grad_loss, in_place=False).to(ctx.dtypes[0])
    if ctx.needs_input_grad[ENTROPY] and grad_entropy_T.shape == grad_T.shape:
        gradients[ENTROPY] = times(grad_entropy_T, grad_loss, in_place=False).to(ctx.dtypes[1])
    return tuple(gradients)


register(
    "grpo_loss",
    f"(Tensor logprobs_T, {LOSS_SCHEMA}) -> (Tensor loss, Tensor grad_T, Tensor grad_entropy_T, Tensor metrics_M)",
    fake=_fake, launch=_launch, save=_save, backward=_backward,
)  # fmt: skip


def named_metrics(metrics_M: Tensor, given: LossArguments) -> dict[str, Tensor]:
    """The metrics that these arguments have."""
    cispo = given.options.loss_type == "cispo"
    absent = {
        "clip_ratio/low": cispo,
        "clip_ratio/region": cispo,
        "kl": given.ref_logprobs_T is None,
        "sampling/sampling_": given.sampler_logprobs_T is None,
        "entropy": given.entropy_T is None,
        "sampling/importance_": not given.has_weights,
        "off_policy": given.options.off_policy_mask_threshold is None,
    }
    prefixes = tuple(prefix for prefix, is_absent in absent.items() if is_absent)
    return {
        "cispo_clip_ratio" if cispo and name == "clip_ratio/high_mean" else name: value
        for name, value in zip(METRICS, metrics_M.detach().unbind())
        if not name.startswith(prefixes)
    }


def op_arguments(given: LossArguments, device: torch.device) -> tuple[Any, ...]:
    """What the operator takes after log-probs and cu_seqlens."""

    def on_device(count: Tensor | float | None) -> Tensor | None:
        if isinstance(count, Tensor) or count is None:
            return None if count is None else count.to(device, non_blocking=True)
        return torch.full((), count, dtype=torch.float64, device=device)

    options = given.options._replace(epsilon_high=given.clip_high)
    values = [getattr(options, name) for name in NUMBERS]
    numbers = [math.nan if value is None else float(value) for value in values]
    return (
        given.advantages_N, given.rewards_N, given.group_ids_N, given.old_logprobs_T, given.ref_logprobs_T,
        given.sampler_logprobs_T, given.loss_mask_T, given.entropy_T, given.threshold(), given.counts_N,
        on_device(given.num_items), on_device(given.num_samples), numbers, [getattr(options, name) for name in WORDS],
    )  # fmt: skip


def grpo_loss(
    logprobs_T: Tensor, cu_seqlens: Tensor, *, impl: str | None = None, **arguments: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss of N packed completions. The sum over the micro-batches of a step is the loss of the step.

    logprobs_T            [T] new log-probabilities of the completion tokens, with gradient
    cu_seqlens            [N + 1] int32; sample n owns tokens cu_seqlens[n]:cu_seqlens[n + 1]
    advantages_N          [N]; or rewards_N with group_ids_N, which go through `group_advantages(scale=scale_rewards)`
    old_logprobs_T        [T]; None = on-policy: the ratio is 1 and the gradient flows
    ref_logprobs_T        [T], needed when beta != 0 (with beta 0 only the metric "kl")
    sampler_logprobs_T    [T]; with is_cap or is_min: importance weights; without: only metrics
    loss_mask_T           [T] bool; what masked positions hold, NaN included, changes nothing
    entropy_T             [T] of the policy, for the metric; with gradient for entropy_coef
    entropy_threshold     [], the quantile over all tokens of the step for top_entropy_quantile; None: of this call
    num_items             global count of tokens that count, over micro-batches and ranks (bnpo, dapo, cispo);
                          None: of this call
    num_samples           the same for samples (grpo, dr_grpo); None: N
    counts_N              [N] int, tokens of each whole sample that count; None: of this call. With it the call may
                          hold a slice of the tokens, cu_seqlens clamped to it, and slices add up, where no option is
                          of whole samples
    Returns (loss, metrics): 0-d tensors, the metrics detached, named as in TRL. Options (loss_options.py):

    """
    if logprobs_T.dim() != 1:
        raise ValueError(f"grpo_loss: got logprobs {tuple(logprobs_T.shape)}, expected [T]")
    given = LossArguments.of("grpo_loss", arguments, len(logprobs_T), cu_seqlens)
    if choose("grpo_loss", impl, logprobs_T)[0] == "reference":
        return grpo_loss_reference(logprobs_T, cu_seqlens, given)
    loss, _, _, metrics_M = torch.ops.r1fast.grpo_loss(logprobs_T, cu_seqlens, *op_arguments(given, logprobs_T.device))
    return loss, named_metrics(metrics_M, given)


def _documented(function: Any) -> None:
    """help() and editors show every argument."""
    rows = [f"    {option.name:25} {option.default!r:16} {option.about.meaning}" for option in OPTIONS]
    function.__doc__ = f"{function.__doc__.rstrip()}\n\n" + "\n".join(rows) + "\n"
    defaults = dict.fromkeys(TENSORS) | LossOptions._field_defaults
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in defaults.items()]
    function.__signature__ = inspect.Signature([*own, *added])


_documented(grpo_loss)
