import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast_kernels import dispatch
from r1fast_kernels import grouped_gemm_vendor as vendor
from r1fast_kernels.grouped_gemm import grouped_gemm
from tests.kernels.backends import BF16, FP16, FP32, FP64, Backend, assert_as_exact, assert_same_bits, needs_cpp
from tests.kernels.moe import bf16_products, vendor_takes_all

# Rows of each expert, rows that belong to none, D, N.
CASES = {
    "random": ([5, 9, 3], 0, 12, 7),
    "primes": ([13, 2, 31], 0, 37, 67),
    "one-row": ([0, 1, 0], 0, 12, 7),
    "no-row": ([0, 0], 0, 12, 7),
    "T0": ([0, 0], 0, 16, 8),  # nothing that a descriptor could describe
    "E1": ([17], 0, 12, 7),
    "empty-experts": ([0, 6, 0, 4, 0], 0, 12, 7),
    "one-takes-all": ([0, 0, 29], 0, 12, 7),
    "skipped-rows": ([5, 4], 6, 12, 7),
    "described": ([5, 33, 0, 16, 1], 3, 48, 32),  # where tiles are copied by descriptors: several, and partial ones
}
DTYPES = [FP32, BF16, FP16, FP64]


def random_case(
    counts: list[int], skipped: int, width: int, out: int, transpose_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, offsets and an upstream gradient, of values that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    weight = normal(len(counts), *((out, width) if transpose_weight else (width, out)))
    rows = sum(counts) + skipped
    return normal(rows, width), weight, torch.tensor(counts).cumsum(0).int(), normal(rows, out)


def run(case: tuple[Tensor, ...], transpose_weight: bool, dtype: torch.dtype, device: str, impl: str) -> list[Tensor]:
    x, weight, offsets, upstream = (t.to(device) for t in case)
    x, weight = (t.to(dtype, copy=True).requires_grad_() for t in (x, weight))
    out = grouped_gemm(x, weight, offsets, transpose_weight=transpose_weight, impl=impl)
    return [out, *torch.autograd.grad(out, (x, weight), upstream.to(dtype))]


@pytest.mark.parametrize("transpose_weight", [True, False], ids=["linear", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_torch(backend: Backend, name: str, dtype: torch.dtype, transpose_weight: bool) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    case = random_case(*CASES[name], transpose_weight)
    exact = run(case, transpose_weight, FP64, "cpu", "reference")
    plain = run(case, transpose_weight, dtype, "cpu", "reference")
    got = run(case, transpose_weight, dtype, backend.device, backend.impl)
    for part, g, p, e, times in zip(("out", "x", "weight"), got, plain, exact, (2, 3, 3), strict=True):
        assert g.dtype == p.dtype, part
        assert_as_exact(g, p, e, times, part)
    ends = sum(CASES[name][0])
    assert not got[0][ends:].any() and not got[1][ends:].any()


@pytest.mark.parametrize("transpose_weight", [True, False], ids=["linear", "plain"])
@pytest.mark.parametrize("name", ["random", "empty-experts", "skipped-rows", "one-row"])
def test_large_products_are_torchs(
    backend: Backend, name: str, transpose_weight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.name == "cpp":
        pytest.skip("of Triton's operator")
    counts, skipped, _, _ = CASES[name]
    case = random_case(counts, skipped, 16, 8, transpose_weight)
    exact, plain = (run(case, transpose_weight, dtype, "cpu", "reference") for dtype in (FP64, BF16))
    seen = vendor_takes_all(monkeypatch)
    got = run(case, transpose_weight, BF16, backend.device, backend.impl)
    assert seen == ["multiply", "multiply", "weight_gradient"]
    for part, g, p, e, times in zip(("out", "x", "weight"), got, plain, exact, (2, 3, 3), strict=True):
        assert_as_exact(g, p, e, times, part)
    assert not got[0][sum(counts) :].any() and not got[1][sum(counts) :].any()


@pytest.mark.parametrize("transpose_weight", [True, False], ids=["linear", "plain"])
def test_torchs_products_have_our_layout(transpose_weight: bool) -> None:
    x, weight, offsets, y = random_case([5, 0, 11], 0, 16, 8, transpose_weight)
    want = run((x, weight, offsets, y), transpose_weight, FP64, "cpu", "reference")
    x, weight, y = (t.bfloat16() for t in (x, weight, y))
    sides = (x, y) if transpose_weight else (y, x)
    got = (
        vendor.multiply(x, weight, offsets, transpose_weight),
        vendor.multiply(y, weight, offsets, not transpose_weight),
        vendor.weight_gradient(*sides, offsets),
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-2, atol=3e-2)
    assert not got[2][1].any()


def test_which_products_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1024, 64, dtype=BF16), torch.zeros(8, 48, 64, dtype=BF16)
    assert not vendor.takes(1024, 8, x, weight)  # on a CPU
    monkeypatch.setattr(dispatch, "capability", lambda device: (9, 0))
    assert vendor.takes(1024, 8, x, weight)
    assert not vendor.takes(1023, 8, x, weight) and not vendor.takes(1024, 0, x, weight[:0])
    assert vendor.takes(1 << 20, 1023, x, weight) and not vendor.takes(1 << 20, 1024, x, weight)  # its limit
    assert not vendor.takes(1024, 8, x.half(), weight.half())
    assert not vendor.takes(1024, 8, x, weight[:, :47].contiguous())
    assert not vendor.takes(1024, 8, x, torch.zeros(8 * 48 * 64 + 1, dtype=BF16)[1:].view(8, 48, 64))


@needs_cpp
@pytest.mark.parametrize("widened", [True, False], ids=["widened", "native"])
def test_bf16_on_both_kinds_of_cpu(widened: bool) -> None:
    case = random_case(*CASES["primes"], True)
    exact, plain = run(case, True, FP64, "cpu", "reference"), run(case, True, BF16, "cpu", "reference")
    with bf16_products(widened):
        got = run(case, True, BF16, "cpu", "cpp")
    for g, p, e, times in zip(got, plain, exact, (2, 3, 3), strict=True):
        assert_as_exact(g, p, e, times)


@needs_cpp
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda dtype: str(dtype)[6:])
def test_an_expert_of_several_slices(dtype: torch.dtype) -> None:
    """2,307 rows: three slices, each with a sum of the weight's gradient, and pieces of 512 rows inside."""
    case = random_case([3, 2307, 0, 70], 5, 24, 10, True)
    exact, plain = run(case, True, FP64, "cpu", "reference"), run(case, True, dtype, "cpu", "reference")
    for g, p, e, times in zip(run(case, True, dtype, "cpu", "cpp"), plain, exact, (2, 3, 3), strict=True):
        assert_as_exact(g, p, e, times)
    assert_same_bits(lambda: run(case, True, dtype, "cpu", "cpp"))


@pytest.mark.parametrize("name", ["random", "empty-experts", "one-takes-all"])
def test_equals_torch_grouped_mm(backend: Backend, name: str) -> None:
    """torch's own wants strides of 16 bytes; it takes the weight of a linear layer as a transposed view."""
    counts, skipped, _, _ = CASES[name]
    case = random_case(counts, skipped, 16, 8, True)
    got = run(case, True, BF16, backend.device, backend.impl)
    x, weight, offsets, upstream = (t.to(backend.device) for t in case)
    x, weight = (t.to(BF16, copy=True).requires_grad_() for t in (x, weight))
    out = F.grouped_mm(x, weight.mT, offs=offsets)
    want = [out, *torch.autograd.grad(out, (x, weight), upstream.to(BF16))]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)


def test_strided_inputs(backend: Backend) -> None:
    x, weight, offsets, _ = (t.to(backend.device) for t in random_case(*CASES["random"], True))
    x, weight = x.float(), weight.float()
    want = grouped_gemm(x, weight, offsets, impl=backend.impl)
    wide = torch.cat([x, x], 1)[:, :12]
    got = grouped_gemm(wide, weight.mT.contiguous().mT, offsets, impl=backend.impl)
    torch.testing.assert_close(got, want)
    leaf = x.clone().requires_grad_()
    grouped_gemm(leaf, weight, offsets, impl=backend.impl).sum().backward()  # an expanded scalar arrives
    ones = grouped_gemm(torch.ones_like(want), weight, offsets, transpose_weight=False, impl=backend.impl)
    torch.testing.assert_close(leaf.grad, ones)


def test_same_bits_every_time(backend: Backend) -> None:
    case = random_case(*CASES["primes"], True)
    assert_same_bits(lambda: run(case, True, FP32, backend.device, backend.impl))


@needs_cpp
@pytest.mark.parametrize("transpose_weight", [True, False], ids=["linear", "plain"])
def test_gradcheck_and_opcheck(transpose_weight: bool) -> None:
    x, weight, offsets, upstream = random_case([2, 0, 3], 1, 3, 2, transpose_weight)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda a, b: grouped_gemm(a, b, offsets, transpose_weight=transpose_weight, impl="cpp"), leaves
    )
    torch.library.opcheck(torch.ops.r1fast.grouped_gemm.default, (*leaves, offsets, transpose_weight))
    torch.library.opcheck(torch.ops.r1fast.grouped_gemm_weight.default, (x.detach(), upstream, offsets))


