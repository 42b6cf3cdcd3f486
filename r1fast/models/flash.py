"""Flash attention on a GPU for sequences packed in a row: the libraries that are here, and which of them takes a call.

    library            module                 GPUs        head sizes                        sums in one order
    FlashAttention 3   flash_attn_interface   sm_90       to 256, of values (96, 128]       to 192
                                                          beside (128, 192] as they are
    FlashAttention 2   flash_attn             from sm_80  to 256, one for all               to 256
    torch              nn.attention.varlen    from sm_80  to 256, one for all               to 256

All take fp16 and bf16, fewer key heads than query heads, and sizes that are a multiple of 8; what is not is padded with
zeros, which changes no score. Soft caps, also with sums in one order, are FlashAttention's alone: of 2 from 2.6.2 on
(flash-attention#1065), of 3 unless it was built without them.

The gradient of the queries is a sum over blocks of keys. By default each block adds its part as it is done, and no two
runs have the same bits; where torch.use_deterministic_algorithms is on, blocks take turns: FlashAttention 3 gives 474
in place of 575 TFLOP/s there (H100, causal, 16 heads of 128, 8,192 tokens; Dao-AILab/flash-attention#1893), earlier
schedules 38% less (arXiv 2601.21824).
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

_HALF = (torch.bfloat16, torch.float16)
_ALIGNED = 8  # elements: kernels read 16 bytes at a time
FLASH3, FLASH2, VARLEN = "FlashAttention 3", "FlashAttention 2", "varlen_attn"
_MODULES = {FLASH3: "flash_attn_interface", FLASH2: "flash_attn"}
_ADVICE = {
    FLASH3: "build the folder hopper/ of github.com/Dao-AILab/flash-attention, of September 2025 or later",
    FLASH2: "pip install flash-attn",
}
_OPTIONS = ("softmax_scale", "causal", "window_size", "deterministic", "return_attn_probs")


class Library(NamedTuple):
    """call: its function, called as FlashAttention's flash_attn_varlen_func; else the obstacle. no_cap: that to a soft
    cap, if there is one."""

    name: str
    call: Callable[..., Any] | None
    obstacle: str = ""
    no_cap: str = ""


class Scores(NamedTuple):
    """What becomes of q . k before the softmax: times `scale`, within `soft_cap`, and seen inside `window`."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None


class Choice(NamedTuple):
    """What takes a call, and how wide queries and keys, and values, are for it."""

    name: str
    call: Callable[..., Any]
    widths: tuple[int, int]


def capability(device: torch.device) -> tuple[int, int] | None:
    """None: not a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@cache
def libraries(device: torch.device) -> tuple[Library, ...]:
    """Best first; none for a CPU, which has kernels of its own."""
    found = capability(device)
    return () if found is None else (_imported(FLASH3, found), _imported(FLASH2, found), _of_torch(found))


def _imported(name: str, found: tuple[int, int]) -> Library:
    module = _MODULES[name]
    if (name == FLASH3 and found[0] != 9) or found < (8, 0):
        return Library(name, None, f"it has no kernels for sm_{found[0]}{found[1]}")
    try:
        found_module = importlib.import_module(module)
        call, no_cap = vars(found_module).get("flash_attn_varlen_func"), _no_cap(name, vars(found_module))
    except Exception as error:  # not there, or built for another torch, where its code may raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        why = f"{module} is not installed" if missing else f"{module} cannot be imported: {error}"
        return Library(name, None, f"{why}; {_ADVICE[name]}")
    lacks = _OPTIONS if call is None else [x for x in _OPTIONS if x not in inspect.signature(call).parameters]
    if lacks:
        return Library(name, None, f"{module}.flash_attn_varlen_func lacks {', '.join(lacks)}; {_ADVICE[name]}")
    return Library(name, call, no_cap=no_cap)


def _no_cap(name: str, module: dict[str, Any]) -> str:
    if name == FLASH2:
        version = module.get("__version__", "0")
        return "" if TorchVersion(version) >= "2.6.2" else f"version {version} has no gradient of a soft cap"
    try:
        flags = vars(importlib.import_module("flash_attn_config"))["CONFIG"]["build_flags"]
        return "it was built without soft caps" if flags["FLASHATTENTION_DISABLE_SOFTCAP"] else ""
    except (ModuleNotFoundError, KeyError):  # builds of before October 2025
        return "its build does not say whether it has soft caps"


def _of_torch(found: tuple[int, int]) -> Library:
    if found < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return Library(VARLEN, None, f"torch {torch.__version__} has no flash attention for sm_{found[0]}{found[1]}")
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 has no such option, and hands any number of key heads on to a kernel that takes it.
    says_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return Library(VARLEN, partial(_varlen, varlen_attn, says_gqa), no_cap="it has no soft cap")


def _varlen(
    varlen_attn: Callable[..., Any], says_gqa: bool, q: Tensor, k: Tensor, *rest: Any,
    softmax_scale: float, window_size: tuple[int, int], **_: Any,
) -> Any:  # fmt: skip
    """Causal by its window; torch's kernel asks by itself whether sums have an order."""
    options = {"enable_gqa": q.shape[1] != k.shape[1]} if says_gqa else {}
    return varlen_attn(q, k, *rest, scale=softmax_scale, window_size=window_size, **options)


