"""sample_tokens, against its reference and softmax + multinomial behind the cuts that transformers makes.

Floor: one read of the logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.cases import Case
from r1fast_kernels import sample_tokens

INF = float("inf")


def options_of(mode: str) -> dict[str, Any]:
    if mode == "plain":
        return {}
    name, value = mode.split("=")
    return {name: int(value) if name == "top_k" else float(value)}


def eager(logits_BV: Tensor, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    cut_BV = logits_BV
    if top_k:
        cut_BV = cut_BV.masked_fill(cut_BV < cut_BV.topk(top_k).values[:, -1:], -INF)
    if top_p < 1:
        sorted_BV, order_BV = cut_BV.sort(dim=-1)
        outside_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - top_p
        outside_BV[:, -1] = False
        cut_BV = cut_BV.masked_fill(outside_BV.scatter(1, order_BV, outside_BV), -INF)
    ids_B1 = torch.multinomial(cut_BV.softmax(-1), 1)
    return ids_B1.squeeze(1), logits_BV.log_softmax(-1).gather(1, ids_B1).squeeze(1)


def test_sample_tokens(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    B, V = case.sizes["B"], case.sizes["V"]
    generator, options = harness.generator(), options_of(case.mode)
    logits_BV = torch.randn(B, V, generator=generator, device=harness.DEVICE) * 3
    seeds_B = torch.randint(1 << 62, (B,), generator=generator, device=harness.DEVICE)
    logp_BV = logits_BV.double().log_softmax(-1)
    expected_B, _ = sample_tokens(logits_BV.double(), seeds_B=seeds_B, impl="reference", **options)

    def check(name: str, outputs: harness.Outputs) -> None:
        """Any draw must come with its own log-prob; ours must be the reference's, but where rounding moved an edge."""
        ids_B, logprobs_B = outputs
        atol = 1e-5 if name == harness.OURS else 1e-4  # torch's fp32 log-softmax is off by 3e-5 over 150k tokens
        torch.testing.assert_close(
            logprobs_B.double(), logp_BV.gather(1, ids_B[:, None]).squeeze(1), rtol=1e-5, atol=atol
        )
        if name == harness.OURS and (ids_B != expected_B).sum() > B // 64:
            raise AssertionError(f"{name}: {(ids_B != expected_B).sum()} of {B} draws are not the reference's")

    compare(
        harness.Problem(
            case,
            {
                harness.OURS: lambda: sample_tokens(logits_BV, seeds_B=seeds_B, **options),
                "reference": lambda: sample_tokens(logits_BV, seeds_B=seeds_B, impl="reference", **options),
                "eager": lambda: eager(logits_BV, **options),
            },
            floor=harness.stream_floor("the logits read", 4 * B * V),
            check=check,
        )
    )
