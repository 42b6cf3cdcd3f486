from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast_kernels import linear_cross_entropy
from tests.kernels.backends import BF16, FP16, FP32, FP64, Backend, assert_as_exact, assert_same_bits, needs_cpp
from tests.kernels.heads import TILINGS, random_head, set_one_thread_for_products, set_tiling


def torchs(hidden: Tensor, weight: Tensor, ids: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(
        F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, FP32)), ids, reduction=reduction
    )


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, ids: Tensor, device: str, function: Any, **options: Any
) -> list[Tensor]:
    leaves = [x.detach().to(device).requires_grad_() for x in (hidden, weight)]
    loss = function(*leaves, ids.to(device), **options)
    upstream = torch.linspace(-1, 2, len(ids)).to(loss) if loss.dim() else torch.tensor(0.7).to(loss)
    return [loss, *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_exact_as_torch(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, reduction: str, tiling: str, dtype: torch.dtype
) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    hidden, weight, _, ids = random_head(dtype=dtype)
    ids[::3] = -100
    exact = loss_and_gradients(hidden.double(), weight.double(), ids, "cpu", torchs, reduction=reduction)
    plain = loss_and_gradients(hidden, weight, ids, backend.device, torchs, reduction=reduction)
    set_tiling(monkeypatch, tiling)
    got = loss_and_gradients(
        hidden, weight, ids, backend.device, linear_cross_entropy, reduction=reduction, impl=backend.impl
    )
    for name, g, p, e, times in zip(("loss", "grad hidden", "grad weight"), got, plain, exact, (2, 3, 3)):
        assert g.dtype == p.dtype, name
        assert_as_exact(g, p, e, times, name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["reference", None])
def test_reference_is_torchs(impl: str | None, reduction: str) -> None:
    hidden, weight, _, ids = random_head()
    ids[::3] = -100
    want = loss_and_gradients(hidden, weight, ids, "cpu", torchs, reduction=reduction)
    got = loss_and_gradients(hidden, weight, ids, "cpu", linear_cross_entropy, reduction=reduction, impl=impl)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tiling", TILINGS)
def test_ignored_rows_may_hold_nan(backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    set_tiling(monkeypatch, tiling)
    hidden, weight, _, ids = (x.to(backend.device) for x in random_head(dtype=FP32))
    clean = linear_cross_entropy(hidden[1:], weight, ids[1:], impl=backend.impl)
    hidden[0], ids[0] = float("nan"), -100
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(*leaves, ids, impl=backend.impl)
    loss.backward()
    torch.testing.assert_close(loss, clean)
    assert weight.grad.isfinite().all() and not hidden.grad[0].any() and hidden.grad[1].any()


@pytest.mark.parametrize("impl", ["reference", "backend"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_target_at_all_is_zero_with_zero_gradient(backend: Backend, reduction: str, impl: str) -> None:
    hidden, weight, _, ids = (x.to(backend.device) for x in random_head(dtype=FP32))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    name = backend.impl if impl == "backend" else impl
    loss = linear_cross_entropy(*leaves, torch.full_like(ids, -100), reduction=reduction, impl=name)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_every_target_counts_when_none_is_ignored(backend: Backend) -> None:
    hidden, weight, _, ids = (x.to(backend.device) for x in random_head(dtype=FP32))
    with_index = linear_cross_entropy(hidden, weight, ids, impl=backend.impl)
    assert torch.equal(linear_cross_entropy(hidden, weight, ids, ignore_index=None, impl=backend.impl), with_index)


@pytest.mark.parametrize("learned", ["hidden", "weight"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_one_side_may_be_frozen(backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str, learned: str) -> None:
    set_tiling(monkeypatch, tiling)
    hidden, weight, _, ids = random_head(dtype=FP32)
    want = loss_and_gradients(hidden, weight, ids, backend.device, linear_cross_entropy, impl=backend.impl)
    hidden, weight, ids = backend.to((hidden, weight, ids))
    leaf = (hidden if learned == "hidden" else weight).requires_grad_()
    (linear_cross_entropy(hidden, weight, ids, impl=backend.impl) * 0.7).backward()
    assert torch.equal(leaf.grad, want[1 if learned == "hidden" else 2])
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, ids, impl=backend.impl), want[0])


@pytest.mark.parametrize("tiling", TILINGS)
def test_same_bits_and_backward_twice(backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    set_tiling(monkeypatch, tiling)
    set_one_thread_for_products(monkeypatch)
    hidden, weight, _, ids = backend.to(random_head(dtype=FP32))
    assert_same_bits(
        lambda: loss_and_gradients(hidden, weight, ids, backend.device, linear_cross_entropy, impl=backend.impl)
    )
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, ids, impl=backend.impl)
    first = torch.autograd.grad(loss, hidden, torch.tensor(3.0).to(loss), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden, torch.tensor(3.0).to(loss))[0], first) and first.any()


@needs_cpp
@pytest.mark.parametrize("tiling", TILINGS)
def test_gradcheck_and_opcheck(monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    set_tiling(monkeypatch, tiling)
    hidden, weight, _, ids = random_head(num_tokens=7, width=2, vocab=67)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, ids), leaves)
    ids[2] = -100
    torch.library.opcheck(torch.ops.r1fast.linear_cross_entropy.default, (*leaves, ids, -100, True, True, True))


def test_errors_say_what_was_expected() -> None:
    hidden, weight, _, ids = random_head()
    with pytest.raises(ValueError, match="expected mean, sum or none"):
        linear_cross_entropy(hidden, weight, ids, reduction="avg")
    with pytest.raises(ValueError, match=r"linear_cross_entropy: got hidden \(23, 8\)"):
        linear_cross_entropy(hidden, weight[:, 1:], ids)