def choose(
    found: tuple[Library, ...], q_THd: Tensor, value_dim: int, *, deterministic: bool, capped: bool = False
) -> tuple[Choice | None, str]:
    """The first library that takes such a call, None where none does; and why, with what would be faster."""
    head_dim = q_THd.shape[-1]
    obstacles: list[str] = []  # and not list[str](), at which torch.compile would break the graph
    if q_THd.dtype not in _HALF:
        return None, f"flash attention takes bfloat16 and float16, got {str(q_THd.dtype).removeprefix('torch.')}"
    for name, call, missing, no_cap in found:
        widths = _widths(name, head_dim, value_dim, deterministic)
        obstacle = missing or (no_cap if capped else "")
        if call is not None and widths is not None and not obstacle:
            padded = "" if widths == (head_dim, value_dim) else f", padded to {widths[0]} and {widths[1]}"
            faster = "".join(f"; {obstacle}" for obstacle in obstacles)
            return Choice(name, call, widths), f"head size {head_dim}, of values {value_dim}{padded}{faster}"
        order = " with sums in one order" if deterministic else ""
        obstacles.append(f"not {name}: {obstacle or f'no head size {max(head_dim, value_dim)}{order}'}")
    return None, "; ".join(obstacles)


def _widths(name: str, head_dim: int, value_dim: int, deterministic: bool) -> tuple[int, int] | None:
    """Of queries and keys, and of values, as the library takes them; None: it does not."""
    wide, wide_v = (-(-size // _ALIGNED) * _ALIGNED for size in (head_dim, value_dim))
    if not (name == FLASH3 and 128 < wide <= 192 and 96 < wide_v <= 128):
        wide = wide_v = max(wide, wide_v)
    return (wide, wide_v) if wide <= (192 if name == FLASH3 and deterministic else 256) else None


def attend(
    choice: Choice, q_THd: Tensor, k_TKd: Tensor, v_TKe: Tensor, cu_seqlens: Tensor, max_length: int, scores: Scores
) -> Tensor:  # fmt: skip
    """Causal attention inside each sequence by the chosen library; cu_seqlens int32 on the device."""
    wide, wide_v = choice.widths
    options = {} if scores.soft_cap is None else {"softcap": scores.soft_cap}
    left = -1 if scores.window is None else scores.window - 1
    out_THe: Tensor = choice.call(
        _padded(q_THd, wide), _padded(k_TKd, wide), _padded(v_TKe, wide_v), cu_seqlens, cu_seqlens,
        max_length, max_length, softmax_scale=scores.scale, causal=True, window_size=(left, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(), return_attn_probs=False, **options,
    )  # fmt: skip
    return out_THe[..., : v_TKe.shape[-1]]


def _padded(x_THd: Tensor, width: int) -> Tensor:
    """Of that width, and every head at a multiple of 16 bytes: kernels read so, and check only some of it."""
    if x_THd.shape[-1] < width:
        return F.pad(x_THd, (0, width - x_THd.shape[-1]))
    strides = (x_THd.storage_offset(), *x_THd.stride()[:-1])
    if x_THd.stride(-1) == 1 and all(stride % _ALIGNED == 0 for stride in strides):
        return x_THd
    return x_THd.clone(memory_format=torch.contiguous_format)
