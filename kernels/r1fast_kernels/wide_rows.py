"""Rows of logits read 16 bytes at a time, wherever they begin and however long they are.

    | lead | chunk | chunk | ..        .. | chunk | tail |          a chunk: 16 aligned bytes; lead, tail: less than one

A vocabulary of 151,669 puts every row on another alignment, and pieces cut from it have tails. Lead and tail, together
the fringe, are read value by value.

A thread takes whole chunks, [LANES, VALUES] with a row for each thread. What is kept for each thread asks for no
exchange between threads until the row is read. Chunks are loaded as [LANES, 4] words: two 16-bit values stay in one
register, and take one instruction each to become fp32.
"""

import triton
import triton.language as tl

from . import dispatch

INTERPRETING = tl.constexpr(dispatch.INTERPRETING)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1000.0)  # 2^-1000 is 0, and 0 * -1000 is too: what stands for log2 0 in a product


@triton.jit
def exp2(x):
    """2^x, and 0 below 2^-126: the hardware's instruction without the two around it that tl.exp2 has for these."""
    if INTERPRETING:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def split_row(row_ptr, length):
    """(values before the first whole chunk, number of whole chunks) of a row of `length` values."""
    VALUES: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    past = (row_ptr.to(tl.int64) // (16 // VALUES)) % VALUES
    lead = tl.minimum((VALUES - past) % VALUES, length).to(tl.int32)
    return lead, (length - lead) // VALUES


@triton.jit
def load_chunks(ptr, mask, LANES: tl.constexpr):
    """LANES chunks from the aligned `ptr`, [LANES, 4] words; -inf where `mask` [LANES] is false. No mask: None."""
    offs = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    # The hint stands at the last step: of pointers in between the compiler makes others.
    words_ptr = tl.multiple_of(ptr.to(tl.pointer_type(tl.uint32)) + offs, [4, 16])
    if mask is None:
        words = tl.load(words_ptr)
    else:
        dtype: tl.constexpr = ptr.dtype.element_ty
        MINUS_INFINITY: tl.constexpr = (
            0xFF800000 if dtype == tl.float32 else 0xFF80FF80 if dtype == tl.bfloat16 else 0xFC00FC00
        )
        words = tl.load(words_ptr, mask=mask[:, None], other=MINUS_INFINITY)
    return words


@triton.jit
def unpack(words, dtype: tl.constexpr):
    """[LANES, 4] words as [LANES, VALUES] fp32, in the order of memory."""
    if dtype == tl.float32:
        x = words.to(tl.float32, bitcast=True)
    else:
        if dtype == tl.bfloat16:
            low = (words << 16).to(tl.float32, bitcast=True)
            high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            low = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (words >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        x = tl.reshape(tl.join(low, high), [words.shape[0], 8])
    return x


@triton.jit
def fringe(length, lead, num_chunks, VALUES: tl.constexpr):
    """(columns, which of them exist) of lead and tail, in two chunks of places."""
    offs = tl.arange(0, 2 * VALUES)
    in_lead = offs < VALUES
    columns = tl.where(in_lead, offs, offs - VALUES + lead + num_chunks * VALUES)
    return columns, columns < tl.where(in_lead, lead, length)
