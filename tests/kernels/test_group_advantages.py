import math

import pytest
import torch

from r1fast_kernels import group_advantages

NAN = float("nan")


def test_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 4.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    # Group 0: mean 1/2, unbiased variance 4 (1/4) / 3. Group 1: mean 3, variance 2.
    std = (math.sqrt(1 / 3), math.sqrt(2))
    want = [0.5 / (std[0] + 1e-4), -0.5 / (std[0] + 1e-4)]
    expected = [want[0], want[1], want[1], want[0], -1 / (std[1] + 1e-4), 1 / (std[1] + 1e-4)]
    torch.testing.assert_close(group_advantages(rewards, groups), torch.tensor(expected))
    unscaled = group_advantages(rewards, groups, scale="none")
    assert unscaled.tolist() == [0.5, -0.5, -0.5, 0.5, -1.0, 1.0]
    batch = group_advantages(rewards, groups, scale="batch")
    torch.testing.assert_close(batch, unscaled / (rewards.std() + 1e-4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_order_and_ids_of_groups_do_not_matter(scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(50, generator=generator)
    groups = torch.randint(7, (50,), generator=generator)
    want = group_advantages(rewards, groups, scale=scale)
    shuffle = torch.randperm(50, generator=generator)
    names = torch.tensor([900, 3, 77, 12, 5, 4, 10**12])
    torch.testing.assert_close(group_advantages(rewards[shuffle], names[groups[shuffle]], scale=scale), want[shuffle])
    for group in range(7):
        assert want[groups == group].sum().abs() < 1e-5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_and_lone_samples_get_exactly_zero(scale: str) -> None:
    # 0.1 summed three times and divided by 3 is not 0.1 in floating point.
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.3, 1.0, 2.0])
    advantages = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 2, 2]), scale=scale)
    assert advantages[:4].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert advantages[4] < 0 < advantages[5]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unscorable_is_left_out(scale: str) -> None:
    rewards = torch.tensor([1.0, NAN, 3.0, 5.0, NAN, NAN, 2.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    advantages = group_advantages(rewards, groups, scale=scale)
    alone = group_advantages(rewards[~rewards.isnan()], groups[~rewards.isnan()], scale=scale)
    torch.testing.assert_close(advantages[~rewards.isnan()], alone)
    assert not advantages[rewards.isnan()].any()
    assert not group_advantages(torch.tensor([NAN, NAN]), torch.tensor([0, 0]), scale=scale).any()


def test_a_large_offset_does_not_cancel() -> None:
    """Rewards of 0 and 1 on top of 1e6: E[x^2] - E[x]^2 would lose them."""
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    groups = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(group_advantages(rewards + 1e6, groups), group_advantages(rewards, groups))


def test_empty_and_errors() -> None:
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match="expected group, batch or none"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), scale="std")
    with pytest.raises(ValueError, match=r"expected both \[N\]"):
        group_advantages(torch.zeros(2), torch.zeros(3, dtype=torch.long))
