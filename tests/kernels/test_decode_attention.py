from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast_kernels import decode_attention, dispatch
from r1fast_kernels.decode_attention import BLOCK, decode_attention_counted, slots_of
from tests.kernels.backends import (
    BF16,
    FP16,
    FP32,
    FP64,
    SLOW_INTERPRETED,
    Backend,
    assert_as_exact,
    assert_same_bits,
    far_apart,
    needs_cpp,
    of_older_processor,
)  # fmt: skip

SCALE = 0.3


@dataclass(frozen=True)
class Shape:
    H: int
    K: int
    d: int
    e: int
    shared: bool = False  # values are the first channels of keys, as in MLA


SHAPES = {
    "mha": Shape(4, 4, 16, 16),
    "grouped": Shape(8, 2, 64, 64),
    "one-key-head": Shape(12, 1, 32, 32),  # more query heads than a strip has rows
    "mla": Shape(4, 1, 48, 32, shared=True),
    "odd": Shape(6, 2, 33, 17),
    "two-tiles": Shape(40, 2, 48, 32, shared=True),  # 20 query heads of a key head: a program on a GPU takes 16
    "latents": Shape(16, 1, 576, 512, shared=True),  # DeepSeek-V2-Lite's: 512 channels have tiles of their own
    "latents-of-many": Shape(36, 1, 576, 512, shared=True),  # a tile of 64 heads as columns, as of DeepSeek-V3's 128
}
# Of a GPU's tiles alone.
TILES = {
    "one-more": Shape(17, 1, 576, 512, shared=True),  # than what goes as rows
    "two-of-columns": Shape(66, 1, 576, 512, shared=True),
    "odd": Shape(33, 1, 523, 509, shared=True),
    "latents-alone": Shape(40, 1, 512, 512, shared=True),  # without channels behind the 512
    "values": Shape(36, 1, 576, 512),  # not a part of keys: tiles of 16 heads
}
# Values in keys, but not as first channels up to a power of two: those a GPU reads once.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "last-channels": lambda k_SKd: k_SKd[..., 16:],
    "past-a-power-of-two": lambda k_SKd: k_SKd[..., :40],
    "of-one-head": lambda k_SKd: k_SKd[:, :1, :32].expand(-1, 2, -1),
}
# One token; up to, at and past a block; at and past a span of 256; several spans. Interpreted, one token of a third.
LENGTHS = [1, 16, 17, 513] if dispatch.INTERPRETING else [1, 15, 16, 17, 255, 256, 257, 600]


