"""Expert selection of mixture-of-experts layers: DeepSeek-V3 (arXiv 2412.19437, eqs 12-16) and Qwen3-MoE.

    s = sigmoid(logits);  choose by s + bias: the best `topk_group` of `n_group` groups (a group's score is the sum of
    its two best), then the `top_k` best experts of these;  weights = s of the chosen, without the bias
    scoring="softmax" (Qwen3-MoE): s = softmax over all experts

Launch-bound: reads 4 T E bytes, writes 12 T K.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import choose, compute_dtype


def _top_ids(scores: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest of the last dimension, largest first; ties to the lowest id (torch.topk: to any)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def route_topk_reference(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    replay_ids_TK: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    scoring: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification."""
    logits_TE = logits_TE.to(compute_dtype(logits_TE))
    scores_TE = logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE.softmax(-1)
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if topk_group < n_group:
        in_groups = choice_TE.unflatten(1, (n_group, -1))
        group_scores = in_groups.topk(min(2, in_groups.shape[2]), dim=-1).values.sum(-1)
        allowed = torch.zeros_like(group_scores, dtype=torch.bool)
        allowed.scatter_(1, _top_ids(group_scores, topk_group), True)
        # -inf, not 0: a negative bias can push every allowed expert below 0.
        choice_TE = in_groups.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)
    expert_ids_TK = _top_ids(choice_TE, top_k) if replay_ids_TK is None else replay_ids_TK
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    # Integer adds commute: the same counts in any order. torch.bincount would wait for the device.
    chosen = expert_ids_TK.flatten()
    tokens_per_expert_E = chosen.new_zeros(logits_TE.shape[1]).scatter_add_(0, chosen, torch.ones_like(chosen))
    return expert_ids_TK, weights_TK * routed_scaling_factor, tokens_per_expert_E


torch.library.define(
    "r1fast::route_topk",
    "(Tensor logits_TE, Tensor? bias_E, Tensor? replay_ids_TK, int top_k, int n_group, int topk_group, "
    "bool norm_topk_prob, float routed_scaling_factor, str scoring) -> (Tensor expert_ids_TK, Tensor weights_TK, "
    "Tensor tokens_per_expert_E)",
)
torch.library.define(
    "r1fast::route_topk_backward",
    "(Tensor logits_TE, Tensor expert_ids_TK, Tensor grad_weights_TK, bool norm_topk_prob, "
    "float routed_scaling_factor, str scoring) -> Tensor",
)


@torch.library.register_fake("r1fast::route_topk")
def _fake(
    logits_TE: Tensor, bias_E: Tensor | None, replay_ids_TK: Tensor | None, top_k: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    return (
        logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64),
        logits_TE.new_empty(num_tokens, top_k, dtype=compute_dtype(logits_TE)),
        logits_TE.new_empty(num_experts, dtype=torch.int64),
    )


torch.library.register_fake("r1fast::route_topk_backward", lambda logits_TE, *_: torch.empty_like(logits_TE))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[0], output[2])
    ctx.save_for_backward(inputs[0], output[0])
    ctx.options = inputs[6:]


def _backward(ctx: Any, _: Any, grad_weights_TK: Tensor, *__: Any) -> tuple[Tensor | None, ...]:
    logits_TE, expert_ids_TK = ctx.saved_tensors
    gradient = torch.ops.r1fast.route_topk_backward(logits_TE, expert_ids_TK, grad_weights_TK, *ctx.options)
    return gradient, *[None] * 8


torch.library.register_autograd("r1fast::route_topk", _backward, setup_context=_setup_context)


def route_topk(
    router_logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    scoring: str = "sigmoid",
    replay_ids_TK: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose `top_k` of E experts for each token.

    router_logits_TE   [T, E], any float dtype; computed in fp32
    bias_E             [E] fp32 selection bias (e_score_correction_bias), or None
    norm_topk_prob     weights of a token sum to `routed_scaling_factor`
    replay_ids_TK      [T, K] int64, 0 <= id < E: nothing is chosen, these experts get the weights of these logits
    Returns expert_ids_TK int64 (best first, ties to the lowest id), weights_TK fp32 (carries the gradient of the
    logits) and tokens_per_expert_E int64.
    """
    if router_logits_TE.dim() != 2:
        raise ValueError(f"route_topk: got router logits {tuple(router_logits_TE.shape)}, expected [T, E]")
    num_experts = router_logits_TE.shape[1]
    if scoring not in ("sigmoid", "softmax"):
        raise ValueError(f"route_topk: got scoring={scoring!r}, expected sigmoid or softmax")
    if num_experts % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(
            f"route_topk: got {num_experts} experts, n_group={n_group}, topk_group={topk_group}, expected n_group to "
            "divide the experts and 1 <= topk_group <= n_group"
        )
    if not 1 <= top_k <= num_experts // n_group * topk_group:
        raise ValueError(
            f"route_topk: got top_k={top_k}, expected 1 <= top_k <= {num_experts // n_group * topk_group} (experts in "
            "the allowed groups)"
        )
    if replay_ids_TK is not None and replay_ids_TK.shape != (router_logits_TE.shape[0], top_k):
        raise ValueError(
            f"route_topk: got replay ids {tuple(replay_ids_TK.shape)}, expected [{router_logits_TE.shape[0]}, {top_k}]"
        )
    arguments = (
        router_logits_TE, bias_E, replay_ids_TK, top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor,
        scoring,
    )  # fmt: skip
    if choose("route_topk", impl, router_logits_TE) == "reference":
        return route_topk_reference(*arguments)
    return torch.ops.r1fast.route_topk(*arguments)
