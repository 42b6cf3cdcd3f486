"""One product per expert, over rows that are sorted by expert.

    out_m = W_e x_m   (weight [E, N, D], transpose_weight=True, as a linear layer)   or   x_m W_e   (weight [E, D, N])
    rows of expert e: offsets_E[e - 1] <= m < offsets_E[e];   rows from offsets_E[-1] on are 0

2 M D N FLOPs, and as many for each gradient; reads E D N weights and M D numbers, writes M N. Each expert's dW is
summed in fp32 and rounded once; without rows it is 0.

On a GPU large products in bf16 are torch's (grouped_gemm_vendor.py). Else a program makes one tile of the table that
moe_dispatch draws, so no tile holds rows of two experts. Tiles are numbered expert by expert, and launched in groups of
GROUP tiles that walk through the columns together:

    tile 0   0  2  4  6      the weight of these columns comes from memory for the first tile of a group,
    tile 1   1  3  5  7      and from L2 for the others
    tile 2   8 ..            (GROUP = 2)
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grouped_gemm_vendor as vendor
from .dispatch import INTERPRETING, choose, product_dtype, register
from .ids import check_offsets
from .launch import launch
from .moe_dispatch import tile_table
from .products import save_factors


def grouped_gemm_reference(x_MD: Tensor, weight: Tensor, offsets_E: Tensor, transpose_weight: bool) -> Tensor:
    """The specification. Waits for the device: the sizes decide every shape."""
    ends = offsets_E.tolist()
    rows = x_MD.split([end - start for start, end in zip([0, *ends], [*ends, len(x_MD)])])
    out = [x_mD @ (w.T if transpose_weight else w) for x_mD, w in zip(rows, weight.unbind())]
    skipped = x_MD.new_zeros(len(rows[-1]), weight.shape[1 if transpose_weight else 2])
    return torch.cat([*out, skipped])


@dataclass(frozen=True)
class Blocks:
    """One program's tile, [m, n], k at a time."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Of a kernel's launch."""
        launch = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {"GROUP": GROUP, "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k} | launch


# By rows per expert. Half of an expert's last tile is empty on average: at 128 rows a tile and 512 rows an expert that
# is one product in eight, hence 64 below. A few rows an expert (sampling) only wait for weights.
BLOCKS_16_BIT = {16: Blocks(16, 128, 128, 4, 4), 511: Blocks(64, 128, 64, 4, 4), 1 << 62: Blocks(128, 128, 64, 8, 3)}
BLOCKS_FP32 = {16: Blocks(16, 64, 32, 4, 3), 1 << 62: Blocks(64, 64, 16, 4, 2)}
# A tile [N, D] of a dW, k rows at a time, by bytes a number. Of 5 stages, those that wait for an index to gather by
# leave 3 (sm_80: 2) tiles on their way.
WEIGHT_BLOCKS = {2: Blocks(128, 128, 64, 8, 5), 4: Blocks(64, 64, 16, 8, 3)}
BLOCKS_INTERPRETED = Blocks(16, 16, 16, 1, 1)  # small shapes have edges too
GROUP = 8
ZERO_ROWS, ZERO_COLUMNS = 64, 64


def gemm_blocks(dtype: torch.dtype, num_rows: int, num_experts: int) -> Blocks:
    """The tile for M rows of E experts: from their number, which asks no device."""
    if INTERPRETING:
        return BLOCKS_INTERPRETED
    table = BLOCKS_FP32 if dtype == torch.float32 else BLOCKS_16_BIT
    return next(blocks for most, blocks in table.items() if num_rows <= most * num_experts)


# The interpreter multiplies bf16 by their bits: it gets fp32.
_UPCAST = tl.constexpr(INTERPRETING)


@triton.jit
def dot(a, b, acc):
    """acc + a b, fp32 for fp32 (not TF32)."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def place_of(pid, num_rows, num_columns, GROUP: tl.constexpr):
    """(row, column) of a program: groups of GROUP rows, column by column."""
    first = pid // (GROUP * num_columns) * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    rest = pid % (GROUP * num_columns)
    return first + rest % size, rest // size


