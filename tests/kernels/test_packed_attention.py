from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast_kernels import packed_attention
from r1fast_kernels.packed_attention import rotate_reference
from tests.kernels.backends import (
    BF16,
    FP32,
    FP64,
    assert_as_exact,
    assert_same_bits,
    needs_cpp,
    of_older_processor,
)  # fmt: skip

pytestmark = needs_cpp
SCALE = 0.3


@dataclass(frozen=True)
class Shape:
    """H query heads, K key heads, `plain` channels that are not rotated, R that are, e of values."""

    H: int
    K: int
    plain: int
    R: int
    e: int
    shared: bool = False
    interleaved: bool = False
    window: int | None = None
    soft_cap: float | None = None


SHAPES = {
    "llama": Shape(4, 4, 0, 8, 8),
    "grouped": Shape(6, 2, 0, 16, 16),
    "one-key-head-and-no-rope": Shape(4, 1, 5, 0, 5),
    "partly-rotated": Shape(2, 2, 10, 6, 16),
    "mla": Shape(4, 4, 8, 4, 8, shared=True, interleaved=True),
    "mla-halves": Shape(4, 4, 16, 8, 16, shared=True),
    # Itself alone; past a strip of queries, not of a step of keys; of two blocks and more than most sequences have.
    "window-1": Shape(4, 2, 0, 8, 8, window=1),
    "window-11": Shape(4, 2, 4, 4, 8, window=11),
    "window-mla": Shape(4, 4, 8, 4, 8, shared=True, window=200),
    "window-300": Shape(2, 1, 0, 16, 16, window=300),
    # Of scores within 6 or so: bent; almost cut off; hardly touched. With what else there is.
    "soft-cap": Shape(4, 2, 0, 16, 16, soft_cap=2.0),
    "soft-cap-mla": Shape(4, 4, 8, 4, 8, shared=True, window=200, soft_cap=0.1),
    "soft-cap-odd": Shape(4, 1, 27, 6, 47, window=11, soft_cap=50.0),
    # Odd channels, past a vector, values wider than keys.
    "odd": Shape(4, 2, 33, 6, 47, interleaved=True),
}
# One token; a prime; empty sequences between others; past a strip, a block of queries, one of keys (128, 256), several.
LENGTHS = {
    "one-token": [1],
    "prime": [13],
    "with-empty": [0, 5, 0, 3, 0],
    "mixed": [1, 64, 7, 130, 2, 33],
    "past-blocks": [129, 257],
    "many-blocks": [300, 700],
}


