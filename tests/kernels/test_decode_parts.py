"""What a decode step on a GPU does between products and attention; and a whole step by them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast.models.cache import BlockCache
from r1fast.rollout.fast_decode import fast_decode
from r1fast.rollout.fused_decode import FusedDecode
from r1fast_kernels import decode_parts as parts
from r1fast_kernels import dispatch, use
from tests import zoo
from tests.kernels.backends import BF16, CUDA, FP16, FP32, FP64, TRITON, Backend, assert_as_exact, needs_gpu

BACKENDS = [pytest.param(TRITON, id="triton")] if dispatch.INTERPRETING else []
BACKENDS += [pytest.param(CUDA, id="cuda", marks=needs_gpu)]
on_backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def in_dtype(given: Any, dtype: torch.dtype) -> Any:
    """Tensors of numbers, in tuples too."""
    if isinstance(given, tuple):
        return tuple(in_dtype(x, dtype) for x in given)
    return given.to(dtype) if isinstance(given, Tensor) and given.is_floating_point() else given


# One channel, a width that is no power of two, one past a power of two; no row.
@on_backends
@dtypes
@pytest.mark.parametrize(("B", "D"), [(1, 1), (3, 48), (2, 1025), (0, 8)])
def test_add_rms_norm(backend: Backend, dtype: torch.dtype, B: int, D: int) -> None:
    given = in_dtype((normal(B, D), normal(B, D, seed=1), normal(D, seed=2)), dtype)
    want = parts.add_rms_norm(*given, eps=1e-3, impl="reference")
    got = parts.add_rms_norm(*backend.to(given), eps=1e-3, impl=backend.impl)
    assert torch.equal(got[0].cpu(), want[0]), "rounded once, before the norm"
    exact = F.rms_norm(want[0].double(), (D,), given[2].double(), 1e-3)
    assert_as_exact(got[1], want[1], exact, 2)


@on_backends
@dtypes
@pytest.mark.parametrize(("B", "width"), [(1, 1), (3, 100), (2, parts.BLOCK_F + 1), (0, 8)])
def test_swiglu(backend: Backend, dtype: torch.dtype, B: int, width: int) -> None:
    given = (5 * normal(B, 2 * width)).to(dtype)
    got = parts.swiglu(backend.to(given), impl=backend.impl)
    want = parts.swiglu(given, impl="reference")
    assert_as_exact(got, want, parts.swiglu_reference(given.double()), 2)
    torch.testing.assert_close(got.cpu(), want, rtol=2e-2 if dtype == BF16 else 2e-3, atol=1e-6)  # not up times gate


def rotation(heads: tuple[int, int, int], *, rope: bool, norms: bool, B: int = 4) -> dict[str, Any]:
    """Rows of B sequences; the cache holds NaN where nothing is written."""
    H, K, d = heads
    angles_BR = normal(B, d // 2, seed=1)
    return {
        "qkv_BX": normal(B, (H + 2 * K) * d),
        "cache": tuple(torch.full((32, K, d), torch.nan, dtype=FP64) for _ in range(2)),
        "slots_B": torch.randperm(32, generator=torch.Generator().manual_seed(2))[:B],
        "rope": (angles_BR.cos(), angles_BR.sin()) if rope else None,
        "norms": (normal(d, seed=3), normal(d, seed=4)) if norms else None,
        "eps": 1e-3,
    }


def rotate(given: dict[str, Any], dtype: torch.dtype, impl: str, backend: Backend | None = None) -> list[Tensor]:
    """Queries, keys and values in their slots."""
    given = {name: in_dtype(x, dtype) for name, x in given.items()}
    given["cache"] = tuple(x.clone() for x in given["cache"])
    if backend is not None:
        given = backend.to(given)
    q_BHd = parts.rotate_and_write(**given, impl=impl)
    return [x.cpu() for x in (q_BHd, *given["cache"])]


# H, K, d: one head; grouped, of a width that is no power of two; more heads than a program takes.
@on_backends
@dtypes
@pytest.mark.parametrize("heads", [(1, 1, 2), (6, 3, 20), (12, 2, 128)], ids=str)
@pytest.mark.parametrize(("rope", "norms"), [(True, False), (True, True), (False, True), (False, False)])
def test_rotate_and_write(
    backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int], rope: bool, norms: bool
) -> None:
    given = rotation(heads, rope=rope, norms=norms)
    rounded = {name: in_dtype(in_dtype(x, dtype), FP64) for name, x in given.items()}
    want, exact = rotate(given, dtype, "reference"), rotate(rounded, FP64, "reference")
    got = rotate(given, dtype, backend.impl, backend)
    for name, ours, theirs, true in zip(("queries", "keys", "values"), got, want, exact, strict=True):
        assert_as_exact(ours, theirs, true, 2, name)
    assert torch.equal(got[2].nan_to_num(7.0), want[2].nan_to_num(7.0)), "values are copied"


# H, n, C, R: one head; widths that are no powers of two, more heads than a program takes.
@on_backends
@dtypes
@pytest.mark.parametrize("widths", [(1, 1, 1, 2), (40, 10, 18, 6), (9, 16, 512, 64)], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotate_latents(
    backend: Backend, dtype: torch.dtype, widths: tuple[int, int, int, int], interleaved: bool
) -> None:
    """Queries and latents as views of one product; NaN where nothing is written."""
    H, n, C, R = widths
    both, angles_BR = normal(4, H * (n + R) + C + R).to(dtype), normal(4, R // 2, seed=1)
    slots_B = torch.randperm(32, generator=torch.Generator().manual_seed(2))[:4]

    def run(dtype: torch.dtype, impl: str, device: str = "cpu") -> list[Tensor]:
        q_BX, kv_BC = both.to(device, dtype).split((H * (n + R), C + R), dim=1)
        latent_S1C = torch.full((32, 1, C + R), torch.nan, dtype=dtype, device=device)
        cos_BR, sin_BR, norm_C = (
            x.to(device, dtype) for x in in_dtype((angles_BR.cos(), angles_BR.sin(), normal(C, seed=3)), rounded)
        )
        query_BHC = parts.rotate_latents(
            q_BX.unflatten(1, (H, -1)), kv_BC, latent_S1C, slots_B.to(device), rope=(cos_BR, sin_BR, interleaved),
            norm_C=norm_C, eps=1e-3, impl=impl,
        )  # fmt: skip
        assert query_BHC.shape == (4, H, C + R)
        return [query_BHC[..., C:].cpu(), latent_S1C.cpu()]

    rounded = dtype
    want, exact = run(dtype, "reference"), run(FP64, "reference")
    for name, ours, theirs, true in zip(("queries", "latents"), run(dtype, backend.impl, backend.device), want, exact):
        assert_as_exact(ours, theirs, true, 2, name)


def test_rotation_is_that_of_the_modules() -> None:
    from r1fast.models.rope import Rope

    given = rotation((2, 1, 8), rope=True, norms=False)
    cos_BR, sin_BR = given["rope"]
    q_BHd, k_SKd, v_SKd = rotate(given, FP64, "reference")
    all_BHd = given["qkv_BX"].unflatten(1, (4, 8))
    assert torch.equal(q_BHd, Rope(cos_BR, sin_BR, False).rotate(all_BHd)[:, :2])
    assert torch.equal(k_SKd[given["slots_B"]], Rope(cos_BR, sin_BR, False).rotate(all_BHd)[:, 2:3])
    assert torch.equal(v_SKd[given["slots_B"]], all_BHd[:, 3:])


@on_backends
def test_a_cache_of_strides(backend: Backend) -> None:
    """Keys and values in one buffer, heads before slots."""
    given = rotation((4, 2, 16), rope=True, norms=True)
    want = rotate(given, FP32, "reference")
    both = torch.full((2, 32, 2, 16), torch.nan, dtype=FP32).to(backend.device)
    given = backend.to({name: in_dtype(x, FP32) for name, x in given.items()})
    given["cache"] = both[:, :, 0].transpose(0, 1), both[:, :, 1].transpose(0, 1)
    assert not given["cache"][0].is_contiguous()
    q_BHd = parts.rotate_and_write(**given, impl=backend.impl)
    for ours, theirs in zip((q_BHd, *given["cache"]), want, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True)


@on_backends
def test_opcheck(backend: Backend) -> None:
    ops, x_BD = torch.ops.r1fast, backend.to(normal(3, 8).float())
    torch.library.opcheck(ops.add_rms_norm.default, (x_BD, x_BD, x_BD[0], 1e-3))
    torch.library.opcheck(ops.swiglu.default, (x_BD,))
    given = backend.to({name: in_dtype(x, FP32) for name, x in rotation((2, 1, 8), rope=True, norms=True).items()})
    qkv_BX, cache, slots_B, rope, norms, eps = given.values()
    torch.library.opcheck(ops.rotate_and_write.default, (qkv_BX, *cache, slots_B, *rope, *norms, eps))
    given = (qkv_BX.view(4, 4, 8), qkv_BX[:, :14], cache[0].new_zeros(32, 1, 14), slots_B)
    checks = ("test_schema", "test_faketensor")  # the rest of the queries is not written
    torch.library.opcheck(
        ops.rotate_latents.default, (*given, *rope, qkv_BX[0, :6], eps, True), test_utils=checks
    )  # fmt: skip


# ---- a whole step ----

COMMON: dict[str, Any] = {"vocab_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def step_of(family: str, dtype: torch.dtype, num_layers: int = 2, **options: Any) -> tuple[Any, Callable[..., Any]]:
    """A model, and a step of three rows of up to 300 tokens by what is given it: the logits and the cache."""
    own = COMMON if family != "deepseek_v3" else {"vocab_size": 32}
    options = own | options | {"num_hidden_layers": num_layers, "max_position_embeddings": 512}
    model = zoo.decoder(family, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.dim() == 1))
    model.to(dtype).requires_grad_(False)
    lengths, table_BN = torch.tensor([1, 40, 300]), torch.arange(60, dtype=torch.int32).view(3, 20)

    def run(decoder: Any, device: str = "cpu") -> list[Tensor]:
        cache = BlockCache(model.config, 60, dtype, device)
        for seed, buffer in enumerate(cache.buffers):
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed)))
        where = [x.to(device) for x in (torch.tensor([3, 9, 27]), lengths - 1, table_BN)]
        logits_BV = decoder.decode(*where[:2], cache, where[2])
        return [x.cpu() for x in (logits_BV, *cache.buffers)]

    return model, run


@on_backends
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "qwen3_moe", "deepseek_v3"])
def test_a_step_is_that_of_the_modules(backend: Backend, family: str) -> None:
    model, run = step_of(family, FP32)
    with use("reference"):
        want = run(model)
    fused = fast_decode(model.to(backend.device))
    assert isinstance(fused, FusedDecode)
    with fused.stacked():
        got = run(fused, backend.device)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@on_backends
def test_bf16_is_as_near_as_the_modules(backend: Backend) -> None:
    model, run = step_of("qwen3", BF16)
    with use("reference"):
        near = run(model)[0].float()
    fused = FusedDecode(model.to(backend.device))
    with fused.stacked():
        got = run(fused, backend.device)[0].float()
    model, run = step_of("qwen3", BF16)
    exact_model, run_exact = step_of("qwen3", FP64)
    exact_model.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    with use("reference"):
        exact = run_exact(exact_model)[0]
    error, theirs = (got - exact).abs(), (near - exact).abs()
    assert 0 < error.mean() < 1.2 * theirs.mean() and error.max() < 2 * theirs.max()
