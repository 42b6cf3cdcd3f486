import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1fast_kernels import dispatch, selective_logprobs

needs_cpp = pytest.mark.skipif(not dispatch.HAS_EXTENSION, reason="the C++ extension is not built")
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
    strided, strided_ids = random_case(7, 301)
    expanded = strided[:1, :300].expand(7, 300)
    return {
        "below-1e4": (far_below - 2e4, ids),
        "above-1e4": (far_below + 2e4, ids),
        "one-masked": (one_masked, ids),
        "target-masked": (one_masked, (ids + 1) % 1000),
        "all-but-one-masked": (all_but_one, ids),
        "first-block-masked": (masked_block, masked_ids.clamp(min=2500)),
        "strided-rows": (strided[:, :300], strided_ids.clamp(max=299)),
        "expanded-row": (expanded, strided_ids.clamp(max=299)),
        "strided-columns": (random_case(40, 7)[0].T, torch.arange(7)),
        "one-row": random_case(1, 1000),
        "V1": (torch.randn(4, 1), torch.zeros(4, dtype=torch.long)),
        "V7-below-a-vector": random_case(3, 7),
        "V2048-a-block": random_case(3, 2048),
        "V2049-past-a-block": random_case(3, 2049),
        "V10007-prime": random_case(3, 10007),
        "T0": (torch.zeros(0, 17), torch.zeros(0, dtype=torch.long)),
    }


def reference_with_gradients(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    leaf = logits.detach().to(dtype).requires_grad_()
    logprobs, entropy = selective_logprobs(leaf, ids, temperature=temperature, with_entropy=True, impl="reference")
    (logprobs * torch.linspace(0.5, -1, len(ids))).sum().add(
        (entropy * torch.linspace(-1, 2, len(ids))).sum()
    ).backward()
    return logprobs.detach(), entropy.detach(), leaf.grad


def test_two_tokens_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])  # p = 1/4, 3/4
    for impl in ("reference", "cpp") if dispatch.HAS_EXTENSION else ("reference",):
        logprobs, entropy = selective_logprobs(logits, torch.tensor([1]), with_entropy=True, impl=impl)
        assert logprobs.item() == pytest.approx(math.log(0.75), abs=1e-7)
        assert entropy.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), abs=1e-7)
        # At temperature 1/2 the odds are squared: 1/10, 9/10.
        tempered = selective_logprobs(logits, torch.tensor([1]), temperature=0.5, impl=impl)
        assert tempered.item() == pytest.approx(math.log(0.9), abs=1e-7)


@needs_cpp
@pytest.mark.parametrize("temperature", [1.0, 0.1, 7.0])
@pytest.mark.parametrize("name", hostile_cases())
def test_cpp_is_as_exact_as_torch(name: str, temperature: float) -> None:
    """Against fp64: outputs within 2x, gradients within 3x the error of plain torch in fp32."""
    logits, ids = hostile_cases()[name]
    exact = reference_with_gradients(logits, ids, temperature, torch.float64)
    eager = reference_with_gradients(logits, ids, temperature, torch.float32)
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = selective_logprobs(leaf, ids, temperature=temperature, with_entropy=True, impl="cpp")
    (logprobs * torch.linspace(0.5, -1, len(ids))).sum().add(
        (entropy * torch.linspace(-1, 2, len(ids))).sum()
    ).backward()
    assert torch.equal(selective_logprobs(logits, ids, temperature=temperature, impl="cpp"), logprobs)
    for got, plain, want, times in zip((logprobs, entropy, leaf.grad), eager, exact, (2, 2, 3)):
        assert got is not None and got.dtype == torch.float32 and got.shape == want.shape
        got = got.detach()
        infinite = want.isinf()
        assert torch.equal(got[infinite].double(), want[infinite])
        error = (got.double() - want)[~infinite].abs()
        floor = 1e-6 * want[~infinite].abs().clamp(min=1)  # some ulps, where torch happens to be exact
        assert (
            (error <= times * (plain.double() - want)[~infinite].abs().max().item() + floor).all()
            if len(error)
            else True
        )


@needs_cpp
def test_nan_reaches_its_row_and_no_other() -> None:
    logits, ids = random_case(3, 5000)
    logits[1, 4321] = float("nan")
    logprobs, entropy = selective_logprobs(logits, ids, with_entropy=True, impl="cpp")
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    row_without_support = torch.full((1, 50), -INF)
    assert selective_logprobs(row_without_support, torch.tensor([3]), impl="cpp").isnan().all()


@needs_cpp
def test_same_bits_for_any_thread_count() -> None:
    logits, ids = random_case(97, 3001)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 1, 1, 2):
            torch.set_num_threads(count)
            outputs.append(torch.stack(selective_logprobs(logits, ids, with_entropy=True, impl="cpp")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_builds_for_older_processors_agree(capability: str, tmp_path: Path) -> None:
    """torch reads ATEN_CPU_CAPABILITY once per process."""
    logits, ids = random_case(9, 3001)
    torch.save((logits, ids), tmp_path / "case.pt")
    script = (
        "import sys, torch; from r1fast_kernels import selective_logprobs as f; "
        "torch.save(f(*torch.load(sys.argv[1] + '/case.pt'), with_entropy=True, impl='cpp'), sys.argv[1] + '/out.pt')"
    )
    kernels = str(Path(__file__).parents[2] / "kernels")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": kernels}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)
    for got, want in zip(torch.load(tmp_path / "out.pt"), selective_logprobs(logits, ids, with_entropy=True)):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@needs_cpp
@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(with_entropy: bool) -> None:
    logits, ids = random_case(5, 33)
    torch.library.opcheck(
        torch.ops.r1fast.selective_logprobs.default, (logits.requires_grad_(), ids, 0.7, with_entropy)
    )


@needs_cpp
def test_compiles_without_a_graph_break() -> None:
    logits, ids = random_case(5, 33)
    compiled = torch.compile(selective_logprobs, backend="aot_eager", fullgraph=True)
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    compiled(leaf, ids).sum().backward()
    selective_logprobs(other, ids).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_reference_gradcheck(temperature: float) -> None:
    logits, ids = random_case(4, 6)
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: selective_logprobs(x, ids, temperature=temperature, with_entropy=True), (leaf,)
    )


def test_errors_say_what_to_do() -> None:
    logits, ids = random_case(4, 6)
    with pytest.raises(ValueError, match=r"expected \[T, V\] and \[T\]"):
        selective_logprobs(logits, ids[:3])
    with pytest.raises(ValueError, match="temperature=0"):
        selective_logprobs(logits, ids, temperature=0)
    with pytest.raises(ValueError, match="expected None or one of reference, cpp"):
        selective_logprobs(logits, ids, impl="cuda")
    with pytest.raises(ValueError, match=r"float32 on CPU, got torch\.bfloat16"):
        selective_logprobs(logits.bfloat16(), ids, impl="cpp")


@needs_cpp
def test_target_outside_the_vocabulary_is_an_error() -> None:
    logits, ids = random_case(4, 6)
    for bad in (-100, 6):
        ids[2] = bad
        with pytest.raises(IndexError, match=rf"target_ids_T\[2\] is {bad}"):
            selective_logprobs(logits, ids, impl="cpp")