def random_inputs(shape: Shape, lengths: list[int], dtype: torch.dtype = FP32) -> dict[str, Any]:
    """`leaves` (q, k, v, and k_pe where it is shared), and what else a call takes."""
    generator, T = torch.Generator().manual_seed(0), sum(lengths)

    def normal(*size: int) -> Tensor:
        return torch.randn(T, *size, generator=generator, dtype=FP64).to(dtype)

    d = shape.plain + shape.R
    leaves = [normal(shape.H, d), normal(shape.K, shape.plain if shape.shared else d), normal(shape.K, shape.e)]
    angles_Tr = 6 * torch.rand(T, shape.R // 2, generator=generator, dtype=FP64)
    return {
        "leaves": leaves + ([normal(shape.R)] if shape.shared else []),
        "upstream": normal(shape.H, shape.e),
        "rope": (angles_Tr.cos().to(dtype), angles_Tr.sin().to(dtype)) if shape.R else None,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "interleaved": shape.interleaved,
        "window": shape.window,
        "soft_cap": shape.soft_cap,
    }


def attend(leaves: list[Tensor], inputs: dict[str, Any], impl: str | None = None) -> Tensor:
    q, k, v, k_pe = [*leaves, None][:4]
    options = {name: inputs[name] for name in ("rope", "interleaved", "window", "soft_cap")}
    return packed_attention(q, k, v, inputs["cu_seqlens"], scale=SCALE, k_pe_TR=k_pe, impl=impl, **options)


def outputs(inputs: dict[str, Any], impl: str | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The result and every gradient."""
    if dtype is not None:
        wide = {name: [x.to(dtype) for x in inputs[name]] for name in ("leaves", "rope") if inputs[name] is not None}
        inputs = inputs | wide | {"upstream": inputs["upstream"].to(dtype)}
    leaves = [x.detach().requires_grad_() for x in inputs["leaves"]]
    out = attend(leaves, inputs, impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs["upstream"])]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_as_exact_as_torch(lengths: list[int], shape: Shape, dtype: torch.dtype) -> None:
    """Against fp64 on the same rounded inputs: the output within 2x, gradients within 3x the error of plain torch."""
    inputs = random_inputs(shape, lengths, dtype)
    exact = outputs(inputs, "reference", FP64)
    plain, got = outputs(inputs, "reference"), outputs(inputs, "cpp")
    for name, g, p, e in zip(("out", "grad q", "grad k", "grad v", "grad k_pe"), got, plain, exact, strict=False):
        assert g.dtype == p.dtype, name
        assert_as_exact(g, p, e, 2 if name == "out" else 3, name)


def test_no_sequence_at_all() -> None:
    got = outputs(random_inputs(SHAPES["mla"], []), "cpp")
    assert [tuple(x.shape) for x in got] == [(0, 4, 8), (0, 4, 12), (0, 4, 8), (0, 4, 8), (0, 4)]


def test_the_reference_by_hand() -> None:
    """Two tokens of one head: the first sees itself, the second weighs both by e^(scale q.k)."""
    q, k, v = (torch.tensor(x, dtype=FP64)[:, None] for x in ([[1.0], [2.0]], [[1.0], [3.0]], [[10.0], [20.0]]))
    weights = torch.tensor([2.0, 6.0], dtype=FP64).mul(0.5).exp()
    want = torch.tensor([10.0, float((weights * torch.tensor([10.0, 20.0])).sum() / weights.sum())], dtype=FP64)
    for impl in ("reference", "cpp"):
        got = packed_attention(q, k, v, torch.tensor([0, 2], dtype=torch.int32), scale=0.5, impl=impl)
        torch.testing.assert_close(got.flatten(), want)


def test_a_window_by_hand() -> None:
    """Of two, as Mistral's: token i sees i - 1 and i. Equal scores, so a mean."""
    q, k, v = torch.zeros(4, 1, 1), torch.zeros(4, 1, 1), torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None]
    cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
    for impl in ("reference", "cpp"):
        got = packed_attention(q, k, v, cu_seqlens, scale=1.0, window=2, impl=impl)
        assert got.flatten().tolist() == [1.0, 1.5, 3.0, 8.0]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda dtype: str(dtype)[6:])
def test_a_window_of_all_is_none(dtype: torch.dtype) -> None:
    inputs = random_inputs(SHAPES["grouped"], [40, 300], dtype)
    for got, want in zip(outputs(inputs | {"window": 300}, "cpp"), outputs(inputs, "cpp"), strict=True):
        assert torch.equal(got, want)


def test_a_soft_cap_by_hand() -> None:
    """Of 2, on scores of 1 and 3, which are 2 tanh(1/2) and 2 tanh(3/2); its slope is 1 - tanh^2."""
    q, k, v = (torch.tensor(x, dtype=FP64)[:, None] for x in ([[0.0], [2.0]], [[1.0], [3.0]], [[10.0], [20.0]]))
    capped = 2 * torch.tensor([0.5, 1.5], dtype=FP64).tanh()
    weights = capped.softmax(0)
    slopes = weights.prod() * (20 - 10) * torch.tensor([-1.0, 1.0], dtype=FP64) * (1 - (capped / 2) ** 2)
    for impl in ("reference", "cpp"):
        leaf = k.clone().requires_grad_()
        got = packed_attention(q, leaf, v, torch.tensor([0, 2], dtype=torch.int32), scale=0.5, soft_cap=2.0, impl=impl)[
            1
        ]
        torch.testing.assert_close(got.item(), float(weights @ v.flatten()))
        torch.testing.assert_close(torch.autograd.grad(got.sum(), leaf)[0].flatten(), slopes * 0.5 * 2)


