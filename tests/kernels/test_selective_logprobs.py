import math
from pathlib import Path
from typing import Any

import pytest
import torch

from r1fast_kernels import selective_logprobs
from tests.kernels.backends import (
    BF16,
    FP16,
    FP32,
    FP64,
    Backend,
    assert_as_exact,
    assert_same_bits,
    far_apart,
    needs_cpp,
    of_older_processor,
)

INF = float("inf")


def random_case(num_tokens: int, vocab: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, vocab, generator=generator) * 4
    return logits, torch.randint(vocab, (num_tokens,), generator=generator)


def hostile_cases() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What broke other kernels (all below -88, masked vocabularies), and the edges of this one's tiles."""
    far_below, ids = random_case(5, 1000)
    one_masked, _ = random_case(5, 1000)
    one_masked[torch.arange(5), (ids + 1) % 1000] = -INF
    all_but_one, _ = random_case(5, 1000)
    only = all_but_one.gather(1, ids[:, None])
    all_but_one.fill_(-INF).scatter_(1, ids[:, None], only)
    masked_block, masked_ids = random_case(3, 5000)
    masked_block[:, :2500] = -INF  # the whole first block, then half of the next
    lowest, _ = random_case(3, 5000)
    lowest[:, :4900] = torch.finfo(BF16).min  # a thread that reads these alone is further away than fp32 can say
    strided, strided_ids = random_case(7, 301)
    expanded = strided[:1, :300].expand(7, 300)
    return {
        "below-1e4": (far_below - 2e4, ids),
        "above-1e4": (far_below + 2e4, ids),
        "one-masked": (one_masked, ids),
        "target-masked": (one_masked, (ids + 1) % 1000),
        "all-but-one-masked": (all_but_one, ids),
        "first-block-masked": (masked_block, masked_ids.clamp(min=2500)),
        "masked-by-the-lowest-number": (lowest, masked_ids % 100 + 4900),
        "strided-rows": (strided[:, :300], strided_ids.clamp(max=299)),
        "expanded-row": (expanded, strided_ids.clamp(max=299)),
        "strided-columns": (random_case(40, 7)[0].T, torch.arange(7)),
        "one-row": random_case(1, 1000),
        "extremes-of-fp16": (torch.tensor([[65504.0, -65504.0], [-65504.0, 0.0]]), torch.tensor([0, 0])),
        "one-of-100000": (
            torch.full((1, 100_000), -INF).index_fill(1, torch.tensor([50_000]), 10.0),
            torch.tensor([50_000]),
        ),
        "V1": (torch.randn(4, 1), torch.zeros(4, dtype=torch.long)),
        "V7-below-a-vector": random_case(3, 7),
        "V2048-a-block": random_case(3, 2048),
        "V2049-past-a-block": random_case(3, 2049),
        "V8192-a-triton-block": random_case(3, 8192),
        "V10007-prime": random_case(3, 10007),
        "V40009-programs-of-the-gradient": random_case(2, 40009),
        "T0": (torch.zeros(0, 17), torch.zeros(0, dtype=torch.long)),
    }


NAMES = tuple(hostile_cases())


