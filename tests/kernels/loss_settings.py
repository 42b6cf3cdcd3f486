"""Settings of the policy loss at random, from the table of its options; and batches that they bite on."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from r1fast_kernels.loss_options import OPTIONS

LENGTHS = [5, 1, 9, 4, 7, 3]

# Of each number its default and values that change something for the batches below.
VALUES: dict[str, tuple[float | None, ...]] = {
    "epsilon": (0.2, 0.0, 0.1),
    "epsilon_high": (None, 0.28),
    "delta": (None, 1.1, 1.4),
    "positive_advantage_weight": (1.0, 0.1, 0.0),
    "beta": (0.0, 0.1),
    "is_cap": (None, 1.2, 3.0),
    "is_min": (None, 0.7),
    "off_policy_mask_threshold": (None, 0.0, 0.1),
    "entropy_coef": (0.0, 0.05, -0.02),
    "top_entropy_quantile": (1.0, 0.5, 0.2),
    "max_completion_length": (12.0,),
}


def random_settings(seed: int) -> dict[str, Any]:
    """A value of every option that the others allow."""
    rng = random.Random(seed)
    settings = {option.name: rng.choice(option.words or VALUES[option.name]) for option in OPTIONS}
    for option in OPTIONS:
        if option.about.loss_types is not None and settings["loss_type"] not in option.about.loss_types:
            settings[option.name] = option.default
    return settings


def random_batch(seed: int) -> dict[str, Any]:
    """Every input of `grpo_loss` in fp64; some batches are on-policy, some masked, some hold almost nothing."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = rng.choice([[5, 1, 0, 9, 4, 7, 3]] * 4 + [[2, 0], [0, 0]])

    def near(center: torch.Tensor | float, spread: float) -> torch.Tensor:
        return center + spread * torch.randn(sum(lengths), generator=generator, dtype=torch.float64)

    logprobs = near(-1.5, 0.4)
    return {
        "logprobs_T": logprobs,
        "entropy_T": near(1.0, 0.2),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "advantages_N": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        "old_logprobs_T": near(logprobs, 0.3) if rng.random() < 0.7 else None,
        "ref_logprobs_T": near(logprobs, 0.3),
        "sampler_logprobs_T": near(logprobs, 0.3),
        "loss_mask_T": torch.rand(sum(lengths), generator=generator) > 0.25 if rng.random() < 0.5 else None,
    }


def batch(
    lengths: Sequence[int] = LENGTHS, masked: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """An off-policy batch with every input; the sample of index 3 is masked whole."""
    generator = torch.Generator().manual_seed(seed)

    def near(center: torch.Tensor | float, spread: float) -> torch.Tensor:
        return center + spread * torch.randn(sum(lengths), generator=generator, dtype=torch.float64)

    logprobs = near(-1.5, 0.4)
    case = {
        "logprobs_T": logprobs,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "advantages_N": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        "old_logprobs_T": near(logprobs, 0.3),
        "ref_logprobs_T": near(logprobs, 0.3),
        "sampler_logprobs_T": near(logprobs, 0.3),
        "entropy_T": near(1.0, 0.2),
        "max_completion_length": 12,
    }
    if masked:
        mask = torch.rand(sum(lengths), generator=generator) > 0.25
        mask[sum(lengths[:3]) : sum(lengths[:4])] = False
        case["loss_mask_T"] = mask
    return cast(case, dtype)


def cast(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    is_float = {name: isinstance(x, torch.Tensor) and x.is_floating_point() for name, x in case.items()}
    return {name: x.to(dtype) if is_float[name] else x for name, x in case.items()}
