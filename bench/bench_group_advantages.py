"""group_advantages, against its reference and what trainers write where all groups have one size.

Floor: rewards and ids read, advantages written; at 64 kB that is the time of two library calls.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench import harness
from bench.cases import Case
from r1fast_kernels import group_advantages


def eager(rewards_N: Tensor, group_size: int) -> Tensor:
    """TRL's lines: samples of a group stand side by side, every reward is a number."""
    rewards_BG = rewards_N.view(-1, group_size)
    centred_BG = rewards_BG - rewards_BG.mean(1, keepdim=True)
    return (centred_BG / (rewards_BG.std(1, keepdim=True) + 1e-4)).flatten()


def test_group_advantages(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    N, G = case.sizes["N"], case.sizes["G"]
    rewards_N = torch.rand(N, generator=harness.generator(), device=harness.DEVICE)
    ids_N = torch.arange(N, device=harness.DEVICE) // G
    exact_N = group_advantages(rewards_N.double(), ids_N, impl="reference")
    compare(
        harness.Problem(
            case,
            {
                harness.OURS: lambda: [group_advantages(rewards_N, ids_N)],
                "reference": lambda: [group_advantages(rewards_N, ids_N, impl="reference")],
                "eager, equal groups": lambda: [eager(rewards_N, G)],
            },
            floor=harness.stream_floor("16 bytes a sample", 12 * N, 4 * N),
            check=harness.agrees_with([exact_N], 1e-6),
        )
    )
