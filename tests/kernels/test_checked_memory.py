"""What the checked interpreter is for: kernels of ours with one fault each, which the check that is named has to find.

A mutation is a replacement in a kernel's source, and an error where the source no longer has what is replaced. Offsets
in 32 bits have a file of their own (test_wide_offsets.py).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import r1fast_kernels as kernels
from r1fast_kernels.launch import launch
from tests.kernels import checked_memory, mutations, test_grouped_gemm
from tests.kernels.backends import BF16, TRITON
from tests.kernels.checked_memory import KernelFault

Mutate = Callable[..., Any]


@pytest.fixture
def mutate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mutate:
    return partial(mutations.mutate, monkeypatch, tmp_path)


def policy_loss(num_samples: int = 5) -> Any:
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.arange(0, 7 * num_samples + 1, 7, dtype=torch.int32)
    logprobs, old = (-torch.rand(7 * num_samples, generator=generator) for _ in range(2))
    advantages = torch.randn(num_samples, generator=generator)
    return kernels.grpo_loss(logprobs, cu_seqlens, advantages_N=advantages, old_logprobs_T=old)


def dispatch(num_tokens: int = 100) -> Any:
    ids = torch.randint(5, (num_tokens, 3), generator=torch.Generator().manual_seed(0))
    return kernels.moe_dispatch(ids, 5)


def route(num_tokens: int = 1100) -> Any:
    logits = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(0))
    return kernels.route_topk(logits, None, top_k=2)


def test_removed_mask(mutate: Mutate) -> None:
    mutate("grpo_loss", "_read", ("offs_t, mask=live, other=0.0", "offs_t"))
    with pytest.raises(
        KernelFault, match=r"_grpo_kernel, program \(0, 0, 0\), _read.py:4: load outside .* logprobs_ptr\[35\]"
    ):
        policy_loss()


def test_mask_one_too_long(mutate: Mutate) -> None:
    mutate("moe_dispatch", "_experts_of", ("mask=offs_m < num_choices", "mask=offs_m <= num_choices"))
    with pytest.raises(KernelFault, match=r"load outside of the argument: ids_ptr\[300\] of \(100, 3\)"):
        dispatch()


def test_removed_mask_of_a_store(mutate: Mutate) -> None:
    mutate("route_topk", "_route_kernel", ("weights * scale, mask=mask_k", "weights * scale"))
    with pytest.raises(KernelFault, match=r"store outside of the argument: weights_ptr\["):
        route()


ARRIVE = """    tl.debug_barrier()
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel", scope="gpu") == num_samples - 1:
        tl.debug_barrier()
