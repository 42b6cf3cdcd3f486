"""Log-probability of one token per row, and entropy of the row, from logits.

    z = logits / temperature,  logprob = z[target] - lse(z),  entropy = lse(z) - sum_v p_v z_v        (nats)
    d logits = (g_logprob (onehot - p) - g_entropy p (ln p + entropy)) / temperature

Memory-bound. Forward reads s T V bytes (s per logit) and writes 12 to 16 T; backward reads s T V and writes s T V.
About 5 T V FLOPs and T V exponentials each. Four running values make one pass of the forward:

    m = max logit,   l = sum e^d,   w = sum d e^d,   with d = (logit - m) / temperature;   and the target's logit
    when m grows by D temperature:   w <- e^-D (w - D l),   l <- e^-D l
    logprob = d_target - ln l,   entropy = ln l - w / l

The maximum is subtracted before anything else: near logits of -1e4, fp32 z - lse would lose four digits.

In Triton each thread keeps m, l and w of what it reads (wide_rows.py), in powers of two; the threads' are put together
once a row. A bf16 logit takes 9.2 instructions of a Hopper GPU with entropy and 7.0 without; of the gradient 13.4 and
11.4. At its copy rate that GPU has time for 13.7, and for 27 in the gradient, which moves twice the bytes.
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
from .wide_rows import LN_2, LOG2_E, LOWEST, exp2, fringe, load_chunks, split_row, unpack


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


# A step of the fold is four chunks a thread: 64 bytes are under way while 64 are worked on. To put threads together
# costs as much as two steps, so that a tile's shorter rows have fewer threads.
ROW_WARPS, TILE_WARPS = 8, 2
GRADIENT_CHUNKS = 8  # a thread of a program: what comes before the first costs as much as four


@triton.jit
def _shift(m, to, scale):
    """log2 of what turns sums relative to `m` into sums relative to `to`, finite. A sum of nothing has the maximum
    -inf; one of masks that are the lowest number of their dtype is as far away."""
    return tl.maximum((m - to) * scale, LOWEST)


@triton.jit
def _terms(x, m, scale):
    """(d, 2^d): d relative to the maximum, finite where a logit is -inf."""
    d = (x - m) * scale
    return tl.maximum(d, LOWEST), exp2(d)


@triton.jit
def _fold_step(a, b, c, d, m, l, w, scale, WITH_ENTROPY: tl.constexpr):
    """Running m, l, w [LANES] of the threads, with four chunks more for each. w is of powers of two here."""
    m_new = tl.maximum(m, tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), axis=1))
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # all masked so far: -inf minus -inf would be NaN
    d_a, e_a = _terms(a, m_safe[:, None], scale)
    d_b, e_b = _terms(b, m_safe[:, None], scale)
    d_c, e_c = _terms(c, m_safe[:, None], scale)
    d_d, e_d = _terms(d, m_safe[:, None], scale)
    shift = _shift(m, m_safe, scale)
    factor = exp2(shift)
    if WITH_ENTROPY:
        w = factor * (w + shift * l) + tl.sum(d_a * e_a + d_b * e_b + d_c * e_c + d_d * e_d, axis=1)
    return m_new, factor * l + tl.sum(e_a + e_b + e_c + e_d, axis=1), w


# Of these a program reads one value, so that it helps nobody where they begin: with a tile of rows, anywhere.
_A_TOKEN = [f"{name}_ptr" for name in ("ids", "stats", "entropy", "grad_logprobs", "grad_entropy")]


@triton.jit(do_not_specialize_on_alignment=_A_TOKEN)
def _fold_kernel(
    logits_ptr, ids_ptr,  # [T, V], [T]
    state_ptr,  # [T, 4]: m, l, w, the target's logit; or None
    logprobs_ptr, entropy_ptr, stats_ptr,  # [T], [T], [T, 2]; or None
    stride_t, vocab, first_id, inverse_temperature, WITH_ENTROPY: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    t = tl.program_id(0).to(tl.int64)  # T V passes 2^31 at 14k tokens of a 152k vocabulary
    row_ptr = logits_ptr + t * stride_t
    lead, num_chunks = split_row(row_ptr, vocab)
    scale = inverse_temperature * LOG2_E
    m = tl.full([LANES], -float("inf"), tl.float32)
    l = tl.zeros([LANES], tl.float32)
    w = tl.zeros([LANES], tl.float32)
    # The last step, which may be cut off, goes first: its load alone is masked. Each is loaded during the one before.
    whole = tl.maximum(num_chunks - 1, 0) // (4 * LANES) * (4 * LANES)
    ptr, offs = row_ptr + lead, tl.arange(0, LANES)
    rest = num_chunks - whole
    a = load_chunks(ptr + whole * CHUNK, offs < rest, LANES)
    b = load_chunks(ptr + (whole + LANES) * CHUNK, offs + LANES < rest, LANES)
    c = load_chunks(ptr + (whole + 2 * LANES) * CHUNK, offs + 2 * LANES < rest, LANES)
    d = load_chunks(ptr + (whole + 3 * LANES) * CHUNK, offs + 3 * LANES < rest, LANES)
    for _ in range(0, whole, 4 * LANES):
        a_next = load_chunks(ptr, None, LANES)
        b_next = load_chunks(ptr + LANES * CHUNK, None, LANES)
        c_next = load_chunks(ptr + 2 * LANES * CHUNK, None, LANES)
        d_next = load_chunks(ptr + 3 * LANES * CHUNK, None, LANES)
        x = unpack(a, DTYPE), unpack(b, DTYPE), unpack(c, DTYPE), unpack(d, DTYPE)
        m, l, w = _fold_step(*x, m, l, w, scale, WITH_ENTROPY)
        a, b, c, d = a_next, b_next, c_next, d_next
        ptr += 4 * LANES * CHUNK
    x = unpack(a, DTYPE), unpack(b, DTYPE), unpack(c, DTYPE), unpack(d, DTYPE)
    m, l, w = _fold_step(*x, m, l, w, scale, WITH_ENTROPY)

    # The row: its threads, its fringe, and what was folded before.
    columns, here = fringe(vocab, lead, num_chunks, CHUNK)
    x = tl.load(row_ptr + columns, mask=here, other=-float("inf")).to(tl.float32)
    row_m = tl.maximum(tl.max(m, axis=0), tl.max(x, axis=0))
    row_l, row_w, target = 0.0, 0.0, float("nan")
    if state_ptr is not None:
        old_m = tl.load(state_ptr + 4 * t)
        row_l = tl.load(state_ptr + 4 * t + 1)
        row_w = tl.load(state_ptr + 4 * t + 2) * LOG2_E
        target = tl.load(state_ptr + 4 * t + 3)
        row_m = tl.maximum(row_m, old_m)
    m_safe = tl.where(row_m == -float("inf"), 0.0, row_m)
    if state_ptr is not None:
        shift = _shift(old_m, m_safe, scale)
        row_w = exp2(shift) * (row_w + shift * row_l)
        row_l = exp2(shift) * row_l
    shift = _shift(m, m_safe, scale)
    d, e = _terms(x, m_safe, scale)
    row_w += tl.sum(exp2(shift) * (w + shift * l), axis=0) + tl.sum(d * e, axis=0)
    row_l += tl.sum(exp2(shift) * l, axis=0) + tl.sum(e, axis=0)
    row_w *= LN_2

    column = tl.load(ids_ptr + t) - first_id
    here = (column >= 0) & (column < vocab)
    target = tl.where(here, tl.load(row_ptr + column, mask=here, other=0.0).to(tl.float32), target)
    if state_ptr is not None:
        tl.store(state_ptr + 4 * t, row_m)
        tl.store(state_ptr + 4 * t + 1, row_l)
        tl.store(state_ptr + 4 * t + 2, row_w)
        tl.store(state_ptr + 4 * t + 3, target)
    else:
        log_sum = tl.log(row_l)
        tl.store(logprobs_ptr + t, (target - row_m) * inverse_temperature - log_sum)
        tl.store(stats_ptr + 2 * t, row_m)
        tl.store(stats_ptr + 2 * t + 1, log_sum)
        if WITH_ENTROPY:
            tl.store(entropy_ptr + t, log_sum - row_w / row_l)


@triton.jit
def _gradient_of(x, m, scale, log2_sum, factor, offset):
    """p (offset + factor log2 p); factor None: 0."""
    log2_p = (x - m) * scale - log2_sum
    if factor is None:
        weight = offset
    else:
        weight = tl.maximum(log2_p, LOWEST) * factor + offset
    return exp2(log2_p) * weight


@triton.jit
def _store_gradient(ptr, grad, start, num_chunks, target, grad_target, ALIKE: tl.constexpr):
    """LANES chunks from chunk `start` on; `target` is the target's place in them, or outside."""
    LANES: tl.constexpr = grad.shape[0]
    CHUNK: tl.constexpr = grad.shape[1]
    lanes = tl.arange(0, LANES)
    offs = lanes[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if (target >= 0) & (target < LANES * CHUNK):
        grad += tl.where(offs == target, grad_target, 0.0)
    ptr += start * CHUNK + offs
    if ALIKE:
        ptr = tl.multiple_of(ptr, [16 // CHUNK, 16])
    tl.store(ptr, grad.to(ptr.dtype.element_ty), mask=(start + lanes < num_chunks)[:, None])


@triton.jit(do_not_specialize_on_alignment=_A_TOKEN)
def _gradient_kernel(
    logits_ptr, grad_ptr, ids_ptr,  # [T, V], [T, V] or the same, [T]
    stats_ptr, entropy_ptr, grad_logprobs_ptr, grad_entropy_ptr,  # [T, 2], [T], [T], [T] or None
    stride_t, stride_grad_t, vocab, first_id, inverse_temperature,
    ALIKE: tl.constexpr,  # a row of the gradient is aligned as the row of logits is
    LANES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    t = tl.program_id(0).to(tl.int64)
    row_ptr, grad_row_ptr = logits_ptr + t * stride_t, grad_ptr + t * stride_grad_t
    lead, num_chunks = split_row(row_ptr, vocab)
    grad_logprob = tl.load(grad_logprobs_ptr + t)
    live = grad_logprob != 0
    grad_logprob *= inverse_temperature
    offset = -grad_logprob
    if grad_entropy_ptr is None:
        factor: tl.constexpr = None
    else:
        grad_entropy = tl.load(grad_entropy_ptr + t)
        live = live | (grad_entropy != 0)
        grad_entropy *= inverse_temperature
        factor = -grad_entropy * LN_2
        offset -= grad_entropy * tl.load(entropy_ptr + t)
    # A row that no loss reads is not read here either: it may hold anything, and its bytes are spared.
    m = tl.where(live, tl.load(stats_ptr + 2 * t), 0.0)
    log2_sum = tl.where(live, tl.load(stats_ptr + 2 * t + 1) * LOG2_E, 0.0)
    offset = tl.where(live, offset, 0.0)
    scale = inverse_temperature * LOG2_E
    column = tl.load(ids_ptr + t) - first_id
    column = tl.where((column >= 0) & (column < vocab), column, -1).to(tl.int32)

    first, readable, lanes = tl.program_id(1) * (CHUNKS * LANES), tl.where(live, num_chunks, 0), tl.arange(0, LANES)
    for start in range(first, tl.minimum(first + CHUNKS * LANES, num_chunks), 2 * LANES):
        a = load_chunks(row_ptr + lead + start * CHUNK, start + lanes < readable, LANES)
        b = load_chunks(row_ptr + lead + (start + LANES) * CHUNK, start + LANES + lanes < readable, LANES)
        a = _gradient_of(unpack(a, DTYPE), m, scale, log2_sum, factor, offset)
        b = _gradient_of(unpack(b, DTYPE), m, scale, log2_sum, factor, offset)
        at = column - lead - start * CHUNK
        _store_gradient(grad_row_ptr + lead, a, start, num_chunks, at, grad_logprob, ALIKE)
        at -= LANES * CHUNK
        _store_gradient(grad_row_ptr + lead, b, start + LANES, num_chunks, at, grad_logprob, ALIKE)
    if tl.program_id(1) == 0:
        columns, here = fringe(vocab, lead, num_chunks, CHUNK)
        read_v = here & (columns < tl.where(live, vocab, 0))
        x = tl.load(row_ptr + columns, mask=read_v, other=-float("inf")).to(tl.float32)
        grad = _gradient_of(x, m, scale, log2_sum, factor, offset)
        grad += tl.where(columns == column, grad_logprob, 0.0)
        tl.store(grad_row_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=here)


def warps_of(rows_TV: Tensor, most: int) -> int:
    """Of a program: no more than have two chunks a thread."""
    num_chunks = rows_TV.shape[1] * rows_TV.element_size() // 16
    return min(most, triton.next_power_of_2(max(1, num_chunks // 64)))


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
    (num_tokens, vocab), num_warps = logits_TV.shape, warps_of(logits_TV, ROW_WARPS if state_T4 is None else TILE_WARPS)
    if num_tokens:
        launch(
            _fold_kernel, (num_tokens,),
            logits_TV, target_ids_T.contiguous(), state_T4, *outputs, logits_TV.stride(0), vocab, first_id,
            1 / temperature, WITH_ENTROPY=with_entropy, LANES=32 * num_warps, num_warps=num_warps,
        )  # fmt: skip


def _launch_forward(
    logits_TV: Tensor, target_ids_T: Tensor, temperature: float, with_entropy: bool, _: bool
) -> tuple[Tensor, ...]:
    outputs = new_outputs(logits_TV, with_entropy)
    _launch_fold_(None, _unit_columns(logits_TV), target_ids_T, temperature, 0, with_entropy, outputs)
    return outputs


def _launch_gradient(grad_TV: Tensor, logits_TV: Tensor, target_ids_T: Tensor, *given: Any, first_id: int = 0) -> None:
    entropy_T, stats_T2, grad_logprobs_T, grad_entropy_T, temperature = given
    (num_tokens, vocab), num_warps, size = (
        logits_TV.shape,
        warps_of(logits_TV, GRADIENT_CHUNKS // 2),
        logits_TV.element_size(),
    )
    num_pieces = triton.cdiv(vocab * size // 16, GRADIENT_CHUNKS * 32 * num_warps)
    apart = logits_TV.data_ptr() - grad_TV.data_ptr(), size * (logits_TV.stride(0) - grad_TV.stride(0))
    if num_tokens:
        launch(
            _gradient_kernel, (num_tokens, max(1, num_pieces)),
            logits_TV, grad_TV, target_ids_T.contiguous(), stats_T2, entropy_T, grad_logprobs_T.contiguous(),
            None if grad_entropy_T is None else grad_entropy_T.contiguous(), logits_TV.stride(0), grad_TV.stride(0),
            vocab, first_id, 1 / temperature, ALIKE=all(x % 16 == 0 for x in apart), LANES=32 * num_warps,
            CHUNKS=GRADIENT_CHUNKS, num_warps=num_warps,
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
