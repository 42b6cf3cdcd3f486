"""The language-model head without its logits: hidden states to log-probabilities and entropies.

    z = (hidden weight^T + bias) / temperature,  logprob = z[target] - lse(z)                  per token

Compute-bound: 2 T D V FLOPs forward, 4 T D V backward, and 2 T D V more for the logits computed again; a frozen weight
saves 2 T D V. The bytes that matter are the ones not written: s T V of logits (s per logit) and as many of their
gradient. Forward folds wide tiles (head.py) into four running values a token; backward computes each tile again, turns
it into its gradient in place, and multiplies that twice. Logits that fit into one tile are kept instead.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import head
from .dispatch import choose, compute_dtype, empty_gradients, product_dtype, register, wanted
from .ids import check_target_ids
from .selective_logprobs import check_temperature, new_outputs, selective_logprobs_reference


def linear_logprobs_reference(
    hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor, bias_V: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor | None]:
    """The specification: all logits at once. options: temperature, with_entropy."""
    return selective_logprobs_reference(F.linear(hidden_TD, weight_VD, bias_V), target_ids_T, *options)


def _forward(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_ids_T: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    (temperature, with_entropy, keep_logits), num_tokens = options, hidden_TD.shape[0]
    check_target_ids("linear_logprobs", target_ids_T, weight_VD.shape[0])
    if head.fits_wide_tile(hidden_TD, weight_VD.shape[0]):
        buffer = head.new_tile(hidden_TD, num_tokens, len(weight_VD))
        logits_TV = head.project(hidden_TD, weight_VD, bias_V, buffer)
        found = torch.ops.r1fast.selective_logprobs(logits_TV, target_ids_T, temperature, with_entropy, False)
        return *found, logits_TV if keep_logits else logits_TV.new_empty(0)
    state_T4 = head.new_state(num_tokens, hidden_TD.device)
    token_pieces, vocab_pieces, buffer = head.wide_tiles(hidden_TD, weight_VD)
    for rows in token_pieces:
        for columns in vocab_pieces:
            bias = None if bias_V is None else bias_V[columns]
            tile = head.project(hidden_TD[rows], weight_VD[columns], bias, buffer)
            torch.ops.r1fast.fold_logits_(
                state_T4[rows], tile, target_ids_T[rows], temperature, columns.start, with_entropy
            )
    return *head.finish(state_T4, temperature, with_entropy, compute_dtype(hidden_TD)), head.new_tile(hidden_TD, 0, 0)


def _backward_kernel(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_ids_T: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not needed. Kept logits are written over."""
    entropy_T, stats_T2, kept_logits_TV, grad_logprobs_T, grad_entropy_T, temperature = given[:6]
    needs_hidden, needs_weight, needs_bias = given[6:]
    vocab = weight_VD.shape[0]
    sum_dtype = compute_dtype(weight_VD)
    if kept_logits_TV.numel():
        token_pieces, vocab_pieces = [slice(0, len(hidden_TD))], list(head.column_pieces(vocab, hidden_TD))
    else:
        token_pieces, vocab_pieces, buffer = head.wide_tiles(hidden_TD, weight_VD)
    hidden_dtype = hidden_TD.dtype if len(vocab_pieces) == 1 else sum_dtype
    weight_dtype = weight_VD.dtype if len(token_pieces) == 1 else sum_dtype
    grad_hidden_TD = hidden_TD.new_zeros(hidden_TD.shape if needs_hidden else 0, dtype=hidden_dtype)
    grad_weight_VD = weight_VD.new_zeros(weight_VD.shape if needs_weight else 0)
    grad_bias_V = weight_VD.new_zeros(vocab if needs_bias else 0, dtype=sum_dtype)
    for columns in vocab_pieces:
        bias = None if bias_V is None else bias_V[columns]
        sum_CD = grad_weight_VD[columns].to(weight_dtype)  # the gradient itself where there is one piece of tokens
        for rows in token_pieces:
            if kept_logits_TV.numel():
                tile = kept_logits_TV[:, columns]
            else:
                tile = head.project(hidden_TD[rows], weight_VD[columns], bias, buffer)
            torch.ops.r1fast.selective_logprobs_backward_(
                tile, target_ids_T[rows], entropy_T[rows], stats_T2[rows], grad_logprobs_T[rows],
                None if grad_entropy_T is None else grad_entropy_T[rows], temperature, first_id=columns.start,
            )  # fmt: skip
            if needs_hidden:
                head.multiply_into(grad_hidden_TD[rows], tile, weight_VD[columns], add=columns.start > 0)
            if needs_weight:
                head.multiply_into(sum_CD, tile.T, hidden_TD[rows], add=rows.start > 0)
            if needs_bias:
                grad_bias_V[columns] += tile.sum(0, dtype=sum_dtype)
        if needs_weight and sum_CD.dtype != grad_weight_VD.dtype:
            grad_weight_VD[columns] = sum_CD
    return grad_hidden_TD.to(hidden_TD.dtype), grad_weight_VD, grad_bias_V.to(weight_VD.dtype)


