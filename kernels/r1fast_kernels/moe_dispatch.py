"""Where each token's row stands among the rows sorted by expert.

    choices (t, k), token-major    0 1 2 3 4 ...   --order_M-->   | expert 0 | expert 1 | ... | ids >= E, skipped |
                                                   <--slot_TK--   offsets_E      end of 0   end of 1 ...

Stable, so deterministic: within an expert, rows keep the order of their tokens. A counting sort on a CPU; on a GPU
histograms of blocks, a prefix over blocks and ranks inside a block: no atomics, no wait for the device. 8 T K bytes
read, 8 T K written; the GPU's three passes read the ids twice.

    block b of 128 choices      counts_BX[b, e]  ->  how many choices of e the blocks before b hold
    row of a choice of e        first row of e + counts_BX[b, e] + how many before it in block b chose e
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import choose, register
from .ids import check_ids
from .launch import launch


def moe_dispatch_reference(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The specification."""
    expert_M = expert_ids_TK.flatten().clamp(max=num_experts)
    order_M = expert_M.argsort(stable=True)
    slot_TK = order_M.argsort().view_as(expert_ids_TK)
    ends_E = torch.arange(num_experts, device=expert_M.device)
    offsets_E = torch.searchsorted(expert_M[order_M], ends_E, right=True)
    return order_M.int(), slot_TK.int(), offsets_E.int()


# A block's choices are compared with one another: 128 x 128 are 64 values a thread.
BLOCK_M, NUM_WARPS = 128, 8
# The prefix over blocks: so many blocks a step, so many experts a program.
PREFIX_BLOCKS, PREFIX_EXPERTS, PREFIX_WARPS = 128, 16, 4


