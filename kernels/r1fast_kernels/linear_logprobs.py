"""The language-model head without its logits: hidden states to log-probabilities, entropies and cross-entropy.

    z = (hidden weight^T + bias) / temperature,  logprob = z[target] - lse(z)                  per token
    cross-entropy = -logprob of the targets that are not ignored, averaged

Compute-bound: 2 T D V FLOPs forward, 4 T D V backward, and 2 T D V more where logits are computed again. The bytes that
matter are the ones not written: 4 T V of logits and as many of their gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import choose, compute_dtype
from .selective_logprobs import selective_logprobs, selective_logprobs_reference

# Logits held at one time (256 MB in fp32). Below this a call keeps them for the backward pass, above it works through
# chunks of tokens and computes each chunk's logits twice.
MAX_LOGITS = 1 << 26


def linear_logprobs_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """The specification: all logits at once."""
    return selective_logprobs_reference(F.linear(hidden_TD, weight_VD, bias_V), target_ids_T, temperature, with_entropy)


def logits_gradient(
    logp_TV: Tensor,
    target_ids_T: Tensor,
    entropy_T: Tensor | None,
    grad_logprobs_T: Tensor,
    grad_entropy_T: Tensor | None,
    temperature: float,
) -> Tensor:
    """d loss / d logits from the log-probabilities of all tokens. Pass `grad_entropy_T=None` to leave entropy out."""
    p_TV = logp_TV.exp()
    grad_TV = p_TV * -grad_logprobs_T[:, None]
    if grad_entropy_T is not None and entropy_T is not None:
        # p = 0 also where logits are -inf: ln p must not turn the product into NaN.
        surprise_TV = logp_TV.masked_fill(p_TV == 0, 0) + entropy_T[:, None]
        grad_TV = grad_TV - p_TV * surprise_TV * grad_entropy_T[:, None]
    grad_TV.scatter_add_(1, target_ids_T[:, None], grad_logprobs_T[:, None])
    return grad_TV.div_(temperature)


class _ChunkedLinearLogprobs(torch.autograd.Function):
    """The same numbers with at most `chunk_size` rows of logits alive; backward computes them again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_ids_T: Tensor,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        chunks = [
            linear_logprobs_reference(hidden_CD, weight_VD, ids_C, bias_V, temperature, with_entropy=True)
            for hidden_CD, ids_C in zip(hidden_TD.split(chunk_size), target_ids_T.split(chunk_size))
        ]
        logprobs_T = torch.cat([logprobs_C for logprobs_C, _ in chunks])
        entropy_T = torch.cat([entropy_C for _, entropy_C in chunks if entropy_C is not None])
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_ids_T, entropy_T)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)  # an entropy that no loss uses arrives as None and costs nothing
        return logprobs_T, entropy_T

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, target_ids_T, entropy_T = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if grad_logprobs_T is None:
            grad_logprobs_T = torch.zeros_like(entropy_T)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        # Sums over chunks in the weight's own bf16 would drift: accumulate in fp32, round once.
        sum_dtype = compute_dtype(weight_VD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=sum_dtype) if needs_weight else None
        grad_bias_V = torch.zeros(weight_VD.shape[0], dtype=sum_dtype, device=weight_VD.device) if needs_bias else None
        for start in range(0, hidden_TD.shape[0], ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            logits_CV = F.linear(hidden_TD[rows], weight_VD, bias_V)
            logp_CV = (logits_CV.to(sum_dtype) / ctx.temperature).log_softmax(-1)
            grad_entropy_C = None if grad_entropy_T is None else grad_entropy_T[rows]
            grad_CV = logits_gradient(
                logp_CV, target_ids_T[rows], entropy_T[rows], grad_logprobs_T[rows], grad_entropy_C, ctx.temperature
            )
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(weight_VD.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[rows] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_TD[rows]
        return (
            grad_hidden_TD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None, None, None,
        )  # fmt: skip


def _linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    with_entropy: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor | None]:
    vocab = weight_VD.shape[0]
    if hidden_TD.shape[0] * vocab < MAX_LOGITS:
        if not torch.is_grad_enabled() and impl is None:  # old and reference log-probs: one pass over the logits
            logits_TV = F.linear(hidden_TD, weight_VD, bias_V)
            found = selective_logprobs(logits_TV, target_ids_T, temperature=temperature, with_entropy=with_entropy)
            return found if isinstance(found, tuple) else (found, None)
        return linear_logprobs_reference(hidden_TD, weight_VD, target_ids_T, bias_V, temperature, with_entropy)
    chunk_size = max(1, MAX_LOGITS // vocab)
    return _ChunkedLinearLogprobs.apply(hidden_TD, weight_VD, bias_V, target_ids_T, temperature, chunk_size)


def _check(op: str, hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor) -> None:
    if (
        hidden_TD.dim() != 2
        or weight_VD.dim() != 2
        or hidden_TD.shape[1] != weight_VD.shape[1]
        or target_ids_T.shape != hidden_TD.shape[:1]
    ):
        raise ValueError(
            f"{op}: got hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)} and target ids "
            f"{tuple(target_ids_T.shape)}, expected [T, D], [V, D] and [T]"
        )


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
    weight_VD      [V, D], same dtype as hidden
    target_ids_T   [T] int64, 0 <= id < V
    Returns logprobs_T fp32 (fp64 for fp64), or (logprobs_T, entropy_T) in nats. Both carry gradients.
    """
    _check("linear_logprobs", hidden_TD, weight_VD, target_ids_T)
    if temperature <= 0:
        raise ValueError(f"linear_logprobs: got temperature={temperature}, expected > 0; for greedy use 1.0")
    choose("linear_logprobs", impl, hidden_TD)
    logprobs_T, entropy_T = _linear_logprobs(
        hidden_TD, weight_VD, target_ids_T, bias_V, temperature, with_entropy, impl
    )
    if with_entropy:
        assert entropy_T is not None
        return logprobs_T, entropy_T
    return logprobs_T


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of a language-model head; targets equal to `ignore_index` are dropped before the product.

    reduction   "mean" over the targets that count (0 when none does, where torch gives NaN), "sum", or "none": [T], 0
                where ignored. Under gradient accumulation use "sum" over the step's global count.
    """
    _check("linear_cross_entropy", hidden_TD, weight_VD, target_ids_T)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: got reduction={reduction!r}, expected mean, sum or none")
    choose("linear_cross_entropy", impl, hidden_TD)
    kept = (target_ids_T != ignore_index).nonzero().squeeze(1)
    if kept.numel() < target_ids_T.numel():
        hidden_TD = hidden_TD.index_select(0, kept)
    losses, _ = _linear_logprobs(hidden_TD, weight_VD, target_ids_T[kept], None, 1.0, False, impl)
    if reduction == "none":
        return losses.new_zeros(target_ids_T.shape).index_copy(0, kept, -losses)
    total = -losses.sum()
    return total if reduction == "sum" else total / max(kept.numel(), 1)
