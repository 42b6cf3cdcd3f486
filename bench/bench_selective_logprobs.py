"""selective_logprobs on this machine: ours, torch's eager log_softmax + gather, and the floor.

    pytest bench/bench_selective_logprobs.py                       (one thread: OMP_NUM_THREADS=1 ...)

Every figure is printed only after the op agreed with its reference in this process. The floor of the forward pass is
one read of the logits: 4 T V bytes at the rate at which this machine sums an array of the same size (measured here).
"""

import functools
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from r1fast_kernels import dispatch, selective_logprobs

# (T, V): a decode batch of the small recipe; a micro-batch with Llama-2's vocabulary; a few rows of Qwen2.5's.
SHAPES = [(4096, 128), (128, 32000), (32, 151936)]


def median_ms(function: Callable[[], object], repeats: int = 15) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] * 1e3


def eager(logits_TV: torch.Tensor, target_ids_T: torch.Tensor, with_entropy: bool) -> object:
    """What a trainer writes by hand."""
    logp_TV = logits_TV.log_softmax(-1)
    logprobs_T = logp_TV.gather(1, target_ids_T[:, None]).squeeze(1)
    return (logprobs_T, -(logp_TV.exp() * logp_TV).sum(-1)) if with_entropy else logprobs_T


@functools.cache
def machine() -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, commit {commit}"
    )


@pytest.mark.skipif(not dispatch.HAS_EXTENSION, reason="the C++ extension is not built")
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logprobs", "with-entropy"])
@pytest.mark.parametrize(("num_tokens", "vocab"), SHAPES, ids=[f"T{t}-V{v}" for t, v in SHAPES])
def test_forward(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], num_tokens: int, vocab: int, with_entropy: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(num_tokens, vocab, generator=generator) * 3
    target_ids_T = torch.randint(vocab, (num_tokens,), generator=generator)

    def ours() -> object:
        return selective_logprobs(logits_TV, target_ids_T, with_entropy=with_entropy, impl="cpp")

    exact = selective_logprobs(logits_TV.double(), target_ids_T, with_entropy=with_entropy, impl="reference")
    torch.testing.assert_close(ours(), exact, rtol=1e-6, atol=1e-6, check_dtype=False)

    benchmark(ours)
    ours_ms = benchmark.stats.stats.median * 1e3
    eager_ms = median_ms(lambda: eager(logits_TV, target_ids_T, with_entropy))
    floor_ms = median_ms(logits_TV.sum)
    with capsys.disabled():
        print(
            f"\nT {num_tokens:5d}  V {vocab:6d}  {'logprob + entropy' if with_entropy else 'logprob':17s}  "
            f"ours {ours_ms:7.3f} ms (iqr {benchmark.stats.stats.iqr * 1e3:.3f})  eager {eager_ms:7.3f} ms = "
            f"{eager_ms / ours_ms:5.2f}x ours  floor {floor_ms:6.3f} ms = {floor_ms / ours_ms:4.0%} of ours  "
            f"[{machine()}]"
        )
