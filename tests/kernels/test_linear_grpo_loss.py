import sys
from typing import Any

import pytest
import torch

from r1fast_kernels import grpo_loss, linear_grpo_loss, linear_logprobs

LENGTHS = [5, 1, 9]


def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(15, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(11, (15,), generator=generator)
    return hidden, weight, ids, torch.tensor([0, *LENGTHS]).cumsum(0).int()


def options() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    hidden, weight, ids, _ = head()
    logprobs = linear_logprobs(hidden, weight, ids, temperature=0.8).detach()

    def near(spread: float) -> torch.Tensor:
        return logprobs + spread * torch.randn(15, generator=generator, dtype=torch.float64)

    return {
        "rewards_N": torch.tensor([1.0, 0.0, 0.5]),
        "group_ids_N": torch.zeros(3, dtype=torch.long),
        "old_logprobs_T": near(0.3),
        "ref_logprobs_T": near(0.2),
        "beta": 0.1,
        "loss_type": "dapo",
    }


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_two_ops(monkeypatch: pytest.MonkeyPatch, masked: bool, chunked: bool) -> None:
    """Values, metrics and both gradients; masked targets and hidden rows may hold anything."""
    hidden, weight, ids, cu_seqlens = head()
    mask = torch.arange(15) % 4 != 1 if masked else None
    logprobs, entropy = linear_logprobs(hidden, weight, ids, temperature=0.8, with_entropy=True)
    want, want_metrics = grpo_loss(logprobs, cu_seqlens, loss_mask_T=mask, **options())
    want_gradients = torch.autograd.grad(want, (hidden, weight))
    if masked:
        ids, entropy = torch.where(mask, ids, -100), entropy[mask]
        with torch.no_grad():
            hidden[~mask] = float("nan")
    if chunked:
        monkeypatch.setattr(sys.modules["r1fast_kernels.linear_logprobs"], "MAX_LOGITS", 11 * 4)
    loss, metrics = linear_grpo_loss(hidden, weight, ids, cu_seqlens, temperature=0.8, loss_mask_T=mask, **options())
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), want_gradients)
    torch.testing.assert_close(metrics.pop("entropy"), entropy.mean().detach())
    torch.testing.assert_close(metrics, want_metrics)


def test_everything_masked_is_zero() -> None:
    hidden, weight, ids, cu_seqlens = head()
    loss, metrics = linear_grpo_loss(
        hidden, weight, ids, cu_seqlens, loss_mask_T=torch.zeros(15, dtype=torch.bool), **options()
    )
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()
    assert all(value.isfinite() for value in metrics.values())


def test_gradcheck() -> None:
    hidden, weight, ids, cu_seqlens = head()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_grpo_loss(h, w, ids, cu_seqlens, temperature=0.8, **options())[0], (hidden, weight)
    )


def test_a_mask_of_another_shape_is_an_error() -> None:
    hidden, weight, ids, cu_seqlens = head()
    with pytest.raises(ValueError, match=r"got loss_mask_T \(3,\), expected \(15,\)"):
        linear_grpo_loss(hidden, weight, ids, cu_seqlens, loss_mask_T=torch.ones(3, dtype=torch.bool), **options())
