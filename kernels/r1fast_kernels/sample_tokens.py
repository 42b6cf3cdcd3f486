"""Draw one token per row from logits.

    p = softmax(logits / temperature), cut to the `top_k` largest, then to the smallest set of mass >= `top_p` of these
    token = the first v, in the order of the vocabulary, with cdf(v) > u;   u = splitmix64(seed) / 2^64
    log-prob under p before both cuts

Memory-bound: s B V bytes (s per logit) and B V exponentials, whatever is drawn: the cdf is kept per block, and only the
block in which u falls is read again. A cut needs its smallest token and no sort. C++ finds it by quickselect in about
3 B V steps. Triton narrows it down:

    bound    the largest of each 4,096th logit, kept in the first pass, and what these alone reach: a lower bound, close
             for top_k, and for top_p of a row with few likely tokens
    narrow   a pass over the row for mass or number above seven logits between bound and maximum, as each thread's sums;
             first evenly by value, from the fourth on by bits, which ends
    list     once few tokens are left between, one pass puts these into slots of each thread; the rest of the search
             reads the list. It does not fit (many equal logits, or all in a few threads): the row goes on being read

One more pass sums what stays. A row takes 3 passes for top_k or both and 3 to 5 for top_p where logits are spread like
a model's. At most 17 of fp32, 13 of fp16, 12 of bf16 for one cut: first, last and list, 3 by value, bits / 3.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .dispatch import choose, compute_dtype, register
from .launch import launch
from .wide_rows import LOG2_E, exp2, load_chunks, split_row, unpack


def _uniform(seeds_B: Tensor) -> Tensor:
    """One fp64 number in [0, 1) per seed: splitmix64 (Steele et al., 2014) in wrapping int64, its top 52 bits."""

    def xor_shift(x: Tensor, bits: int) -> Tensor:
        return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))  # >> on int64 copies the sign: mask it off

    x = seeds_B + (0x9E3779B97F4A7C15 - (1 << 64))
    x = xor_shift(x, 30) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = xor_shift(x, 27) * (0x94D049BB133111EB - (1 << 64))
    x = xor_shift(x, 31)
    # 52 bits and not 53: u * total must stay below total after rounding, else the search runs off the end.
    return ((x >> 12) & ((1 << 52) - 1)).to(torch.float64) * 2.0**-52


def _truncate(weights_BV: Tensor, logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """The weights, 0 where a token is cut off."""
    order_BV = logits_BV.argsort(dim=-1, descending=True, stable=True)
    sorted_BV = weights_BV.gather(1, order_BV)
    if top_k > 0:
        sorted_BV[:, top_k:] = 0
    cdf_BV = sorted_BV.cumsum(-1, dtype=torch.float64)
    # A token stays while the mass before it is short of top_p; the first always does.
    sorted_BV[cdf_BV - sorted_BV >= top_p * cdf_BV[:, -1:]] = 0
    return torch.empty_like(weights_BV).scatter_(1, order_BV, sorted_BV)


def sample_tokens_reference(
    logits_BV: Tensor, seeds_B: Tensor | None, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """The specification; greedy at temperature 0. Every step works row by row: a row's draw ignores its neighbours."""
    logits_BV = logits_BV.to(compute_dtype(logits_BV))
    z_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / (temperature or 1.0)
    kept_BV = weights_BV = z_BV.exp()
    if seeds_B is None or temperature == 0:
        ids_B = logits_BV.argmax(-1)
    else:
        if top_k > 0 or top_p < 1:
            kept_BV = _truncate(weights_BV, logits_BV, top_k, top_p)
        cdf_BV = kept_BV.cumsum(-1, dtype=torch.float64)  # in fp32, tokens of a 150k vocabulary would merge
        target_B1 = _uniform(seeds_B)[:, None] * cdf_BV[:, -1:]
        # right=True: the first v with cdf(v) > target, so that a token of probability 0 is never drawn.
        ids_B = torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(1)
        ids_B = ids_B.clamp(max=z_BV.shape[1] - 1)  # only a row of NaN is clamped
    logprobs_B = z_BV.gather(1, ids_B[:, None]).squeeze(1) - weights_BV.sum(-1, dtype=torch.float64).log()
    return ids_B, logprobs_B.float()


