"""route_topk, against its reference and the router of transformers' DeepSeek-V3, from the logits on.

Floor: one read of the logits; with the backward pass one more, and one write of their gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench import harness
from bench.cases import Case
from r1fast_kernels import route_topk

GROUPS, ALLOWED, SCALE = 8, 4, 2.5


def transformers_router(logits_TE: Tensor, bias_E: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """ids and weights of transformers' DeepseekV3TopkRouter.forward (5.17), behind its linear layer."""
    num_experts = logits_TE.shape[1]
    scores = logits_TE.sigmoid()
    choice = scores + bias_E
    group_scores = choice.view(-1, GROUPS, num_experts // GROUPS).topk(2, dim=-1)[0].sum(dim=-1)
    group_idx = torch.topk(group_scores, k=ALLOWED, dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(group_scores)
    group_mask.scatter_(1, group_idx, 1)
    mask = group_mask.unsqueeze(-1).expand(-1, GROUPS, num_experts // GROUPS).reshape(-1, num_experts)
    choice = choice.masked_fill(~mask.bool(), float("-inf"))
    ids = torch.topk(choice, k=top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return ids, weights * SCALE


def by_expert(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """[T, E], 0 where not chosen: the order within K is free."""
    return weights_TK.new_zeros(len(ids_TK), num_experts).scatter(1, ids_TK, weights_TK)


def test_route_topk(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    T, E, K = (case.sizes[letter] for letter in "TEK")
    generator = harness.generator()
    logits_TE = torch.randn(T, E, generator=generator, device=harness.DEVICE).requires_grad_()
    bias_E = torch.randn(E, generator=generator, device=harness.DEVICE) * 0.1
    upstream_TE = torch.randn(T, E, generator=generator, device=harness.DEVICE)

    def ours(logits: Tensor = logits_TE, impl: str | None = None) -> tuple[Tensor, Tensor]:
        ids, weights, _ = route_topk(
            logits, bias_E.to(logits), top_k=K, n_group=GROUPS, topk_group=ALLOWED, routed_scaling_factor=SCALE,
            impl=impl,
        )  # fmt: skip
        return ids, weights

    def with_gradient(forward: Callable[[], tuple[Tensor, Tensor]], leaf: Tensor = logits_TE) -> harness.Run:
        def run() -> list[Tensor]:
            ids, weights = forward()
            (gradient,) = torch.autograd.grad(weights, leaf, upstream_TE.gather(1, ids).to(weights))
            return [ids, weights.detach(), gradient]

        return run

    def found(outputs: harness.Outputs) -> list[Tensor]:
        ids, weights, gradient = outputs
        assert ids is not None and weights is not None and gradient is not None
        return [by_expert(ids, weights, E), gradient]

    leaf = logits_TE.detach().double().requires_grad_()
    exact = with_gradient(lambda: ours(leaf, "reference"), leaf)()
    agrees = harness.agrees_with(found(exact), 1e-5)
    compare(
        harness.Problem(
            case,
            {
                harness.OURS: with_gradient(ours),
                "reference": with_gradient(lambda: ours(impl="reference")),
                "transformers": with_gradient(lambda: transformers_router(logits_TE, bias_E, K)),
            },
            floor=harness.stream_floor("the logits read twice, a gradient written", 8 * T * E, 4 * T * E),
            check=lambda name, outputs: agrees(name, found(outputs)),
            gradient_bytes=4 * T * E,
        )
    )  # fmt: skip
