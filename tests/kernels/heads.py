"""Inputs of the tests of the linear ops, and tiles so small that every loop over them runs."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import FP64, threads

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
    """whole: one tile. Else wide tiles of 64 columns and all tokens or 5, tall ones of 7 rows, 50-column products.

    pieces-of-both multiplies bf16 as the other kind of CPU does, with or without instructions for it, and begins rows
    of a tile where a GPU does.
    """
    if name == "whole":
        return
    head = sys.modules[HEAD]
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(head.WIDE_TILE_BYTES, device, 1)
        monkeypatch.setitem(head.TALL_TILE_BYTES, device, 7 * 211 * 8)
        if name == "pieces-of-both":
            monkeypatch.setitem(head.MAX_ROWS, device, 5)
            monkeypatch.setitem(head.ROW_BYTES, device, 128)
    if name == "pieces-of-both":
        monkeypatch.setattr(head, "WIDENS_BF16", not head.WIDENS_BF16)
    monkeypatch.setitem(head.COLUMNS, "cpu", 50)


def head_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are cut into a GPU's tiles, and keep a GPU's running values."""
    head = sys.modules[HEAD]
    for table in (
        head.WIDE_TILE_BYTES, head.TALL_TILE_BYTES, head.MAX_ROWS, head.COLUMNS, head.STATE_DTYPE, head.ROW_BYTES,
    ):  # fmt: skip
        monkeypatch.setitem(table, "cpu", table["cuda"])
    monkeypatch.setattr(head, "WIDENS_BF16", False)


def set_one_thread_for_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's product may add in another order on two threads (MKL does, for few rows): leave that out."""
    for name in ("project", "multiply_into"):
        function = getattr(sys.modules[HEAD], name)

        def on_one_thread(*args: Any, _function: Any = function, **options: Any) -> Any:
            with threads(1):
                return _function(*args, **options)

        monkeypatch.setattr(sys.modules[HEAD], name, on_one_thread)