# One program a row; 4096 fp64 running sums are 16 values a thread.
BLOCK_V, NUM_WARPS = 4096, 8
LEAST_BLOCKS = 64  # so that vocabularies up to 262,144 share their code
# With a cut: without a limit the assembler may aim at three blocks a multiprocessor, and spill. On a Hopper GPU it does
# so of fp32 with both cuts, by Triton 3.9.
MOST_REGISTERS, MOST_BEFORE_HOPPER = 128, 104
MOST_SLOTS = 64  # of each thread, for tokens of which one is the smallest to stay: 64 KB a row of fp32
# Low bits of a logit that are the same in every fp32 of that dtype: the search skips them.
KEY_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}

# 1 / temperature is bounded: 0 * inf would make the largest logit of a nearly greedy row NaN.
MOST_INVERSE = 1e38


@triton.jit
def _uniform_of(seed):
    x = seed.to(tl.uint64) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 12).to(tl.float64) * 2.220446049250313e-16  # 2^-52


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """uint32 that order like the floats; -0 is 0."""
    return _key_of_bits(tl.where(x == 0, 0.0, x), SHIFT)


@triton.jit
def _key_of_bits(x, SHIFT: tl.constexpr):
    """Of value_of the inverse: -0 has a key of its own, which no logit has."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    bits = tl.where((key << SHIFT) >= 0x80000000, (key << SHIFT) ^ 0x80000000, ~(key << SHIFT))
    return ((bits >> SHIFT) << SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def _add(reached, x, least, top, scale, OF_MASS: tl.constexpr):
    """To [LANES] sums each: mass, or number, of those of x [LANES, VALUES] that are at least the logit of the sum."""
    weight = exp2((x - top) * scale) if OF_MASS else 1.0
    return (
        reached[0] + tl.sum(tl.where(x >= least[0], weight, 0.0), axis=1),
        reached[1] + tl.sum(tl.where(x >= least[1], weight, 0.0), axis=1),
        reached[2] + tl.sum(tl.where(x >= least[2], weight, 0.0), axis=1),
        reached[3] + tl.sum(tl.where(x >= least[3], weight, 0.0), axis=1),
        reached[4] + tl.sum(tl.where(x >= least[4], weight, 0.0), axis=1),
        reached[5] + tl.sum(tl.where(x >= least[5], weight, 0.0), axis=1),
        reached[6] + tl.sum(tl.where(x >= least[6], weight, 0.0), axis=1),
    )


@triton.jit
def _fringe(row_ptr, vocab, LANES: tl.constexpr):
    """(lead, whole chunks, [LANES, VALUES]): the first thread takes the lead, the second the tail."""
    VALUES: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    lead, num_chunks = split_row(row_ptr, vocab)
    lanes = tl.arange(0, LANES)
    before = tl.where(lanes == 0, 0, lead + num_chunks * VALUES)
    end = tl.where(lanes == 0, lead, tl.where(lanes == 1, vocab, 0))[:, None]
    # Two values to a word, as in a chunk: else threads would exchange these, or their sums, by barriers.
    columns = before[:, None] + tl.arange(0, 4)[None, :] * (VALUES // 4)
    x = tl.load(row_ptr + columns, mask=columns < end, other=-float("inf")).to(tl.float32)
    if VALUES == 8:
        odd = tl.load(row_ptr + columns + 1, mask=columns + 1 < end, other=-float("inf")).to(tl.float32)
        x = tl.reshape(tl.join(x, odd), [LANES, 8])
    return lead, num_chunks, x


@triton.jit
def _load_four(ptr, left, LANES: tl.constexpr):
    """Of the `left` chunks from here four a thread."""
    CHUNK: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    lanes = tl.arange(0, LANES)
    return (
        load_chunks(ptr, lanes < left, LANES),
        load_chunks(ptr + LANES * CHUNK, LANES + lanes < left, LANES),
        load_chunks(ptr + 2 * LANES * CHUNK, 2 * LANES + lanes < left, LANES),
        load_chunks(ptr + 3 * LANES * CHUNK, 3 * LANES + lanes < left, LANES),
    )


@triton.jit
def _measure(row_ptr, vocab, least, top, scale, OF_MASS: tl.constexpr, LANES: tl.constexpr):
    """For each of seven logits above -inf the mass, or the number, of the tokens with at least that: one pass."""
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // dtype.primitive_bitwidth
    lead, num_chunks, x = _fringe(row_ptr, vocab, LANES)
    none = tl.zeros([LANES], tl.float32)
    reached = _add((none, none, none, none, none, none, none), x, least, top, scale, OF_MASS)
    ptr = row_ptr + lead
    for start in range(0, num_chunks, 4 * LANES):
        a, b, c, d = _load_four(ptr, num_chunks - start, LANES)
        reached = _add(reached, unpack(a, dtype), least, top, scale, OF_MASS)
        reached = _add(reached, unpack(b, dtype), least, top, scale, OF_MASS)
        reached = _add(reached, unpack(c, dtype), least, top, scale, OF_MASS)
        reached = _add(reached, unpack(d, dtype), least, top, scale, OF_MASS)
        ptr += 4 * LANES * CHUNK
    return reached


@triton.jit
def _append(list_ptr, held, x, least, most, LANES: tl.constexpr, SLOTS: tl.constexpr):
    """Those of x [LANES, VALUES] from `least` to `most` into each thread's next slots; how many it holds, or would."""
    lanes, places = tl.arange(0, LANES), tl.arange(0, x.shape[1])
    bits = x.to(tl.uint32, bitcast=True)
    for i in tl.static_range(x.shape[1]):
        # One register of each thread: of [LANES, VALUES] the compiler would make other threads' by a barrier.
        value = tl.sum(tl.where(places == i, bits, 0), axis=1).to(tl.float32, bitcast=True)
        inside = (value >= least) & (value <= most)
        where = list_ptr + held * LANES + lanes
        tl.store(where, value.to(list_ptr.dtype.element_ty), mask=inside & (held < SLOTS))
        held += inside.to(tl.int32)
    return held


