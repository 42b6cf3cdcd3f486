"""Inputs of the tests of the linear ops, and tiles so small that every loop over them runs."""

import sys

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import FP64

# Not `import r1fast_kernels.head`: importlib mode and ops named like their modules make attribute paths unreliable.
HEAD = "r1fast_kernels.head"


def random_head(
    num_tokens: int = 23, width: int = 8, vocab: int = 211, dtype: torch.dtype = FP64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, ids: primes, so that no tile fits evenly."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=FP64)
    weight = torch.randn(vocab, width, generator=generator, dtype=FP64)
    bias = torch.randn(vocab, generator=generator, dtype=FP64)
    ids = torch.randint(vocab, (num_tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), ids


TILINGS = ("whole", "one-piece-of-tokens", "pieces-of-both")


def set_tiling(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """whole: all in one tile. Else 64 columns a wide tile, of all tokens or of 5; 7 rows a tall one; 50-column products."""
    if name == "whole":
        return
    head = sys.modules[HEAD]
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(head.WIDE_TILE_BYTES, device, 1)
        monkeypatch.setitem(head.TALL_TILE_BYTES, device, 7 * 211 * 8)
        if name == "pieces-of-both":
            monkeypatch.setitem(head.MAX_ROWS, device, 5)
    monkeypatch.setattr(head, "CPU_COLUMNS", 50)