def test_a_soft_cap_far_above_all_scores_changes_little() -> None:
    inputs = random_inputs(SHAPES["grouped"], [40, 300])
    for got, want in zip(outputs(inputs | {"soft_cap": 1e5}, "cpp"), outputs(inputs, "cpp"), strict=True):
        torch.testing.assert_close(got, want)


def test_rotation_by_hand() -> None:
    """A quarter turn takes (a, b) to (-b, a); interleaved pairs are (0, 1) and (2, 3), else (0, 2) and (1, 3)."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    assert rotate_reference(x, cos, sin, interleaved=True).flatten().tolist() == [-2, -4, 1, 3]
    assert rotate_reference(x, cos, sin, interleaved=False).flatten().tolist() == [-3, -4, 1, 2]


def test_a_sequence_does_not_see_its_neighbours() -> None:
    """The same bits alone and between others, for the same angles."""
    inputs = random_inputs(SHAPES["mla"], [40, 77, 23])
    packed, span = outputs(inputs, "cpp"), slice(40, 117)
    alone = {"leaves": [x[span] for x in inputs["leaves"]], "rope": tuple(x[span] for x in inputs["rope"])}
    alone |= {"upstream": inputs["upstream"][span], "cu_seqlens": torch.tensor([0, 77], dtype=torch.int32)}
    for got, want in zip(outputs(inputs | alone, "cpp"), packed, strict=True):
        assert torch.equal(got, want[span])


def test_strided_inputs() -> None:
    """Keys and values as views of one product, as in MLA; queries of a wider row; an expanded gradient."""
    inputs = random_inputs(SHAPES["mla"], [9, 40])
    q, k, v, k_pe = inputs["leaves"]
    kv = torch.cat((k, v), dim=-1)
    views = [torch.cat((q, q), dim=-1)[..., : q.shape[-1]], *kv.split((k.shape[-1], v.shape[-1]), dim=-1), k_pe]
    assert not any(x.is_contiguous() for x in views[:3])
    strided = inputs | {"leaves": views, "upstream": inputs["upstream"][:, :1].expand(-1, 4, -1)}
    dense = strided | {"leaves": inputs["leaves"], "upstream": strided["upstream"].contiguous()}
    for got, want in zip(outputs(strided, "cpp"), outputs(dense, "cpp"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda dtype: str(dtype)[6:])
def test_large_scores_and_nan(dtype: torch.dtype, soft_cap: float | None) -> None:
    """Scores of hundreds neither overflow nor lose the sum; a NaN stays in its sequence, from its token on."""
    inputs = random_inputs(SHAPES["llama"], [30, 20], dtype)
    inputs["leaves"][0] *= 100
    inputs["soft_cap"] = soft_cap
    got, plain, exact = outputs(inputs, "cpp"), outputs(inputs, "reference"), outputs(inputs, "reference", FP64)
    assert_as_exact(got[0], plain[0], exact[0], 2)
    inputs["leaves"][1][35] = torch.nan
    with_nan = outputs(inputs, "cpp")[0]
    assert torch.equal(with_nan[:35], got[0][:35]) and with_nan[35:].isnan().all()


@pytest.mark.parametrize("learned", range(4))
def test_one_side_may_be_frozen(learned: int) -> None:
    inputs = random_inputs(SHAPES["mla"], [9, 4])
    leaves = [x.clone().requires_grad_(i == learned) for i, x in enumerate(inputs["leaves"])]
    (got,) = torch.autograd.grad(attend(leaves, inputs), leaves[learned], inputs["upstream"])
    assert torch.equal(got, outputs(inputs)[1 + learned])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda dtype: str(dtype)[6:])
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    inputs = random_inputs(SHAPES["mla"], [3, 260, 40, 40, 7], dtype)
    assert_same_bits(lambda: outputs(inputs, "cpp"))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_builds_for_older_processors_agree(capability: str, tmp_path: Any) -> None:
    calls = "outputs(random_inputs(SHAPES[name], [40, 150], dtype), 'cpp')"
    expression = f"[{calls} for name in ('mla', 'odd', 'window-11', 'soft-cap') for dtype in (FP32, BF16, FP64)]"
    for got, want in zip(*of_older_processor(capability, "test_packed_attention", expression, tmp_path), strict=True):
        for g, w in zip(got, want, strict=True):
            tolerance = 5e-2 if w.dtype == BF16 else 1e-5
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["grouped", "mla", "window-1", "soft-cap"])
def test_gradcheck_opcheck_and_compile(name: str) -> None:
    inputs = random_inputs(SHAPES[name], [3, 6], FP64)
    leaves = [x.requires_grad_() for x in inputs["leaves"]]

    def run(*leaves: Tensor) -> Tensor:
        return attend(list(leaves), inputs)

    assert torch.autograd.gradcheck(run, leaves)
    q, k, v, k_pe = [*leaves, None][:4]
    cos, sin = inputs["rope"]
    arguments = (q, k, v, inputs["cu_seqlens"], k_pe, cos, sin, SCALE, inputs["interleaved"], inputs["window"])
    arguments += (inputs["soft_cap"],)
    torch.library.opcheck(torch.ops.r1fast.packed_attention.default, arguments)
    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(run, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, run)]
    torch.testing.assert_close(*gradients)


def test_errors_say_what_was_expected() -> None:
    inputs = random_inputs(SHAPES["grouped"], [5, 4])
    q, k, v = inputs["leaves"]
    cu_seqlens, rope = inputs["cu_seqlens"], inputs["rope"]
    for wrong in ((q[:, :5], k, v), (q, k[..., 1:], v), (q, k, v[1:]), (q[..., :8], k[..., :8], v)):
        with pytest.raises(ValueError, match=r"expected \[T, H, d\], \[T, K, d - 0\] and \[T, K, e\]"):
            packed_attention(*wrong, cu_seqlens, scale=1, rope=rope)
    with pytest.raises(ValueError, match=r"expected \[T, R\] and `rope`"):
        packed_attention(q, k, v, cu_seqlens, scale=1, k_pe_TR=k[:, 0, :4])
    with pytest.raises(ValueError, match=r"expected \[9, R/2\]"):
        packed_attention(q, k, v, cu_seqlens, scale=1, rope=(rope[0], rope[1][1:]))
    with pytest.raises(ValueError, match="expected one dtype"):
        packed_attention(q, k, v.double(), cu_seqlens, scale=1, rope=rope)
    for wrong_option in ({"scale": 0}, {"scale": 1, "window": 0}):
        with pytest.raises(ValueError, match="expected more than 0"):
            packed_attention(q, k, v, cu_seqlens, rope=rope, **wrong_option)
    for cap in (0.0, -50.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"soft_cap=.*, expected a finite number above 0, or None"):
            packed_attention(q, k, v, cu_seqlens, rope=rope, scale=1, soft_cap=cap)
    for ends in ([0, 3], [1, 9], [0, 7, 5, 9], []):
        with pytest.raises(ValueError, match=r"expected \[N\+1\] rising from 0 to 9"):
            packed_attention(q, k, v, torch.tensor(ends, dtype=torch.int32), scale=1, rope=rope, impl="cpp")
    with pytest.raises(ValueError, match=r"int32 \[N\+1\]"):
        packed_attention(q, k, v, cu_seqlens.long(), scale=1, rope=rope, impl="cpp")
