"""Cross-entropy of a language-model head, without its logits: what SFT, pretraining and distillation minimise.

    loss = -sum_t logprob_t        over the targets that are not ignored;  "mean" divides by their number

The gradient of every log-prob is known beforehand (-1, or -1 / number), so it is formed in the forward pass, while the
tile of logits is still there (head.py): 6 T D V FLOPs, where computing the logits again would take 8. Backward only
scales by the incoming scalar. With reduction "none" the gradients are not known, and linear_logprobs does the work.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import choose, compute_dtype, empty_gradients, register
from .head import forward_with_gradient, times
from .ids import check_target_ids
from .linear_logprobs import check_head, linear_logprobs, linear_logprobs_reference


def linear_cross_entropy_reference(hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor) -> Tensor:
    """The specification: [T] losses of targets that all count."""
    return -linear_logprobs_reference(hidden_TD, weight_VD, target_ids_T, None, 1.0, False)[0]


def _forward(
    hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor, ignore_index: int | None, mean: bool, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape, kept_M = hidden_TD.shape, None
    if ignore_index is not None:
        kept_M = (target_ids_T != ignore_index).nonzero().squeeze(1)
        if len(kept_M) == len(target_ids_T):
            kept_M = None
        else:
            hidden_TD, target_ids_T = hidden_TD.index_select(0, kept_M), target_ids_T[kept_M]
    check_target_ids("linear_cross_entropy", target_ids_T, weight_VD.shape[0])
    scale = 1 / max(len(target_ids_T), 1) if mean else 1.0
    logprobs_T, _, grad_hidden_TD, grad_weight_VD = forward_with_gradient(
        hidden_TD, weight_VD, target_ids_T, 1.0, False,
        lambda _, logprobs_R, __: (torch.full_like(logprobs_R, -scale), None), *needs,
    )  # fmt: skip
    if needs[0] and kept_M is not None:
        grad_hidden_TD = grad_hidden_TD.new_zeros(shape).index_copy_(0, kept_M, grad_hidden_TD)
    return logprobs_T.sum() * -scale, grad_hidden_TD, grad_weight_VD


def _fake(hidden_TD: Tensor, weight_VD: Tensor, *others: Any) -> tuple[Tensor, ...]:
    loss = hidden_TD.new_empty((), dtype=compute_dtype(hidden_TD))
    return loss, *empty_gradients((hidden_TD, weight_VD), others[-2:])


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """setup_context of an op (hidden, weight, ...) -> (..., grad_hidden, grad_weight)."""
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-2:])


def scale_gradients(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    """Backward of such an op: its gradients, times the one of the loss. In place: a second dWeight may be gigabytes."""
    gradients = [
        times(gradient, grad_loss, in_place=True) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad)
    ]
    return *gradients, *([None] * (ctx.num_inputs - 2))


register(
    "linear_cross_entropy",
    "(Tensor hidden_TD, Tensor weight_VD, Tensor target_ids_T, int? ignore_index, bool mean, bool needs_hidden, "
    "bool needs_weight) -> (Tensor loss, Tensor grad_hidden_TD, Tensor grad_weight_VD)",
    fake=_fake, launch=_forward, device=("cpu", "cuda"), save=save_gradients, backward=scale_gradients,
)  # fmt: skip


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of a language-model head; targets equal to `ignore_index` do not count.

    hidden_TD      [T, D]; weight_VD [V, D], same dtype
    target_ids_T   [T] int64, 0 <= id < V or ignore_index
    ignore_index   with "mean" and "sum" such targets are dropped before the product, which on a GPU waits for how many
                   are left; None = every target counts, without a wait
    reduction      "mean" over the targets that count (0 when none does, where torch gives NaN), "sum", or "none": [T],
                   0 where ignored. Under gradient accumulation use "sum" over the step's global count
    Returns the loss, fp32 (fp64 for fp64).
    """
    hidden_TD, weight_VD = check_head("linear_cross_entropy", hidden_TD, weight_VD, target_ids_T)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: got reduction={reduction!r}, expected mean, sum or none")
    chosen, _ = choose("linear_cross_entropy", impl, hidden_TD)
    if reduction != "none" and chosen != "reference":
        learns = torch.is_grad_enabled()
        return torch.ops.r1fast.linear_cross_entropy(
            hidden_TD, weight_VD, target_ids_T, ignore_index, reduction == "mean", learns and hidden_TD.requires_grad,
            learns and weight_VD.requires_grad,
        )[0]  # fmt: skip
    # Shapes here depend on no value, for torch.compile: what is ignored is not dropped, but is a zero row of target 0.
    ignored_T = torch.zeros_like(target_ids_T, dtype=torch.bool)
    if ignore_index is not None:
        ignored_T = target_ids_T == ignore_index
        hidden_TD, target_ids_T = hidden_TD.masked_fill(ignored_T[:, None], 0), target_ids_T.masked_fill(ignored_T, 0)
    if chosen == "reference":
        check_target_ids("linear_cross_entropy", target_ids_T, weight_VD.shape[0])
        losses_T = linear_cross_entropy_reference(hidden_TD, weight_VD, target_ids_T)
    else:
        losses_T = -linear_logprobs(hidden_TD, weight_VD, target_ids_T, impl=impl)  # type: ignore[operator]
    if ignore_index is not None:
        losses_T = losses_T.masked_fill(ignored_T, 0)
    if reduction == "none":
        return losses_T
    return losses_T.sum() / ((~ignored_T).sum().clamp(min=1) if reduction == "mean" else 1)
