"""Packed attention against one masked softmax per sequence; the plan's layout."""

import pytest
import torch
from torch import Tensor

from r1fast.models.attention import AttentionPlan, packed_attention
from r1fast.models.rope import Rope
from r1fast_kernels import use

# N, lengths: one token; a prime; empty sequences between others; alike lengths that share a bucket; far apart.
LENGTHS = {
    "one-token": [1],
    "prime": [13],
    "with-empty": [0, 5, 0, 3, 0],
    "alike": [30, 29, 31, 30, 24],
    "far-apart": [1, 64, 7, 130, 2, 33],
}
# H, K, d, dv: plain; grouped; one kv head; MLA's narrower values
SHAPES = {"mha": (4, 4, 8, 8), "gqa": (6, 2, 8, 8), "mqa": (4, 1, 5, 5), "mla": (4, 4, 12, 8)}


def plan_of(lengths: list[int]) -> AttentionPlan:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return AttentionPlan(cu_seqlens, sum(lengths), torch.device("cpu"))


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outs = []
    for q_SHd, k_SHd, v_SHd in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("shd,thd->hst", q_SHd, k_SHd) * scale
        place = torch.arange(len(q_SHd))
        distance = place[:, None] - place
        unseen = (distance < 0) | (distance >= (window or len(place)))
        outs.append(torch.einsum("hst,thd->shd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v_SHd))
    return torch.cat(outs)


def no_rotation(num_tokens: int) -> Rope:
    """One pair of channels, turned by nothing."""
    return Rope(*(fill(num_tokens, 1, dtype=torch.float64) for fill in (torch.ones, torch.zeros)), False)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("impl", ["reference", "cpp", "padded"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_forward_and_gradients(
    lengths: list[int], shape: tuple[int, int, int, int], impl: str, window: int | None, monkeypatch
) -> None:
    heads, kv_heads, dim, value_dim = shape
    generator, tokens = torch.Generator().manual_seed(0), sum(lengths)
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    q, k, v = (torch.randn(tokens, *size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes)
    grad = torch.randn(tokens, heads, value_dim, generator=generator, dtype=torch.float64)
    plan = plan_of(lengths)
    if impl == "padded":  # as on a GPU in fp32
        monkeypatch.setattr("r1fast.models.attention.choose", lambda *args: (impl, ""))
        impl = None
    with use(impl):
        out = packed_attention(q, k, v, plan, None if window else no_rotation(tokens), 0.3, window=window)
    expected = reference(q, k, v, lengths, 0.3, window)
    torch.testing.assert_close(out, expected)
    got_grads = torch.autograd.grad(out, (q, k, v), grad)
    for got, want in zip(got_grads, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(got, want)


def test_no_sequence_at_all() -> None:
    plan, empty = plan_of([]), torch.empty(0, 2, 4, dtype=torch.float64)
    for impl in ("reference", "cpp"):
        with use(impl):
            assert packed_attention(empty, empty, empty, plan, no_rotation(0), 1.0).shape == (0, 2, 4)


def test_plan_positions_and_rows() -> None:
    plan = plan_of([3, 0, 2])
    assert plan.rows_T.tolist() == [0, 0, 0, 2, 2]
    assert plan.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert (plan.num_sequences, plan.max_length) == (3, 3)


def test_buckets_are_few_and_nearly_full() -> None:
    lengths = torch.randint(20, 45, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    layout = plan_of(lengths).padded
    assert len(layout.buckets) <= 4
    assert len(layout.slot_T.unique()) == sum(lengths) <= layout.num_slots < 1.2 * sum(lengths)


@pytest.mark.parametrize(
    "cu_seqlens", [[0, 3], [1, 5], [0, 4, 2, 5], []], ids=["short", "not-from-0", "falling", "empty"]
)
def test_bad_cu_seqlens(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected \[N\+1\] rising from 0 to the 5 packed tokens"):
        AttentionPlan(torch.tensor(cu_seqlens, dtype=torch.int32), 5, torch.device("cpu"))
