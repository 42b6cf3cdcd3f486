"""Log-probability of one token per row, and entropy of the row, from logits.

    z = logits / temperature,  logprob = z[target] - lse(z),  entropy = lse(z) - sum_v p_v z_v        (nats)
    d logits = (g_logprob (onehot - p) - g_entropy p (ln p + entropy)) / temperature

Memory-bound. Forward reads s T V bytes (s per logit) and writes 12 to 16 T; backward reads s T V and writes s T V.
About 5 T V FLOPs and T V exponentials each. Four running values make one pass of the forward:

    m = max logit,   l = sum e^d,   w = sum d e^d,   with d = (logit - m) / temperature;   and the target's logit
    when m grows by D temperature:   w <- e^-D (w - D l),   l <- e^-D l
    logprob = d_target - ln l,   entropy = ln l - w / l

The maximum is subtracted before anything else: near logits of -1e4, fp32 z - lse would lose four digits.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import choose, compute_dtype, register
from .ids import check_target_ids
from .launch import launch


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


# One program a row; 8192 columns of bf16 are 32 values a thread. Wider spills, narrower waits more for reductions.
FOLD_BLOCK_V, FOLD_WARPS = 8192, 8
GRADIENT_BLOCK_V, GRADIENT_WARPS = 4096, 8


@triton.jit
def _fold_kernel(
    logits_ptr, ids_ptr,  # [T, V], [T]
    state_ptr,  # [T, 4]: m, l, w, the target's logit; or None
    logprobs_ptr, entropy_ptr, stats_ptr,  # [T], [T], [T, 2]; or None
    stride_t, vocab, first_id, inverse_temperature, WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)  # T V passes 2^31 at 14k tokens of a 152k vocabulary
    row_ptr = logits_ptr + t * stride_t
    if state_ptr is not None:
        m = tl.load(state_ptr + 4 * t)
        l = tl.load(state_ptr + 4 * t + 1)
        w = tl.load(state_ptr + 4 * t + 2)
        target = tl.load(state_ptr + 4 * t + 3)
    else:
        m, l, w, target = -float("inf"), 0.0, 0.0, float("nan")
    for start in range(0, vocab, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < vocab
        x = tl.load(row_ptr + offs_v, mask=mask_v, other=-float("inf")).to(tl.float32)  # [BLOCK_V]
        m_new = tl.maximum(m, tl.max(x, axis=0))
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # all masked so far: -inf minus -inf would be NaN
        d = (x - m_safe) * inverse_temperature
        e = tl.exp(d)
        shift = tl.where(l > 0, (m - m_safe) * inverse_temperature, 0.0)
        factor = tl.exp(shift)
        if WITH_ENTROPY:
            w = factor * (w + shift * l) + tl.sum(tl.where(e > 0, d * e, 0.0), axis=0)
        l = factor * l + tl.sum(e, axis=0)
        m = m_new
    column = tl.load(ids_ptr + t) - first_id
    here = (column >= 0) & (column < vocab)
    target = tl.where(here, tl.load(row_ptr + column, mask=here, other=0.0).to(tl.float32), target)
    if state_ptr is not None:
        tl.store(state_ptr + 4 * t, m)
        tl.store(state_ptr + 4 * t + 1, l)
        tl.store(state_ptr + 4 * t + 2, w)
        tl.store(state_ptr + 4 * t + 3, target)
    else:
        log_sum = tl.log(l)
        tl.store(logprobs_ptr + t, (target - m) * inverse_temperature - log_sum)
        tl.store(stats_ptr + 2 * t, m)
        tl.store(stats_ptr + 2 * t + 1, log_sum)
        if WITH_ENTROPY:
            tl.store(entropy_ptr + t, log_sum - w / l)


@triton.jit
def _gradient_kernel(
    logits_ptr, grad_ptr, ids_ptr,  # [T, V], [T, V] or the same, [T]
    stats_ptr, entropy_ptr, grad_logprobs_ptr, grad_entropy_ptr,  # [T, 2], [T], [T], [T] or None
    stride_t, stride_grad_t, vocab, first_id, inverse_temperature, BLOCK_V: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    grad_logprob = tl.load(grad_logprobs_ptr + t)
    live = grad_logprob != 0
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + t)
        live = live | (grad_entropy != 0)
    # A row that no loss reads is not read here either: it may hold anything, and its bytes are spared.
    read_v = offs_v < tl.where(live, vocab, 0)
    x = tl.load(logits_ptr + t * stride_t + offs_v, mask=read_v, other=0.0).to(tl.float32)  # [BLOCK_V]
    logp = (x - tl.load(stats_ptr + 2 * t)) * inverse_temperature - tl.load(stats_ptr + 2 * t + 1)
    p = tl.exp(logp)
    grad = -grad_logprob * p
    if grad_entropy_ptr is not None:
        # p = 0 also where logits are -inf: ln p must not turn the product into NaN.
        surprise = tl.where(p > 0, logp, 0.0) + tl.load(entropy_ptr + t)
        grad -= grad_entropy * p * surprise
    column = tl.load(ids_ptr + t) - first_id
    grad += tl.where(offs_v == column, grad_logprob, 0.0)
    grad = tl.where(live, grad * inverse_temperature, 0.0)
    tl.store(grad_ptr + t * stride_grad_t + offs_v, grad.to(grad_ptr.dtype.element_ty), mask=offs_v < vocab)


def block_v(vocab: int, largest: int) -> int:
    """Columns of one step: a power of two, no wider than the row."""
    return min(largest, triton.next_power_of_2(vocab))


def new_outputs(rows_TX: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs_T, entropy_T (empty where not asked for), stats_T2 for the backward pass."""
    num_rows, new = rows_TX.shape[0], partial(rows_TX.new_empty, dtype=compute_dtype(rows_TX))
    return new(num_rows), new(num_rows if with_entropy else 0), new(num_rows, 2)


