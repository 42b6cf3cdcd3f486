from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1fast_kernels import moe_experts
from tests.kernels.backends import (
    BF16,
    FP16,
    FP32,
    FP64,
    Backend,
    assert_as_exact,
    assert_same_bits,
    needs_cpp,
    of_older_processor,
    slow_when_interpreted,
)
from tests.kernels.moe import (
    NAMES,
    Layer,
    bf16_products,
    random_layer,
    run,
    transformers_experts,
    vendor_takes_all,
    without_rows,
)

DTYPES = [FP32, BF16, FP16, FP64]

# One token; K = 1; every expert of each token; primes; a row past a piece of 512; and routings that broke others.
CASES = {
    "random": {},
    "T1": {"num_tokens": 1},
    "K1": {"num_tokens": 19, "k": 1},
    "K-is-E": {"num_tokens": 9, "k": 5},
    "primes": {"num_tokens": 37, "num_experts": 7, "k": 3, "width": 67, "inner": 31},
    "E1": {"num_tokens": 9, "num_experts": 1, "k": 1},
    "one-takes-all": {"how": "one-takes-all", "num_tokens": 67, "width": 24, "inner": 17},
    "some-skipped": {"how": "some-skipped"},
    "all-skipped": {"how": "all-skipped"},
    "empty-experts": {"how": "empty-experts"},
    "described": {"num_tokens": 37, "width": 48, "inner": 16, "how": "some-skipped"},  # see test_grouped_gemm.py
    "more-experts-than-tokens": {"num_tokens": 3, "num_experts": 11, "k": 2, "width": 19, "inner": 9},
}


