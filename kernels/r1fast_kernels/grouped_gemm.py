"""One product per expert, over rows that are sorted by expert.

    out_m = W_e x_m   (weight [E, N, D], transpose_weight=True, as a linear layer)   or   x_m W_e   (weight [E, D, N])
    rows of expert e: offsets_E[e - 1] <= m < offsets_E[e];   rows from offsets_E[-1] on are 0

2 M D N FLOPs, and as many for each gradient; reads E D N weights and M D numbers, writes M N. Each expert's dW is
summed in fp32 and rounded once; without rows it is 0.

On a GPU large products in bf16 are torch's (grouped_gemm_vendor.py). Else a program makes one tile of rows of one
expert. Tiles are numbered expert by expert; how many an expert needs is known to the device alone, so as many programs
start as there can be, ceil(M / tile) + E, and each looks up whose rows it has. GROUP tiles walk through the columns
together:

    tile 0   0  2  4  6      the weight of these columns comes from memory for the first tile of a group,
    tile 1   1  3  5  7      and from L2 for the others
    tile 2   8 ..            (GROUP = 2)

From Hopper on the hardware copies whole tiles by descriptors of the tensors (TMA) where rows begin at 16 bytes: one
thread starts a copy, for which else every thread computes addresses. A tile may then reach into rows of the next
expert, which are not stored; in a dW, where they would be added, the last rows of an expert are read by address.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import dispatch
from . import grouped_gemm_vendor as vendor
from .dispatch import INTERPRETING, choose, product_dtype, register
from .ids import check_offsets
from .launch import launch
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
# Of 64 rows before Hopper, where shared memory has room for two blocks: the assembler of Triton 3.6 aims at three, and
# spills.
MOST_REGISTERS = 192
BLOCKS_FP32 = {16: Blocks(16, 64, 32, 4, 3), 1 << 62: Blocks(64, 64, 16, 4, 2)}
# With descriptors, of all three products. L2 is what binds: a tile of 128 x 128 reads a byte of it for 64 FLOPs, this
# one for 85. And tensor cores read 80 bytes a clock of shared memory for 64 x 256, 96 for 64 x 128.
BLOCKS_DESCRIBED = Blocks(128, 256, 64, 8, 4)
# A tile [N, D] of a dW, k rows at a time, by bytes a number.
WEIGHT_BLOCKS = {2: Blocks(128, 128, 64, 8, 3), 4: Blocks(64, 64, 16, 8, 3)}
BLOCKS_INTERPRETED = Blocks(16, 16, 16, 1, 1)  # small shapes have edges too
GROUP = 8
ZERO_ROWS, ZERO_COLUMNS = 64, 64


def gemm_blocks(dtype: torch.dtype, num_rows: int, num_experts: int) -> Blocks:
    """The tile for M rows of E experts: from their number, which asks no device."""
    if INTERPRETING:
        return BLOCKS_INTERPRETED
    table = BLOCKS_FP32 if dtype == torch.float32 else BLOCKS_16_BIT
    return next(blocks for most, blocks in table.items() if num_rows <= most * num_experts)


def can_describe(*tensors: Tensor) -> bool:
    """Whether the hardware copies tiles of these contiguous tensors: it knows none without elements."""
    return (INTERPRETING or dispatch.capability(tensors[0].device) >= (9, 0)) and all(
        x.numel() > 0 and x.dtype.itemsize == 2 and x.shape[-1] % 8 == 0 and x.data_ptr() % 16 == 0 for x in tensors
    )


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
def read_tile(
    offsets_ptr, num_rows, num_experts, num_columns, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """(expert, first row, end of its rows, column tile) of this program. Expert E: skipped rows; E + 1: no tile."""
    num_tiles = tl.num_programs(0) // num_columns
    tile, column = place_of(tl.program_id(0), num_tiles, num_columns, GROUP)
    offs_e = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + offs_e, mask=offs_e < num_experts, other=num_rows)
    begins = tl.load(offsets_ptr + offs_e - 1, mask=(offs_e > 0) & (offs_e <= num_experts), other=0)
    needed = tl.where(offs_e <= num_experts, tl.cdiv(ends - begins, BLOCK_M), 0)
    passed = (tl.cumsum(needed, axis=0) <= tile) & (offs_e <= num_experts)
    expert = tl.sum(passed.to(tl.int32), axis=0)
    first = tl.max(tl.where(passed, ends, 0), axis=0) + (tile - tl.sum(tl.where(passed, needed, 0), axis=0)) * BLOCK_M
    end = tl.min(tl.where(passed, num_rows, ends), axis=0)
    return expert, first, end, column


@triton.jit
def multiply(
    row_ptr,  # [BLOCK_M] where each row of x begins
    weight_ptr,  # of one expert: [N, D] with TRANSPOSE, else [D, N]
    columns,  # [BLOCK_N]; with TRANSPOSE int64 and all < N
    inner, depth, width,  # D, of which `depth` are summed, and N
    TRANSPOSE: tl.constexpr, EVEN_K: tl.constexpr,  # BLOCK_K divides D
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of x W, fp32."""
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
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
def _multiply_described(
    x, weight,  # descriptors of [M, D], and of [E N, D] with TRANSPOSE, else [E D, N]
    expert, first, column, inner, depth, width, TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of x W, fp32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
        x_tile = x.load([first, k])  # [BLOCK_M, BLOCK_K]
        if TRANSPOSE:
            w = weight.load([expert * width + column * BLOCK_N, k]).T  # [BLOCK_K, BLOCK_N]
        else:
            w = weight.load([expert * inner + k, column * BLOCK_N])  # [BLOCK_K, BLOCK_N]
        acc = dot(x_tile, w, acc)
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _gemm_kernel(
    x, weight, out_ptr, offsets_ptr,  # [M, D], [E, N, D] or [E, D, N]: descriptors or pointers; [M, N], [E]
    num_rows, num_experts, inner, width, TRANSPOSE: tl.constexpr, ZERO_SKIPPED: tl.constexpr, DESCRIBED: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    expert, first, end, column = read_tile(
        offsets_ptr, num_rows, num_experts, tl.cdiv(width, BLOCK_N), GROUP, BLOCK_M, BLOCK_E
    )
    if (expert > num_experts) | ((expert == num_experts) & (not ZERO_SKIPPED)):
        return
    depth = tl.where(expert < num_experts, inner, 0)  # skipped rows are sums of nothing
    rows = first + tl.arange(0, BLOCK_M)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if DESCRIBED:
        acc = _multiply_described(
            x, weight, expert, first, column, inner, depth, width, TRANSPOSE, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
    else:
        # Rows and columns past the edge repeat the last one: no mask in the loop.
        row_ptr = x + tl.minimum(rows, end - 1).to(tl.int64) * inner
        columns = tl.minimum(offs_n, width - 1) if TRANSPOSE else offs_n
        acc = multiply(
            row_ptr, weight + expert.to(tl.int64) * inner * width, columns.to(tl.int64), inner, depth, width,
            TRANSPOSE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    mask = (rows < end)[:, None] & (offs_n < width)[None, :]
    tile_ptr = out_ptr + rows.to(tl.int64)[:, None] * width + offs_n[None, :]
    tl.store(tile_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _read_rows(x_ptr, rows, mask_m, columns, width, EVEN: tl.constexpr):
    """[rows, columns], 0 where `mask_m` is not."""
    tile_ptr = x_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
    return tl.load(tile_ptr, mask=mask_m[:, None] & ((columns < width) | EVEN)[None, :], other=0.0)


@triton.jit
def _weight_kernel(
    x, y, x_ptr, y_ptr,  # descriptors of [M, D] and [M, N], or None; both again
    offsets_ptr, out_ptr,  # [E], [E, N, D]
    width_x, width_y, DESCRIBED: tl.constexpr, EVEN: tl.constexpr,  # EVEN: tiles divide both widths
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
    whole = begin + (end - begin) // BLOCK_M * BLOCK_M  # behind it fewer than BLOCK_M rows
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(begin, whole, BLOCK_M):
        if DESCRIBED:
            x_tile = x.load([start, d * BLOCK_D])  # [BLOCK_M, BLOCK_D]
            y_tile = y.load([start, n * BLOCK_N])  # [BLOCK_M, BLOCK_N]
        else:
            rows = start + tl.arange(0, BLOCK_M)
            x_tile = _read_rows(x_ptr, rows, rows >= 0, offs_d, width_x, EVEN)
            y_tile = _read_rows(y_ptr, rows, rows >= 0, offs_n, width_y, EVEN)
        acc = dot(y_tile.T, x_tile, acc)
    if whole < end:
        rows = whole + tl.arange(0, BLOCK_M)
        x_tile = _read_rows(x_ptr, rows, rows < end, offs_d, width_x, EVEN)
        y_tile = _read_rows(y_ptr, rows, rows < end, offs_n, width_y, EVEN)
        acc = dot(y_tile.T, x_tile, acc)
    rows_out = expert.to(tl.int64) * width_y + offs_n  # [BLOCK_N]
    mask = ((offs_n < width_y) | EVEN)[:, None] & ((offs_d < width_x) | EVEN)[None, :]
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


def count_tiles(num_rows: int, num_experts: int, blocks: Blocks) -> int:
    """As many as there can be, with those of skipped rows."""
    return triton.cdiv(num_rows, blocks.m) + num_experts


def _launch_gemm(x_MD: Tensor, weight: Tensor, offsets_E: Tensor, transpose_weight: bool, zero_skipped: bool) -> Tensor:
    (num_rows, inner), num_experts = x_MD.shape, len(weight)
    out_MN = x_MD.new_empty(num_rows, weight.shape[1 if transpose_weight else 2])
    width, blocks = out_MN.shape[1], gemm_blocks(x_MD.dtype, num_rows, num_experts)
    few_blocks = x_MD.element_size() == 2 and blocks.m == 64 and dispatch.capability(x_MD.device) < (9, 0)
    # 16 rows are multiplied in registers, where Triton 3.9 spills beside descriptors.
    described = can_describe(x_MD, weight) and inner % blocks.k == 0 and (blocks.m > 16 or INTERPRETING)
    if described and blocks.m == BLOCKS_DESCRIBED.m:
        blocks = BLOCKS_DESCRIBED
    factors: tuple[Tensor | TensorDescriptor, ...] = x_MD, weight
    if described:
        weight_block = [blocks.n, blocks.k] if transpose_weight else [blocks.k, blocks.n]
        factors = (
            TensorDescriptor.from_tensor(x_MD, [blocks.m, blocks.k]),
            TensorDescriptor.from_tensor(weight.flatten(0, 1), weight_block),
        )
    if out_MN.numel():
        launch(
            _gemm_kernel, (count_tiles(num_rows, num_experts, blocks) * triton.cdiv(width, blocks.n),),
            *factors, out_MN, offsets_E, num_rows, num_experts, inner, width, TRANSPOSE=transpose_weight,
            ZERO_SKIPPED=zero_skipped, DESCRIBED=described, EVEN_K=inner % blocks.k == 0,
            BLOCK_E=triton.next_power_of_2(num_experts + 1), **blocks.options,
            maxnreg=MOST_REGISTERS if few_blocks else None,
        )  # fmt: skip
    return out_MN


def _launch_weight(x_MD: Tensor, y_MN: Tensor, offsets_E: Tensor) -> Tensor:
    num_experts, width_x, width_y = len(offsets_E), x_MD.shape[1], y_MN.shape[1]
    described, factors = can_describe(x_MD, y_MN), (None, None)
    blocks = BLOCKS_DESCRIBED if described else WEIGHT_BLOCKS[x_MD.dtype.itemsize]
    blocks = BLOCKS_INTERPRETED if INTERPRETING else blocks
    if described:
        factors = (
            TensorDescriptor.from_tensor(x_MD, [blocks.k, blocks.n]),
            TensorDescriptor.from_tensor(y_MN, [blocks.k, blocks.m]),
        )
    out_END = x_MD.new_empty(num_experts, width_y, width_x)
    if out_END.numel():
        num_tiles = triton.cdiv(width_y, blocks.m) * triton.cdiv(width_x, blocks.n)
        launch(
            _weight_kernel, (num_experts * num_tiles,),
            *factors, x_MD, y_MN, offsets_E, out_END, width_x, width_y, DESCRIBED=described,
            EVEN=width_x % blocks.n == 0 and width_y % blocks.m == 0, GROUP=GROUP, BLOCK_M=blocks.k, BLOCK_N=blocks.m,
            BLOCK_D=blocks.n, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip
    return out_END


def _zero_skipped(out_MN: Tensor, offsets_E: Tensor) -> None:
    num_rows, width = out_MN.shape
    launch(
        _zero_skipped_kernel, (triton.cdiv(num_rows, ZERO_ROWS),), out_MN, offsets_E, num_rows, len(offsets_E), width,
        BLOCK_M=ZERO_ROWS, BLOCK_N=ZERO_COLUMNS,
    )  # fmt: skip


def launch_product(
    x_MD: Tensor, weight: Tensor, offsets_E: Tensor, transpose_weight: bool, zero_skipped: bool = True
) -> Tensor:
    """[M, N]; rows of skipped choices are 0 or, without `zero_skipped`, whatever was there."""
    x_MD, weight = x_MD.contiguous(), weight.contiguous()
    if not vendor.takes(len(x_MD), len(weight), x_MD, weight):
        return _launch_gemm(x_MD, weight, offsets_E, transpose_weight, zero_skipped)
    out_MN = vendor.multiply(x_MD, weight, offsets_E, transpose_weight)
    if zero_skipped:
        _zero_skipped(out_MN, offsets_E)
    return out_MN


def launch_weight_gradient(x_MD: Tensor, y_MN: Tensor, offsets_E: Tensor) -> Tensor:
    """[E, N, D]: y_e^T x_e over the rows of each expert."""
    x_MD, y_MN = x_MD.contiguous(), y_MN.contiguous()
    if vendor.takes(len(x_MD), len(offsets_E), x_MD, y_MN):
        return vendor.weight_gradient(x_MD, y_MN, offsets_E)
    return _launch_weight(x_MD, y_MN, offsets_E)


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
    launch=launch_product, save=_save, backward=_backward,
)  # fmt: skip
register(
    "grouped_gemm_weight",
    "(Tensor x_MD, Tensor y_MN, Tensor offsets_E) -> Tensor",
    fake=lambda x_MD, y_MN, offsets_E: x_MD.new_empty(len(offsets_E), y_MN.shape[1], x_MD.shape[1]),
    launch=launch_weight_gradient,
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