def _unit_columns(logits_TV: Tensor) -> Tensor:
    return logits_TV if logits_TV.stride(1) == 1 or logits_TV.shape[1] == 1 else logits_TV.contiguous()


def _launch_fold_(
    state_T4: Tensor | None, logits_TV: Tensor, target_ids_T: Tensor, temperature: float, first_id: int,
    with_entropy: bool, outputs: Sequence[Tensor | None] = (None, None, None),
) -> None:  # fmt: skip
    num_tokens, vocab = logits_TV.shape
    if num_tokens:
        launch(
            _fold_kernel, (num_tokens,),
            logits_TV, target_ids_T.contiguous(), state_T4, *outputs, logits_TV.stride(0), vocab, first_id,
            1 / temperature, WITH_ENTROPY=with_entropy, BLOCK_V=block_v(vocab, FOLD_BLOCK_V), num_warps=FOLD_WARPS,
        )  # fmt: skip


def _launch_forward(
    logits_TV: Tensor, target_ids_T: Tensor, temperature: float, with_entropy: bool, _: bool
) -> tuple[Tensor, ...]:
    outputs = new_outputs(logits_TV, with_entropy)
    _launch_fold_(None, _unit_columns(logits_TV), target_ids_T, temperature, 0, with_entropy, outputs)
    return outputs


def _launch_gradient(grad_TV: Tensor, logits_TV: Tensor, target_ids_T: Tensor, *given: Any, first_id: int = 0) -> None:
    entropy_T, stats_T2, grad_logprobs_T, grad_entropy_T, temperature = given
    num_tokens, vocab = logits_TV.shape
    block = block_v(vocab, GRADIENT_BLOCK_V)
    if num_tokens:
        launch(
            _gradient_kernel, (num_tokens, triton.cdiv(vocab, block)),
            logits_TV, grad_TV, target_ids_T.contiguous(), stats_T2, entropy_T, grad_logprobs_T.contiguous(),
            None if grad_entropy_T is None else grad_entropy_T.contiguous(), logits_TV.stride(0), grad_TV.stride(0),
            vocab, first_id, 1 / temperature, BLOCK_V=block, num_warps=GRADIENT_WARPS,
        )  # fmt: skip


def _launch_backward(logits_TV: Tensor, *gradient: Any) -> Tensor:
    grad_TV = torch.empty(logits_TV.shape, dtype=logits_TV.dtype, device=logits_TV.device)
    _launch_gradient(grad_TV, _unit_columns(logits_TV), *gradient)
    return grad_TV


