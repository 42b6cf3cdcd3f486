"""The vocabulary product by tiles: what linear_logprobs, linear_cross_entropy and linear_grpo_loss share.

The product is the vendor's (cuBLAS, MKL, oneDNN); what becomes of a tile of logits is ours (selective_logprobs.py).

    wide tiles   all tokens x some columns    T [ | | | | ]     backward: a column's dWeight is whole in one tile
    tall tiles   some tokens x all columns      [=========]     log-probs are known before the tile is dropped, and with
                                                [=========]     them, for most losses, the gradient: no second product
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .dispatch import compute_dtype
from .torch_private import backward_may_repeat, multiplies_bf16

# Bytes of a tile of logits. On a CPU it should stay near the caches; on a GPU it has to be large enough for the product
# to run at full rate, and goes through memory once each way (4% of the product's time at D = 4096).
WIDE_TILE_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
TALL_TILE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
# More tokens than this are cut, so that wide tiles stay wide; dWeight is then summed over the pieces in fp32.
MAX_ROWS = {"cpu": 8192, "cuda": 16384}
# A CPU's fp32 product of a few hundred rows with all columns runs a fifth slower than in pieces.
COLUMNS = {"cpu": 1024, "cuda": 1 << 62}
# Rows of a tile begin at multiples of these bytes: the vendor's products are slower where a row of 151,669 ends odd.
ROW_BYTES = {"cpu": 1, "cuda": 128}
# Of running values: on a CPU fp64 costs nothing; on a GPU sums over a tile are fp32 already.
STATE_DTYPE = {"cpu": torch.float64, "cuda": torch.float32}
# Without instructions for it torch multiplies bf16 5 to 70 times slower than fp32: there products and tiles are fp32.
WIDENS_BF16 = not multiplies_bf16()


def slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, max(size, 1)))


def tile_dtype(hidden_TD: Tensor) -> torch.dtype:
    widens = WIDENS_BF16 and hidden_TD.device.type == "cpu" and hidden_TD.dtype == torch.bfloat16
    return torch.float32 if widens else hidden_TD.dtype


def row_stride(hidden_TD: Tensor, num_columns: int) -> int:
    """From one row of a tile to the next, in logits."""
    multiple = max(1, ROW_BYTES[hidden_TD.device.type] // tile_dtype(hidden_TD).itemsize)
    return -(-num_columns // multiple) * multiple


def new_tile(hidden_TD: Tensor, num_rows: int, num_columns: int) -> Tensor:
    return hidden_TD.new_empty(num_rows * row_stride(hidden_TD, num_columns), dtype=tile_dtype(hidden_TD))


def rows_of_tall_tile(hidden_TD: Tensor, vocab: int) -> int:
    return max(1, TALL_TILE_BYTES[hidden_TD.device.type] // (vocab * tile_dtype(hidden_TD).itemsize))


def fits_wide_tile(hidden_TD: Tensor, vocab: int) -> bool:
    tile_bytes = hidden_TD.shape[0] * vocab * tile_dtype(hidden_TD).itemsize
    return tile_bytes <= WIDE_TILE_BYTES[hidden_TD.device.type]


def wide_tiles(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[list[slice], list[slice], Tensor]:
    """(pieces of the tokens, pieces of the vocabulary, a buffer for one tile)."""
    num_tokens, vocab = hidden_TD.shape[0], weight_VD.shape[0]
    device = hidden_TD.device.type
    num_rows = max(1, min(num_tokens, MAX_ROWS[device]))
    num_columns = max(1, min(vocab, WIDE_TILE_BYTES[device] // (num_rows * tile_dtype(hidden_TD).itemsize)))
    if num_columns < vocab:
        num_columns = max(64, num_columns // 64 * 64)  # whole cache lines, and whole tiles of the product
    buffer = new_tile(hidden_TD, num_rows, min(num_columns, vocab))
    return list(slices(num_tokens, num_rows)), list(slices(vocab, num_columns)), buffer


def column_pieces(vocab: int, like: Tensor) -> Iterator[slice]:
    """How a CPU takes what is in one piece on a GPU: piece after piece, through all of its steps while it is cached."""
    return slices(vocab, COLUMNS[like.device.type])


def project(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, buffer: Tensor) -> Tensor:
    """logits_TV = hidden weight^T + bias, written into the beginning of `buffer`."""
    num_tokens, vocab = hidden_TD.shape[0], weight_VD.shape[0]
    logits_TV = buffer.as_strided((num_tokens, vocab), (row_stride(hidden_TD, vocab), 1))
    hidden_TD = hidden_TD.to(buffer.dtype)
    for columns in column_pieces(vocab, hidden_TD):
        weight_CD = weight_VD[columns].to(buffer.dtype)
        if bias_V is None:
            torch.mm(hidden_TD, weight_CD.T, out=logits_TV[:, columns])
        else:
            torch.addmm(bias_V[columns].to(buffer.dtype), hidden_TD, weight_CD.T, out=logits_TV[:, columns])
    return logits_TV


def multiply_into(total_XY: Tensor, a_XK: Tensor, b_KY: Tensor, *, add: bool) -> None:
    """total = a b, or total += a b. A total that is wider than its factors takes the product unrounded on a GPU.

    A CPU has no product of bf16 factors into fp32: there each summand is rounded to bf16, and their sum is fp32. A tile
    `a` that was widened to fp32 widens `b` too, and only the total is rounded.
    """
    b_KY = b_KY.to(a_XK.dtype)
    if total_XY.dtype == a_XK.dtype:
        torch.addmm(total_XY, a_XK, b_KY, beta=int(add), out=total_XY)
    elif total_XY.is_cuda:
        torch.addmm(total_XY, a_XK, b_KY, beta=int(add), out_dtype=total_XY.dtype, out=total_XY)
    else:
        for rows in column_pieces(total_XY.shape[0], total_XY):
            product = torch.mm(a_XK[rows], b_KY, out=a_XK.new_empty(len(a_XK[rows]), b_KY.shape[1]))  # past autocast
            total_XY[rows].add_(product) if add else total_XY[rows].copy_(product)


def new_state(num_tokens: int, device: torch.device) -> Tensor:
    """[T, 4] running (max, sum, sum of the entropy's terms, logit of the target) for `fold_logits_`."""
    state_T4 = torch.zeros(num_tokens, 4, dtype=STATE_DTYPE[device.type], device=device)
    state_T4[:, 0].fill_(-torch.inf)
    state_T4[:, 3].fill_(torch.nan)  # until the piece with the target has come
    return state_T4


def finish(state_T4: Tensor, temperature: float, with_entropy: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(logprobs_T, entropy_T or empty, stats_T2 for the backward pass) of rows whose logits are all folded."""
    max_T, sum_T, weighted_T, target_T = state_T4.unbind(1)
    log_sum_T = sum_T.log()
    logprobs_T = ((target_T - max_T) / temperature - log_sum_T).to(dtype)
    entropy_T = (log_sum_T - weighted_T / sum_T).to(dtype) if with_entropy else logprobs_T.new_empty(0)
    return logprobs_T, entropy_T, torch.stack([max_T, log_sum_T], 1).to(dtype)


def may_overwrite(saved: Tensor) -> bool:
    """Inside a backward pass: whether nothing can run it again, so that what was saved may be written over.

    Not while it is traced (then the tensor is of a class of its own): a compiled graph must not write over its inputs.
    """
    return type(saved) is Tensor and not backward_may_repeat()


def times(saved: Tensor, factor: Tensor, *, in_place: bool) -> Tensor:
    """saved * factor in a backward pass, written over `saved` where that is allowed and nothing can ask for it again.

    Times 1, which is what backward() of a loss sends, it is `saved` itself; looked at only where that does not wait.
    """
    if type(saved) is Tensor and factor.device.type == "cpu" and factor == 1:
        return saved
    return saved.mul_(factor) if in_place and may_overwrite(saved) else saved * factor


def forward_with_gradient(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    temperature: float,
    with_entropy: bool,
    token_gradient: Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs_T, entropy_T, grad_hidden_TD, grad_weight_VD), by tall tiles: one product forward, two for gradients.

    token_gradient(rows, logprobs_R, entropy_R) gives d loss / d logprobs of these rows, and d loss / d entropy or None;
    they may depend on nothing but these log-probs and what was known before. Gradients that are not needed are empty.
    """
    num_tokens, vocab = hidden_TD.shape[0], weight_VD.shape[0]
    num_tiles = -(-num_tokens // rows_of_tall_tile(hidden_TD, vocab))
    num_rows = -(-num_tokens // max(num_tiles, 1))  # tiles of one height: no product of a last few rows
    logprobs_T = hidden_TD.new_empty(num_tokens, dtype=compute_dtype(hidden_TD))
    entropy_T = torch.empty_like(logprobs_T) if with_entropy else logprobs_T.new_empty(0)
    grad_hidden_TD = hidden_TD.new_empty(hidden_TD.shape if needs_hidden else 0)
    # One tile rounds the weight's gradient once whatever it is kept in; sums over tiles in bf16 would drift.
    sum_dtype = weight_VD.dtype if num_tiles <= 1 else compute_dtype(weight_VD)
    new = weight_VD.new_empty if num_tokens else weight_VD.new_zeros
    grad_weight_VD = new(weight_VD.shape if needs_weight else 0, dtype=sum_dtype)
    pieces = list(column_pieces(vocab, hidden_TD))
    sum_RD = hidden_TD.new_empty(0)
    if needs_hidden:
        sum_RD = torch.empty_like(hidden_TD[:num_rows], dtype=hidden_TD.dtype if len(pieces) == 1 else logprobs_T.dtype)
    strides = [row_stride(hidden_TD, columns.stop - columns.start) for columns in pieces]
    buffer = new_tile(hidden_TD, num_rows, sum(strides))
    ops = torch.ops.r1fast
    for rows in slices(num_tokens, num_rows):
        hidden_RD, ids_R = hidden_TD[rows], target_ids_T[rows]
        state_R4 = new_state(len(ids_R), ids_R.device)
        tiles = []
        for columns, free in zip(pieces, buffer.split([num_rows * stride for stride in strides])):
            tiles.append(project(hidden_RD, weight_VD[columns], None, free))
            ops.fold_logits_(state_R4, tiles[-1], ids_R, temperature, columns.start, with_entropy)
        logprobs_T[rows], entropy_R, stats_R2 = finish(state_R4, temperature, with_entropy, logprobs_T.dtype)
        if with_entropy:
            entropy_T[rows] = entropy_R
        if not (needs_hidden or needs_weight):
            continue
        gradients = token_gradient(rows, logprobs_T[rows], entropy_R)
        sum_RD = sum_RD[: len(ids_R)]
        for columns, tile_RC in zip(pieces, tiles):
            ops.selective_logprobs_backward_(
                tile_RC, ids_R, entropy_R, stats_R2, *gradients, temperature, first_id=columns.start
            )
            if needs_hidden:
                multiply_into(sum_RD, tile_RC, weight_VD[columns], add=columns.start > 0)
            if needs_weight:
                multiply_into(grad_weight_VD[columns], tile_RC.T, hidden_RD, add=rows.start > 0)
        if needs_hidden:
            grad_hidden_TD[rows] = sum_RD
    return logprobs_T, entropy_T, grad_hidden_TD, grad_weight_VD.to(weight_VD.dtype)
