"""linear_grpo_loss from rewards, with old and reference log-probs, against the same as two ops, eager torch and Liger.

Floor: the bare products. A token's gradient is known once its log-prob is, each logit is computed once: 6 T D V.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.cases import Case
from bench.head import Head, eager_logprobs, exact, floor, runnable
from r1fast_kernels import group_advantages, grpo_loss, linear_grpo_loss, linear_logprobs

BETA, GROUP = 0.04, 8


def loss_arguments(head: Head, num_samples: int) -> dict[str, Any]:
    """Log-probs of policies a little away from this one; rewards of 0 and 1, as rules give.

    So little that bf16 logits, off by 0.03, move no ratio across the edge of the clip, where the gradient jumps.
    """
    generator = harness.generator(1)
    T, device = len(head.ids_T), harness.DEVICE

    def near(values_T: Tensor) -> Tensor:
        return values_T + 0.03 * torch.randn(T, generator=generator, device=device)

    with torch.no_grad():
        logprobs_T = linear_logprobs(*head.leaves, head.ids_T)
    return {
        "rewards_N": torch.randint(2, (num_samples,), generator=generator, device=device).float(),
        "group_ids_N": torch.arange(num_samples, device=device) // GROUP,
        "old_logprobs_T": near(logprobs_T),
        "ref_logprobs_T": near(logprobs_T),
        "beta": BETA,
    }


def liger(head: Head, num_samples: int, arguments: dict[str, Any]) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(beta=BETA, loss_type="grpo", compiled=harness.DEVICE == "cuda")
    mask_NL = torch.ones(num_samples, len(head.ids_T) // num_samples, device=harness.DEVICE)
    old_NL, ref_NL = (arguments[f"{name}_logprobs_T"].view_as(mask_NL) for name in ("old", "ref"))

    def run() -> Tensor:
        advantages_N = group_advantages(arguments["rewards_N"], arguments["group_ids_N"])
        hidden_NLD = head.hidden_TD.view(*mask_NL.shape, -1)
        return fused(
            hidden_NLD, head.weight_VD, head.ids_T.view(mask_NL.shape), mask_NL, advantages_N,
            ref_per_token_logps=ref_NL, old_per_token_logps=old_NL,
        )[0]  # fmt: skip

    return run


def test_linear_grpo_loss(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    torch._dynamo.reset()
    head, N = Head.random(case), case.sizes["N"]
    arguments = loss_arguments(head, N)
    cu_seqlens = torch.arange(N + 1, device=harness.DEVICE, dtype=torch.int32) * (len(head.ids_T) // N)

    def two_ops() -> Tensor:
        logprobs_T, _ = linear_logprobs(*head.leaves, head.ids_T, with_entropy=True)
        return grpo_loss(logprobs_T, cu_seqlens, **arguments)[0]

    def eager() -> Tensor:
        logprobs_T, _ = eager_logprobs(*head.leaves, head.ids_T)
        return grpo_loss(logprobs_T, cu_seqlens, **arguments, impl="reference")[0]

    forwards: dict[str, Callable[[], Tensor]] = {
        harness.OURS: lambda: linear_grpo_loss(*head.leaves, head.ids_T, cu_seqlens, **arguments)[0],
        "two ops": two_ops,
        "eager": eager,
    }
    if importlib.util.find_spec("liger_kernel"):
        forwards["Liger"] = liger(head, N, arguments)
    runs = {
        name: harness.in_mode(case.mode, lambda forward=forward: [forward()], head.leaves, [None])
        for name, forward in forwards.items()
    }
    _, _, loss, gradients = exact(
        head, lambda logprobs_T, _: grpo_loss(logprobs_T, cu_seqlens, **arguments, impl="reference")[0]
    )
    compare(
        harness.Problem(
            case, runnable(head.hidden_TD, runs),
            floor=floor(head, num_forwards=1),
            check=harness.agrees_with([loss, *gradients], 1e-5 if case.dtype == "fp32" else 2e-2),
            gradient_bytes=head.gradient_bytes,
        )
    )  # fmt: skip