def _launch_backward_(logits_TV: Tensor, *gradient: Any, **tile: Any) -> None:
    if logits_TV.stride(1) != 1 and logits_TV.shape[1] > 1:
        raise ValueError(
            f"selective_logprobs: got logits with column stride {logits_TV.stride(1)}, expected 1 where the gradient "
            "is to be written over them"
        )
    _launch_gradient(logits_TV, logits_TV, *gradient, **tile)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TV, target_ids_T, ctx.temperature, _, ctx.inplace = inputs
    _, entropy_T, stats_T2 = output
    ctx.mark_non_differentiable(stats_T2)
    ctx.save_for_backward(logits_TV, target_ids_T, entropy_T, stats_T2)


def _backward(ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None, _: Any) -> tuple[Any, ...]:
    logits_TV, target_ids_T, entropy_T, stats_T2 = ctx.saved_tensors
    if grad_logprobs_T is None:
        grad_logprobs_T = torch.zeros_like(entropy_T)
    gradient = entropy_T, stats_T2, grad_logprobs_T, grad_entropy_T, ctx.temperature
    if ctx.inplace:
        torch.ops.r1fast.selective_logprobs_backward_(logits_TV, target_ids_T, *gradient)
        torch.autograd.graph.increment_version(logits_TV)  # a second backward pass would read a gradient as logits
        return logits_TV, None, None, None, None
    return torch.ops.r1fast.selective_logprobs_backward(logits_TV, target_ids_T, *gradient), None, None, None, None


_GRADIENT = (
    "Tensor target_ids_T, Tensor entropy_T, Tensor stats_T2, Tensor grad_logprobs_T, Tensor? grad_entropy_T, "
    "float temperature"
)
register(
    "selective_logprobs",
    "(Tensor logits_TV, Tensor target_ids_T, float temperature, bool with_entropy, bool inplace_backward) "
    "-> (Tensor logprobs_T, Tensor entropy_T, Tensor stats_T2)",
    fake=lambda logits_TV, _, __, with_entropy, ___: new_outputs(logits_TV, with_entropy),
    launch=_launch_forward, save=_save, backward=_backward,
)  # fmt: skip
register(
    "selective_logprobs_backward",
    f"(Tensor logits_TV, {_GRADIENT}) -> Tensor",
    fake=lambda logits_TV, *_: logits_TV.new_empty(logits_TV.shape),
    launch=_launch_backward,
)
# The gradient written over the logits, which may be a tile: columns first_id, first_id + 1, .. of the vocabulary.
register(
    "selective_logprobs_backward_",
    f"(Tensor(a!) logits_TV, {_GRADIENT}, *, int first_id=0) -> ()",
    fake=lambda *_, first_id=0: None,
    launch=_launch_backward_,
)
# One more tile of the same rows into their running values.
register(
    "fold_logits_",
    "(Tensor(a!) state_T4, Tensor logits_TV, Tensor target_ids_T, float temperature, int first_id, bool with_entropy) "
    "-> ()",
    fake=lambda *_: None,
    launch=_launch_fold_,
)


def check_temperature(op: str, temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"{op}: got temperature={temperature}, expected > 0; for greedy use 1.0")


def selective_logprobs(
    logits_TV: Tensor,
    target_ids_T: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of `target_ids_T` under softmax(logits / temperature), and the entropy of that distribution.

    logits_TV      [T, V], any float dtype and row stride; -inf marks a token that cannot be chosen
    target_ids_T   [T] int64, 0 <= id < V (on a GPU, where ids are not looked at, another id gives NaN)
    inplace_backward  the backward pass writes the gradient over the logits: saves their size, but only for logits that
                   nothing else reads afterwards. The reference ignores it
    Returns logprobs_T fp32 (fp64 for fp64 logits), or (logprobs_T, entropy_T) in nats. Both carry gradients. A row
    whose two incoming gradients are 0 gets a gradient of 0, whatever it holds.
    """
    if logits_TV.dim() != 2 or target_ids_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"selective_logprobs: got logits {tuple(logits_TV.shape)} and target ids {tuple(target_ids_T.shape)}, "
            "expected [T, V] and [T]"
        )
    check_temperature("selective_logprobs", temperature)
    chosen, _ = choose("selective_logprobs", impl, logits_TV)
    if chosen != "cpp":
        check_target_ids("selective_logprobs", target_ids_T, logits_TV.shape[1])
    if chosen == "reference":
        found: Any = selective_logprobs_reference(logits_TV, target_ids_T, temperature, with_entropy)
    else:
        op = torch.ops.r1fast.selective_logprobs
        found = op(logits_TV, target_ids_T, temperature, with_entropy, inplace_backward)
    return found[:2] if with_entropy else found[0]