def random_rows(shape: Shape, dtype: torch.dtype = FP32, lengths: list[int] = LENGTHS) -> dict[str, Any]:
    """Blocks in any order; NaN in slots that no row has, all of block 0 among them; no block's id behind the length."""
    generator = torch.Generator().manual_seed(0)
    width, B = -(-max(lengths, default=1) // BLOCK) + 1, len(lengths)
    table = 1 + torch.randperm(B * width, generator=generator).view(B, width).int()
    num_slots = (1 + B * width) * BLOCK
    k = torch.full((num_slots, shape.K, shape.d), torch.nan, dtype=FP64)
    v = torch.full((num_slots, shape.K, shape.e), torch.nan, dtype=FP64)
    for row, length in enumerate(lengths):
        slots = slots_of(table[row : row + 1], length)[0]
        k[slots], v[slots] = (
            torch.randn(length, *x.shape[1:], generator=generator, dtype=FP64) for x in (k, v)
        )  # fmt: skip
        table[row, -(-length // BLOCK) :] = 2**30
    k = k.to(dtype)
    return {
        "q_BHd": torch.randn(B, shape.H, shape.d, generator=generator, dtype=FP64).to(dtype),
        "k_SKd": k,
        "v_SKe": k[..., : shape.e] if shape.shared else v.to(dtype),
        "block_table_BN": table,
        "lengths_B": torch.tensor(lengths, dtype=torch.int32),
    }


def attend(
    rows: dict[str, Any],
    impl: str | None = None,
    dtype: torch.dtype | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    wide = {name: x.to(dtype) if dtype is not None and x.is_floating_point() else x for name, x in rows.items()}
    return decode_attention(**wide, scale=SCALE, window=window, soft_cap=soft_cap, impl=impl)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_exact_as_torch(backend: Backend, shape: Shape, dtype: torch.dtype) -> None:
    """Against fp64 on the same rounded inputs; what is in the cache beside the rows' tokens is not read."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    rows = random_rows(shape, dtype)
    got = attend(backend.to(rows), backend.impl)
    assert got.dtype == dtype and got.shape == (len(LENGTHS), shape.H, shape.e)
    assert_as_exact(got, attend(rows, "reference"), attend(rows, "reference", FP64), 2)


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", TILES.values(), ids=TILES)
def test_tiles_of_many_heads(backend: Backend, shape: Shape, dtype: torch.dtype, window: int | None) -> None:
    if backend.impl == "cpp":
        pytest.skip("a GPU's tiles")
    rows = random_rows(shape, dtype)
    want, exact = attend(rows, "reference", window=window), attend(rows, "reference", FP64, window)
    assert_as_exact(attend(backend.to(rows), backend.impl, window=window), want, exact, 2)


@pytest.mark.parametrize("shape", [SHAPES["mla"], TILES["one-more"]], ids=["mla", "one-more"])
def test_large_queries(backend: Backend, shape: Shape) -> None:
    """Scores of hundreds, in several spans (NVIDIA/cutlass#2274)."""
    rows = random_rows(shape, lengths=[600])
    rows["q_BHd"] *= 100
    want, exact = attend(rows, "reference"), attend(rows, "reference", FP64)
    assert_as_exact(attend(backend.to(rows), backend.impl), want, exact, 2)


# Itself; inside a block; a block; past one; past a span; more than any row has.
@pytest.mark.parametrize("window", [1, 5, 16, 17, 300, 10_000])
@pytest.mark.parametrize("name", ["grouped", "mla", "odd"])
def test_a_window(backend: Backend, name: str, window: int) -> None:
    """Blocks before it are not read: they may hold anything."""
    rows = random_rows(SHAPES[name])
    want, exact = attend(rows, "reference", window=window), attend(rows, "reference", FP64, window)
    if window > max(LENGTHS):
        assert torch.equal(want, attend(rows, "reference"))
        assert torch.equal(
            attend(backend.to(rows), backend.impl, window=window), attend(backend.to(rows), backend.impl)
        )
    for row, length in enumerate(LENGTHS):
        before = max(0, length - window) // BLOCK * BLOCK
        rows["k_SKd"][slots_of(rows["block_table_BN"][row : row + 1], length)[0, :before]] = torch.nan
    got = attend(backend.to(rows), backend.impl, window=window)
    assert_as_exact(got, want, exact, 2)
    for b, length in enumerate(LENGTHS):  # the last tokens alone, from the block that they begin in
        skipped = max(0, length - window) // BLOCK
        alone = rows | {name: rows[name][b : b + 1] for name in ("q_BHd", "block_table_BN", "lengths_B")}
        alone["block_table_BN"] = alone["block_table_BN"][:, skipped:].contiguous()
        alone["lengths_B"] = alone["lengths_B"] - skipped * BLOCK
        torch.testing.assert_close(attend(alone, "reference", window=window)[0], want[b])


# That scores are almost cut off by; bent; hardly touched, where a tanh of small numbers must keep its last bits.
@pytest.mark.parametrize("soft_cap", [0.1, 2.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["grouped", "odd", "mla", "latents-of-many"])
def test_a_soft_cap(backend: Backend, name: str, dtype: torch.dtype, soft_cap: float) -> None:
    """With a window; what is behind a row, NaN here, stays unseen."""
    if dtype not in backend.dtypes or (name == "latents-of-many" and backend.impl == "cpp"):
        pytest.skip(f"{backend.name} does not take {dtype}, or has no tiles of 64 heads")
    rows = random_rows(SHAPES[name], dtype)
    options: dict[str, Any] = {"window": 300, "soft_cap": soft_cap}
    got = attend(backend.to(rows), backend.impl, **options)
    assert_as_exact(got, attend(rows, "reference", **options), attend(rows, "reference", FP64, **options), 2)


def test_a_soft_cap_by_hand(backend: Backend) -> None:
    """Scores of 1000 and -1000 are 2 and -2."""
    k, v = torch.tensor([1000.0, -1000.0] * 8)[:, None, None], torch.tensor([3.0, 20.0] * 8)[:, None, None]
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.full((1,), 2, dtype=torch.int32)
    want = torch.tensor([2.0, -2.0]).softmax(0) @ torch.tensor([3.0, 20.0])
    for impl in ("reference", backend.impl):
        inputs = backend.to((torch.ones(1, 1, 1), k, v, table, lengths))
        got = decode_attention(*inputs, scale=1.0, soft_cap=2.0, impl=impl)
        torch.testing.assert_close(got.squeeze().cpu(), want)


def test_by_hand(backend: Backend) -> None:
    """Two tokens in two blocks: weights e^(scale q.k), over their sum."""
    k, v = torch.zeros(48, 1, 1), torch.zeros(48, 1, 1)
    k[32:48, 0, 0] = k[0] = 1.0  # block 2, then block 0: 17 tokens
    v[32:48, 0, 0], v[0] = 3.0, 20.0
    k[0] = 2.0
    table, lengths = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([17], dtype=torch.int32)
    e = torch.tensor([0.5, 1.0]).exp()
    want = (16 * e[0] * 3 + e[1] * 20) / (16 * e[0] + e[1])
    inputs = torch.ones(1, 1, 1), k, v, table, lengths
    torch.testing.assert_close(decode_attention(*inputs, scale=0.5, impl="reference").squeeze(), want)
    got = decode_attention(*backend.to(inputs), scale=0.5, impl=backend.impl)
    torch.testing.assert_close(got.squeeze().cpu(), want)


def test_rows_may_share_blocks(backend: Backend) -> None:
    rows = random_rows(SHAPES["grouped"], lengths=[40, 40])
    rows["block_table_BN"][1, :2] = rows["block_table_BN"][0, :2]
    torch.testing.assert_close(attend(backend.to(rows), backend.impl).cpu(), attend(rows, "reference"))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_values_may_be_any_view_of_keys(backend: Backend, view: Callable[[Tensor], Tensor]) -> None:
    rows = random_rows(Shape(4, 2, 48, 32), lengths=[17, 300])
    rows["v_SKe"] = view(rows["k_SKd"])
    want = attend(rows, "reference")
    rows = backend.to(rows)
    rows["v_SKe"] = view(rows["k_SKd"])
    torch.testing.assert_close(attend(rows, backend.impl).cpu(), want)


def test_scores_far_apart(backend: Backend) -> None:
    """A token of the first, second or last span that outweighs the row; a row of scores far below 0."""
    rows = random_rows(Shape(1, 1, 16, 16), lengths=[600] * 4)
    scores_BJ = torch.zeros(4, 600)
    scores_BJ[[0, 1, 2], [3, 300, 599]] = 1000.0
    scores_BJ[3] = -1000.0
    slots_BJ = slots_of(rows["block_table_BN"], 600)
    rows["k_SKd"][slots_BJ] = 0.0
    rows["k_SKd"][slots_BJ, 0, 0] = scores_BJ
    rows["q_BHd"] = torch.ones(4, 1, 16)
    torch.testing.assert_close(attend(backend.to(rows), backend.impl).cpu(), attend(rows, "reference"))


def test_spans_are_merged_in_fp32(backend: Backend) -> None:
    """Spans of 256, 256 and 88 tokens that nearly cancel: bf16 holds neither a mean of 1 + 2^-8 nor log2(88)."""
    rows = random_rows(Shape(1, 1, 16, 16), BF16, lengths=[600])
    values_J = torch.tensor([1.0, 1.0 + 2.0**-7]).repeat(300)
    values_J[512:] = -5.8125
    slots_J = slots_of(rows["block_table_BN"], 600)[0]
    rows["k_SKd"][slots_J] = 0.0
    rows["v_SKe"][slots_J] = values_J.to(BF16)[:, None, None]
    got = attend(backend.to(rows), backend.impl)
    torch.testing.assert_close(got, torch.full_like(got, (514 - 88 * 5.8125) / 600), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["mla", "latents-of-many"])
@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=SLOW_INTERPRETED), BF16], ids=lambda dtype: str(dtype)[6:])
def test_a_row_alone_is_the_row_in_a_batch(backend: Backend, dtype: torch.dtype, name: str) -> None:
    """With the batch's width of the table, and with its own: a GPU then merges fewer spans, or none."""
    rows = backend.to(random_rows(SHAPES[name], dtype))
    together = attend(rows, backend.impl)
    for b, length in enumerate(LENGTHS):
        alone = rows | {name: rows[name][b : b + 1] for name in ("q_BHd", "block_table_BN", "lengths_B")}
        assert torch.equal(attend(alone, backend.impl)[0], together[b])
        narrow = alone | {"block_table_BN": alone["block_table_BN"][:, : -(-length // BLOCK)]}
        assert torch.equal(attend(narrow, backend.impl)[0], together[b])
    few = rows | {name: rows[name][:3] for name in ("q_BHd", "block_table_BN", "lengths_B")}
    few["block_table_BN"] = few["block_table_BN"][:, : -(-max(LENGTHS[:3]) // BLOCK)]
    assert not few["block_table_BN"].is_contiguous()
    assert torch.equal(attend(few, backend.impl), together[:3])


@pytest.mark.parametrize("strides", [(1 << 26, 32, 1), (32, 1 << 30, 1)], ids=["slots", "heads"])
def test_strides_beyond_32_bits(backend: Backend, strides: tuple[int, int, int]) -> None:
    """The last slots, or the last key head, begin 2^31 elements in or later. Only the pages that are touched exist."""
    if backend.name == "cuda":
        pytest.skip("memory on a GPU is not handed out page by page")
    rows = random_rows(Shape(6, 3, 32, 16), BF16, lengths=[20])
    k_SKd = rows["k_SKd"]
    near, apart = (rows | {"k_SKd": x, "v_SKe": x[..., 16:]} for x in (k_SKd, far_apart(k_SKd, strides)))
    assert torch.equal(attend(apart, backend.impl), attend(near, backend.impl))


def test_strided_inputs_and_no_rows(backend: Backend) -> None:
    rows = backend.to(random_rows(SHAPES["grouped"], lengths=[17, 300]))
    want = attend(rows, backend.impl)
    wide = rows | {"q_BHd": torch.cat((rows["q_BHd"], rows["q_BHd"]), dim=-1)[..., :64]}
    assert not wide["q_BHd"].is_contiguous() and torch.equal(attend(wide, backend.impl), want)
    turned = rows | {name: rows[name].mT.contiguous().mT for name in ("q_BHd", "k_SKd", "v_SKe")}
    assert turned["k_SKd"].stride(-1) == 2 and torch.equal(attend(turned, backend.impl), want)
    empty = backend.to(random_rows(SHAPES["grouped"], lengths=[]))
    assert attend(empty, backend.impl).shape == attend(empty, "reference").shape == (0, 8, 64)


def test_counters_are_left_at_zero(backend: Backend) -> None:
    """So that the next layer counts in them; and change no bit."""
    rows = backend.to(random_rows(SHAPES["two-tiles"], BF16, lengths=[5, 300, 600]))
    finished = torch.zeros(3 * 40, dtype=torch.int32, device=backend.device)
    for _ in range(2):
        got = decode_attention_counted(*rows.values(), scale=SCALE, window=None, finished=finished)
        assert torch.equal(got, attend(rows, backend.impl)) and not finished.any()


def test_same_bits_every_time(backend: Backend) -> None:
    rows = backend.to(random_rows(SHAPES["grouped"], lengths=[5, 300]))
    assert_same_bits(lambda: [attend(rows, backend.impl)])


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_builds_for_older_processors_agree(capability: str, tmp_path: Any) -> None:
    calls = "attend(random_rows(SHAPES[name], dtype), 'cpp')"
    expression = f"[{calls} for name in ('mla', 'odd') for dtype in (FP32, BF16, FP64)]"
    for got, want in zip(*of_older_processor(capability, "test_decode_attention", expression, tmp_path), strict=True):
        tolerance = 2e-2 if want.dtype == BF16 else 1e-5
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_opcheck(backend: Backend) -> None:
    rows = backend.to(random_rows(SHAPES["mla"], lengths=[3, 20]))
    torch.library.opcheck(torch.ops.r1fast.decode_attention.default, (*rows.values(), SCALE))
    torch.library.opcheck(torch.ops.r1fast.decode_attention.default, (*rows.values(), SCALE, None, 2.0))


@needs_cpp
def test_errors_say_what_was_expected() -> None:
    rows = random_rows(SHAPES["grouped"])
    wrong: dict[str, list[tuple[str, Any]]] = {
        r"expected \[B, H, d\], \[S, K, d\] and \[S, K, e\] in one dtype": [
            ("q_BHd", rows["q_BHd"][:, :7]), ("k_SKd", rows["k_SKd"][1:]), ("q_BHd", rows["q_BHd"].double()),
        ],
        r"expected \[B, N\] and \[B\]": [("lengths_B", rows["lengths_B"][1:])],
        "lengths in torch.int32, expected int32": [("block_table_BN", rows["block_table_BN"].long())],
        r"lengths_B\[0\] = 0, expected 1 to": [("lengths_B", torch.zeros_like(rows["lengths_B"]))],
        "expected a block of the cache": [("block_table_BN", rows["block_table_BN"] * 0 - 1)],
    }  # fmt: skip
    for message, changes in wrong.items():
        for name, value in changes:
            with pytest.raises(ValueError, match=message):
                decode_attention(**(rows | {name: value}), scale=SCALE, impl="cpp")
    with pytest.raises(ValueError, match="expected more than 0"):
        decode_attention(**rows, scale=0.0)
    for cap in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"soft_cap=.*, expected a finite number above 0, or None"):
            decode_attention(**rows, scale=SCALE, soft_cap=cap)
