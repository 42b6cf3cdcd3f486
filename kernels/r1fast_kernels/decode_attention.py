"""Attention of one new token per sequence over keys and values that lie in blocks of a shared cache.

    out_b = sum_j p_bj v_j,   p_bj = softmax_j(scale q_b . k_j),   j over the lengths_b tokens of row b

    block_table_b   7 2 9 .      token j is in slot 16 * block_table_b[j // 16] + j % 16
    cache           |0|1|2|...   a block may be in the tables of many rows: samples of a prompt share its blocks

as in PagedAttention (Kwon et al. 2023, arXiv 2309.06180). With a window w a row sees its last w tokens alone; with a
soft cap c scores are c tanh(scale q_b . k_j / c) (Gemma 2, arXiv 2408.00118). In multi-head latent attention (arXiv
2405.04434) keys are the cached latents, values a part of the same, and all query heads read one key head.

Bound by memory: s K (d + e) bytes of a row's tokens (s d where values are a view of keys), for 2 H (d + e) FLOPs; with
128 heads over one latent by the FLOPs.
"""

from typing import Any

import torch
from torch import Tensor

from .decode_attention_triton import BLOCK, launch_decode
from .dispatch import choose, compute_dtype, product_dtype, register
from .ids import check_blocks
from .packed_attention import check_soft_cap


def slots_of(block_table_BN: Tensor, num_tokens: int) -> Tensor:
    """[B, num_tokens]: the slot of each row's token j."""
    token_J = torch.arange(num_tokens, device=block_table_BN.device)
    return block_table_BN.long()[:, token_J // BLOCK] * BLOCK + token_J % BLOCK


def decode_attention_reference(
    q_BHd: Tensor, k_SKd: Tensor, v_SKe: Tensor, block_table_BN: Tensor, lengths_B: Tensor, scale: float,
    window: int | None = None, soft_cap: float | None = None,
) -> Tensor:  # fmt: skip
    """The specification."""
    num_tokens = int(lengths_B.max()) if len(lengths_B) else 0
    token_J = torch.arange(num_tokens, device=q_BHd.device)
    live_BJ = token_J < lengths_B[:, None]
    if window is not None:
        live_BJ &= token_J >= lengths_B[:, None] - window
    slots_BJ = slots_of(block_table_BN, num_tokens).where(live_BJ, 0)
    k_BJKd, v_BJKe = k_SKd[slots_BJ], v_SKe[slots_BJ].masked_fill(~live_BJ[..., None, None], 0)  # 0 * NaN is not 0
    q_BKgd = q_BHd.unflatten(1, (k_SKd.shape[1], -1)).to(k_SKd.dtype)
    scores_BKgJ = torch.einsum("bkgd,bjkd->bkgj", q_BKgd, k_BJKd).to(compute_dtype(q_BHd)) * scale
    scores_BKgJ = scores_BKgJ if soft_cap is None else soft_cap * (scores_BKgJ / soft_cap).tanh()
    probs_BKgJ = scores_BKgJ.masked_fill(~live_BJ[:, None, None], -torch.inf).softmax(-1).to(v_SKe.dtype)
    return torch.einsum("bkgj,bjke->bkge", probs_BKgJ, v_BJKe).flatten(1, 2).to(q_BHd.dtype)


_SCHEMA = (
    "Tensor q_BHd, Tensor k_SKd, Tensor v_SKe, Tensor block_table_BN, Tensor lengths_B, float scale, int? window=None, "
    "float? soft_cap=None"
)


def _fake(q_BHd: Tensor, _: Tensor, v_SKe: Tensor, *others: Any, **counters: Any) -> Tensor:
    return q_BHd.new_empty(*q_BHd.shape[:2], v_SKe.shape[2])


register("decode_attention", f"({_SCHEMA}) -> Tensor", fake=_fake, launch=launch_decode)
# With counters that are there: one launch.
register("decode_attention_counted", f"({_SCHEMA}, *, Tensor(a!) finished) -> Tensor", fake=_fake, launch=launch_decode)


@torch.no_grad()
def decode_attention(
    q_BHd: Tensor,
    k_SKd: Tensor,
    v_SKe: Tensor,
    block_table_BN: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention of B queries, each over the tokens of its own row; no gradient.

    q_BHd            [B, H, d], H a multiple of the K key heads; query head h reads key head h // (H / K)
    k_SKd, v_SKe     [S, K, d] and [S, K, e], the slots of the cache, in blocks of 16; v may be a view of k
    block_table_BN   int32 [B, N]: the blocks of each row, in order; entries behind its length are not read. A GPU
                     starts programs for all N columns: give those of the longest row, a view of a wider table
    lengths_B        int32 [B]: tokens of the row, at least 1, at most 16 N
    scale            on the scores, above 0
    window           tokens at the end of each row that are seen; None: all
    soft_cap         that scaled scores stay within, by a tanh; None: no bound
    Returns out_BHe in the dtype of q; under autocast in its dtype, with q taken to the cache's, which is not rounded.
    What a row gets depends on the row alone: the same bits in any batch.
    """
    out_dtype = product_dtype(q_BHd)
    if torch.is_autocast_enabled(q_BHd.device.type):
        q_BHd = q_BHd.to(k_SKd.dtype)
    (B, H, d), (S, K, _) = q_BHd.shape, k_SKd.shape
    if k_SKd.shape[2] != d or v_SKe.shape[:2] != (S, K) or H % K or S % BLOCK or q_BHd.dtype != k_SKd.dtype:
        raise ValueError(
            f"decode_attention: got q {tuple(q_BHd.shape)} in {q_BHd.dtype}, k {tuple(k_SKd.shape)} in {k_SKd.dtype} "
            f"and v {tuple(v_SKe.shape)}; expected [B, H, d], [S, K, d] and [S, K, e] in one dtype, H a multiple of K "
            f"and S of {BLOCK}"
        )
    if block_table_BN.dim() != 2 or len(block_table_BN) != B or lengths_B.shape != (B,):
        raise ValueError(
            f"decode_attention: got block_table {tuple(block_table_BN.shape)} and lengths {tuple(lengths_B.shape)} for "
            f"{B} rows; expected [B, N] and [B]"
        )
    if block_table_BN.dtype != torch.int32 or lengths_B.dtype != torch.int32:
        raise ValueError(
            f"decode_attention: got block_table in {block_table_BN.dtype}, lengths in {lengths_B.dtype}, expected int32"
        )
    if scale <= 0 or (window is not None and window < 1):
        raise ValueError(f"decode_attention: got {scale=} and {window=}, expected more than 0")
    check_soft_cap("decode_attention", soft_cap)
    chosen, _ = choose("decode_attention", impl, q_BHd)
    if chosen != "cpp":
        check_blocks("decode_attention", block_table_BN, lengths_B, BLOCK, S // BLOCK)
    given = q_BHd, k_SKd, v_SKe, block_table_BN, lengths_B, scale, window, soft_cap
    if chosen == "reference":
        out_BHe = decode_attention_reference(*given)
    else:
        out_BHe = torch.ops.r1fast.decode_attention(*given)
    return out_BHe.to(out_dtype)


@torch.no_grad()
def decode_attention_counted(*rows: Tensor, scale: float, window: int | None, finished: Tensor) -> Tensor:
    """decode_attention of `rows`, its tensors, in a step whose layers share what a GPU's programs count in: one launch.

    finished   int32 [B H], all 0, and so again behind the call
    """
    if choose("decode_attention", None, rows[0])[0] != "triton":
        return decode_attention(*rows, scale=scale, window=window)
    return torch.ops.r1fast.decode_attention_counted(*rows, scale, window, finished=finished)
