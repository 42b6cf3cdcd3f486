"""The whole head of a GRPO update: hidden states and rewards in, loss out, gradients to hidden and weight.

    grpo_loss(linear_logprobs(hidden, weight, targets, temperature), ...)          masked tokens never reach the product

Compute-bound, T counting unmasked tokens only. With token-level ratios a token's gradient depends on its own log-prob
and on numbers known before, so it is formed in the forward pass, tile by tile: 6 T D V FLOPs where computing the logits
again would take 8.

    tall tile of logits -> log-probs -> grpo_loss of these rows -> gradient of the logits, in place -> two products
                                        all tiles: loss and metrics of the whole

A sequence-level ratio needs all log-probs of its sample: the same way where one tile holds all tokens, else
linear_logprobs and grpo_loss one after the other, with recomputation.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .dispatch import choose, compute_dtype, empty_gradients, register
from .group_advantages import group_advantages
from .grpo_loss import LOSS_SCHEMA, METRICS, grpo_loss, named_metrics, op_arguments
from .grpo_loss_reference import TENSORS, LossArguments
from .head import forward_with_gradient, rows_of_tall_tile
from .ids import check_target_ids
from .linear_cross_entropy import save_gradients, scale_gradients
from .linear_logprobs import check_head, linear_logprobs


def linear_grpo_loss_reference(
    head: tuple[Tensor, Tensor, Tensor], cu_seqlens: Tensor, temperature: float, given: LossArguments, impl: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The specification, with impl="reference": the two ops one after the other. head: hidden, weight, target ids."""
    logprobs_T, entropy_T = linear_logprobs(*head, temperature=temperature, with_entropy=True, impl=impl)
    arguments = {name: getattr(given, name) for name in TENSORS} | given.options._asdict() | {"entropy_T": entropy_T}
    return grpo_loss(logprobs_T, cu_seqlens, impl=impl, **arguments)