def assert_follows_rule(layer: Layer, dtype: torch.dtype, backend: Backend, **options: object) -> None:
    exact = run(layer, impl="reference")
    plain = run(layer.to(dtype), impl="reference")
    got = run(layer.to(dtype, backend.device), impl=backend.impl, **options)
    for name, g, p, e, times in zip(("out", *NAMES), got, plain, exact, (2, 3, 3, 3, 3)):
        assert g.dtype == p.dtype, name
        assert_as_exact(g, p, e, times, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_torch(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """Against fp64 on the same rounded numbers: the output within 2x, gradients within 3x the error of plain torch."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    assert_follows_rule(random_layer(**CASES[name]), dtype, backend)


@pytest.mark.parametrize("name", ["random", "T1", "one-takes-all", "some-skipped", "all-skipped", "empty-experts"])
def test_around_torchs_products(backend: Backend, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.name == "cpp":
        pytest.skip("of Triton's operator")
    seen = vendor_takes_all(monkeypatch)
    layer = random_layer(**CASES[name] | {"width": 16, "inner": 8})
    assert_follows_rule(layer, BF16, backend)
    assert seen.count("multiply") == 4 and seen.count("weight_gradient") == 2
    everything = run(layer.to(BF16, backend.device), impl=backend.impl)
    for alone in range(4):
        needs = tuple(i == alone for i in range(4))
        out, gradient = run(layer.to(BF16, backend.device), needs, impl=backend.impl)
        assert torch.equal(out, everything[0]) and torch.equal(gradient, everything[1 + alone]), NAMES[alone]


@needs_cpp
@pytest.mark.parametrize("widened", [True, False], ids=["widened", "native"])
@pytest.mark.parametrize("name", ["random", "primes", "some-skipped"])
def test_bf16_on_both_kinds_of_cpu(name: str, widened: bool) -> None:
    with bf16_products(widened):
        cpp = Backend("cpp", "cpp", "cpu", (BF16,))
        assert_follows_rule(random_layer(**CASES[name]), BF16, cpp)


@needs_cpp
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("how", ["one-takes-all", "some-skipped"])
def test_experts_of_several_slices(how: str, dtype: torch.dtype) -> None:
    """An expert with 2,602 rows: three slices of 1,024 and pieces of 512; each has a sum of the weights' gradients."""
    layer = random_layer(1301, 3, width=24, inner=9, how=how)
    assert_follows_rule(layer, dtype, Backend("cpp", "cpp", "cpu", (dtype,)))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("how", ["random", "one-takes-all", "some-skipped", "empty-experts"])
def test_equals_transformers_with_gradients(backend: Backend, how: str, family: str) -> None:
    layer = random_layer(how=how).to(FP64 if backend.impl == "cpp" else FP32)
    got = run(layer.to(device=backend.device), impl=backend.impl)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if backend.impl == "cpp" else {"rtol": 1e-4, "atol": 1e-5}
    for name, g, want in zip(("out", *NAMES), got, transformers_experts(layer, family), strict=True):
        torch.testing.assert_close(g.cpu(), want, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_all_skipped_is_zero_with_zero_gradients(backend: Backend) -> None:
    layer = random_layer(6, how="all-skipped").to(FP32, backend.device)
    assert not any(x.any() for x in run(layer, impl=backend.impl))


def test_no_token(backend: Backend) -> None:
    layer = without_rows(random_layer(3)).to(FP32, backend.device)
    out, grad_hidden, grad_gate_up, grad_down, grad_weights = run(layer, impl=backend.impl)
    assert out.shape == grad_hidden.shape == (0, 12) and grad_weights.shape == (0, 2)
    assert grad_gate_up.shape == (5, 14, 12) and not grad_gate_up.any() and not grad_down.any()


def test_frozen_parts(backend: Backend) -> None:
    """What is needed has the same bits whether or not the rest is computed."""
    layer = random_layer(num_tokens=17).to(FP32, backend.device)
    everything = run(layer, impl=backend.impl)
    for alone, name in enumerate(NAMES):
        needs = tuple(i == alone for i in range(4))
        out, gradient = run(layer, needs, impl=backend.impl)
        assert torch.equal(out, everything[0]) and torch.equal(gradient, everything[1 + alone]), name
    assert torch.equal(run(layer, (False,) * 4, impl=backend.impl)[0], everything[0])


@needs_cpp
def test_what_is_not_needed_is_empty() -> None:
    layer, op = random_layer(5), torch.ops.r1fast
    _, *saved = op.moe_experts(*layer.leaves[:3], layer.ids_TK, layer.weights_TK, True)
    for needs in ((True, False, False, False), (False, True, False, False), (False, False, True, False)):
        found = op.moe_experts_backward(layer.upstream_TD, *layer.leaves, *saved, *needs)
        assert [x.numel() > 0 for x in found] == list(needs)


@slow_when_interpreted
@pytest.mark.parametrize("how", ["random", "some-skipped"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda dtype: str(dtype)[6:])
def test_same_bits_every_time(backend: Backend, dtype: torch.dtype, how: str) -> None:
    """Any number of threads: products run on one thread each, and rows are cut by their number alone."""
    sizes = {} if backend.interpreted else {"num_tokens": 1301, "width": 40, "inner": 24}
    layer = random_layer(how=how, **sizes).to(dtype, backend.device)
    assert_same_bits(lambda: run(layer, impl=backend.impl))


def test_strided_inputs(backend: Backend) -> None:
    """Weights that are kept transposed, columns of a wider tensor, and the expanded gradient of a sum."""
    layer = random_layer().to(FP32, backend.device)
    wide = torch.cat([layer.hidden_TD, layer.hidden_TD], 1)[:, :12]
    strided = replace(
        layer, hidden_TD=wide, gate_up_E2FD=layer.gate_up_E2FD.mT.contiguous().mT,
        down_EDF=layer.down_EDF.mT.contiguous().mT, ids_TK=layer.ids_TK.T.contiguous().T,
        weights_TK=layer.weights_TK.T.contiguous().T, upstream_TD=layer.upstream_TD[:1, :1].expand(41, 12),
    )  # fmt: skip
    leaves = [x.requires_grad_() for x in strided.leaves]
    out = moe_experts(*leaves[:3], strided.ids_TK, leaves[3], impl=backend.impl)
    got = [out, *torch.autograd.grad(out, leaves, strided.upstream_TD)]
    want = run(replace(layer, upstream_TD=strided.upstream_TD.contiguous()), impl=backend.impl)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("num_tokens", "k", "how"),
    [(1, 1, "random"), (3, 1, "random"), (4, 5, "random"), (5, 2, "some-skipped")],
    ids=["T1-K1", "K1", "K-is-E", "some-skipped"],
)
def test_gradcheck(num_tokens: int, k: int, how: str, impl: str) -> None:
    layer = random_layer(num_tokens, k=k, width=3, inner=2, how=how)
    leaves = [x.requires_grad_() for x in layer.leaves]
    assert torch.autograd.gradcheck(lambda h, g, d, w: moe_experts(h, g, d, layer.ids_TK, w, impl=impl), leaves)


@needs_cpp
def test_opcheck() -> None:
    layer, op = random_layer(6, how="some-skipped").to(FP32), torch.ops.r1fast
    leaves = [x.clone().requires_grad_() for x in layer.leaves]
    torch.library.opcheck(op.moe_experts.default, (*leaves[:3], layer.ids_TK, leaves[3], True))
    torch.library.opcheck(op.moe_experts.default, (*layer.leaves[:3], layer.ids_TK, layer.weights_TK, False))
    _, *saved = op.moe_experts(*layer.leaves[:3], layer.ids_TK, layer.weights_TK, True)
    for needs in ((True,) * 4, (True, False, False, False)):
        arguments = (layer.upstream_TD, *layer.leaves, *saved, *needs)
        torch.library.opcheck(op.moe_experts_backward.default, arguments)


@needs_cpp
def test_compiles_without_a_graph_break() -> None:
    layer = random_layer(7).to(FP32)

    def loss(hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return moe_experts(hidden * 2, gate_up, down, layer.ids_TK, weights).square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in layer.leaves]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(gradients[1], gradients[0])


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_builds_for_older_processors_agree(capability: str, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.pt"  # by file: torch's random numbers depend on the capability too
    torch.save([random_layer(**CASES["primes"]).to(dtype) for dtype in (FP32, BF16, FP64)], inputs)
    expression = f"[run(layer, impl='cpp') for layer in torch.load({str(inputs)!r}, weights_only=False)]"
    for got, want in zip(*of_older_processor(capability, "test_moe_experts", expression, tmp_path), strict=True):
        for g, w in zip(got, want, strict=True):
            tolerance = 2e-2 if w.dtype == BF16 else 1e-5
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


def test_extreme_gates(backend: Backend) -> None:
    """Gates of +-200 and more: silu and its derivative are x, 1 and 0, not NaN."""
    layer = random_layer()
    layer = replace(layer, hidden_TD=layer.hidden_TD * 256)
    for dtype in (FP32, BF16):
        with bf16_products(True) if backend.impl == "cpp" else nullcontext():
            assert_follows_rule(layer, dtype, backend)


def test_errors_say_what_was_expected(backend: Backend) -> None:
    layer = random_layer(4).to(FP32, backend.device)
    hidden, gate_up, down, weights = layer.leaves
    ids = layer.ids_TK
    with pytest.raises(ValueError, match=r"expected \[T, D\], \[E, 2F, D\], \[E, D, F\]"):
        moe_experts(hidden, down, gate_up, ids, weights)
    with pytest.raises(ValueError, match=r"for 4 tokens, expected both \[T, K\]"):
        moe_experts(hidden, gate_up, down, ids[:3], weights[:3])
    with pytest.raises(ValueError, match="expected one dtype"):
        moe_experts(hidden, gate_up.bfloat16(), down, ids, weights)


@needs_cpp
def test_a_negative_id_is_an_error() -> None:
    layer = random_layer(4)
    layer.ids_TK[2, 1] = -1
    with pytest.raises(ValueError, match=r"expert_ids_TK\[2, 1\] is -1"):
        run(layer, impl="cpp")
