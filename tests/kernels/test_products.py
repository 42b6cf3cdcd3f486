from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast_kernels import grouped_gemm, products
from r1fast_kernels.torch_private import OperatorMode, fake_tensors
from tests.kernels.backends import BF16, FP32, FP64, assert_as_exact, assert_same_bits, needs_gpu

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a CPU where oneDNN is faster, on any."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def random_case(T: int, K: int, N: int, dtype: torch.dtype = FP32) -> list[Tensor]:
    """x, weight, bias, and the gradient from above."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=generator, dtype=FP64).to(dtype) for size in ((T, K), (N, K), (N,), (T, N))]


def outputs(linear: Any, case: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    out = linear(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, case[3])]


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 31, 5), (300, 128, 96), (1000, 17, 1031)], ids=str)
def test_as_exact_as_torch(shape: tuple[int, int, int]) -> None:
    case = random_case(*shape)
    exact = outputs(F.linear, [x.double() for x in case])
    for name, g, p, e, times in zip(
        ("out", "grad x", "grad weight", "grad bias"), outputs(products.linear, case), outputs(F.linear, case), exact,
        (2, 3, 3, 3), strict=True,
    ):  # fmt: skip
        assert_as_exact(g, p, e, times, name)


def test_no_bias_views_and_a_frozen_side() -> None:
    x, weight, _, grad = random_case(23, 48, 10)
    view, expanded = x[:, 5:37], grad[:1].expand(23, -1)
    part = weight[:, :32].requires_grad_()
    (got,) = torch.autograd.grad(products.linear(view, part), part, expanded)
    (want,) = torch.autograd.grad(F.linear(view, part), part, expanded)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(products.linear(view, part), F.linear(view, part))


@pytest.mark.parametrize("product", ["linear", "linear_fp32", "grouped_gemm"])
def test_a_frozen_weight_keeps_no_activations(product: str) -> None:
    """As those beside LoRA's adapters; and an input without a gradient keeps no weight."""
    x, weight, *_ = random_case(300, 24, 16)
    run: Callable[..., Tensor] = getattr(products, product, grouped_gemm)
    x, others = x.bfloat16() if product == "linear_fp32" else x, ()
    if product == "grouped_gemm":
        weight, others = weight.view(2, 8, 24), (torch.tensor([100, 300], dtype=torch.int32),)
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for x_learns, kept in ((True, weight), (False, x)):
        saved.clear()
        leaves = x.requires_grad_(x_learns), weight.requires_grad_(not x_learns)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            out = run(*leaves, *others)
        assert [t.data_ptr() for t in saved if t.numel() > 2] == [kept.data_ptr()]
        out.sum().backward()
        assert leaves[not x_learns].grad is not None


def test_what_stays_torchs_own() -> None:
    """Other dtypes and empty inputs, to the bit."""
    for case in (random_case(5, 4, 3, FP64), random_case(5, 4, 3, torch.bfloat16), random_case(0, 4, 3)):
        for got, want in zip(outputs(products.linear, case), outputs(F.linear, case), strict=True):
            assert torch.equal(got, want)


def test_same_bits_every_time() -> None:
    case = random_case(515, 96, 64)
    assert_same_bits(lambda: outputs(products.linear, case))


@pytest.mark.parametrize("num_tokens", [5, 2048, 5000])
def test_widened_by_pieces(num_tokens: int) -> None:
    """bf16 rows times an fp32 weight, over several pieces: as exact as with a widened copy of all."""
    x, weight, _, grad = random_case(num_tokens, 24, 6)
    leaves = x.bfloat16().requires_grad_(), weight.requires_grad_()

    def all_of(out: Tensor, upstream: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    got = all_of(products.linear_fp32(*leaves), grad)
    plain = all_of(F.linear(leaves[0].float(), leaves[1]), grad)
    exact = all_of(F.linear(leaves[0].double(), leaves[1].double()), grad.double())
    assert [x.dtype for x in got] == [FP32, torch.bfloat16, FP32]
    for name, g, p, e, times in zip(("out", "grad x", "grad weight"), got, plain, exact, (2, 3, 3), strict=True):
        assert_as_exact(g, p, e, times, name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_bf16_factors_are_not_widened(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensor cores, whose sums a CPU makes of widened factors here: as exact as fp32 products of widened copies."""
    if device == "cpu":

        def sums(a: Tensor, b: Tensor) -> Tensor:
            assert a.dtype == b.dtype == BF16
            return a.float() @ b.float()

        monkeypatch.setattr(products, "_sums", sums)
    x, weight, _, grad = (t.to(device) for t in random_case(300, 64, 48))
    leaves = x.to(BF16).requires_grad_(), weight.to(BF16).requires_grad_()

    def all_of(out: Tensor, upstream: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    got = all_of(products._LinearOfHalves.apply(*leaves), grad)
    plain = all_of(F.linear(leaves[0].float(), leaves[1].float()), grad)
    exact = [grad.double().T @ leaves[0].double(), grad.double() @ leaves[1].double()]
    assert [t.dtype for t in got] == [FP32, BF16, BF16]
    assert_as_exact(got[0], plain[0], leaves[0].double() @ leaves[1].double().T, 2, "out")
    for name, g, p, e in zip(("grad weight", "grad x"), got[:0:-1], plain[:0:-1], exact, strict=True):
        assert_as_exact(g, p, e, 3, name)


def test_the_compiler_has_the_products_of_bf16_factors() -> None:
    """Of products with an out_dtype, torch.compile lowers mm's alone."""
    found = list[str]()

    class Overloads(OperatorMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append(str(func))
            return func(*args, **kwargs or {})

    with fake_tensors():
        x, weight, _, grad = random_case(8, 16, 4, BF16)
        out = products._LinearOfHalves.apply(x.requires_grad_(), weight.requires_grad_())
        with Overloads():
            out.backward(grad.float())
    assert found.count("aten.mm.dtype") == 2 and not any("addmm" in name for name in found)


def test_an_fp32_router_keeps_its_precision() -> None:
    """Factors of two dtypes are widened: nothing of the fp32 weight is lost."""
    x, weight, *_ = random_case(9, 16, 4)
    got = products.linear_fp32(x.bfloat16(), weight)
    torch.testing.assert_close(got, F.linear(x.bfloat16().float(), weight), rtol=1e-6, atol=1e-6)
