"""How often Triton's sampler reads a row for a cut, and that each way of the search ends at the same token.

Passes are those between the first (maximum and sum) and the last (what stays); those over a list count apart.
"""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast_kernels import sample_tokens
from r1fast_kernels.sample_tokens import _uniform
from tests.kernels import mutations
from tests.kernels.backends import BF16, FP32
from tests.kernels.checked_memory import KernelFault

VOCAB = 40_000
TOP_K, TOP_P, BOTH = {"top_k": 50}, {"top_p": 0.95}, {"top_k": 50, "top_p": 0.9}
Mutate = Callable[..., Any]


def normal(scale: float, shift: float = 0.0) -> Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * scale + shift


def of_one_thread() -> Tensor:
    """152 large logits, all in the chunks of fp32 of the first thread: they do not fit into its slots."""
    row = normal(1.0)
    places = torch.arange(VOCAB) % 1024 < 4
    row[:, places] += 20
    return row


def of_few_values() -> Tensor:
    return (torch.arange(VOCAB)[None] % 3).float()


@pytest.fixture
def mutate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mutate:
    return partial(mutations.mutate, monkeypatch, tmp_path, "sample_tokens")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    """(over the row, over a list) of a call, which has to draw what the reference draws."""
    module = importlib.import_module("r1fast_kernels.sample_tokens")
    lengths: list[int] = []

    def count(name: str) -> None:
        original = getattr(module, name)

        def counted(ptr: Any, length: Any, *rest: Any) -> Any:
            lengths.append(int(length.handle.data.item()))
            return original(ptr, length, *rest)

        monkeypatch.setattr(module, name, counted)

    count("_measure")
    count("_collect")

    def draw(logits: Tensor, **options: float) -> tuple[int, int]:
        lengths.clear()
        seeds = torch.arange(2000)
        seeds = seeds[_uniform(seeds).argmax()][None]  # the last tokens that stay show a cut that is wrong
        ids, _ = sample_tokens(logits, seeds_B=seeds, impl="triton", **options)
        want, _ = sample_tokens(logits.double(), seeds_B=seeds, impl="reference", **options)
        assert torch.equal(ids, want), f"drew {ids.item()}, the reference {want.item()}"
        return lengths.count(VOCAB), len(lengths) - lengths.count(VOCAB)

    return draw


# At most: over the row, over a list.
ROWS = {
    "normal": (normal(2.0), TOP_K, (1, 8)),
    "normal, mass": (normal(2.0), TOP_P, (3, 8)),
    "normal, both": (normal(2.0), BOTH, (1, 17)),
    "wide, mass": (normal(6.0), TOP_P, (2, 8)),
    "shifted": (normal(2.0, 20.0), {"top_k": 1000}, (1, 8)),
    "bf16": (normal(2.0).to(BF16), TOP_K, (1, 3)),
    "bf16, mass": (normal(2.0).to(BF16), TOP_P, (3, 3)),
    "equal": (torch.zeros(1, VOCAB), TOP_K, (0, 0)),
    "equal, mass": (torch.zeros(1, VOCAB), {"top_p": 0.63}, (1, 0)),
    "of few values": (of_few_values(), {"top_k": 5000}, (1, 0)),
    "of one thread": (of_one_thread(), {"top_k": 140}, (12, 0)),
    "of one thread, mass": (of_one_thread(), {"top_p": 0.9}, (12, 0)),
}


@pytest.mark.parametrize("name", ROWS)
def test_passes(passes: Callable[..., tuple[int, int]], name: str) -> None:
    logits, options, most = ROWS[name]
    found = passes(logits, **options)
    assert found[0] <= most[0] and found[1] <= most[1], f"{found} passes over row and list, at most {most}"


def test_no_bound(mutate: Mutate, passes: Callable[..., tuple[int, int]]) -> None:
    mutate("_bound", ("low = tl.where(enough, tl.maximum(low, middle), low)", "low = low"))
    assert passes(normal(2.0), **TOP_K)[0] > ROWS["normal"][2][0]


def test_no_list(mutate: Mutate, passes: Callable[..., tuple[int, int]]) -> None:
    mutate("_select", ("if used <= SLOTS:", "if used < 0:"))
    assert passes(normal(2.0), **TOP_P)[0] > ROWS["normal, mass"][2][0]


def test_mass_beyond_the_list_is_forgotten(mutate: Mutate, passes: Callable[..., tuple[int, int]]) -> None:
    mutate("_select", ("target, reached, above = target - above, ", "target, reached, above = target, "))
    with pytest.raises(AssertionError, match="the reference"):
        passes(normal(2.0).sort(descending=True).values, **TOP_P)


def test_a_list_that_is_not_whole(mutate: Mutate, passes: Callable[..., tuple[int, int]]) -> None:
    mutate("_select", ("if used <= SLOTS:", "if used >= 0:"))
    with pytest.raises((AssertionError, KernelFault)):
        passes(of_one_thread(), top_k=140)


def test_slots_of_the_next_row(mutate: Mutate) -> None:
    mutate("_append", ("mask=inside & (held < SLOTS)", "mask=inside"))
    with pytest.raises(KernelFault):
        sample_tokens(of_one_thread().to(FP32), top_k=140, impl="triton")
