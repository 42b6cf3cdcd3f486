"""Expert selection of mixture-of-experts layers: DeepSeek-V3 (arXiv 2412.19437, eqs 12-16) and Qwen3-MoE.

    s = sigmoid(logits);  choose by s + bias: the best `topk_group` of `n_group` groups (a group's score is the sum of
    its two best), then the `top_k` best experts of these;  weights = s of the chosen, without the bias
    scoring="softmax" (Qwen3-MoE): s = softmax over all experts

Launch-bound: reads 4 T E bytes, writes 12 T K; the gradient reads 4 T E and writes 4 T E. On a GPU a block of tokens is
one program, and each of the K passes one maximum over numbers that hold score and id, so that ties need no second look:

    64 bits:   score as an unsigned integer that orders like it | 2^31 - 1 - id         (0: already taken, or no expert)

Experts lie in registers by group, [n_group, experts of a group], each padded to a power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import choose, compute_dtype, register
from .ids import check_ids
from .launch import launch
from .sample_tokens import key_of, value_of


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


# Experts of all tokens of one program: 8 values a thread.
BLOCK_SCORES, NUM_WARPS = 1024, 4
GRADIENT_WARPS = 8  # with 4, Triton 3.6 spills for 512 experts
ORDERED_MASKED = tl.constexpr(0x007FFFFF << 31)  # key_of(-inf), without its id
LAST_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ordered(value, id):
    """int64 that order like `value`, ties to the lowest id; above 0. NaN is the largest, as in torch.sort."""
    key = tl.where(value != value, 0xFFFFFFFF, key_of(value, 0).to(tl.int64))
    return (key << 31) | (LAST_ID - id)


@triton.jit
def _value_of_ordered(ordered):
    return value_of((ordered >> 31).to(tl.uint32), 0)


@triton.jit
def _mask_groups(ordered, id, topk_group, NUM_GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr):
    """`ordered` [BLOCK_T, NUM_GROUPS * GROUP], lowered to -inf outside of the best groups. 0 stays 0."""
    in_groups = ordered.reshape(BLOCK_T, NUM_GROUPS, GROUP)
    best = tl.max(in_groups, axis=2)  # [BLOCK_T, NUM_GROUPS]
    second = tl.max(tl.where(in_groups == best[:, :, None], 0, in_groups), axis=2)
    score = _value_of_ordered(best) + tl.where(second == 0, 0.0, _value_of_ordered(second))
    offs_g = tl.arange(0, NUM_GROUPS)[None, :]
    group = tl.where(best == 0, 0, _ordered(score, offs_g.to(tl.int64)))
    for _ in range(topk_group):
        top = tl.max(group, axis=1)[:, None]
        group = tl.where(group == top, 0, group)
    dropped = ((group > 0)[:, :, None] & (in_groups > 0)).reshape(BLOCK_T, NUM_GROUPS * GROUP)
    return tl.where(dropped, ORDERED_MASKED | (LAST_ID - id), ordered)


@triton.jit
def _softmax_of(x, mask):
    """(maximum, sum of exponentials) of each row."""
    m = tl.max(tl.where(mask, x, -float("inf")), axis=1)
    return m, tl.sum(tl.where(mask, tl.exp(x - m[:, None]), 0.0), axis=1)


@triton.jit
def _score_of(x, m, l, SOFTMAX: tl.constexpr):
    return tl.exp(x - m[:, None]) / l[:, None] if SOFTMAX else tl.sigmoid(x)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr, bias_ptr, replay_ptr,  # [T, E], [E], [T, K]
    ids_ptr, weights_ptr, counts_ptr,  # [T, K], [T, K], [E] of 0
    num_tokens, num_experts, n_group, topk_group, top_k, scale,
    SOFTMAX: tl.constexpr, NORM: tl.constexpr, LIMITED: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    row_ptr = logits_ptr + offs_t[:, None] * num_experts
    place = tl.arange(0, NUM_GROUPS * GROUP)
    size = num_experts // n_group
    group = place // GROUP
    offs_e = (group * size + place % GROUP)[None, :]
    mask_e = ((group < n_group) & (place % GROUP < size))[None, :]
    mask = mask_t[:, None] & mask_e
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    mask_k = mask_t[:, None] & (offs_k < top_k)
    choice_ptr = offs_t[:, None] * top_k + offs_k

    if SOFTMAX or replay_ptr is None:
        x = tl.load(row_ptr + offs_e, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, NUM_GROUPS * GROUP]
    m, l = _softmax_of(x, mask_e) if SOFTMAX else (None, None)
    if replay_ptr is None:
        choice = _score_of(x, m, l, SOFTMAX)
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        wide_e = offs_e.to(tl.int64)
        ordered = tl.where(mask_e, _ordered(choice, wide_e), 0)
        if LIMITED:
            ordered = _mask_groups(ordered, wide_e, topk_group, NUM_GROUPS, BLOCK_T, GROUP)
        ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int64)
        for k in range(top_k):
            top = tl.max(ordered, axis=1)[:, None]
            ordered = tl.where(ordered == top, 0, ordered)
            ids = tl.where(offs_k == k, LAST_ID - (top & LAST_ID), ids)
    else:
        ids = tl.load(replay_ptr + choice_ptr, mask=mask_k, other=0)
    tl.store(ids_ptr + choice_ptr, ids, mask=mask_k)

    # Read again instead of picked from registers. An id that is no expert gives NaN and is not counted.
    exists = mask_k & (ids >= 0) & (ids < num_experts)
    chosen = tl.load(row_ptr + ids, mask=exists, other=float("nan")).to(tl.float32)  # [BLOCK_T, BLOCK_K]
    weights = _score_of(chosen, m, l, SOFTMAX)
    if NORM:
        weights /= tl.sum(tl.where(offs_k < top_k, weights, 0.0), axis=1)[:, None] + 1e-20
    tl.store(weights_ptr + choice_ptr, weights * scale, mask=mask_k)
    tl.atomic_add(counts_ptr + ids, tl.full([BLOCK_T, BLOCK_K], 1, tl.int64), mask=exists, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def _route_gradient_kernel(
    logits_ptr, ids_ptr, grad_weights_ptr, grad_ptr,  # [T, E], [T, K], [T, K], [T, E]
    num_tokens, num_experts, top_k, scale, SOFTMAX: tl.constexpr, NORM: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    offs_e = tl.arange(0, BLOCK_E)[None, :]
    mask_e = offs_e < num_experts
    row_ptr = logits_ptr + offs_t[:, None] * num_experts
    x = tl.load(row_ptr + offs_e, mask=mask_t[:, None] & mask_e, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_E]
    m, l = _softmax_of(x, mask_e) if SOFTMAX else (None, None)
    score = _score_of(x, m, l, SOFTMAX)

    if NORM:  # w = s / total:  d s = (d w - sum d w w) / total
        offs_k = tl.arange(0, BLOCK_K)[None, :]
        mask_k = mask_t[:, None] & (offs_k < top_k)
        ids = tl.load(ids_ptr + offs_t[:, None] * top_k + offs_k, mask=mask_k, other=0)
        grad_w = tl.load(grad_weights_ptr + offs_t[:, None] * top_k + offs_k, mask=mask_k, other=0.0)
        chosen = tl.load(row_ptr + ids, mask=mask_k, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_K]
        chosen = tl.where(offs_k < top_k, _score_of(chosen, m, l, SOFTMAX), 0.0)
        total = tl.sum(chosen, axis=1) + 1e-20
        shared = tl.sum(grad_w.to(tl.float32) * (chosen / total[:, None]), axis=1)

    # Expert by expert of a token, not scattered: two choices of one expert (replayed) add up.
    grad = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for k in range(top_k):
        id = tl.load(ids_ptr + offs_t * top_k + k, mask=mask_t, other=0)
        grad_s = tl.load(grad_weights_ptr + offs_t * top_k + k, mask=mask_t, other=0.0).to(tl.float32)
        if NORM:
            grad_s = (grad_s - shared) / total
        grad += tl.where(offs_e == id[:, None], (grad_s * scale)[:, None], 0.0)
    if SOFTMAX:
        grad = score * (grad - tl.sum(tl.where(mask_e, grad * score, 0.0), axis=1)[:, None])
    else:
        grad *= score * (1.0 - score)
    out_ptr = grad_ptr + offs_t[:, None] * num_experts + offs_e
    tl.store(out_ptr, grad.to(grad_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_e)


def _launch(
    logits_TE: Tensor, bias_E: Tensor | None, replay_ids_TK: Tensor | None, top_k: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n_group, topk_group, norm_topk_prob, routed_scaling_factor, scoring = options
    num_tokens, num_experts = logits_TE.shape
    ids_TK, weights_TK, counts_E = _fake(logits_TE, bias_E, replay_ids_TK, top_k)
    counts_E.zero_()
    limited = topk_group < n_group
    n_group = n_group if limited else 1
    num_groups, group = triton.next_power_of_2(n_group), triton.next_power_of_2(num_experts // n_group)
    block = max(1, BLOCK_SCORES // (num_groups * group))
    if num_tokens:
        launch(
            _route_kernel, (triton.cdiv(num_tokens, block),),
            logits_TE.contiguous(), None if bias_E is None else bias_E.contiguous(),
            None if replay_ids_TK is None else replay_ids_TK.contiguous(), ids_TK, weights_TK, counts_E, num_tokens,
            num_experts, n_group, topk_group, top_k, routed_scaling_factor, SOFTMAX=scoring == "softmax",
            NORM=norm_topk_prob, LIMITED=limited, NUM_GROUPS=num_groups, GROUP=group,
            BLOCK_K=triton.next_power_of_2(top_k), BLOCK_T=block, num_warps=NUM_WARPS,
        )  # fmt: skip
    return ids_TK, weights_TK, counts_E


def _launch_gradient(logits_TE: Tensor, expert_ids_TK: Tensor, grad_weights_TK: Tensor, *options: Any) -> Tensor:
    norm_topk_prob, routed_scaling_factor, scoring = options
    (num_tokens, num_experts), top_k = logits_TE.shape, expert_ids_TK.shape[1]
    grad_TE = logits_TE.new_empty(logits_TE.shape)
    block_e = triton.next_power_of_2(num_experts)
    block = max(1, BLOCK_SCORES // block_e)
    if num_tokens:
        launch(
            _route_gradient_kernel, (triton.cdiv(num_tokens, block),),
            logits_TE.contiguous(), expert_ids_TK.contiguous(), grad_weights_TK.contiguous(), grad_TE, num_tokens,
            num_experts, top_k, routed_scaling_factor, SOFTMAX=scoring == "softmax", NORM=norm_topk_prob,
            BLOCK_E=block_e, BLOCK_K=triton.next_power_of_2(top_k), BLOCK_T=block, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
    return grad_TE


def _fake(logits_TE: Tensor, _: Any, __: Any, top_k: int, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    ids_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
    return ids_TK, torch.empty_like(ids_TK, dtype=compute_dtype(logits_TE)), ids_TK.new_empty(num_experts)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[0], output[2])
    ctx.save_for_backward(inputs[0], output[0])
    ctx.options = inputs[6:]


def _backward(ctx: Any, _: Any, grad_weights_TK: Tensor, *__: Any) -> tuple[Tensor | None, ...]:
    logits_TE, expert_ids_TK = ctx.saved_tensors
    gradient = torch.ops.r1fast.route_topk_backward(logits_TE, expert_ids_TK, grad_weights_TK, *ctx.options)
    return gradient, *[None] * 8


register(
    "route_topk",
    "(Tensor logits_TE, Tensor? bias_E, Tensor? replay_ids_TK, int top_k, int n_group, int topk_group, "
    "bool norm_topk_prob, float routed_scaling_factor, str scoring) -> (Tensor expert_ids_TK, Tensor weights_TK, "
    "Tensor tokens_per_expert_E)",
    fake=_fake, launch=_launch, save=_save, backward=_backward,
)  # fmt: skip
register(
    "route_topk_backward",
    "(Tensor logits_TE, Tensor expert_ids_TK, Tensor grad_weights_TK, bool norm_topk_prob, "
    "float routed_scaling_factor, str scoring) -> Tensor",
    fake=lambda logits_TE, *_: logits_TE.new_empty(logits_TE.shape),
    launch=_launch_gradient,
)


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
    chosen, _ = choose("route_topk", impl, router_logits_TE)
    if chosen != "cpp" and replay_ids_TK is not None:
        check_ids("route_topk", "replay_ids_TK", replay_ids_TK, num_experts)
    if chosen == "reference":
        return route_topk_reference(*arguments)
    return torch.ops.r1fast.route_topk(*arguments)