"""


@pytest.mark.parametrize(
    "changed",
    [
        ARRIVE.replace("    tl.debug_barrier()\n    if", "    if"),
        ARRIVE.replace("        tl.debug_barrier()\n", ""),
        ARRIVE.replace("acq_rel", "relaxed"),
        ARRIVE.replace("acq_rel", "acquire"),
        ARRIVE.replace("acq_rel", "release"),
        ARRIVE.replace('"gpu"', '"cta"'),
        ARRIVE.replace("num_samples - 1", "0"),
        ARRIVE.replace("num_samples - 1", "num_samples - 2"),
        "    tl.debug_barrier()\n    if tl.load(finished_ptr) == 0:\n        tl.debug_barrier()\n",
    ],
    ids=["no-release-barrier", "no-acquire-barrier", "relaxed", "acquire", "release", "of-a-block", "first",
         "last-but-one", "no-atomic"],
)  # fmt: skip
def test_broken_order_of_the_last_program(mutate: Mutate, changed: str) -> None:
    mutate("grpo_loss", "_grpo_kernel", (ARRIVE, changed))
    with pytest.raises(KernelFault, match="with nothing that orders the two"):
        policy_loss()


def test_barrier_behind_the_atomic(mutate: Mutate) -> None:
    swapped = """    arrived = tl.atomic_add(finished_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    if arrived == num_samples - 1:
"""
    mutate("grpo_loss", "_grpo_kernel", (ARRIVE, swapped))
    with pytest.raises(KernelFault, match=r"load of what program \(0, 0, 0\) writes, .* partials_ptr\[0\]"):
        policy_loss()


def test_partial_sums_behind_the_atomic(mutate: Mutate) -> None:
    store = """    for column in tl.static_range(13):
        tl.store(partials_ptr + n + column * num_samples, partials[column])
"""
    arrive, last = ARRIVE.split(" == num_samples - 1:\n")
    late = arrive.replace("if tl", "arrived = tl") + f"\n{store}    if arrived == num_samples - 1:\n{last}"
    mutate("grpo_loss", "_grpo_kernel", (store, ""), (ARRIVE, late))
    with pytest.raises(KernelFault, match="with nothing that orders the two"):
        policy_loss()


def test_two_programs_write_one_address(mutate: Mutate) -> None:
    mutate(
        "grpo_loss", "_grpo_kernel", ("partials_ptr + n + column * num_samples", "partials_ptr + column * num_samples")
    )
    with pytest.raises(KernelFault, match=r"program \(1, 0, 0\), .*: store of what program \(0, 0, 0\) writes"):
        policy_loss()


def test_two_programs_write_equal_values(mutate: Mutate) -> None:
    """All blocks know the offsets of the experts; one may write them."""
    mutate("moe_dispatch", "_order_kernel", ("tl.where(block == 0, num_experts, 0)", "num_experts"))
    with pytest.raises(KernelFault, match=r"store of what program \(0, 0, 0\) writes.* offsets_ptr\[0\]"):
        dispatch()


def test_read_back_without_a_barrier(mutate: Mutate) -> None:
    """The compiler may lay out the load in other threads than the store (triton#10924)."""
    end = "ends = tl.cumsum(totals, axis=0)"
    stored = "tl.store(totals_ptr + offs_e, totals, mask=offs_e <= num_experts)"
    again = "totals = tl.load(totals_ptr + offs_e, mask=offs_e <= num_experts, other=0)"
    mutate("moe_dispatch", "_order_kernel", (end, f"{stored}\n    {again}\n    {end}"))
    with pytest.raises(
        KernelFault, match=r"load of what this program stored, with no barrier between: totals_ptr\[0\]"
    ):
        dispatch(20)


def test_predecessor_of_the_first(mutate: Mutate) -> None:
    """Both sides of a `where` are read (vllm-ascend#16275)."""
    mutate("grouped_gemm", "read_tile", ("mask=(offs_e > 0) & (offs_e <= num_experts)", "mask=offs_e <= num_experts"))
    with pytest.raises(KernelFault, match=r"load outside of the argument: offsets_ptr\[-1\]"):
        kernels.grouped_gemm(torch.ones(4, 8), torch.ones(2, 8, 8), torch.tensor([1, 4], dtype=torch.int32))


def test_two_lanes_of_a_store(mutate: Mutate) -> None:
    mutate("moe_dispatch", "_order_kernel", ("+ before + rank", "+ before"))
    with pytest.raises(KernelFault, match=r"one store puts two values into order_ptr"):
        dispatch()


def test_count_without_an_atomic(mutate: Mutate) -> None:
    plain = "tl.store(counts_ptr + ids, tl.full([BLOCK_T, BLOCK_K], 1, tl.int64), mask=exists)"
    atomic = 'tl.atomic_add(counts_ptr + ids, tl.full([BLOCK_T, BLOCK_K], 1, tl.int64), mask=exists, sem="relaxed")'
    mutate("route_topk", "_route_kernel", (atomic, plain))
    with pytest.raises(KernelFault, match=r"store of what program .* counts_ptr"):
        route()


def test_result_of_the_last_program(mutate: Mutate) -> None:
    """Atomics, so no race, but who comes last decides."""
    store, last = "tl.store(order_ptr + row, offs_m, mask", "tl.atomic_xchg(order_ptr + row * 0, offs_m, mask"
    mutate("moe_dispatch", "_order_kernel", (store, last))
    with pytest.raises(KernelFault, match=r"_order_kernel: with its 3 programs backwards other bits in order_ptr\[0\]"):
        dispatch()


def test_unwritten_output(mutate: Mutate) -> None:
    mutate(
        "group_advantages",
        "_advantages_kernel",
        ("advantage.to(tl.float32))", "advantage.to(tl.float32), mask=n != 3)"),
    )
    got = kernels.group_advantages(torch.arange(5.0), torch.zeros(5, dtype=torch.int64))
    assert got.isnan().tolist() == [False, False, False, True, False]
    mutate("moe_dispatch", "_order_kernel", ("row, mask=mask_m", "row, mask=mask_m & (offs_m != 3)"))
    _, slot_TK, _ = dispatch()
    assert slot_TK.flatten()[3] == torch.iinfo(torch.int32).max


@pytest.mark.parametrize(
    ("kernel", "replacements", "finds"),
    [
        ("_gemm_kernel", [("(rows < end)[:, None]", "(rows < end + 1)[:, None]")], "of what program"),
        ("_gemm_kernel", [("num_experts) & (not ZERO_SKIPPED)", "num_experts)")], "out: off by nan"),
        ("_weight_kernel", [("rows < end, offs_d", "rows < end + 1, offs_d"),
                            ("rows < end, offs_n", "rows < end + 1, offs_n")], "weight: off by"),
        ("_weight_kernel", [("if whole < end:", "if whole < begin:")], "weight: off by"),
    ],
    ids=["stores-into-the-next-expert", "leaves-skipped-rows", "adds-rows-of-the-next-expert", "forgets-the-last-rows"],
)  # fmt: skip
def test_grouped_products(mutate: Mutate, kernel: str, replacements: list[tuple[str, str]], finds: str) -> None:
    """Rows of one expert end inside of a tile, and those of the next begin there."""
    mutate("grouped_gemm", kernel, *replacements)
    with pytest.raises(AssertionError, match=finds):
        test_grouped_gemm.test_as_exact_as_torch(TRITON, "described", BF16, True)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


def test_only_what_the_argument_shows() -> None:
    """The memory between the rows of a view is not the kernel's, nor is another argument's behind it."""
    memory, out = torch.arange(8.0), torch.empty(8)
    launch(_copy_kernel, (1,), memory[:5], out, 5, BLOCK=8)
    assert torch.equal(out[:5], memory[:5]) and out[5:].isnan().all()
    for view in (memory[:4], memory.view(2, 4)[:, :3], memory[::2]):
        with pytest.raises(KernelFault, match=r"load outside of the argument: x_ptr\["):
            launch(_copy_kernel, (1,), view, out, 5, BLOCK=8)
    with pytest.raises(KernelFault, match=r"store outside of the argument: y_ptr\[4\]"):
        launch(_copy_kernel, (1,), memory[:5], memory[4:], 5, BLOCK=8)


@triton.jit
def _shift_kernel(x_ptr):
    n = tl.program_id(0)
    tl.store(x_ptr + n, tl.load(x_ptr + n + 1))


def test_read_before_another_program_writes() -> None:
    """In this order nothing goes wrong; the check does not need the other."""
    with pytest.raises(KernelFault, match=r"\(0, 0, 0\), test_checked_.*: load of what program \(1, 0, 0\) writes"):
        launch(_shift_kernel, (3,), torch.arange(4.0))


@triton.jit
def _described_kernel(x_desc, y_desc, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    y_desc.store([start, 0], x_desc.load([start, 0]))


def test_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A box that hangs over the edge is cut; a shape that the tensor does not have is refused."""
    monkeypatch.setattr(checked_memory, "reordered", None)
    x, y = torch.randn(6, 8), torch.empty(6, 8)

    def described(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
        return TensorDescriptor(tensor, [rows, 8], [8, 1], [4, 8])

    launch_described: Any = _described_kernel[(2,)]
    launch_described(described(x, 6), described(y, 6), BLOCK=4)
    assert torch.equal(x, y)
    with pytest.raises(KernelFault, match=r"descriptor outside of the argument: x_desc\["):
        launch_described(described(x, 7), described(y, 6), BLOCK=4)
    with pytest.raises(KernelFault, match=r"store of what program \(0, 0, 0\) writes"):
        launch_described(described(x, 6), described(y, 6), BLOCK=2)