@needs_cpp
def test_compiles_without_a_graph_break() -> None:
    x, weight, offsets, _ = random_case(*CASES["random"], True)
    compiled = torch.compile(lambda a, b: grouped_gemm(a * 2, b, offsets).sum(), backend="aot_eager", fullgraph=True)
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    compiled(leaf, weight).backward()
    grouped_gemm(other * 2, weight, offsets).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_errors_say_what_was_expected(backend: Backend) -> None:
    x, weight, offsets, _ = (t.to(backend.device) for t in random_case(*CASES["random"], True))
    with pytest.raises(ValueError, match=r"expected \[M, D\], \[E, N, D\] and \[E\]"):
        grouped_gemm(x[:, :5], weight, offsets, impl=backend.impl)


@needs_cpp
@pytest.mark.parametrize("ends", [[5, 3, 9], [5, 9, 18], [-1, 9, 17]], ids=["decreasing", "past-the-rows", "negative"])
def test_wrong_offsets_are_an_error(ends: list[int]) -> None:
    x, weight, _, upstream = random_case(*CASES["random"], True)
    offsets = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected ends that do not decrease and are at most 17 rows"):
        grouped_gemm(x, weight, offsets, impl="cpp")
    with pytest.raises(ValueError, match="expected ends that do not decrease"):
        torch.ops.r1fast.grouped_gemm_weight(x, upstream, offsets)