def _fake(hidden_TD: Tensor, weight_VD: Tensor, *others: Any) -> tuple[Tensor, ...]:
    with_entropy, keep_logits = others[-2:]
    logits_TV = hidden_TD.new_empty(0, dtype=head.tile_dtype(hidden_TD))
    if keep_logits:
        shape = hidden_TD.shape[0], weight_VD.shape[0]
        logits_TV = logits_TV.new_empty_strided(shape, (head.row_stride(hidden_TD, shape[1]), 1))
    return *new_outputs(hidden_TD, with_entropy), logits_TV


def _backward_fake(hidden_TD: Tensor, weight_VD: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return empty_gradients((hidden_TD, weight_VD, weight_VD.new_empty(weight_VD.shape[0])), others[-3:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_TD, weight_VD, bias_V, target_ids_T, ctx.temperature, _, _ = inputs
    _, entropy_T, stats_T2, logits_TV = output
    ctx.mark_non_differentiable(stats_T2, logits_TV)
    ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_ids_T, entropy_T, stats_T2, logits_TV)


def _backward(ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *saved, stats_T2, logits_TV = ctx.saved_tensors
    if grad_logprobs_T is None:
        grad_logprobs_T = torch.zeros_like(stats_T2[:, 0])
    if not head.may_overwrite(logits_TV):
        logits_TV = logits_TV.clone()
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.r1fast.linear_logprobs_backward(
        *saved, stats_T2, logits_TV, grad_logprobs_T, grad_entropy_T, ctx.temperature, *needs
    )
    return *wanted(gradients, needs), None, None, None, None


register(
    "linear_logprobs",
    "(Tensor hidden_TD, Tensor weight_VD, Tensor? bias_V, Tensor target_ids_T, float temperature, bool with_entropy, "
    "bool keep_logits) -> (Tensor logprobs_T, Tensor entropy_T, Tensor stats_T2, Tensor logits_TV)",
    fake=_fake, launch=_forward, device=("cpu", "cuda"), save=_save, backward=_backward,
)  # fmt: skip
register(
    "linear_logprobs_backward",
    "(Tensor hidden_TD, Tensor weight_VD, Tensor? bias_V, Tensor target_ids_T, Tensor entropy_T, Tensor stats_T2, "
    "Tensor(a!) logits_TV, Tensor grad_logprobs_T, Tensor? grad_entropy_T, float temperature, bool needs_hidden, "
    "bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake, launch=_backward_kernel, device=("cpu", "cuda"),
)  # fmt: skip


def check_head(
    op: str, hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Hidden and weight as the op takes them: in autocast's dtype where autocast is on. Raises ValueError."""
    check_temperature(op, temperature)
    fits = hidden_TD.dim() == weight_VD.dim() == 2 and hidden_TD.shape[1] == weight_VD.shape[1]
    if not fits or target_ids_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"{op}: got hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)} and target ids "
            f"{tuple(target_ids_T.shape)}, expected [T, D], [V, D] and [T]"
        )
    if torch.is_autocast_enabled(hidden_TD.device.type):
        dtype = product_dtype(weight_VD)
        return hidden_TD.to(dtype), weight_VD.to(dtype)
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(
            f"{op}: got hidden in {hidden_TD.dtype} and weight in {weight_VD.dtype}, expected one dtype; convert one, "
            "or call under torch.autocast"
        )
    return hidden_TD, weight_VD


def linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_logprobs(hidden @ weight.T + bias, ...)` without a T x V buffer when that would be large.

    hidden_TD      [T, D]; pass only the rows whose log-probability is wanted
    weight_VD      [V, D], same dtype as hidden; may be tied to the embedding, or frozen
    target_ids_T   [T] int64, 0 <= id < V (on a GPU, where ids are not looked at, another id gives NaN)
    Returns logprobs_T fp32 (fp64 for fp64), or (logprobs_T, entropy_T) in nats. Both carry gradients.
    """
    hidden_TD, weight_VD = check_head("linear_logprobs", hidden_TD, weight_VD, target_ids_T, temperature)
    if bias_V is not None:
        if bias_V.shape != weight_VD.shape[:1]:
            raise ValueError(f"linear_logprobs: got bias {tuple(bias_V.shape)}, expected {tuple(weight_VD.shape[:1])}")
        bias_V = bias_V.to(weight_VD.dtype)
    if choose("linear_logprobs", impl, hidden_TD)[0] == "reference":
        check_target_ids("linear_logprobs", target_ids_T, weight_VD.shape[0])
        found: Any = linear_logprobs_reference(hidden_TD, weight_VD, target_ids_T, bias_V, temperature, with_entropy)
    else:
        inputs = hidden_TD, weight_VD, bias_V
        learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        keep_logits = learns and head.fits_wide_tile(hidden_TD, weight_VD.shape[0])
        found = torch.ops.r1fast.linear_logprobs(*inputs, target_ids_T, temperature, with_entropy, keep_logits)
    return found[:2] if with_entropy else found[0]
