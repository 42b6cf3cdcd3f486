"""grpo_loss forward and backward, from old, reference and sampler log-probs, against its reference and its compilation.

Floor: four log-probs read and one gradient written, 20 bytes a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.cases import Case
from bench.harness import Outputs
from r1fast_kernels import grpo_loss

BYTES_READ, BYTES_WRITTEN = 16, 4


def ragged_batch(num_samples: int, mean_length: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(logprobs, cu_seqlens, arguments): lengths from half to one and a half times the mean, T = their exact sum."""
    generator, device = harness.generator(), harness.DEVICE
    pairs, low, high = num_samples // 2, mean_length // 2, 1 + 3 * mean_length // 2
    half_N = torch.randint(low, high, (pairs,), generator=generator, device=device)
    lengths_N = torch.stack([half_N, 2 * mean_length - half_N], 1).flatten()
    cu_seqlens = torch.cat([lengths_N.new_zeros(1), lengths_N.cumsum(0)]).int()
    T = num_samples * mean_length

    def near(values_T: Tensor | float, spread: float) -> Tensor:
        return values_T + spread * torch.randn(T, generator=generator, device=device)

    logprobs_T = -near(0, 1.5).abs()
    old_T = near(logprobs_T, 0.2)
    arguments = {
        "advantages_N": torch.randn(num_samples, generator=generator, device=device),
        "old_logprobs_T": old_T,
        "ref_logprobs_T": near(logprobs_T, 0.2),
        "sampler_logprobs_T": near(old_T, 0.05),
        "beta": 0.04,
        "is_cap": 2.0,
    }
    return logprobs_T.requires_grad_(), cu_seqlens, arguments


def reference(logprobs_T: Tensor, cu_seqlens: Tensor, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return grpo_loss(logprobs_T, cu_seqlens, **arguments, impl="reference")


def test_grpo_loss(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    torch._dynamo.reset()
    logprobs_T, cu_seqlens, arguments = ragged_batch(case.sizes["N"], case.sizes["L"])
    T = len(logprobs_T)

    def run(op: Callable[..., tuple[Tensor, dict[str, Tensor]]], leaf_T: Tensor, arguments: dict[str, Any]) -> Outputs:
        loss, metrics = op(leaf_T, cu_seqlens, **arguments)
        return [loss.detach(), *torch.autograd.grad(loss, leaf_T), *(metrics[name] for name in sorted(metrics))]

    in_fp64 = {name: x.double() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    exact = run(reference, logprobs_T.detach().double().requires_grad_(), in_fp64)
    ops = {harness.OURS: grpo_loss, "eager": reference, "compile": torch.compile(reference, dynamic=False)}
    compare(
        harness.Problem(
            case,
            {name: lambda op=op: run(op, logprobs_T, arguments) for name, op in ops.items()},
            floor=harness.stream_floor("20 bytes a token", BYTES_READ * T, BYTES_WRITTEN * T),
            check=harness.agrees_with(exact, 1e-5),
            gradient_bytes=BYTES_WRITTEN * T,
        )
    )