def outputs_and_gradient(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float, device: str, **options: Any
) -> list[torch.Tensor]:
    """Log-probs, entropy, and the gradient of a sum in which every row has other weights for the two."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).to(device).requires_grad_()
    outputs = selective_logprobs(leaf, ids.to(device), temperature=temperature, with_entropy=True, **options)
    weights = torch.linspace(0.5, -1, len(ids)), torch.linspace(-1, 2, len(ids))
    sum((x * w.to(x)).sum() for x, w in zip(outputs, weights)).backward()
    return [*outputs, leaf.grad]


def test_two_tokens_by_hand(backend: Backend) -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]], device=backend.device)  # p = 1/4, 3/4
    ids = torch.tensor([1], device=backend.device)
    for impl in ("reference", backend.impl):
        logprobs, entropy = selective_logprobs(logits, ids, with_entropy=True, impl=impl)
        assert logprobs.item() == pytest.approx(math.log(0.75), abs=2e-7)
        assert entropy.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), abs=2e-7)
        # At temperature 1/2 the odds are squared: 1/10, 9/10.
        tempered = selective_logprobs(logits, ids, temperature=0.5, impl=impl)
        assert tempered.item() == pytest.approx(math.log(0.9), abs=2e-7)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 7.0])
@pytest.mark.parametrize("name", NAMES)
def test_as_exact_as_torch(backend: Backend, name: str, temperature: float, dtype: torch.dtype) -> None:
    """Against fp64 on the same rounded logits: outputs within 2x, gradients within 3x the error of plain torch."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    logits, ids = hostile_cases()[name]
    logits = logits.to(dtype)
    exact = outputs_and_gradient(logits.double(), ids, temperature, "cpu", impl="reference")
    plain = outputs_and_gradient(logits, ids, temperature, "cpu", impl="reference")
    got = outputs_and_gradient(logits, ids, temperature, backend.device, impl=backend.impl)
    for part, g, p, e, times in zip(("logprobs", "entropy", "gradient"), got, plain, exact, (2, 2, 3)):
        assert g.dtype == p.dtype, part
        assert_as_exact(g, p, e, times, part)
    alone = selective_logprobs(
        logits.to(backend.device), ids.to(backend.device), temperature=temperature, impl=backend.impl
    )
    assert torch.equal(alone, got[0])


def test_in_place_gradient(backend: Backend) -> None:
    """The same bits, written over the logits; a second backward pass through them is refused."""
    logits, ids = random_case(5, 301)
    want = outputs_and_gradient(logits, ids, 0.7, backend.device, impl=backend.impl)[2]
    leaf = logits.to(backend.device).requires_grad_()
    logits = leaf * 1.0
    logprobs, entropy = selective_logprobs(
        logits, ids.to(backend.device), temperature=0.7, with_entropy=True, inplace_backward=True, impl=backend.impl
    )
    weights = torch.linspace(0.5, -1, 5), torch.linspace(-1, 2, 5)
    loss = sum((x * w.to(x)).sum() for x, w in zip((logprobs, entropy), weights))
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, want)
    assert torch.equal(logits, want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("used", ["logprobs", "entropy"])
def test_either_output_may_go_unused(backend: Backend, used: str) -> None:
    logits, ids = backend.to(random_case(5, 301))
    gradients = []
    for impl in ("reference", backend.impl):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = selective_logprobs(leaf, ids, with_entropy=True, impl=impl)
        (logprobs if used == "logprobs" else entropy).sum().backward()  # an expanded scalar arrives
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [slice(0, 0), slice(4000, 5000)], ids=["", "in a block of masked tokens"])
def test_nan_reaches_its_row_and_no_other(backend: Backend, masked: slice) -> None:
    logits, ids = random_case(3, 5000)
    logits[1, masked] = -INF
    logits[1, 4321] = float("nan")
    leaf = logits.to(backend.device).requires_grad_()
    logprobs, entropy = selective_logprobs(leaf, ids.to(backend.device), with_entropy=True, impl=backend.impl)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    # Rows that no loss reads: no gradient, whatever they hold.
    (logprobs + entropy)[[0, 2]].sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[1].any() and leaf.grad[0].any()


def test_a_row_without_support_is_nan(backend: Backend) -> None:
    row = torch.full((1, 50), -INF, device=backend.device)
    assert selective_logprobs(row, torch.tensor([3], device=backend.device), impl=backend.impl).isnan().all()


def test_same_bits_every_time(backend: Backend) -> None:
    logits, ids = random_case(11 if backend.interpreted else 97, 3001)
    assert_same_bits(lambda: outputs_and_gradient(logits, ids, 1.0, backend.device, impl=backend.impl))


def test_rows_beyond_32_bits(backend: Backend) -> None:
    """Rows 2^30 elements apart: the third begins past 2^31. Only the pages that are touched exist."""
    if backend.name == "cuda":
        pytest.skip("memory on a GPU is not handed out page by page")
    logits = far_apart(random_case(4, 40)[0], (1 << 30, 1))
    ids = torch.tensor([3, 1, 4, 1])
    got = selective_logprobs(logits, ids, impl=backend.impl)
    torch.testing.assert_close(got, selective_logprobs(logits.contiguous(), ids, impl="reference"))


