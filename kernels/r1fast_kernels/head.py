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

# Bytes of a tile of logits. On a CPU it should stay near the caches; on a GPU it has to be large enough for the product
# to run at full rate, and goes through memory once each way (4% of the product's time at D = 4096).
WIDE_TILE_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
TALL_TILE_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
# More tokens than this are cut, so that wide tiles stay wide; dWeight is then summed over the pieces in fp32.
MAX_ROWS = {"cpu": 8192, "cuda": 16384}
# A CPU's fp32 product of a few hundred rows with all columns runs a fifth slower than in pieces.
CPU_COLUMNS = 1024


def slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, max(size, 1)))


def rows_of_tall_tile(hidden_TD: Tensor, vocab: int) -> int:
    return max(1, TALL_TILE_BYTES[hidden_TD.device.type] // (vocab * hidden_TD.element_size()))


def fits_wide_tile(hidden_TD: Tensor, vocab: int) -> bool:
    return hidden_TD.shape[0] * vocab * hidden_TD.element_size() <= WIDE_TILE_BYTES[hidden_TD.device.type]


def wide_tiles(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[list[slice], list[slice], Tensor]:
    """(pieces of the tokens, pieces of the vocabulary, a buffer for one tile)."""
    num_tokens, vocab = hidden_TD.shape[0], weight_VD.shape[0]
    device = hidden_TD.device.type
    num_rows = max(1, min(num_tokens, MAX_ROWS[device]))
    num_columns = max(1, min(vocab, WIDE_TILE_BYTES[device] // (num_rows * hidden_TD.element_size())))
    if num_columns < vocab:
        num_columns = max(64, num_columns // 64 * 64)  # whole cache lines, and whole tiles of the product
    return list(slices(num_tokens, num_rows)), list(slices(vocab, num_columns)), hidden_TD.new_empty(
        num_rows * min(num_columns, vocab)
    )  # fmt: skip


def project(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, buffer: Tensor) -> Tensor:
    """logits_TV = hidden weight^T + bias, written into the beginning of `buffer`."""
    num_tokens, vocab = hidden_TD.shape[0], weight_VD.shape[0]
    logits_TV = buffer[: num_tokens * vocab].view(num_tokens, vocab)
    for columns in _column_pieces(vocab, hidden_TD):
        if bias_V is None:
            torch.mm(hidden_TD, weight_VD[columns].T, out=logits_TV[:, columns])
        else:
            torch.addmm(bias_V[columns], hidden_TD, weight_VD[columns].T, out=logits_TV[:, columns])
    return logits_TV


def _column_pieces(vocab: int, like: Tensor) -> Iterator[slice]:
    return slices(vocab, CPU_COLUMNS if like.device.type == "cpu" else vocab)


def multiply_into(total_XY: Tensor, a_XK: Tensor, b_KY: Tensor, *, add: bool) -> None:
    """total = a b, or total += a b. A total that is wider than its factors takes the product unrounded on a GPU.

    A CPU has no product of bf16 factors into fp32: there each summand is rounded to bf16, and their sum is fp32.
    """
    if total_XY.dtype == a_XK.dtype:
        torch.addmm(total_XY, a_XK, b_KY, beta=int(add), out=total_XY)
    elif total_XY.device.type == "cuda":
        torch.addmm(total_XY, a_XK, b_KY, beta=int(add), out_dtype=total_XY.dtype, out=total_XY)
    else:
        for rows in _column_pieces(total_XY.shape[0], total_XY):
            product = a_XK[rows] @ b_KY
            total_XY[rows].add_(product) if add else total_XY[rows].copy_(product)


def may_overwrite(saved: Tensor) -> bool:
    """Inside a backward pass: whether nothing can run it again, so that what was saved may be written over.

    Not while it is traced (then the tensor is of a class of its own): a compiled graph must not write over its inputs.
    """
    return type(saved) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()


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
    token_gradient: Callable[[slice, Tensor, Tensor], Tensor],
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs_T, entropy_T, grad_hidden_TD, grad_weight_VD), by tall tiles: one product forward, two for gradients.

    token_gradient(rows, logprobs_R, entropy_R) gives d loss / d logprobs of these rows; it may depend on nothing but
    these log-probs and what was known before. Gradients that are not needed are empty.
    """
    num_tokens, vocab = hidden_TD.shape[0], weight_VD.shape[0]
    num_tiles = -(-num_tokens // rows_of_tall_tile(hidden_TD, vocab))
    num_rows = -(-num_tokens // max(num_tiles, 1))  # tiles of one height: no product of a last few rows
    logprobs_T = hidden_TD.new_empty(num_tokens, dtype=compute_dtype(hidden_TD))
    entropy_T = torch.empty_like(logprobs_T) if with_entropy else logprobs_T.new_empty(0)
    grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else hidden_TD.new_empty(0)
    # One tile rounds the weight's gradient once whatever it is kept in; sums over tiles in bf16 would drift.
    sum_dtype = weight_VD.dtype if num_tiles <= 1 else compute_dtype(weight_VD)
    grad_weight_VD = weight_VD.new_zeros(weight_VD.shape if needs_weight and not num_tokens else 0)
    if needs_weight and num_tokens:
        grad_weight_VD = torch.empty(weight_VD.shape, dtype=sum_dtype, device=weight_VD.device)
    buffer = hidden_TD.new_empty(num_rows * vocab)
    ops = torch.ops.r1fast
    for rows in slices(num_tokens, num_rows):
        hidden_RD, ids_R = hidden_TD[rows], target_ids_T[rows]
        logits_RV = project(hidden_RD, weight_VD, None, buffer)
        logprobs_T[rows], entropy_R, stats_R2 = ops.selective_logprobs(
            logits_RV, ids_R, temperature, with_entropy, False
        )
        if with_entropy:
            entropy_T[rows] = entropy_R
        if not (needs_hidden or needs_weight):
            continue
        gradient_R = token_gradient(rows, logprobs_T[rows], entropy_R)
        ops.selective_logprobs_backward_(logits_RV, ids_R, entropy_R, stats_R2, gradient_R, None, temperature)
        if needs_hidden:
            multiply_into(grad_hidden_TD[rows], logits_RV, weight_VD, add=False)
        if needs_weight:
            for columns in _column_pieces(vocab, weight_VD):
                multiply_into(grad_weight_VD[columns], logits_RV[:, columns].T, hidden_RD, add=rows.start > 0)
    return logprobs_T, entropy_T, grad_hidden_TD, grad_weight_VD.to(weight_VD.dtype)