@triton.jit
def _collect(row_ptr, vocab, list_ptr, least, most, LANES: tl.constexpr, SLOTS: tl.constexpr):
    """Logits from `least` to `most` into the list [SLOTS, LANES], in one pass; slots used, more than SLOTS: not all."""
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // dtype.primitive_bitwidth
    lanes = tl.arange(0, LANES)
    lead, num_chunks, x = _fringe(row_ptr, vocab, LANES)
    held = _append(list_ptr, tl.zeros([LANES], tl.int32), x, least, most, LANES, SLOTS)
    ptr = row_ptr + lead
    for start in range(0, num_chunks, 4 * LANES):
        a, b, c, d = _load_four(ptr, num_chunks - start, LANES)
        held = _append(list_ptr, held, unpack(a, dtype), least, most, LANES, SLOTS)
        held = _append(list_ptr, held, unpack(b, dtype), least, most, LANES, SLOTS)
        held = _append(list_ptr, held, unpack(c, dtype), least, most, LANES, SLOTS)
        held = _append(list_ptr, held, unpack(d, dtype), least, most, LANES, SLOTS)
        ptr += 4 * LANES * CHUNK
    used = tl.max(held, axis=0)
    for slot in range(tl.min(held, axis=0), tl.minimum(used, SLOTS)):
        tl.store(list_ptr + slot * LANES + lanes, -float("inf"), mask=slot >= held)
    tl.debug_barrier()  # other threads read the list
    return used


@triton.jit
def _load_block(row_ptr, first, vocab, BLOCK_V: tl.constexpr):
    """Places are compared with what is left: numbers of tokens would be a register each."""
    places = tl.arange(0, BLOCK_V)
    return tl.load(row_ptr + first + places, mask=places < vocab - first, other=-float("inf")).to(tl.float32)


