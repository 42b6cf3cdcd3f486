import pytest
import torch

from r1fast_kernels import dispatch
from r1fast_kernels.moe_dispatch import moe_dispatch, moe_dispatch_reference
from tests.kernels.backends import Backend, assert_same_bits, needs_cpp


def random_ids(num_tokens: int, k: int, end: int) -> torch.Tensor:
    return torch.randint(end, (num_tokens, k), generator=torch.Generator().manual_seed(0))


# Ids up to `end`: those from num_experts on are skipped.
CASES = {
    "random": (random_ids(40, 3, 5), 5),
    "T1": (random_ids(1, 2, 5), 5),
    "T0": (random_ids(0, 2, 5), 5),
    "K1": (random_ids(33, 1, 7), 7),
    "E1": (random_ids(9, 2, 1), 1),
    "some-skipped": (random_ids(67, 2, 9), 5),
    "all-skipped": (random_ids(7, 2, 3) + 4, 4),
    "one-takes-all": (torch.full((31, 2), 3), 5),
    "more-experts-than-choices": (random_ids(3, 2, 200), 257),
    "past-a-chunk-of-16384": (random_ids(16411, 2, 6), 5),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_a_stable_sort(backend: Backend, name: str) -> None:
    ids, num_experts = CASES[name]
    if backend.interpreted:
        ids = ids[:100]
    got = moe_dispatch(ids.to(backend.device), num_experts, impl=backend.impl)
    for g, want in zip(got, moe_dispatch_reference(ids, num_experts), strict=True):
        assert g.dtype == torch.int32 and torch.equal(g.cpu(), want)


def test_by_hand(backend: Backend) -> None:
    ids = torch.tensor([[2, 0], [9, 2], [0, 2]], device=backend.device)
    order, slot, offsets = moe_dispatch(ids, 3, impl=backend.impl)
    assert order.tolist() == [1, 4, 0, 3, 5, 2]  # expert 0: choices 1 and 4; expert 2: 0, 3, 5; skipped: 2
    assert slot.tolist() == [[2, 0], [5, 3], [1, 4]]
    assert offsets.tolist() == [2, 2, 5]


def test_strided_ids(backend: Backend) -> None:
    ids = random_ids(3, 40, 5).to(backend.device).T
    for got, want in zip(moe_dispatch(ids, 5, impl=backend.impl), moe_dispatch_reference(ids, 5), strict=True):
        assert torch.equal(got, want)


def test_same_bits_every_time(backend: Backend) -> None:
    ids = random_ids(50 if backend.interpreted else 40_000, 2, 6).to(backend.device)
    assert_same_bits(lambda: moe_dispatch(ids, 5, impl=backend.impl))


@needs_cpp
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.r1fast.moe_dispatch.default, (random_ids(9, 2, 6), 5))


def test_errors_say_what_was_expected(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"expected \[T, K\]"):
        moe_dispatch(torch.zeros(3, dtype=torch.long, device=backend.device), 4, impl=backend.impl)
    absent = "triton" if backend.impl == "cpp" else "cpp"
    if absent in dispatch.IMPLEMENTATIONS["moe_dispatch"]:
        with pytest.raises(ValueError, match=f"impl='{absent}' cannot run here"):
            moe_dispatch(random_ids(2, 2, 3).to(backend.device), 3, impl=absent)


@needs_cpp
def test_a_negative_id_is_an_error() -> None:
    ids = random_ids(40, 3, 5)
    ids[7, 2] = -4
    with pytest.raises(ValueError, match=r"expert_ids_TK\[7, 2\] is -4, expected an id >= 0"):
        moe_dispatch(ids, 5, impl="cpp")
