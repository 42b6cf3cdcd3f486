"""The whole head of a GRPO update: hidden states and rewards in, loss out, gradients to hidden and weight.

    grpo_loss(linear_logprobs(hidden, weight, targets, temperature), ...)          masked tokens never reach the product

Compute-bound: 8 T D V FLOPs forward and backward with recomputed logits, T counting unmasked tokens only.
"""

from typing import Any

from torch import Tensor

from .dispatch import choose
from .grpo_loss import grpo_loss
from .linear_logprobs import linear_logprobs


def linear_grpo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    cu_seqlens: Tensor,
    *,
    temperature: float = 1.0,
    loss_mask_T: Tensor | None = None,
    impl: str | None = None,
    **loss_arguments: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` straight from hidden states, without a T x V buffer when that would be large.

    hidden_TD        [T, D], completion tokens only: row t predicts target_ids_T[t]
    weight_VD        [V, D]
    target_ids_T     [T] int64; anything where masked
    cu_seqlens       [N + 1] int32 over these T tokens
    loss_mask_T      [T] bool
    loss_arguments   every other keyword argument of `grpo_loss`
    Returns (loss, metrics) of `grpo_loss`, and the metric "entropy": mean over the tokens that count, in nats.
    """
    if loss_mask_T is not None and loss_mask_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"linear_grpo_loss: got loss_mask_T {tuple(loss_mask_T.shape)}, expected {tuple(hidden_TD.shape[:1])}"
        )
    choose("linear_grpo_loss", impl, hidden_TD)
    if loss_mask_T is None:
        logprobs_T, entropy_T = linear_logprobs(
            hidden_TD, weight_VD, target_ids_T, temperature=temperature, with_entropy=True
        )
    else:
        kept = loss_mask_T.nonzero().squeeze(1)
        kept_logprobs, entropy_T = linear_logprobs(
            hidden_TD.index_select(0, kept), weight_VD, target_ids_T[kept], temperature=temperature, with_entropy=True
        )
        logprobs_T = kept_logprobs.new_zeros(len(target_ids_T)).index_copy(0, kept, kept_logprobs)
    loss, metrics = grpo_loss(logprobs_T, cu_seqlens, loss_mask_T=loss_mask_T, **loss_arguments)
    metrics["entropy"] = entropy_T.detach().sum() / max(len(entropy_T), 1)
    return loss, metrics
