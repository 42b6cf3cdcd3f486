"""Offsets past 2^31 in every kernel that may meet them: tensors of gigabytes, of which a few pages exist.

Only the first and last programs of a launch run, so that a case takes milliseconds; checked_memory.py faults an offset
that wraps in 32 bits. Rows far apart by their stride are tested with each op too (far_apart).
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import r1fast_kernels as kernels
from r1fast_kernels import decode_parts, moe_experts_rows, moe_experts_triton
from r1fast_kernels.launch import launch
from tests.kernels import mutations
from tests.kernels.backends import BF16, FP32, far_apart, page_by_page
from tests.kernels.checked_memory import KernelFault, wide

INT32, INT64 = torch.int32, torch.int64
LONG = (1 << 27) + 40  # rows; with 16 columns more than 2^31 numbers
WIDE = 1 << 27  # columns
ops = torch.ops.r1fast
# The package has functions of these names.
grouped_gemm_module, moe_dispatch_module = (
    importlib.import_module(f"r1fast_kernels.{stem}") for stem in ("grouped_gemm", "moe_dispatch")
)


def vast(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Zeros, but for random numbers in the first and last 40 of its rows and columns, where these meet."""
    count = torch.Size(shape).numel()
    values = torch.frombuffer(page_by_page(count * dtype.itemsize), dtype=dtype, count=count).view(shape)
    if dtype.is_floating_point:
        generator = torch.Generator().manual_seed(count)
        for rows in (slice(0, 40), slice(-40, None)):
            for columns in (slice(0, 40), slice(-40, None)):
                corner = values[..., rows, columns] if len(shape) > 1 else values[columns]
                corner.copy_(torch.randn(corner.shape, generator=generator))
    return values


def small(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_near(got: Tensor, want: Tensor) -> None:
    assert want.abs().max() > 0
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)


def ends_of(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=INT32)


# ---- cases ----


def selective_logprobs() -> None:
    logits, ids = small(4, 40, dtype=FP32), torch.tensor([3, 1, 4, 1])

    def gradient(logits_TV: Tensor, inplace: bool) -> Tensor:
        leaf = logits_TV.requires_grad_()
        logprobs, entropy = kernels.selective_logprobs(leaf, ids, with_entropy=True, inplace_backward=inplace)
        return torch.autograd.grad((logprobs + entropy).sum(), leaf)[0]

    want = gradient(logits, False)
    for inplace in (False, True):
        assert torch.equal(gradient(far_apart(logits.detach(), (1 << 30, 1)), inplace), want)


def sample_tokens() -> None:
    logits, seeds = small(4, 40, dtype=FP32), torch.arange(4)
    for options in ({}, {"top_k": 9, "top_p": 0.9}, {"temperature": 0.0}):
        want = kernels.sample_tokens(logits, seeds_B=seeds, **options)
        got = kernels.sample_tokens(far_apart(logits, (1 << 30, 1)), seeds_B=seeds, **options)
        assert all(torch.equal(g, w) for g, w in zip(got, want))


def route_topk() -> None:
    logits_TE = vast((1 << 26) + 40, 40)
    with wide():
        ids, weights, _ = kernels.route_topk(logits_TE, None, top_k=3)
        grad = ops.route_topk_backward(logits_TE, ids, weights, True, 1.0, "sigmoid")
    want_ids, want, _ = kernels.route_topk(logits_TE[-4:], None, top_k=3)
    assert torch.equal(ids[-4:], want_ids) and torch.equal(weights[-4:], want)
    assert torch.equal(grad[-4:], ops.route_topk_backward(logits_TE[-4:], want_ids, want, True, 1.0, "sigmoid"))


