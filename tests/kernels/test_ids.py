"""Every op that follows ids, offsets or block tables looks at them first: on a CPU an outside one is an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import r1fast_kernels as kernels
from r1fast_kernels import dispatch
from tests.kernels.backends import FP32, ON_CPU, TRITON, Backend

LOWEST = torch.iinfo(torch.int64).min
V, D, E, SLOTS = 11, 6, 3, 4 * 16


def normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def with_value(size: int | tuple[int, ...], place: Any, value: int, dtype: torch.dtype = torch.int64) -> Tensor:
    ids = torch.ones(size, dtype=dtype)
    ids[place] = value
    return ids


CU_SEQLENS = torch.tensor([0, 2, 4], dtype=torch.int32)
ADVANTAGES = {"advantages_N": torch.tensor([1.0, -1.0])}


def _of_groups(bad: int) -> dict[str, Tensor]:
    return {"rewards_N": torch.tensor([1.0, 0.0]), "group_ids_N": with_value(2, 1, bad)}


Op = Callable[[int, str], Any]
# By op and argument: a call with one bad id among good ones.
TARGETS: dict[str, Op] = {
    "selective_logprobs": lambda bad, impl: kernels.selective_logprobs(normal(4, V), with_value(4, 2, bad), impl=impl),
    "linear_logprobs": lambda bad, impl: kernels.linear_logprobs(
        normal(4, D), normal(V, D), with_value(4, 2, bad), impl=impl
    ),
    "linear_cross_entropy": lambda bad, impl: kernels.linear_cross_entropy(
        normal(4, D), normal(V, D), with_value(4, 2, bad), impl=impl
    ),
    "linear_cross_entropy, sum": lambda bad, impl: kernels.linear_cross_entropy(
        normal(4, D), normal(V, D), with_value(4, 2, bad), reduction="sum", ignore_index=None, impl=impl
    ),
    "linear_cross_entropy, none": lambda bad, impl: kernels.linear_cross_entropy(
        normal(4, D), normal(V, D), with_value(4, 2, bad), reduction="none", impl=impl
    ),
    "linear_grpo_loss": lambda bad, impl: kernels.linear_grpo_loss(
        normal(4, D), normal(V, D), with_value(4, 2, bad), CU_SEQLENS, impl=impl, **ADVANTAGES
    ),
    "linear_grpo_loss, sequence": lambda bad, impl: kernels.linear_grpo_loss(
        normal(4, D), normal(V, D), with_value(4, 2, bad), CU_SEQLENS, impl=impl, importance_level="sequence",
        loss_mask_T=torch.tensor([True, False, True, True]), **ADVANTAGES,
    ),
    "route_topk": lambda bad, impl: kernels.route_topk(
        normal(4, V), None, top_k=2, replay_ids_TK=with_value((4, 2), (2, 1), bad), impl=impl
    ),
}  # fmt: skip
# An id >= E is skipped by contract, any group may have any name from 0 on.
FROM_ZERO: dict[str, Op] = {
    "moe_dispatch": lambda bad, impl: kernels.moe_dispatch(with_value((4, 2), (2, 1), bad), E, impl=impl),
    "moe_experts": lambda bad, impl: kernels.moe_experts(
        normal(4, D), normal(E, 8, D), normal(E, D, 4), with_value((4, 2), (2, 1), bad), normal(4, 2), impl=impl
    ),
    "group_advantages": lambda bad, impl: kernels.group_advantages(**_of_groups(bad), impl=impl),
    "grpo_loss": lambda bad, impl: kernels.grpo_loss(normal(4), CU_SEQLENS, impl=impl, **_of_groups(bad)),
    "linear_grpo_loss": lambda bad, impl: kernels.linear_grpo_loss(
        normal(4, D), normal(V, D), with_value(4, 0, 1), CU_SEQLENS, impl=impl, **_of_groups(bad)
    ),
}
OFFSETS: dict[str, Callable[[Tensor, str], Any]] = {
    "grpo_loss": lambda ends, impl: kernels.grpo_loss(
        normal(4), ends, advantages_N=normal(len(ends) - 1), impl=impl
    ),
    "linear_grpo_loss": lambda ends, impl: kernels.linear_grpo_loss(
        normal(4, D), normal(V, D), with_value(4, 0, 1), ends, advantages_N=normal(len(ends) - 1), impl=impl
    ),
    "packed_attention": lambda ends, impl: kernels.packed_attention(
        normal(4, 2, 8), normal(4, 2, 8), normal(4, 2, 8), ends, scale=1.0, impl=impl
    ),
}  # fmt: skip


def impls(op: str, backend: Backend) -> list[str]:
    """The backend's, and beside it once the reference."""
    exists = dispatch.IMPLEMENTATIONS[op.split(",")[0]]
    wanted = [backend.impl] if backend == TRITON else [backend.impl, "reference"]
    return [impl for impl in wanted if impl in exists]