@triton.jit
def _experts_of(ids_ptr, offs_m, num_choices, num_experts):
    """Skipped choices, and places past the last one, are of expert E."""
    ids = tl.load(ids_ptr + offs_m, mask=offs_m < num_choices, other=num_experts)
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit(do_not_specialize=["num_choices"])
def _count_kernel(
    ids_ptr, counts_ptr,  # [M], [B, E + 1]
    num_choices, num_experts, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    experts = _experts_of(ids_ptr, block * BLOCK_M + tl.arange(0, BLOCK_M), num_choices, num_experts)
    row_ptr = counts_ptr + block.to(tl.int64) * (num_experts + 1)
    tl.store(row_ptr + offs_e, tl.histogram(experts, BLOCK_E), mask=offs_e <= num_experts)


@triton.jit(do_not_specialize=["num_blocks"])
def _prefix_kernel(
    counts_ptr,  # [B, E + 1], becomes the exclusive prefix over B
    totals_ptr,  # [E + 1]
    num_blocks, num_experts, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e <= num_experts
    before = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask = (offs_b < num_blocks)[:, None] & mask_e[None, :]
        tile_ptr = counts_ptr + offs_b.to(tl.int64)[:, None] * (num_experts + 1) + offs_e[None, :]
        counts = tl.load(tile_ptr, mask=mask, other=0)  # [BLOCK_B, BLOCK_E]
        tl.store(tile_ptr, before[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        before += tl.sum(counts, axis=0)
    tl.store(totals_ptr + offs_e, before, mask=mask_e)


@triton.jit(do_not_specialize=["num_choices"])
def _order_kernel(
    ids_ptr, counts_ptr, totals_ptr,  # [M], [B, E + 1], [E + 1]
    order_ptr, slot_ptr, offsets_ptr,  # [M], [M], [E]
    num_choices, num_experts, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK_M)
    offs_m = block * BLOCK_M + place
    experts = _experts_of(ids_ptr, offs_m, num_choices, num_experts)
    offs_e = tl.arange(0, BLOCK_E)
    totals = tl.load(totals_ptr + offs_e, mask=offs_e <= num_experts, other=0)
    ends = tl.cumsum(totals, axis=0)
    tl.store(offsets_ptr + offs_e, ends, mask=offs_e < tl.where(block == 0, num_experts, 0))

    same = experts[:, None] == experts[None, :]  # [BLOCK_M, BLOCK_M]
    rank = tl.sum((same & (place[None, :] < place[:, None])).to(tl.int32), axis=1)
    before = tl.load(counts_ptr + block.to(tl.int64) * (num_experts + 1) + experts)
    row = tl.gather(ends - totals, experts, axis=0) + before + rank
    mask_m = offs_m < num_choices
    tl.store(slot_ptr + offs_m, row, mask=mask_m)
    tl.store(order_ptr + row, offs_m, mask=mask_m)


def launch_dispatch(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order_M, slot_TK, offsets_E."""
    order_M, slot_TK, offsets_E = fake(expert_ids_TK, num_experts)
    num_choices, buckets = len(order_M), num_experts + 1
    if not num_choices:
        return order_M, slot_TK, offsets_E.zero_()
    ids_M, num_blocks = expert_ids_TK.contiguous(), triton.cdiv(num_choices, BLOCK_M)
    counts_BX, totals_X = order_M.new_empty(num_blocks, buckets), order_M.new_empty(buckets)
    block_e = triton.next_power_of_2(buckets)
    launch(
        _count_kernel,
        (num_blocks,),
        ids_M,
        counts_BX,
        num_choices,
        num_experts,
        BLOCK_M=BLOCK_M,
        BLOCK_E=block_e,
        num_warps=NUM_WARPS,
    )
    launch(
        _prefix_kernel, (triton.cdiv(buckets, PREFIX_EXPERTS),),
        counts_BX, totals_X, num_blocks, num_experts, BLOCK_B=PREFIX_BLOCKS, BLOCK_E=PREFIX_EXPERTS,
        num_warps=PREFIX_WARPS,
    )  # fmt: skip
    launch(
        _order_kernel, (num_blocks,),
        ids_M, counts_BX, totals_X, order_M, slot_TK, offsets_E, num_choices, num_experts, BLOCK_M=BLOCK_M,
        BLOCK_E=block_e, num_warps=NUM_WARPS,
    )  # fmt: skip
    return order_M, slot_TK, offsets_E


def fake(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_TK = torch.empty_like(expert_ids_TK, dtype=torch.int32, memory_format=torch.contiguous_format)
    return ids_TK.new_empty(ids_TK.numel()), ids_TK, ids_TK.new_empty(num_experts)


register(
    "moe_dispatch",
    "(Tensor expert_ids_TK, int num_experts) -> (Tensor order_M, Tensor slot_TK, Tensor offsets_E)",
    fake=fake, launch=launch_dispatch,
)  # fmt: skip


def check_expert_ids(op: str, expert_ids_TK: Tensor, num_experts: int) -> None:
    check_ids(op, "expert_ids_TK", expert_ids_TK, None, hint=f"ids from {num_experts} on are skipped")


def moe_dispatch(expert_ids_TK: Tensor, num_experts: int, *, impl: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the T K choices by expert.

    expert_ids_TK   [T, K] int64 >= 0; an id >= num_experts is skipped: it stands behind all others
    Returns int32 order_M [T K] (which choice, t K + k, stands in a row), slot_TK (its inverse: the row of a choice),
    and offsets_E: the end of each expert's rows. Rows from offsets_E[-1] on belong to skipped choices.
    """
    if expert_ids_TK.dim() != 2:
        raise ValueError(f"moe_dispatch: got expert ids {tuple(expert_ids_TK.shape)}, expected [T, K]")
    chosen, _ = choose("moe_dispatch", impl, expert_ids_TK)
    if chosen != "cpp":
        check_expert_ids("moe_dispatch", expert_ids_TK, num_experts)
    if chosen == "reference":
        return moe_dispatch_reference(expert_ids_TK, num_experts)
    return torch.ops.r1fast.moe_dispatch(expert_ids_TK, num_experts)
