import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast_kernels import linear_logprobs
from tests.kernels.backends import (
    BF16,
    FP16,
    FP32,
    FP64,
    Backend,
    assert_as_exact,
    assert_same_bits,
    needs_cpp,
    slow_when_interpreted,
)  # fmt: skip
from tests.kernels.heads import HEAD, TILINGS, random_head, set_one_thread_for_products, set_tiling

NAMES = ("logprobs", "entropy", "grad hidden", "grad weight", "grad bias")


def outputs_and_gradients(
    head: tuple[Tensor, ...], device: str, *, with_bias: bool = True, **options: Any
) -> list[Tensor]:
    """Log-probs, entropy, and the gradients of a sum in which every token has other weights for the two."""
    hidden, weight, bias = (x.detach().to(device).requires_grad_() for x in head[:3])
    options |= {"bias_V": bias} if with_bias else {}
    logprobs, entropy = linear_logprobs(hidden, weight, head[3].to(device), with_entropy=True, **options)
    ramp = torch.linspace(-1, 1, len(logprobs)).to(logprobs)
    loss = (logprobs * ramp).sum() + 0.3 * (entropy * (1 + ramp)).sum()
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    return [logprobs, entropy, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", ""])
def test_as_exact_as_torch(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tiling: str, with_bias: bool
) -> None:
    """Against fp64 on the same rounded inputs: outputs within 2x, gradients within 3x the error of plain torch."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    head = random_head(dtype=dtype)
    options = {"with_bias": with_bias, "temperature": 0.7}
    exact = outputs_and_gradients(tuple(x.double() for x in head[:3]) + head[3:], "cpu", impl="reference", **options)
    plain = outputs_and_gradients(head, backend.device, impl="reference", **options)
    set_tiling(monkeypatch, tiling)
    got = outputs_and_gradients(head, backend.device, impl=backend.impl, **options)
    for name, g, p, e, times in zip(NAMES, got, plain, exact, (2, 2, 3, 3, 3)):
        assert g.dtype == p.dtype and g.is_contiguous(), name
        assert_as_exact(g, p, e, times, name)


HOSTILE = {
    "one-token": random_head(num_tokens=1),
    "no-token": random_head(num_tokens=0),
    "one-column": random_head(vocab=1),
    "width-1": random_head(width=1),
    "logits-near-2e4": tuple(x + 50 if i < 2 else x for i, x in enumerate(random_head())),
    "logits-near--2e4": tuple(x + (50, -50)[i] if i < 2 else x for i, x in enumerate(random_head())),
}


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input(backend: Backend, monkeypatch: pytest.MonkeyPatch, name: str, tiling: str) -> None:
    head = tuple(x.float() for x in HOSTILE[name][:3]) + HOSTILE[name][3:]
    exact = outputs_and_gradients(tuple(x.double() for x in head[:3]) + head[3:], "cpu", impl="reference")
    # A logit near 2e4 is known to 2e-3, so an entropy depends on the order in which products are summed: plain torch is
    # tried in two, and the worse one of each output counts.
    plain = outputs_and_gradients(head, backend.device, impl="reference")
    other = outputs_and_gradients((head[0].flip(1), head[1].flip(1), *head[2:]), backend.device, impl="reference")
    other[2:4] = (x.flip(1) for x in other[2:4])
    set_tiling(monkeypatch, tiling)
    got = outputs_and_gradients(head, backend.device, impl=backend.impl)
    for part, g, orders, e, times in zip(NAMES, got, zip(plain, other), exact, (2, 2, 3, 3, 3)):
        worse = max(orders, key=lambda x: float((x.detach().double().cpu() - e).abs().max()) if x.numel() else 0.0)
        assert_as_exact(g, worse, e, times, part)


@pytest.mark.parametrize("tiling", TILINGS)
def test_a_masked_vocabulary(backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    """A bias of -inf takes tokens out: whole tiles of them, and all but one."""
    hidden, weight, bias, ids = random_head(dtype=FP32)
    for kept in (slice(0, 60), slice(130, 211), slice(77, 78)):
        masked = torch.full_like(bias, -torch.inf)
        masked[kept] = bias[kept]
        head = hidden, weight, masked, ids * 0 + kept.start
        exact = outputs_and_gradients(tuple(x.double() for x in head[:3]) + head[3:], "cpu", impl="reference")
        plain = outputs_and_gradients(head, backend.device, impl="reference")
        with monkeypatch.context() as patch:
            set_tiling(patch, tiling)
            got = outputs_and_gradients(head, backend.device, impl=backend.impl)
        for part, g, p, e, times in zip(NAMES, got, plain, exact, (2, 2, 3, 3, 3)):
            assert_as_exact(g, p, e, times, part)


@slow_when_interpreted
@pytest.mark.parametrize("tiling", TILINGS)
def test_what_needs_no_gradient_costs_no_product(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str
) -> None:
    """A frozen weight (LoRA) spares its product, a frozen body the other one."""
    module = sys.modules[HEAD]
    multiply, shapes = module.multiply_into, []

    def counted(total: Tensor, *factors: Tensor, add: bool) -> None:
        shapes.append(total.shape[1])
        multiply(total, *factors, add=add)

    monkeypatch.setattr(module, "multiply_into", counted)
    set_tiling(monkeypatch, tiling)
    head = [x.to(backend.device) for x in random_head(dtype=FP32)]
    want = outputs_and_gradients(random_head(dtype=FP32), backend.device, with_bias=False, impl=backend.impl)
    both = len(shapes)
    for learned in (0, 1):
        shapes.clear()
        inputs = [x.requires_grad_() if i == learned else x.detach() for i, x in enumerate(head[:2])]
        logprobs, entropy = linear_logprobs(*inputs, head[3], with_entropy=True, impl=backend.impl)
        ramp = torch.linspace(-1, 1, len(logprobs)).to(logprobs)
        ((logprobs * ramp).sum() + 0.3 * (entropy * (1 + ramp)).sum()).backward()
        assert len(shapes) == both / 2
        assert torch.equal(inputs[learned].grad, want[2 + learned]) and inputs[1 - learned].grad is None


def test_tied_to_the_embedding(backend: Backend) -> None:
    """One parameter, used twice: both gradients arrive."""
    _, weight, _, ids = random_head(dtype=FP32)
    gradients = []
    for impl in ("reference", backend.impl):
        table = weight.to(backend.device).requires_grad_()
        linear_logprobs(table[ids.to(backend.device)] * 0.1, table, ids.to(backend.device), impl=impl).sum().backward()
        gradients.append(table.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


@slow_when_interpreted
@pytest.mark.parametrize("tiling", TILINGS)
def test_same_bits_every_time(backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    set_tiling(monkeypatch, tiling)
    set_one_thread_for_products(monkeypatch)
    head = random_head(dtype=FP32)
    assert_same_bits(lambda: outputs_and_gradients(head, backend.device, impl=backend.impl))


@pytest.mark.parametrize("tiling", TILINGS)
def test_backward_twice(backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    """Kept logits are written over only when nothing can ask again."""
    set_tiling(monkeypatch, tiling)
    hidden, weight, _, ids = (x.to(backend.device) for x in random_head(dtype=FP32))
    hidden.requires_grad_()
    loss = linear_logprobs(hidden, weight, ids, impl=backend.impl).sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first) and first.any()


@needs_cpp
@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, tiling: str, impl: str) -> None:
    set_tiling(monkeypatch, tiling)
    hidden, weight, bias, ids = random_head(num_tokens=7, width=2, vocab=67)
    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, ids, bias_V=b, temperature=1.3, with_entropy=True, impl=impl), leaves
    )


@needs_cpp
@pytest.mark.parametrize("tiling", TILINGS)
def test_opcheck(monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    set_tiling(monkeypatch, tiling)
    hidden, weight, bias, ids = random_head(dtype=FP32)
    hidden.requires_grad_()
    # Not with kept logits: eager writes the gradient over that output, which the caller never sees.
    torch.library.opcheck(
        torch.ops.r1fast.linear_logprobs.default, (hidden, weight.requires_grad_(), bias, ids, 0.7, True, False)
    )


@needs_cpp
@pytest.mark.parametrize("tiling", TILINGS)
def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    """And without a new compilation for each number of tokens."""
    set_tiling(monkeypatch, tiling)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return sum(x.sum() for x in linear_logprobs(hidden * 2, weight, ids, with_entropy=True))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for num_tokens in (23, 17, 29, 31, 37):
        hidden, weight, _, ids = random_head(num_tokens, dtype=FP32)
        gradients = []
        for function in (compiled, loss):
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            gradients.append(torch.autograd.grad(function(*leaves, ids), leaves))
        torch.testing.assert_close(gradients[0], gradients[1])
    assert counter.frame_count <= 2  # the first size, then any size


def test_autocast_decides_the_dtype(backend: Backend) -> None:
    """fp32 master weights and bf16 activations under autocast, as torch's own linear takes them."""
    hidden, weight, _, ids = (x.to(backend.device) for x in random_head(dtype=FP32))
    weight.requires_grad_()
    with torch.autocast(backend.device, dtype=BF16):
        logprobs = linear_logprobs(hidden.bfloat16(), weight, ids, impl=backend.impl)
    want = linear_logprobs(hidden.bfloat16(), weight.detach().bfloat16(), ids, impl=backend.impl)
    assert torch.equal(logprobs, want)
    logprobs.sum().backward()
    assert weight.grad.dtype == FP32


def test_rows_are_views_of_anything(backend: Backend) -> None:
    hidden, weight, bias, ids = (x.to(backend.device) for x in random_head(dtype=FP32))
    want = linear_logprobs(hidden, weight, ids, bias_V=bias, impl=backend.impl)
    wide = torch.stack([hidden, hidden], 1).flatten(1)[:, : hidden.shape[1]]
    transposed = weight.T.contiguous().T
    got = linear_logprobs(wide, transposed, torch.stack([ids, ids], 1)[:, 0], bias_V=bias, impl=backend.impl)
    torch.testing.assert_close(got, want)


def test_errors_say_what_was_expected(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, ids = random_head(dtype=FP32)
    with pytest.raises(ValueError, match=r"expected \[T, D\], \[V, D\] and \[T\]"):
        linear_logprobs(hidden, weight[:, :5], ids)
    with pytest.raises(ValueError, match=r"got bias \(210,\), expected \(211,\)"):
        linear_logprobs(hidden, weight, ids, bias_V=bias[1:])
    with pytest.raises(ValueError, match=r"hidden in torch\.bfloat16 and weight in torch\.float32"):
        linear_logprobs(hidden.bfloat16(), weight, ids)
    with pytest.raises(ValueError, match="temperature=0"):
        linear_logprobs(hidden, weight, ids, temperature=0)
    if backend.name == "cpp":
        for tiling in TILINGS:
            set_tiling(monkeypatch, tiling)
            with pytest.raises(IndexError, match="expected 0 <= id < 211"):
                linear_logprobs(hidden, weight, torch.where(ids == ids[3], -100, ids), impl="cpp")


def test_the_small_tiles_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would run one tile three times."""
    hidden, weight, _, _ = random_head()
    set_tiling(monkeypatch, "one-piece-of-tokens")
    tokens, columns, buffer = sys.modules[HEAD].wide_tiles(hidden, weight)
    assert (len(tokens), len(columns), buffer.numel()) == (1, 4, 23 * 64)
    set_tiling(monkeypatch, "pieces-of-both")
    tokens, columns, buffer = sys.modules[HEAD].wide_tiles(hidden, weight)
    assert (len(tokens), len(columns), buffer.numel()) == (5, 4, 5 * 64)
    assert sys.modules[HEAD].rows_of_tall_tile(hidden, 211) == 7
