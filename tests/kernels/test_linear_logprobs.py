import sys

import pytest
import torch
import torch.nn.functional as F

from r1fast_kernels import linear_cross_entropy, linear_logprobs, selective_logprobs


def random_head(
    num_tokens: int = 23, width: int = 8, vocab: int = 31, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(vocab, (num_tokens,), generator=generator)


@pytest.fixture
def chunks_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    """31 x 5 logits at a time: four whole chunks and one of 3."""
    # Not `import r1fast_kernels.linear_logprobs`: the package exports the op under the module's name.
    monkeypatch.setattr(sys.modules["r1fast_kernels.linear_logprobs"], "MAX_LOGITS", 31 * 5)


def outputs_and_gradients(entropy_weight: float) -> list[torch.Tensor]:
    hidden, weight, bias, ids = random_head()
    logprobs, entropy = linear_logprobs(hidden, weight, ids, bias_V=bias, temperature=0.7, with_entropy=True)
    loss = (logprobs * torch.linspace(-1, 1, len(ids))).sum()
    if entropy_weight:
        loss = loss + entropy_weight * entropy.square().sum()
    return [logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight, bias))]


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3], ids=["logprobs-only", "with-entropy"])
def test_chunks_equal_the_whole(request: pytest.FixtureRequest, entropy_weight: float) -> None:
    whole = outputs_and_gradients(entropy_weight)
    request.getfixturevalue("chunks_of_five")
    for got, want in zip(outputs_and_gradients(entropy_weight), whole):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunked", [False, True])
def test_gradcheck(request: pytest.FixtureRequest, chunked: bool) -> None:
    if chunked:
        request.getfixturevalue("chunks_of_five")
    hidden, weight, bias, ids = random_head(num_tokens=7, width=3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, ids, bias_V=b, temperature=1.3, with_entropy=True), (hidden, weight, bias)
    )


@pytest.mark.usefixtures("chunks_of_five")
def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, ids = random_head()
    linear_logprobs(hidden, weight.detach(), ids).sum().backward()
    frozen_hidden, live_weight, _, _ = random_head()
    linear_logprobs(frozen_hidden.detach(), live_weight, ids).sum().backward()
    assert hidden.grad is not None and live_weight.grad is not None and frozen_hidden.grad is None


@pytest.mark.usefixtures("chunks_of_five")
def test_bf16_chunks_are_as_exact_as_plain_bf16() -> None:
    hidden, weight, _, ids = random_head(num_tokens=200, width=64)
    exact = torch.autograd.grad(linear_logprobs(hidden, weight, ids).sum(), (hidden, weight))
    low_hidden, low_weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    ours = torch.autograd.grad(linear_logprobs(low_hidden, low_weight, ids).sum(), (low_hidden, low_weight))
    logits = F.linear(low_hidden, low_weight)
    plain_logprobs = selective_logprobs(logits, ids, impl="reference").sum()
    plain = torch.autograd.grad(plain_logprobs, (low_hidden, low_weight))
    for got, eager, want in zip(ours, plain, exact):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() <= 3 * (eager.double() - want).norm()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torchs(request: pytest.FixtureRequest, reduction: str, chunked: bool) -> None:
    if chunked:
        request.getfixturevalue("chunks_of_five")
    hidden, weight, _, ids = random_head()
    ids[::3] = -100
    scale = torch.linspace(-1, 2, len(ids), dtype=torch.float64) if reduction == "none" else 1.0
    ours = linear_cross_entropy(hidden, weight, ids, reduction=reduction)
    torchs = F.cross_entropy(F.linear(hidden, weight), ids, reduction=reduction)
    torch.testing.assert_close(ours, torchs)
    got = torch.autograd.grad((ours * scale).sum(), (hidden, weight))
    want = torch.autograd.grad((torchs * scale).sum(), (hidden, weight))
    torch.testing.assert_close(got, want)


def test_ignored_rows_may_hold_nan() -> None:
    hidden, weight, _, ids = random_head()
    clean = linear_cross_entropy(hidden[1:], weight, ids[1:])
    with torch.no_grad():
        hidden[0] = float("nan")
    ids[0] = -100
    loss = linear_cross_entropy(hidden, weight, ids)
    loss.backward()
    torch.testing.assert_close(loss, clean)
    assert weight.grad.isfinite().all() and not hidden.grad[0].any()


def test_no_target_at_all_is_zero_with_zero_gradient() -> None:
    hidden, weight, _, ids = random_head()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any() and not weight.grad.any()


def test_errors_say_what_was_expected() -> None:
    hidden, weight, _, ids = random_head()
    with pytest.raises(ValueError, match=r"expected \[T, D\], \[V, D\] and \[T\]"):
        linear_logprobs(hidden, weight[:, :5], ids)
    with pytest.raises(ValueError, match="expected mean, sum or none"):
        linear_cross_entropy(hidden, weight, ids, reduction="avg")
