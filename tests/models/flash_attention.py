"""Stand-ins for FlashAttention 2.8 and 3: the signatures of their flash_attn_varlen_func, what they refuse, and what
would fault on a device; computed by the reference, on a CPU."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast.models import flash
from r1fast_kernels.packed_attention import packed_attention_reference


class Calls(list[dict[str, Any]]):
    """What the stand-in was called with."""

    def note(self, q: Tensor, v: Tensor, deterministic: bool, window_size: tuple[int, int], softcap: float) -> None:
        shapes = tuple(q.shape), tuple(v.shape)
        self.append({
            "shapes": shapes, "deterministic": deterministic, "window_size": window_size, "learns": q.requires_grad,
            "softcap": softcap,
        })  # fmt: skip


class _Backward(torch.autograd.Function):
    """The identity; its gradient refuses what the library's backward does."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, refused: str | None) -> Tensor:
        ctx.refused = refused
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if ctx.refused is not None:
            raise RuntimeError(ctx.refused)
        return grad, None


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check_all(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], longest: tuple[int, int]) -> None:
    _check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    _check(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    _check(all(type(most) is int for most in longest), "max_seqlen must be an int")
    for cu, most, tokens in zip(cu_seqlens, longest, (len(q), len(k))):
        _check(cu.dtype == torch.int32 and cu.is_contiguous(), "cu_seqlens must have dtype int32 and be contiguous")
        _check(int(cu[-1]) == tokens and most == int(cu.diff().max()) > 0, "a launch of no block, or past the tokens")
    for x in (q, k, v):
        _check(x.dim() == 3 and x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        bytes_of = [stride * x.element_size() for stride in x.stride()[:-1]]
        _check(x.data_ptr() % 16 == 0 and not any(n % 16 for n in bytes_of), "CUDA error: misaligned address")
    _check(q.shape[1] % k.shape[1] == 0, "Number of heads in key/value must divide number of heads in query")
    _check(max(q.shape[2], v.shape[2]) <= 256, "FlashAttention forward only supports head dimension at most 256")


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> Tensor:
    _check(causal and window[1] in (-1, 0), "the stand-in is causal")
    left = None if window[0] < 0 else window[0] + 1
    options = {"window": left, "soft_cap": softcap or None}
    return packed_attention_reference(q, k, v, cu_seqlens, scale or q.shape[-1] ** -0.5, **options)


def flash_attention_2(calls: Calls) -> ModuleType:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.note(q, v, deterministic, window_size, softcap)
        _check_all(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
        _check(k.shape == v.shape and q.shape[2] == k.shape[2], "head sizes differ")
        swapped = max_seqlen_q == 1 and q.shape[1] > k.shape[1] and window_size == (-1, -1)
        _check(not swapped or len(q) == len(cu_seqlens_q) - 1, "shape is invalid for input of size")
        out = _compute(q, k, v, cu_seqlens_q, softmax_scale, causal, window_size, softcap)
        return (out, None, None) if return_attn_probs else out

    return _module("flash_attn", flash_attn_varlen_func, __version__="2.8.3.post1")


def flash_attention_3(calls: Calls) -> ModuleType:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        calls.note(q, v, deterministic, window_size, softcap)
        _check_all(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
        dim, value_dim = q.shape[2], v.shape[2]
        _check(dim % 8 == 0 and value_dim % 8 == 0, "head_size should be a multiple of 8")
        apart = (128 < dim <= 192 and 96 < value_dim <= 128) or (dim <= 64 and value_dim <= 512)
        _check(dim == value_dim or apart, "we only support Q/K headdim in (128, 192] and V headdim in (96, 128]")
        out = _compute(q, k, v, cu_seqlens_q, softmax_scale, causal, window_size, softcap)
        refused = "Deterministic backward not supported for hdim 256."
        out = _Backward.apply(out, refused if deterministic and max(dim, value_dim) > 192 else None)
        return (out, None) if return_attn_probs else out

    return _module("flash_attn_interface", flash_attn_varlen_func)


def _module(name: str, call: Any, **others: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(flash_attn_varlen_func=call, **others)
    return module


MODULES = {flash.FLASH3: flash_attention_3, flash.FLASH2: flash_attention_2}


def install(
    monkeypatch: pytest.MonkeyPatch, *names: str, capability: tuple[int, int] = (9, 0), softcap: bool | None = True
) -> Calls:
    """A CPU that is taken for a GPU with these libraries alone; `softcap`: 3 was built with it; None: nobody says."""
    calls = Calls()
    for name, make in MODULES.items():
        module = make(calls) if name in names else None  # None: importing it raises ModuleNotFoundError
        monkeypatch.setitem(sys.modules, flash._MODULES[name], module)
    config = ModuleType("flash_attn_config")  # which the build of 3 writes
    vars(config)["CONFIG"] = {"build_flags": {"FLASHATTENTION_DISABLE_SOFTCAP": not softcap}}
    monkeypatch.setitem(sys.modules, "flash_attn_config", None if softcap is None else config)
    monkeypatch.setattr(flash, "capability", lambda device: capability)
    flash.libraries.cache_clear()
    return calls