class Prefix:
    """In place of the kernel, which takes a step for every 128 blocks: all choices are of expert 0."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(counts_BX: Tensor, totals_X: Tensor, *_: Any, **__: Any) -> None:
            assert counts_BX[[0, -1], 0].tolist() == [128, 128]
            for block in (0, 1, len(counts_BX) - 2, len(counts_BX) - 1):
                counts_BX[block, 0] = 128 * block
            totals_X.zero_()
            totals_X[0] = 128 * len(counts_BX)

        return run


def moe_dispatch() -> None:
    """One choice less than 2^31 rows of 128: counts of all blocks are more than 2^31 numbers."""
    ids = vast((1 << 24) - 1, 128, dtype=INT64)
    with wide(2, 2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_dispatch_module, "_prefix_kernel", Prefix())
        order_M, slot_TK, _ = ops.moe_dispatch(ids, 128)
    last = torch.arange(ids.numel() - 128, ids.numel())
    assert torch.equal(order_M[-128:], last.int()) and torch.equal(slot_TK[-1], last.int())


def moe_dispatch_prefix() -> None:
    """The last blocks of as many counts."""
    counts, totals = vast(130, WIDE // 8 + 8, dtype=INT32), torch.empty(WIDE // 8 + 8, dtype=INT32)
    counts[-1, -8:] = 5
    with wide(0, 1):
        launch(
            moe_dispatch_module._prefix_kernel,
            (WIDE // 128 + 1,),
            counts,
            totals,
            130,
            WIDE // 8 + 7,
            BLOCK_B=128,
            BLOCK_E=16,
        )
    assert (totals[-8:] == 5).all() and not counts[-1, -8:].any()


def grouped_gemm_of_wide_weights() -> None:
    x_MD, ends = small(20, 24), ends_of(5, 20)
    for transpose in (True, False):
        weight = vast(2, WIDE, 24) if transpose else vast(2, 24, WIDE)
        with wide(4, 8):
            got = kernels.grouped_gemm(x_MD, weight, ends, transpose_weight=transpose)
        edge = weight[:, -16:] if transpose else weight[..., -16:]
        assert_near(got[:, -16:], kernels.grouped_gemm(x_MD, edge.contiguous(), ends, transpose_weight=transpose))


def grouped_gemm_of_many_rows() -> None:
    for inner in (16, 24):  # by descriptors and by addresses
        x_MD, weight, ends = vast(LONG, inner), small(2, 16, inner), ends_of(LONG - 30, LONG - 5)
        with wide(2, 6):
            got = kernels.grouped_gemm(x_MD, weight, ends)
        assert_near(got[-20:-5], x_MD[-20:-5] @ weight[1].T)
        assert not got[-5:].any()
    x_MD = vast(LONG, 16)
    grid = (-(-LONG // 64),)
    with wide():  # what a product of the vendor's leaves to us
        launch(grouped_gemm_module._zero_skipped_kernel, grid, x_MD, ends, LONG, 2, 16, BLOCK_M=64, BLOCK_N=16)
    assert x_MD[-20:-5].any() and not x_MD[-5:].any()


def grouped_gemm_weight() -> None:
    """Wide rows of each side, and rows behind 2^31 numbers."""
    ends, narrow, broad = ends_of(7, 20), small(20, 16), vast(20, WIDE)
    with wide():
        assert_near(ops.grouped_gemm_weight(narrow, broad, ends)[1, -16:], broad[7:, -16:].T @ narrow[7:])
    with wide():
        assert_near(ops.grouped_gemm_weight(broad, narrow, ends)[1, :, -16:], narrow[7:].T @ broad[7:, -16:])
    many, sides = vast(LONG, 16), ends_of(LONG - 20, LONG)
    with wide(0, 1):
        assert_near(ops.grouped_gemm_weight(many, many, sides)[1], many[-20:].T @ many[-20:])


def moe_rows() -> None:
    order, slots, ends = torch.arange(20, dtype=INT32), torch.arange(20, dtype=INT32).view(20, 1), ends_of(20)
    x_TD = vast(20, WIDE)
    with wide():
        assert torch.equal(moe_experts_rows.gather(x_TD, order, ends, 1)[-1, -40:], x_TD[-1, -40:])
        assert torch.equal(moe_experts_rows.combine(x_TD, slots, ends)[-1, -40:], x_TD[-1, -40:])
    gate_up, grad = vast(LONG, 32), vast(LONG, 16)
    order, weights, ends = (
        torch.frombuffer(page_by_page(4 * LONG), dtype=INT32),
        vast(LONG, 1, dtype=FP32),
        ends_of(LONG),
    )
    order[:40], order[-40:] = torch.arange(40), torch.arange(LONG - 40, LONG)
    short = gate_up[-8:], weights[-8:], torch.arange(8, dtype=INT32), ends_of(8)
    with wide():
        inner = moe_experts_rows.swiglu(gate_up, weights, order, ends)
        found = moe_experts_rows.swiglu_gradients(grad, gate_up, weights, order, ends, (True, True, True))
    assert torch.equal(inner[-8:], moe_experts_rows.swiglu(*short))
    for got, want in zip(found, moe_experts_rows.swiglu_gradients(grad[-8:], *short, (True, True, True))):
        assert torch.equal(got[-8:], want)


def moe_experts_of_wide_weights() -> None:
    """Forward, but for the product that would take a step for every 16 of 2^26 channels. Backward are ops of above."""
    E, F, D, M = 3, WIDE // 2, 24, 36
    hidden, weights, gate_up = small(M, D), small(M, 1, dtype=FP32), vast(E, 2 * F, D)
    gate_up[:, F - 40 : F] = small(E, 40, D)
    ids, inner = (torch.arange(M) % E).view(M, 1), []

    def launch_product(inner_MF: Tensor, *_: Any, **__: Any) -> Tensor:
        inner.append(inner_MF)
        return inner_MF.new_zeros(M, D)

    with wide(8, 8), pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_experts_triton, "launch_product", launch_product)
        _, order_M, *_, kept = moe_experts_triton.launch_forward(hidden, gate_up, vast(E, D, F), ids, weights, True)
    rows = order_M[-12:].long()  # of the last expert
    gate, up = (hidden[rows] @ w.T for w in (gate_up[-1, F - 8 : F], gate_up[-1, -8:]))
    assert_near(kept[-12:, -8:], up)
    assert_near(kept[-12:, F - 8 : F], gate)
    assert_near(inner[0][-12:, -8:], torch.nn.functional.silu(gate.float()) * up * weights[rows])


def moe_experts_of_many_tokens() -> None:
    hidden, grad_out, weights = vast(LONG, 16), vast(LONG, 16), vast(LONG, 1, dtype=FP32)
    gate_up, down, M = small(1, 32, 16), small(1, 16, 16), 36
    order, slots, ends = torch.arange(LONG - M, LONG, dtype=INT32), ends_of(3).view(1, 1), ends_of(M)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_experts_triton, "launch_dispatch", lambda *_: (order, slots, ends))
        patch.setattr(moe_experts_triton, "combine", lambda rows, *_: rows)
        rows, *_, kept = moe_experts_triton.launch_forward(hidden, gate_up, down, slots, weights, True)
        given = hidden, gate_up, down, weights, order, slots, ends, kept
        grad, _, _, _ = moe_experts_triton.launch_backward(grad_out, *given, True, False, False, False)
        near = *(x[-M:].contiguous() for x in (hidden, weights, grad_out)), torch.arange(M, dtype=INT32)
        patch.setattr(moe_experts_triton, "launch_dispatch", lambda *_: (near[3], slots, ends))
        want, *_, kept = moe_experts_triton.launch_forward(near[0], gate_up, down, slots, near[1], True)
        given = near[0], gate_up, down, near[1], near[3], slots, ends, kept
        want_grad, _, _, _ = moe_experts_triton.launch_backward(near[2], *given, True, False, False, False)
    assert torch.equal(rows, want) and torch.equal(grad, want_grad) and want.any() and want_grad.any()


def decode_attention() -> None:
    """2^21 tokens in the last row, and parts of 400 rows of 128 heads and 4096 spans."""
    B, H, N, d = 400, 128, 1 << 17, 16
    q, k, v = small(B, H, d), small(48, 1, d), small(48, 1, d)
    table, lengths = vast(B, N, dtype=INT32), torch.ones(B, dtype=INT32)
    table[-1, -16:], lengths[-1] = torch.arange(16) % 3, 16 * N
    with wide(1, 1):
        got = kernels.decode_attention(q, k, v, table, lengths, scale=0.3, window=256)
    near, length = table[-1:, -16:].contiguous(), ends_of(256)
    assert_near(got[-1, -1], kernels.decode_attention(q[-1:], k, v, near, length, scale=0.3, window=256)[0, -1])


def decode_attention_cache() -> None:
    q, k, v = small(2, 3, 16), small(160, 3, 16), small(160, 3, 16)
    table, lengths = torch.tensor([[9, 8], [0, 9]], dtype=INT32), ends_of(30, 20)
    want = kernels.decode_attention(q, k, v, table, lengths, scale=0.3)
    for strides in ((1 << 24, 16, 1), (16, 1 << 30, 1)):
        apart = (far_apart(x, strides) for x in (k, v))
        assert torch.equal(kernels.decode_attention(q, *apart, table, lengths, scale=0.3), want)


def decode_layers() -> None:
    qkv, slots = vast((1 << 25) + 40, 4 * 16), vast((1 << 25) + 40, dtype=INT64)
    slots[1], slots[-4:] = 5, torch.arange(1, 5)
    cos, sin = (vast(len(qkv), 8) for _ in range(2))
    k, v = small(6, 1, 16), small(6, 1, 16)
    with wide(2, 4):
        q = decode_parts.rotate_and_write(qkv, (k, v), slots, rope=(cos, sin))
    near = torch.zeros_like(k), torch.zeros_like(v)
    want = decode_parts.rotate_and_write(qkv[-4:], near, slots[-4:], rope=(cos[-4:], sin[-4:]))
    assert torch.equal(q[-4:], want) and torch.equal(k[1:5], near[0][1:5]) and torch.equal(v[1:5], near[1][1:5])

    x, delta, weight = vast(LONG, 16), vast(LONG, 16), small(16)
    with wide():
        both = decode_parts.add_rms_norm(x, delta, weight, eps=1e-6)
    for got, want in zip(both, decode_parts.add_rms_norm(x[-4:], delta[-4:], weight, eps=1e-6)):
        assert torch.equal(got[-4:], want)
    gate_up = vast(LONG, 32)
    with wide():
        assert torch.equal(decode_parts.swiglu(gate_up)[-4:], decode_parts.swiglu(gate_up[-4:]))


def decode_layers_latents() -> None:
    q, kv, slots = vast(LONG, 16), vast(LONG, 16), vast(LONG, dtype=INT64)
    slots[:4], slots[-4:] = torch.arange(4, 8), torch.arange(4)
    cos, sin = (vast(LONG, 4) for _ in range(2))
    norm, latents = small(8), torch.zeros(8, 1, 16, dtype=BF16)
    with wide(4, 4):
        query = decode_parts.rotate_latents(
            q[:, None], kv, latents, slots, rope=(cos, sin, True), norm_C=norm, eps=1e-6
        )
    near = torch.zeros_like(latents)
    want = decode_parts.rotate_latents(
        q[-4:, None], kv[-4:], near, slots[-4:], rope=(cos[-4:], sin[-4:], True), norm_C=norm, eps=1e-6
    )
    assert torch.equal(query[-2:, :, 8:], want[-2:, :, 8:])
    assert torch.equal(latents[2:4], near[2:4]) and near[2:4].abs().max() > 0


def decode_layers_cache() -> None:
    qkv, slots = small(2, 9 * 16), torch.tensor([129, 3])
    k, v = torch.zeros(160, 3, 16, dtype=BF16), torch.zeros(160, 3, 16, dtype=BF16)
    decode_parts.rotate_and_write(qkv, (k, v), slots, rope=None)
    for strides in ((1 << 24, 16, 1), (16, 1 << 30, 1)):
        apart = tuple(far_apart(torch.zeros_like(x), strides) for x in (k, v))
        decode_parts.rotate_and_write(qkv, (apart[0], apart[1]), slots, rope=None)
        assert torch.equal(apart[0], k) and torch.equal(apart[1], v)


CASES = (
    selective_logprobs, sample_tokens, route_topk, moe_dispatch, moe_dispatch_prefix, grouped_gemm_of_wide_weights,
    grouped_gemm_of_many_rows, grouped_gemm_weight, moe_rows, moe_experts_of_wide_weights,
    moe_experts_of_many_tokens, decode_attention, decode_attention_cache,
    decode_layers, decode_layers_latents, decode_layers_cache,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_past_32_bits(case: Callable[[], None]) -> None:
    case()


# ---- every widening is needed ----

# What is made 64 bits wide for another reason than an offset.
OTHERWISE = (
    "key_of(value, 0).to(tl.int64)", "offs_g.to(tl.int64)", "wide_e = offs_e.to(tl.int64)",  # bits of a sorting key
    "tl.store(ids_ptr + b, id.to(tl.int64))",  # what is written
    "tl.load(cu_seqlens_ptr + n",  # T stays below 2^31
    "row_ptr.to(tl.int64)",  # the bits of an address
)  # fmt: skip
WIDENED = [
    (stem, name, place.start(), place.end())
    for stem in (module.__name__.removeprefix("r1fast_kernels.") for module in mutations.MODULES)
    for name, source in mutations.kernels_of(stem)
    for place in re.finditer(re.escape(".to(tl.int64)"), source)
    if not any(text in source[source.rfind("\n", 0, place.start()) : place.end() + 1] for text in OTHERWISE)
]


@pytest.mark.parametrize(
    ("stem", "name", "begin", "end"), [pytest.param(*one, id=f"{one[1]}-{one[2]}") for one in WIDENED]
)
def test_offset_in_32_bits(
    stem: str, name: str, begin: int, end: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dict(mutations.kernels_of(stem))[name]
    mutations.put(monkeypatch, tmp_path, stem, name, source[:begin] + source[end:])
    for case in sorted(CASES, key=lambda case: not case.__name__.startswith(stem.split("_")[0])):
        try:
            case()
        except (KernelFault, AssertionError):
            return
    line = source[source.rfind("\n", 0, begin) : source.find("\n", end)].strip()
    raise AssertionError(f"{name}: no case notices that this is 32 bits wide: {line}")