def test_more_rows_than_a_grid_axis(backend: Backend) -> None:
    """65,536 rows and more: a launch grid's second axis ends at 65,535."""
    if backend.interpreted:
        pytest.skip("the interpreter's grid has no end")
    logits, ids = backend.to(random_case(70_001, 5))
    got = selective_logprobs(logits, ids, impl=backend.impl)
    torch.testing.assert_close(got, selective_logprobs(logits, ids, impl="reference"))


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_builds_for_older_processors_agree(capability: str, tmp_path: Path) -> None:
    cases = "((random_case(9, 3001)[0].to(dtype), random_case(9, 3001)[1]) for dtype in (FP32, BF16, FP64))"
    expression = f"[outputs_and_gradient(*case, 0.7, 'cpu', impl='cpp') for case in {cases}]"
    for got, want in zip(*of_older_processor(capability, "test_selective_logprobs", expression, tmp_path), strict=True):
        for g, w in zip(got, want, strict=True):
            tolerance = 1e-2 if w.dtype == BF16 else 2e-6
            torch.testing.assert_close(g, w, rtol=tolerance, atol=2e-6)


@needs_cpp
@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(with_entropy: bool) -> None:
    logits, ids = random_case(5, 33)
    op = torch.ops.r1fast
    forward = logits.clone().requires_grad_(), ids, 0.7, with_entropy, False
    torch.library.opcheck(op.selective_logprobs.default, forward)
    _, entropy, stats = op.selective_logprobs(logits, ids, 0.7, with_entropy, False)
    backward = logits, ids, entropy, stats, torch.ones(5), torch.ones(5) if with_entropy else None, 0.7
    torch.library.opcheck(op.selective_logprobs_backward.default, backward)
    torch.library.opcheck(op.selective_logprobs_backward_.default, (logits.clone(), *backward[1:]))
    state = torch.zeros(5, 4, dtype=FP64)
    torch.library.opcheck(op.fold_logits_.default, (state, logits, ids, 0.7, 0, with_entropy))


@needs_cpp
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in-place"])
def test_compiles_without_a_graph_break(inplace: bool) -> None:
    logits, ids = random_case(5, 33)

    def loss(x: torch.Tensor, fn: Any) -> torch.Tensor:
        return sum(y.sum() for y in fn(x * 2, ids, with_entropy=True, inplace_backward=inplace))

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    compiled(leaf, selective_logprobs).backward()
    loss(other, selective_logprobs).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@needs_cpp
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_gradcheck(impl: str, temperature: float) -> None:
    logits, ids = random_case(4, 35)
    leaf = (logits.double() / 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: selective_logprobs(x, ids, temperature=temperature, with_entropy=True, impl=impl), (leaf,)
    )


def test_errors_say_what_to_do(backend: Backend) -> None:
    logits, ids = backend.to(random_case(4, 6))
    with pytest.raises(ValueError, match=r"expected \[T, V\] and \[T\]"):
        selective_logprobs(logits, ids[:3])
    with pytest.raises(ValueError, match="temperature=0"):
        selective_logprobs(logits, ids, temperature=0)
    with pytest.raises(ValueError, match="expected None or one of reference, cpp, triton"):
        selective_logprobs(logits, ids, impl="cuda")
    absent = "triton" if backend.impl == "cpp" else "cpp"
    with pytest.raises(ValueError, match=f"impl='{absent}' cannot run here"):
        selective_logprobs(logits, ids, impl=absent)
    wrong = FP16 if backend.impl == "cpp" else FP64
    with pytest.raises(ValueError, match=f"kernels take float32.* got {str(wrong)[6:]}"):
        selective_logprobs(logits.to(wrong), ids, impl=backend.impl)
    columns = (logits.clone().requires_grad_() * 1).T
    loss = selective_logprobs(columns, ids.new_zeros(6), inplace_backward=True, impl=backend.impl).sum()
    with pytest.raises(ValueError, match="expected 1 where the gradient is to be written over"):
        loss.backward()


@needs_cpp
def test_target_outside_the_vocabulary_is_an_error() -> None:
    logits, ids = random_case(4, 6)
    for bad in (-100, 6):
        ids[2] = bad
        with pytest.raises(IndexError, match=rf"target_ids_T\[2\] is {bad}"):
            selective_logprobs(logits, ids, impl="cpp")