@triton.jit
def _bound(columns, target, low, top, scale, OF_MASS: tl.constexpr, SHIFT: tl.constexpr):
    """A key from which some of the row's logits, `columns`, reach the target without the others; else `low`."""
    weight = exp2((columns - top) * scale) if OF_MASS else tl.full(columns.shape, 1.0, tl.float32)
    high = key_of(top, SHIFT)
    smallest = tl.min(tl.where(columns > -float("inf"), columns, float("inf")), axis=0)
    near = tl.minimum(tl.maximum(low, key_of(smallest, SHIFT)), high)
    middle = high  # of equal logits this is the cut
    for _ in range(16):  # to 1/32768 of the values between: it need not be the best bound
        enough = tl.sum(tl.where(columns >= value_of(middle, SHIFT), weight, 0.0), axis=0) >= target
        low = tl.where(enough, tl.maximum(low, middle), low)
        near = tl.where(enough, middle, near)
        high = tl.where(enough, high, tl.maximum(middle, near + 1) - 1)
        half = value_of(near, SHIFT) * 0.5 + value_of(high, SHIFT) * 0.5
        middle = tl.minimum(tl.maximum(key_of(half, SHIFT), near), high)
    return low


@triton.jit
def _between(i: tl.constexpr, low, high, by_value, begins, SHIFT: tl.constexpr):
    """The logit of the i-th of seven keys above `low` up to `high`: an eighth of the keys, or values, to the next.

    Of the first seven the last is `high`, where rows of equal logits end.
    """
    least, most = value_of(low, SHIFT), value_of(high, SHIFT)
    of_value = key_of(least + (most - least) * (i / 8), SHIFT)
    key = tl.where(by_value, of_value, low + i * ((high - low) // 8 + 1))
    key = tl.where(begins & (i == 7), high, key)
    return value_of(tl.maximum(tl.minimum(key, high), low + 1), SHIFT)


@triton.jit
def _select(
    row_ptr, vocab, list_ptr, open, target, low, high, reached, top, scale,
    OF_MASS: tl.constexpr, SHIFT: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The largest key up to `high` such that the tokens from it upwards reach `target`, else `low`; what those above it
    hold; and the list that has all tokens from `low` upwards, else the row, as (pointer, length, whether it may become
    a list).

    Those from `low` upwards hold at most `reached`. A pass leaves an eighth of the keys or values between `low` and
    `high`. Once few tokens can be between them, these become a list, if they fit.
    """
    high = tl.minimum(high, key_of(top, SHIFT))
    low = tl.minimum(low, high)  # a row without a largest token
    wanted = target
    above = tl.full([], 0, tl.float64)
    ptr, length, passes = row_ptr, vocab, 0
    while low < high:
        least = value_of(low, SHIFT)
        weight = exp2((least - top) * scale) if OF_MASS else 1.0
        if (open > 0) & (high - low > 7) & (reached - above.to(tl.float32) <= weight * (SLOTS * LANES // 2)):
            used = _collect(ptr, length, list_ptr, least, value_of(high, SHIFT), LANES, SLOTS)
            open = 0
            if used <= SLOTS:
                # Of the list alone: what is above all of it counts no more.
                ptr, length = list_ptr, used * LANES
                target, reached, above = target - above, reached - above.to(tl.float32), 0.0 * above
        by_value = (passes < 3) & (high - low > 7) & (least > -float("inf"))
        passes += 1
        begins = passes == 1
        least = (
            _between(1, low, high, by_value, begins, SHIFT), _between(2, low, high, by_value, begins, SHIFT),
            _between(3, low, high, by_value, begins, SHIFT), _between(4, low, high, by_value, begins, SHIFT),
            _between(5, low, high, by_value, begins, SHIFT), _between(6, low, high, by_value, begins, SHIFT),
            _between(7, low, high, by_value, begins, SHIFT),
        )  # fmt: skip
        found = _measure(ptr, length, least, top, scale, OF_MASS, LANES)
        for i in tl.static_range(7):
            here = tl.sum(found[i].to(tl.float64), axis=0)
            enough = here >= target
            key = _key_of_bits(least[i], SHIFT)  # anew: seven keys would take a register each through the pass
            nearer = (here < target) & (key <= high)
            above = tl.where(nearer, here, above)
            high = tl.where(enough, high, tl.minimum(high, key - 1))
            reached = tl.where(enough, here.to(tl.float32), reached)
            low = tl.where(enough, key, low)
    above += wanted - target
    if wanted > target:
        ptr, length, open = row_ptr, vocab, 1
    return low, above, ptr, length, open


@triton.jit
def _reachable(rest, number, top, scale, SHIFT: tl.constexpr):
    """A key below which so many tokens have less than the mass `rest` together: none of them need stay."""
    each = tl.log2(rest.to(tl.float32)) - tl.log2(tl.full([], number, tl.float32))
    return key_of(top + (each - 1) / scale, SHIFT)


@triton.jit
def _least_times(part, whole, most):
    """The least number of parts that reach the whole, both fp64; of parts of nothing, more than `most`. A division of
    fp64 is a call, for which all registers of a thread are put aside."""
    most = tl.full([], most, tl.float32)
    quotient = tl.minimum(whole.to(tl.float32) / part.to(tl.float32), most)
    number = tl.where(part > 0, quotient, most).to(tl.int32) - 1
    for _ in tl.static_range(3):
        number += (number * part < whole).to(tl.int32)
    return number


@triton.jit
def _keep(x, cut, num_ties):
    """x, -inf where it is cut off: below `cut`, and on it but for the first `num_ties`."""
    on_cut = x == cut
    return tl.where((x > cut) | (on_cut & (tl.cumsum(on_cut.to(tl.int32), axis=0) <= num_ties)), x, -float("inf"))


@triton.jit
def _sample_kernel(
    logits_ptr, seeds_ptr, ids_ptr, logprobs_ptr, lists_ptr,  # [B, V], [B], [B], [B], [B, SLOTS, LANES]
    stride_b, vocab, inverse_temperature, top_k, top_p, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    SHIFT: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + b * stride_b
    scale = inverse_temperature * LOG2_E
    # One value a block of the row.
    offs_n = tl.arange(0, NUM_BLOCKS)
    maxima = tl.full([NUM_BLOCKS], -float("inf"), tl.float32)
    sums = tl.zeros([NUM_BLOCKS], tl.float32)
    columns = tl.full([BLOCK_V], -float("inf"), tl.float32)  # the largest of each place in a block
    for start in range(0, vocab, BLOCK_V):
        x = _load_block(row_ptr, start, vocab, BLOCK_V)
        if TOP_K or TOP_P:
            columns = tl.maximum(columns, x)
        m = tl.max(x, axis=0)
        m_safe = tl.where(m == -float("inf"), 0.0, m)  # all masked: -inf minus -inf would be NaN
        here = offs_n == start // BLOCK_V
        maxima = tl.where(here, m, maxima)
        sums = tl.where(here, tl.sum(exp2((x - m_safe) * scale), axis=0), sums)
    top = tl.max(maxima, axis=0)
    factors = tl.where(sums == 0, 0.0, exp2((maxima - top) * scale))
    shares = sums.to(tl.float64) * factors  # [NUM_BLOCKS]; fp64: in fp32, tokens of a 150k vocabulary would merge
    total = tl.sum(shares, axis=0)

    cut = tl.full([], 0, tl.uint32)  # a key that no token has
    num_ties = 0
    ties = tl.zeros([NUM_BLOCKS], tl.int32)
    if TOP_K or TOP_P:
        lowest = key_of(tl.full([], -float("inf"), tl.float32), SHIFT)
        highest = key_of(top, SHIFT)
        list_ptr = lists_ptr + b * SLOTS * LANES
        ptr, length, open, high = row_ptr, vocab, 1, highest
        if TOP_K:
            target = tl.full([], top_k, tl.float64)
            cut = _bound(columns, top_k, lowest, top, scale, False, SHIFT)
            # A guess: of one column others may be as large.
            most = tl.where(cut > lowest, top_k, vocab).to(tl.float32)
        else:
            target = total * top_p
            cut = tl.maximum(_reachable(total - target, vocab, top, scale, SHIFT), lowest)
            # Sums in another order: the bound shall hold whatever they round to.
            cut = _bound(columns, target * 1.00001, cut, top, scale, True, SHIFT)
            most = total.to(tl.float32)
        # Both: the cut by number, then the mass above it, then the cut by mass. One search does all: twice the code
        # does not fit into the registers.
        weigh = 0.0 if TOP_K else scale  # exp2(0) is 1
        above = tl.full([], 0, tl.float64)
        for step in range(3 if TOP_K and TOP_P else 1):
            cut, above, ptr, length, open = _select(
                ptr, length, list_ptr, open, target, cut, high, most, top, weigh, TOP_P, SHIFT, LANES, SLOTS
            )
            if TOP_K and TOP_P:
                weigh = scale
                if step == 0:
                    num_ties = top_k - above.to(tl.int32)
                    target = tl.full([], 1e300, tl.float64)  # nothing reaches it
                    high = cut + 1
                if step == 1:
                    tie = exp2((value_of(cut, SHIFT) - top) * scale).to(tl.float64)
                    mass = num_ties * tie + above
                    most = mass.to(tl.float32)
                    target = mass * top_p
                    high = highest
                    cut = tl.maximum(cut, _reachable(mass - target, top_k, top, scale, SHIFT))
        if TOP_P:
            tie = exp2((value_of(cut, SHIFT) - top) * scale).to(tl.float64)
            num_ties = _least_times(tie, target - above, vocab)
        else:
            num_ties = top_k - above.to(tl.int32)
        num_before = 0
        sums = tl.zeros([NUM_BLOCKS], tl.float32)
        at_cut = value_of(cut, SHIFT)
        at_cut_mass = exp2((at_cut - top) * scale)
        for start in range(0, vocab, BLOCK_V):
            x = _load_block(row_ptr, start, vocab, BLOCK_V)
            num_here = tl.sum((x == at_cut).to(tl.int32), axis=0)
            num_kept = tl.minimum(tl.maximum(num_ties - num_before, 0), num_here)
            likelier = tl.sum(tl.where(x > at_cut, exp2((x - top) * scale), 0.0), axis=0)
            here = offs_n == start // BLOCK_V
            ties = tl.where(here, num_before, ties)
            sums = tl.where(here, likelier + num_kept * at_cut_mass, sums)
            num_before += num_here
        shares = sums.to(tl.float64)

    # The block in which the draw falls. Rounding may leave the last cdf short of the target: then it is the last block.
    if GREEDY:
        block = tl.min(tl.where(maxima == top, offs_n, NUM_BLOCKS - 1), axis=0)
    else:
        cdf = tl.cumsum(shares, axis=0)
        target = _uniform_of(tl.load(seeds_ptr + b)) * tl.max(cdf, axis=0)
        block = tl.min(tl.where((shares > 0) & (cdf > target), offs_n, NUM_BLOCKS - 1), axis=0)
        block = tl.minimum(block, tl.max(tl.where(shares > 0, offs_n, 0), axis=0))
        target -= tl.sum(tl.where(offs_n < block, shares, 0.0), axis=0)
    first, places = block * BLOCK_V, tl.arange(0, BLOCK_V)
    x = _load_block(row_ptr, first, vocab, BLOCK_V)
    if GREEDY:
        place = tl.min(tl.where(x == top, places, vocab - 1 - first), axis=0)
    else:
        if TOP_K or TOP_P:
            ties_before = tl.sum(tl.where(offs_n == block, ties, 0), axis=0)
            weight = tl.where(_keep(x, at_cut, num_ties - ties_before) > -float("inf"), exp2((x - top) * scale), 0.0)
        else:
            weight = exp2((x - top) * scale)
        reached = tl.cumsum(weight.to(tl.float64), axis=0) > target
        place = tl.min(tl.where(reached & (weight > 0), places, vocab - 1 - first), axis=0)
        place = tl.minimum(place, tl.max(tl.where(weight > 0, places, 0), axis=0))
    id = first + place
    logit = tl.load(row_ptr + id).to(tl.float32)
    tl.store(ids_ptr + b, id.to(tl.int64))
    tl.store(logprobs_ptr + b, (logit - top) * inverse_temperature - tl.log(total.to(tl.float32)))


def _most_registers(logits_BV: Tensor, by_number: bool, by_mass: bool) -> int | None:
    if dispatch.capability(logits_BV.device)[0] < 9:
        return MOST_BEFORE_HOPPER if by_number or by_mass else None
    return MOST_REGISTERS if by_number and by_mass and logits_BV.dtype == torch.float32 else None


def _launch(
    logits_BV: Tensor, seeds_B: Tensor | None, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    num_rows, vocab = logits_BV.shape
    ids_B, logprobs_B = _fake(logits_BV)
    greedy = temperature == 0
    by_number, by_mass = not greedy and 0 < top_k < vocab, not greedy and top_p < 1
    lanes = 32 * NUM_WARPS
    slots = min(MOST_SLOTS, triton.next_power_of_2(triton.cdiv(vocab, lanes)))
    lists = logits_BV.new_empty(num_rows, slots, lanes) if by_number or by_mass else None
    if num_rows:
        launch(
            _sample_kernel, (num_rows,),
            logits_BV, None if greedy or seeds_B is None else seeds_B.contiguous(), ids_B, logprobs_B, lists,
            logits_BV.stride(0), vocab, min(1 / (temperature or 1.0), MOST_INVERSE), top_k, top_p, GREEDY=greedy,
            TOP_K=by_number, TOP_P=by_mass, SHIFT=KEY_SHIFT[logits_BV.dtype],
            NUM_BLOCKS=max(LEAST_BLOCKS, triton.next_power_of_2(triton.cdiv(vocab, BLOCK_V))), BLOCK_V=BLOCK_V,
            LANES=lanes, SLOTS=slots, num_warps=NUM_WARPS,
            maxnreg=_most_registers(logits_BV, by_number, by_mass),
        )  # fmt: skip
    return ids_B, logprobs_B


def _fake(logits_BV: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    ids_B = logits_BV.new_empty(len(logits_BV), dtype=torch.int64)
    return ids_B, torch.empty_like(ids_B, dtype=torch.float32)


register(
    "sample_tokens",
    "(Tensor logits_BV, Tensor? seeds_B, float temperature, int top_k, float top_p) "
    "-> (Tensor ids_B, Tensor logprobs_B)",
    fake=_fake, launch=_launch,
)  # fmt: skip


@torch.no_grad()
def sample_tokens(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds_B: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row; what a row draws depends on its seed and its logits alone.

    logits_BV     [B, V], any float dtype and row stride; -inf marks a token that cannot be drawn
    temperature   0 = greedy (the largest logit, ties to the lowest id)
    top_k, top_p  0 and 1.0 turn them off; top_k first, then top_p on what is left, renormalised; at a cut, of equal
                  logits the lowest ids stay
    seeds_B       [B] int64, one already-mixed seed per row; None draws them from torch's generator
    Returns ids_B int64 and logprobs_B fp32: of the tempered distribution before truncation, of the untempered one when
    greedy (what a trainer computes for the same token, so that their ratio is 1). A row that holds NaN or +inf, or
    nothing above -inf, gets the log-prob NaN and some id of the vocabulary.
    """
    if logits_BV.dim() != 2 or logits_BV.shape[1] == 0:
        raise ValueError(f"sample_tokens: got logits {tuple(logits_BV.shape)}, expected [B, V] with V > 0")
    if seeds_B is not None and (seeds_B.shape != logits_BV.shape[:1] or seeds_B.dtype != torch.int64):
        raise ValueError(
            f"sample_tokens: got logits {tuple(logits_BV.shape)} and seeds {tuple(seeds_B.shape)} {seeds_B.dtype}, "
            "expected [B, V] and [B] int64"
        )
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"sample_tokens: got temperature={temperature}, top_k={top_k}, top_p={top_p}, expected temperature >= 0, "
            "top_k >= 0 (0 = off) and 0 < top_p <= 1"
        )
    if seeds_B is None and temperature > 0:
        seeds_B = torch.randint(1 << 62, logits_BV.shape[:1], device=logits_BV.device)
    if choose("sample_tokens", impl, logits_BV)[0] == "reference":
        return sample_tokens_reference(logits_BV, seeds_B, temperature, top_k, top_p)
    return torch.ops.r1fast.sample_tokens(logits_BV, seeds_B, temperature, top_k, top_p)