@pytest.mark.parametrize("bad", [-1, V, V + 1, LOWEST])
@pytest.mark.parametrize("op", TARGETS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_an_id_outside_is_an_error(op: str, bad: int, backend: Backend) -> None:
    for impl in impls(op, backend):
        TARGETS[op](V - 1, impl)
        with pytest.raises((IndexError, ValueError), match=rf"\[\d(, 1)?\] is {bad}, expected 0 <= id < {V}"):
            TARGETS[op](bad, impl)


@pytest.mark.parametrize("bad", [-1, LOWEST])
@pytest.mark.parametrize("op", FROM_ZERO)
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_negative_id_is_an_error(op: str, bad: int, backend: Backend) -> None:
    for impl in impls(op, backend):
        FROM_ZERO[op](E + 7, impl)
        with pytest.raises(ValueError, match=rf"^{op}: .*{bad}, expected an id >= 0"):
            FROM_ZERO[op](bad, impl)


@pytest.mark.parametrize("ends", [[1, 2, 4], [0, 3, 2, 4], [0, 2, 3], [0, 2, 5], [0, -1, 4]], ids=str)
@pytest.mark.parametrize("op", OFFSETS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_boundaries_that_are_none_are_an_error(op: str, ends: list[int], backend: Backend) -> None:
    for impl in impls(op, backend):
        OFFSETS[op](CU_SEQLENS, impl)
        with pytest.raises(ValueError, match="cu_seqlens"):
            OFFSETS[op](torch.tensor(ends, dtype=torch.int32), impl)


@pytest.mark.parametrize("ends", [[3, 2, 4], [2, 3, 5], [-1, 2, 4]], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_ends_of_experts(ends: list[int], backend: Backend) -> None:
    for impl in impls("grouped_gemm", backend):
        kernels.grouped_gemm(normal(4, D), normal(E, 8, D), torch.tensor([0, 2, 3], dtype=torch.int32), impl=impl)
        with pytest.raises(ValueError, match="expected ends that do not decrease and are at most 4 rows"):
            kernels.grouped_gemm(normal(4, D), normal(E, 8, D), torch.tensor(ends, dtype=torch.int32), impl=impl)


@pytest.mark.parametrize("bad", [-1, SLOTS // 16, SLOTS // 16 + 1, torch.iinfo(torch.int32).min])
@pytest.mark.parametrize("backend", ON_CPU)
def test_block_tables_and_lengths(bad: int, backend: Backend) -> None:
    def call(table: Tensor, lengths: list[int], impl: str) -> Tensor:
        k = normal(SLOTS, 1, 8)
        return kernels.decode_attention(
            normal(2, 2, 8), k, k, table, torch.tensor(lengths, dtype=torch.int32), scale=1.0, impl=impl
        )

    for impl in impls("decode_attention", backend):
        table = with_value((2, 2), (1, 1), bad, torch.int32)
        call(table, [32, 16], impl)  # a block behind the end is not looked at
        with pytest.raises(ValueError, match=rf"block_table_BN\[1, 1\] = {bad}, expected a block of the cache, 0 to 3"):
            call(table, [32, 17], impl)
        for length in (0, 33, bad):
            if not 1 <= length <= 32:
                with pytest.raises(ValueError, match=rf"lengths_B\[1\] = {length}, expected 1 to 32"):
                    call(with_value((2, 2), 0, 0, torch.int32), [32, length], impl)


@pytest.mark.skipif(not dispatch.HAS_EXTENSION, reason="the C++ extension is not built")
@pytest.mark.parametrize("op", ["selective_logprobs", "linear_logprobs", "linear_cross_entropy", "linear_grpo_loss"])
def test_compiled_calls_look_too(op: str) -> None:
    torch._dynamo.reset()
    hidden, weight, ids = normal(4, D), normal(V, D), with_value(4, 2, V)

    def call(ids: Tensor) -> Any:
        if op == "selective_logprobs":
            return kernels.selective_logprobs(hidden @ weight.T, ids)
        given = (CU_SEQLENS,) if op == "linear_grpo_loss" else ()
        return getattr(kernels, op)(hidden, weight, ids, *given, **(ADVANTAGES if given else {}))

    with pytest.raises((IndexError, ValueError), match=f"is {V}, expected 0 <= id < {V}"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(ids)
