"""Log-probability of one token per row, and entropy of the row, from logits.

    z = logits / temperature,  logprob = z[target] - lse(z),  entropy = lse(z) - sum_v p_v z_v        (nats)
    d logits = (g_logprob (onehot - p) - g_entropy p (ln p + entropy)) / temperature

Memory-bound. Forward reads 4 T V bytes (fp32) and writes 12 to 16 T; about 5 T V FLOPs and T V exponentials.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import HAS_EXTENSION, compute_dtype, resolve


def selective_logprobs_reference(
    logits_TV: Tensor, target_ids_T: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """The specification. A masked logit (-inf) has probability 0 and adds 0 to the entropy and to every gradient."""
    logp_TV = (logits_TV.to(compute_dtype(logits_TV)) / temperature).log_softmax(-1)
    logprobs_T = logp_TV.gather(1, target_ids_T[:, None]).squeeze(1)
    if not with_entropy:
        return logprobs_T, None
    p_TV = logp_TV.exp()
    entropy_T = -(p_TV * logp_TV.masked_fill(p_TV == 0, 0)).sum(-1)
    return logprobs_T, entropy_T


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


def _fake(logits_TV: Tensor, target_ids_T: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, ...]:
    num_tokens = logits_TV.shape[0]
    return (
        logits_TV.new_empty(num_tokens),
        logits_TV.new_empty(num_tokens if with_entropy else 0),
        logits_TV.new_empty(num_tokens, 2),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TV, target_ids_T, ctx.temperature, ctx.with_entropy = inputs
    _, entropy_T, stats_T2 = output
    ctx.save_for_backward(logits_TV, target_ids_T, entropy_T, stats_T2)


def _backward(
    ctx: Any, grad_logprobs_T: Tensor, grad_entropy_T: Tensor, grad_stats_T2: Tensor
) -> tuple[Tensor, None, None, None]:
    logits_TV, target_ids_T, entropy_T, stats_T2 = ctx.saved_tensors
    max_T1, log_sum_T1 = stats_T2.split(1, dim=1)
    # Subtract the maximum first: with logits near -1e4, z - lse would lose four digits.
    logp_TV = torch.div(logits_TV, ctx.temperature).sub_(max_T1).sub_(log_sum_T1)
    grad_entropy = grad_entropy_T if ctx.with_entropy else None
    grad_TV = logits_gradient(logp_TV, target_ids_T, entropy_T, grad_logprobs_T, grad_entropy, ctx.temperature)
    return grad_TV, None, None, None


if HAS_EXTENSION:
    torch.library.register_fake("r1fast::selective_logprobs", _fake)
    torch.library.register_autograd("r1fast::selective_logprobs", _backward, setup_context=_setup_context)


def _why_not_cpp(logits_TV: Tensor) -> str | None:
    if logits_TV.device.type != "cpu" or logits_TV.dtype != torch.float32:
        return f"the C++ kernel takes float32 on CPU, got {logits_TV.dtype} on {logits_TV.device.type}"
    if not HAS_EXTENSION:
        return "the C++ extension is not built: pip install --no-build-isolation -e ."
    return None


def selective_logprobs(
    logits_TV: Tensor,
    target_ids_T: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of `target_ids_T` under softmax(logits / temperature), and the entropy of that distribution.

    logits_TV      [T, V], any float dtype and row stride; -inf marks a token that cannot be chosen
    target_ids_T   [T] int64, 0 <= id < V
    Returns logprobs_T fp32 (fp64 for fp64 logits), or (logprobs_T, entropy_T) in nats. Both carry gradients.
    """
    if logits_TV.dim() != 2 or target_ids_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"selective_logprobs: got logits {tuple(logits_TV.shape)} and target ids {tuple(target_ids_T.shape)}, "
            "expected [T, V] and [T]"
        )
    if temperature <= 0:
        raise ValueError(f"selective_logprobs: got temperature={temperature}, expected > 0; for greedy use 1.0")
    obstacle = _why_not_cpp(logits_TV)
    default, reason = ("reference", obstacle) if obstacle else ("cpp", "float32 on CPU")
    chosen = resolve("selective_logprobs", impl, default=default, reason=reason or "")
    if chosen == "cpp":
        if obstacle:
            raise ValueError(f'selective_logprobs: impl="cpp" cannot run here: {obstacle}')
        logprobs_T, entropy_T, _ = torch.ops.r1fast.selective_logprobs(
            logits_TV, target_ids_T, temperature, with_entropy
        )
    else:
        logprobs_T, entropy_T = selective_logprobs_reference(logits_TV, target_ids_T, temperature, with_entropy)
    return (logprobs_T, entropy_T) if with_entropy else logprobs_T