def _forward(
    hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor, temperature: float, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs, cu_seqlens, given = others[:2], others[2], others[3:]
    *advantages, old_T, ref_T, sampler_T, mask_T, _ = given[:8]
    num_tokens = hidden_TD.shape[0]
    check_target_ids("linear_grpo_loss", target_ids_T, weight_VD.shape[0])

    def loss_of(rows: slice, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, ...]:
        of_rows = (None if values_T is None else values_T[rows] for values_T in (old_T, ref_T, sampler_T, mask_T))
        boundaries = cu_seqlens.clamp(rows.start, rows.stop) - rows.start
        return torch.ops.r1fast.grpo_loss(logprobs_R, boundaries, *advantages, *of_rows, entropy_R, *given[8:])

    found: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def token_gradient(rows: slice, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, Tensor | None]:
        found[rows.start, rows.stop] = loss_of(rows, logprobs_R, entropy_R)
        _, grad_R, grad_entropy_R, _ = found[rows.start, rows.stop]
        return grad_R, grad_entropy_R if grad_entropy_R.shape == grad_R.shape else None

    logprobs_T, entropy_T, grad_hidden_TD, grad_weight_VD = forward_with_gradient(
        hidden_TD, weight_VD, target_ids_T, temperature, True, token_gradient, *needs
    )
    loss, *_, metrics_M = found.get((0, num_tokens)) or loss_of(slice(0, num_tokens), logprobs_T, entropy_T)
    return loss, metrics_M, grad_hidden_TD, grad_weight_VD


def _fake(hidden_TD: Tensor, weight_VD: Tensor, *others: Any) -> tuple[Tensor, ...]:
    loss, metrics_M = (hidden_TD.new_empty(size, dtype=compute_dtype(hidden_TD)) for size in ((), len(METRICS)))
    return loss, metrics_M, *empty_gradients((hidden_TD, weight_VD), others[2:4])


register(
    "linear_grpo_loss",
    "(Tensor hidden_TD, Tensor weight_VD, Tensor target_ids_T, float temperature, bool needs_hidden, "
    f"bool needs_weight, {LOSS_SCHEMA}) "
    "-> (Tensor loss, Tensor metrics_M, Tensor grad_hidden_TD, Tensor grad_weight_VD)",
    fake=_fake, launch=_forward, device=("cpu", "cuda"), save=save_gradients, backward=scale_gradients,
)  # fmt: skip


def _without_masked(
    hidden_TD: Tensor, target_ids_T: Tensor, cu_seqlens: Tensor, given: LossArguments
) -> tuple[Tensor, Tensor, Tensor, LossArguments]:
    """The same, of the tokens that count alone. Waits for the device: how many there are decides every shape.

    In a graph that is traced they stay, as rows of 0 with target 0 that the loss masks.
    """
    mask_T = given.loss_mask_T
    if mask_T is None:
        return hidden_TD, target_ids_T, cu_seqlens, replace(given, counts_N=cu_seqlens.diff())
    kept_before = torch.nn.functional.pad(mask_T.bool().cumsum(0), (1, 0))[cu_seqlens.long()].int()
    given = replace(given, counts_N=kept_before.diff())
    if torch.compiler.is_compiling():
        masked_T = ~mask_T.bool()
        return hidden_TD.masked_fill(masked_T[:, None], 0), target_ids_T.masked_fill(masked_T, 0), cu_seqlens, given
    kept = mask_T.nonzero().squeeze(1)
    per_token = {
        name: getattr(given, name)[kept]
        for name in ("old_logprobs_T", "ref_logprobs_T", "sampler_logprobs_T")
        if getattr(given, name) is not None
    }
    given = replace(given, loss_mask_T=None, **per_token)
    return hidden_TD.index_select(0, kept), target_ids_T[kept], kept_before, given


def linear_grpo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    cu_seqlens: Tensor,
    *,
    temperature: float = 1.0,
    impl: str | None = None,
    **loss_arguments: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` straight from hidden states, without a T x V buffer when that would be large.

    hidden_TD        [T, D], completion tokens only: row t predicts target_ids_T[t]
    weight_VD        [V, D], same dtype as hidden; may be tied to the embedding, or frozen
    target_ids_T     [T] int64, 0 <= id < V; anything where masked
    cu_seqlens       [N + 1] int32 over these T tokens
    loss_arguments   every other keyword argument of `grpo_loss`: advantages_N, or rewards_N with group_ids_N; ...
                     With a loss_mask_T, masked tokens are dropped before the product, which on a GPU waits for their
                     number (in a compiled graph they are computed); pass None where nothing is masked
    Returns (loss, metrics) of `grpo_loss`, and the metric "entropy": mean over the tokens that count, in nats.
    """
    if found := [name for name in ("entropy_T", "counts_N") if name in loss_arguments]:
        raise TypeError(f"linear_grpo_loss: got {', '.join(found)}, which it finds itself; leave it out")
    hidden_TD, weight_VD = check_head("linear_grpo_loss", hidden_TD, weight_VD, target_ids_T, temperature)
    # The entropy is always there: any tensor in its place stands for it.
    arguments = {**loss_arguments, "entropy_T": target_ids_T}
    given = LossArguments.of("linear_grpo_loss", arguments, hidden_TD.shape[0], cu_seqlens)
    chosen, _ = choose("linear_grpo_loss", impl, hidden_TD)
    hidden_TD, target_ids_T, cu_seqlens, given = _without_masked(hidden_TD, target_ids_T, cu_seqlens, given)
    num_tokens, vocab = hidden_TD.shape[0], weight_VD.shape[0]
    one_tile = num_tokens <= rows_of_tall_tile(hidden_TD, vocab) if chosen != "reference" else False
    lacks_threshold = given.options.top_entropy_quantile < 1 and given.entropy_threshold is None
    if chosen == "reference" or lacks_threshold or (given.needs_whole_samples and not one_tile):
        head = hidden_TD, weight_VD, target_ids_T
        return linear_grpo_loss_reference(head, cu_seqlens, temperature, given, chosen)
    if given.num_items is None:  # which a tile cannot know by itself
        given = replace(given, num_items=num_tokens if given.loss_mask_T is None else given.loss_mask_T.sum())
    if given.rewards_N is not None and given.group_ids_N is not None and not one_tile:
        scale = given.options.scale_rewards
        advantages_N = group_advantages(given.rewards_N, given.group_ids_N, scale=scale, impl=chosen)
        given = replace(given, advantages_N=advantages_N, rewards_N=None, group_ids_N=None)
    learns = torch.is_grad_enabled()
    loss, metrics_M, _, _ = torch.ops.r1fast.linear_grpo_loss(
        hidden_TD, weight_VD, target_ids_T, temperature, learns and hidden_TD.requires_grad,
        learns and weight_VD.requires_grad, cu_seqlens, *op_arguments(given, hidden_TD.device),
    )  # fmt: skip
    return loss, named_metrics(metrics_M, given)