@triton.jit
def read_tile(tiles_ptr, num_columns, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of its rows, column tile) of this program."""
    num_tiles = tl.num_programs(0) // num_columns
    tile, column = place_of(tl.program_id(0), num_tiles, num_columns, GROUP)
    expert = tl.load(tiles_ptr + tile).to(tl.int64)  # E times a weight passes 2^31
    return expert, tl.load(tiles_ptr + num_tiles + tile), tl.load(tiles_ptr + 2 * num_tiles + tile), column


@triton.jit
def multiply(
    row_ptr,  # [BLOCK_M] where each row of x begins
    weight_ptr,  # of one expert: [N, D] with TRANSPOSE, else [D, N]
    columns,  # [BLOCK_N]; with TRANSPOSE int64 and all < N
    inner, width, TRANSPOSE: tl.constexpr, EVEN_K: tl.constexpr,  # BLOCK_K divides D
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of x W, fp32."""
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, inner, BLOCK_K):
        mask_k = (k + offs_k < inner) | EVEN_K
        x = tl.load(row_ptr[:, None] + (k + offs_k)[None, :], mask=mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if TRANSPOSE:
            w_ptr = weight_ptr + columns[None, :] * inner + (k + offs_k)[:, None]
            w = tl.load(w_ptr, mask=mask_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            w_ptr = weight_ptr + (k + offs_k).to(tl.int64)[:, None] * width + columns[None, :]
            w = tl.load(w_ptr, mask=mask_k[:, None] & (columns < width)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(x, w, acc)
    return acc


@triton.jit
def _gemm_kernel(
    x_ptr, weight_ptr, out_ptr, tiles_ptr,  # [M, D], [E, N, D] or [E, D, N], [M, N], [3, I]
    num_experts, inner, width, TRANSPOSE: tl.constexpr, ZERO_SKIPPED: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, first, end, column = read_tile(tiles_ptr, tl.cdiv(width, BLOCK_N), GROUP, BLOCK_M)
    if expert < 0:
        return
    rows = first + tl.arange(0, BLOCK_M)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < end)[:, None] & (offs_n < width)[None, :]
    tile_ptr = out_ptr + rows.to(tl.int64)[:, None] * width + offs_n[None, :]
    if expert == num_experts:
        if ZERO_SKIPPED:
            tl.store(tile_ptr, tl.zeros([BLOCK_M, BLOCK_N], out_ptr.dtype.element_ty), mask=mask)
        return
    # Rows and columns past the edge repeat the last one: no mask in the loop.
    row_ptr = x_ptr + tl.minimum(rows, end - 1).to(tl.int64) * inner
    columns = tl.minimum(offs_n, width - 1) if TRANSPOSE else offs_n
    acc = multiply(
        row_ptr, weight_ptr + expert * inner * width, columns.to(tl.int64), inner, width, TRANSPOSE, EVEN_K, BLOCK_M,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.store(tile_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_kernel(
    x_ptr, y_ptr,  # [M, D] and [M, N], with GATHER_X or GATHER_Y [T, ..]
    token_ptr, offsets_ptr, out_ptr,  # [M] token of a row, or None; [E], [E, N, D]
    width_x, width_y, GATHER_X: tl.constexpr, GATHER_Y: tl.constexpr, EVEN: tl.constexpr,  # tiles divide both widths
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(width_y, BLOCK_N)
    num_d = tl.cdiv(width_x, BLOCK_D)
    expert = tl.program_id(0) // (num_n * num_d)
    n, d = place_of(tl.program_id(0) % (num_n * num_d), num_n, num_d, GROUP)
    offs_n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = d * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    mask_n = (offs_n < width_y) | EVEN
    mask_d = (offs_d < width_x) | EVEN
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask_m = rows < end
        tokens = tl.load(token_ptr + rows, mask=mask_m, other=0) if GATHER_X or GATHER_Y else rows
        rows_x = tokens if GATHER_X else rows
        rows_y = tokens if GATHER_Y else rows
        tile_ptr = x_ptr + rows_x.to(tl.int64)[:, None] * width_x + offs_d[None, :]
        x = tl.load(tile_ptr, mask=mask_m[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
        tile_ptr = y_ptr + rows_y.to(tl.int64)[None, :] * width_y + offs_n[:, None]
        y = tl.load(tile_ptr, mask=mask_m[None, :] & mask_n[:, None], other=0.0)  # [BLOCK_N, BLOCK_M]
        acc = dot(y, x, acc)
    rows_out = expert.to(tl.int64) * width_y + offs_n  # [BLOCK_N]
    mask = mask_n[:, None] & mask_d[None, :]
    tile_ptr = out_ptr + rows_out[:, None] * width_x + offs_d[None, :]
    tl.store(tile_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _zero_skipped_kernel(
    out_ptr, offsets_ptr,  # [M, N], [E]
    num_rows, num_experts, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (rows < num_rows) & (rows >= tl.load(offsets_ptr + num_experts - 1))
    columns = tl.where(tl.max(mask_m.to(tl.int32)) > 0, width, 0)  # most programs have nothing to do
    for start in range(0, columns, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (offs_n < width)[None, :]
        zeros = tl.zeros([BLOCK_M, BLOCK_N], out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * width + offs_n[None, :], zeros, mask=mask)


def launch_gemm(
    x_MD: Tensor, weight: Tensor, tiles_3I: Tensor, transpose_weight: bool, blocks: Blocks, zero_skipped: bool
) -> Tensor:
    """[M, N]; rows of skipped choices are 0 or, without `zero_skipped`, whatever was there."""
    (num_rows, inner), width = x_MD.shape, weight.shape[1 if transpose_weight else 2]
    out_MN = x_MD.new_empty(num_rows, width)
    if num_rows and width:
        launch(
            _gemm_kernel, (tiles_3I.shape[1] * triton.cdiv(width, blocks.n),),
            x_MD, weight, out_MN, tiles_3I, len(weight), inner, width,
            TRANSPOSE=transpose_weight, ZERO_SKIPPED=zero_skipped, EVEN_K=inner % blocks.k == 0, **blocks.options,
        )  # fmt: skip
    return out_MN


def launch_weight(
    x_MD: Tensor, y_MN: Tensor, offsets_E: Tensor, token_M: Tensor | None = None, gather: str = ""
) -> Tensor:
    """[E, N, D]. gather: which of "x" and "y" has a row per token, that of a row of the other being token_M[row]."""
    blocks = BLOCKS_INTERPRETED if INTERPRETING else WEIGHT_BLOCKS[x_MD.dtype.itemsize]
    width_x, width_y = x_MD.shape[1], y_MN.shape[1]
    out_END = x_MD.new_empty(len(offsets_E), width_y, width_x)
    if out_END.numel():
        num_tiles = triton.cdiv(width_y, blocks.m) * triton.cdiv(width_x, blocks.n)
        launch(
            _weight_kernel, (len(offsets_E) * num_tiles,),
            x_MD, y_MN, token_M, offsets_E, out_END, width_x, width_y,
            GATHER_X=gather == "x", GATHER_Y=gather == "y",
            EVEN=width_x % blocks.n == 0 and width_y % blocks.m == 0, GROUP=GROUP, BLOCK_M=blocks.k, BLOCK_N=blocks.m,
            BLOCK_D=blocks.n, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip
    return out_END


def _launch(x_MD: Tensor, weight: Tensor, offsets_E: Tensor, transpose_weight: bool) -> Tensor:
    x_MD, weight = x_MD.contiguous(), weight.contiguous()
    if vendor.takes(len(x_MD), len(weight), x_MD, weight):
        out_MN = vendor.multiply(x_MD, weight, offsets_E, transpose_weight)
        num_rows, width = out_MN.shape
        launch(
            _zero_skipped_kernel, (triton.cdiv(num_rows, ZERO_ROWS),), out_MN, offsets_E, num_rows, len(weight), width,
            BLOCK_M=ZERO_ROWS, BLOCK_N=ZERO_COLUMNS,
        )  # fmt: skip
        return out_MN
    blocks = gemm_blocks(x_MD.dtype, len(x_MD), len(weight))
    tiles_3I = tile_table(offsets_E, len(x_MD), blocks.m)
    return launch_gemm(x_MD, weight, tiles_3I, transpose_weight, blocks, zero_skipped=True)


def _launch_weight(x_MD: Tensor, y_MN: Tensor, offsets_E: Tensor) -> Tensor:
    x_MD, y_MN = x_MD.contiguous(), y_MN.contiguous()
    if vendor.takes(len(x_MD), len(offsets_E), x_MD, y_MN):
        return vendor.weight_gradient(x_MD, y_MN, offsets_E)
    return launch_weight(x_MD, y_MN, offsets_E)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_MD, weight, offsets_E, ctx.transpose_weight = inputs
    save_factors(ctx, x_MD, weight, offsets_E)


def _backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x_MD, weight, offsets_E = ctx.saved_tensors
    grad_MN = grad_MN.contiguous()  # `.sum().backward()` sends an expanded scalar
    ops, grad_x, grad_weight = torch.ops.r1fast, None, None
    if ctx.needs_input_grad[0]:
        grad_x = ops.grouped_gemm(grad_MN, weight, offsets_E, not ctx.transpose_weight)
    if ctx.needs_input_grad[1]:
        sides = (x_MD, grad_MN) if ctx.transpose_weight else (grad_MN, x_MD)
        grad_weight = ops.grouped_gemm_weight(*sides, offsets_E)
    return grad_x, grad_weight, None, None


register(
    "grouped_gemm",
    "(Tensor x_MD, Tensor weight, Tensor offsets_E, bool transpose_weight) -> Tensor",
    fake=lambda x_MD, weight, _, transpose: x_MD.new_empty(len(x_MD), weight.shape[1 if transpose else 2]),
    launch=_launch, save=_save, backward=_backward,
)  # fmt: skip
# [E, N, D]: y_e^T x_e over the rows of each expert.
register(
    "grouped_gemm_weight",
    "(Tensor x_MD, Tensor y_MN, Tensor offsets_E) -> Tensor",
    fake=lambda x_MD, y_MN, offsets_E: x_MD.new_empty(len(offsets_E), y_MN.shape[1], x_MD.shape[1]),
    launch=_launch_weight,
)


def grouped_gemm(
    x_MD: Tensor, weight: Tensor, offsets_E: Tensor, *, transpose_weight: bool = True, impl: str | None = None
) -> Tensor:
    """Each row times the weight of its expert.

    x_MD        [M, D], sorted by expert (`moe_dispatch`)
    weight      [E, N, D] with transpose_weight, as `torch.nn.Linear` keeps it; else [E, D, N]
    offsets_E   [E] int32, where each expert's rows end, as in torch.nn.functional.grouped_mm
    Returns [M, N] in the dtype of the weight, or autocast's where that is on; rows from offsets_E[-1] on are 0
    (grouped_mm leaves them uninitialised).
    """
    inner = 2 if transpose_weight else 1
    if x_MD.dim() != 2 or weight.dim() != 3 or weight.shape[inner] != x_MD.shape[1] or len(offsets_E) != len(weight):
        raise ValueError(
            f"grouped_gemm: got x {tuple(x_MD.shape)}, weight {tuple(weight.shape)} and offsets "
            f"{tuple(offsets_E.shape)}, expected [M, D], {'[E, N, D]' if transpose_weight else '[E, D, N]'} and [E]"
        )
    dtype = product_dtype(weight)
    x_MD, weight = x_MD.to(dtype), weight.to(dtype)
    chosen, _ = choose("grouped_gemm", impl, x_MD)
    if chosen != "cpp":
        check_offsets("grouped_gemm", "offsets_E", offsets_E, len(x_MD), whole=False)
    if chosen == "reference":
        return grouped_gemm_reference(x_MD, weight, offsets_E, transpose_weight)
    return torch.ops.r1fast.grouped_gemm(x_MD, weight, offsets_E.int(), transpose_weight)
