import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast_kernels import group_advantages
from tests.kernels.backends import (
    FP16,
    FP64,
    SLOW_INTERPRETED,
    Backend,
    assert_as_exact,
    assert_same_bits,
    needs_cpp,
)

NAN = float("nan")


def on(backend: Backend, rewards: Tensor, groups: Tensor, **options: Any) -> Tensor:
    """The advantages that this backend computes, on the CPU."""
    return group_advantages(backend.to(rewards), backend.to(groups), **options, impl=backend.impl).cpu()


def random_case(num_samples: int, num_groups: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards of which one in ten is unscorable, and groups of uneven size in any order."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(num_samples, generator=generator)
    rewards[torch.rand(num_samples, generator=generator) < 0.1] = NAN
    return rewards, torch.randint(num_groups, (num_samples,), generator=generator)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "num_samples", [1, 7, 37, *(pytest.param(n, marks=SLOW_INTERPRETED) for n in (1024, 1031))], ids=lambda n: f"N{n}"
)
def test_as_exact_as_the_reference(backend: Backend, num_samples: int, scale: str) -> None:
    """1024 samples are a block, 1031 a prime beyond it. The result is fp64 rounded once."""
    for dtype in backend.dtypes:
        rewards, groups = random_case(num_samples, max(1, num_samples // 5))
        rewards = rewards.to(dtype)
        got = on(backend, rewards, groups, scale=scale)
        exact = group_advantages(rewards.double(), groups, scale=scale, impl="reference")
        plain = group_advantages(rewards, groups, scale=scale, impl="reference")
        assert got.dtype == plain.dtype
        assert_as_exact(got, plain, exact, 2)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_past_a_block(backend: Backend, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks, the last not full: every program goes through all of them."""
    monkeypatch.setattr(sys.modules["r1fast_kernels.group_advantages"], "BLOCK_N", 8)
    rewards, groups = random_case(19, 3)
    want = group_advantages(rewards, groups, scale=scale, impl="reference")
    torch.testing.assert_close(on(backend, rewards, groups, scale=scale), want)


def test_same_bits_every_time(backend: Backend) -> None:
    rewards, groups = random_case(50 if backend.interpreted else 1031, 9)
    assert_same_bits(lambda: [on(backend, rewards, groups, scale=scale) for scale in ("group", "batch", "none")])


@needs_cpp
def test_opcheck_and_compile() -> None:
    rewards, groups = random_case(50, 9)
    torch.library.opcheck(torch.ops.r1fast.group_advantages.default, (rewards, groups, "group", 1e-4))
    compiled = torch.compile(group_advantages, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(rewards, groups), group_advantages(rewards, groups))


def test_by_hand(backend: Backend) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 4.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    # Group 0: mean 1/2, unbiased variance 4 (1/4) / 3. Group 1: mean 3, variance 2.
    std = (math.sqrt(1 / 3), math.sqrt(2))
    want = [0.5 / (std[0] + 1e-4), -0.5 / (std[0] + 1e-4)]
    expected = [want[0], want[1], want[1], want[0], -1 / (std[1] + 1e-4), 1 / (std[1] + 1e-4)]
    torch.testing.assert_close(on(backend, rewards, groups), torch.tensor(expected))
    unscaled = on(backend, rewards, groups, scale="none")
    assert unscaled.tolist() == [0.5, -0.5, -0.5, 0.5, -1.0, 1.0]
    batch = on(backend, rewards, groups, scale="batch")
    torch.testing.assert_close(batch, unscaled / (rewards.std() + 1e-4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_order_and_ids_of_groups_do_not_matter(backend: Backend, scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(50, generator=generator)
    groups = torch.randint(7, (50,), generator=generator)
    want = on(backend, rewards, groups, scale=scale)
    shuffle = torch.randperm(50, generator=generator)
    names = torch.tensor([900, 3, 77, 12, 5, 4, 10**12])
    torch.testing.assert_close(on(backend, rewards[shuffle], names[groups[shuffle]], scale=scale), want[shuffle])
    for group in range(7):
        assert want[groups == group].sum().abs() < 1e-5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_and_lone_samples_get_exactly_zero(backend: Backend, scale: str) -> None:
    # 0.1 summed three times and divided by 3 is not 0.1 in floating point.
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.3, 1.0, 2.0])
    advantages = on(backend, rewards, torch.tensor([0, 0, 0, 1, 2, 2]), scale=scale)
    assert advantages[:4].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert advantages[4] < 0 < advantages[5]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unscorable_is_left_out(backend: Backend, scale: str) -> None:
    rewards = torch.tensor([1.0, NAN, 3.0, 5.0, NAN, NAN, 2.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    advantages = on(backend, rewards, groups, scale=scale)
    alone = on(backend, rewards[~rewards.isnan()], groups[~rewards.isnan()], scale=scale)
    torch.testing.assert_close(advantages[~rewards.isnan()], alone)
    assert not advantages[rewards.isnan()].any()
    assert not on(backend, torch.tensor([NAN, NAN]), torch.tensor([0, 0]), scale=scale).any()


def test_a_large_offset_does_not_cancel(backend: Backend) -> None:
    """Rewards of 0 and 1 on top of 1e6: E[x^2] - E[x]^2 would lose them."""
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0])  # 1e6 + 1 is exact in fp32
    groups = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(on(backend, rewards + 1e6, groups), on(backend, rewards, groups))


def test_empty_and_errors(backend: Backend) -> None:
    assert on(backend, torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match="expected group, batch or none"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), scale="std")
    with pytest.raises(ValueError, match=r"expected both \[N\]"):
        group_advantages(torch.zeros(2), torch.zeros(3, dtype=torch.long))
    wrong = FP16 if backend.impl == "cpp" else FP64
    with pytest.raises(ValueError, match=f"kernels take float32.* got {str(wrong)[6:]}"):
        on(backend, torch.zeros(2, dtype=wrong), torch.zeros(2, dtype=torch.long))
