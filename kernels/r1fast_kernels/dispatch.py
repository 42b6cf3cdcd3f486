"""Which implementation an op runs: what exists, what was built, what was chosen."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("r1fast_kernels")

NAMES = ("reference", "cpp", "triton")
# The implementations that exist, per op. A public function refuses any other name.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("selective_logprobs", "linear_logprobs", "linear_cross_entropy", "group_advantages", "grpo_loss",
     "linear_grpo_loss", "route_topk", "moe_dispatch", "grouped_gemm", "moe_experts", "sample_tokens",
     "decode_attention", "decode_layers"),
    NAMES,
) | dict.fromkeys(("rms_norm", "packed_attention"), ("reference", "cpp"))  # fmt: skip

CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton's own switch: its kernels then run on CPU tensors, one program after the other. They take the place of the C++
# ops in that process, so that the same tests can be run on both.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DEVICE = "cpu" if INTERPRETING else "cuda"

HAS_EXTENSION = not INTERPRETING and importlib.util.find_spec("r1fast_kernels._C") is not None
if HAS_EXTENSION:
    try:
        importlib.import_module("r1fast_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"r1fast_kernels._C was built for another torch than this one ({torch.__version__}): {error}. "
            "Build it again: pip install --no-build-isolation -e . in a checkout; elsewhere install r1fast again with "
            "--no-build-isolation --no-cache-dir --force-reinstall --no-deps (pip keeps the library that it has built)."
        ) from error

# What was chosen so far, (op, implementation) -> reason; each is logged once.
choices: dict[tuple[str, str], str] = {}

_in_use: str | None = None


@contextmanager
def use(impl: str | None) -> Iterator[None]:
    """What every op called inside runs, unless the call says it itself: "reference", "cpp", "triton"; None: the best.

    It holds for the process: ops also run in a sampler's thread, and in those in which autograd recomputes.
    """
    global _in_use
    if impl not in (None, *NAMES):
        raise ValueError(f"use: got {impl!r}, expected None or one of {', '.join(NAMES)}")
    before, _in_use = _in_use, impl
    try:
        yield
    finally:
        _in_use = before


def in_use() -> str | None:
    """What `use` asks for."""
    return _in_use


def choose(op: str, impl: str | None, tensor: Tensor) -> tuple[str, str]:
    """The implementation that this call of `op` on `tensor` runs, and why: `impl`, what is in use, or the best.

    Raises ValueError when what is asked for does not exist for this op, or cannot run here.
    """
    asked, exists = impl or _in_use, IMPLEMENTATIONS[op]
    if asked is not None and asked not in exists:
        raise ValueError(f"{op}: got impl={asked!r}, expected None or one of {', '.join(exists)}")
    fused = "triton" if tensor.device.type == TRITON_DEVICE else "cpp"
    obstacle = _obstacle(asked or fused, tensor) if asked or fused in exists else f"no {fused} kernel: torch's own"
    if asked is not None and obstacle is not None:
        raise ValueError(f"{op}: impl={asked!r} cannot run here: {obstacle}")
    if asked is not None:
        chosen, reason = asked, "asked for"
    elif obstacle is not None:
        chosen, reason = "reference", obstacle
    else:
        chosen, reason = fused, f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
    log_choice(op, chosen, reason)
    return chosen, reason


def log_choice(op: str, chosen: str, reason: str) -> None:
    if not torch.compiler.is_compiling() and (op, chosen) not in choices:
        choices[op, chosen] = reason
        logger.info("%s runs %s (%s)", op, chosen, reason)


def _obstacle(impl: str, tensor: Tensor) -> str | None:
    """Why `impl` cannot take this tensor; None when it can."""
    if impl == "reference":
        return None
    device, dtypes = (TRITON_DEVICE, TRITON_DTYPES) if impl == "triton" else ("cpu", CPP_DTYPES)
    name = "Triton" if impl == "triton" else "C++"
    if tensor.device.type != device:
        return f"the {name} kernels take tensors on {device}, got {tensor.device.type}"
    if tensor.is_floating_point() and tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the {name} kernels take {names}, got {str(tensor.dtype).removeprefix('torch.')}"
    if impl == "cpp" and not HAS_EXTENSION:
        return "the C++ extension is not built: pip install --no-build-isolation -e ."
    return None


def register(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    launch: Callable[..., Any] | None = None,
    device: str | tuple[str, ...] = TRITON_DEVICE,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Make the operator r1fast::`name`, whose CPU kernel is C++ unless `launch` is on that `device`.

    save, backward: setup_context and backward of torch.library.register_autograd. `backward` gets None for an output
    without a gradient, and at least one: the zeros that torch makes else are gigabytes where an op keeps activations.
    """
    op = f"r1fast::{name}"
    torch.library.define(op, schema)
    torch.library.register_fake(op, fake)
    if launch is not None:
        torch.library.impl(op, device, launch)
    if backward is not None and save is not None:
        torch.library.register_autograd(op, partial(_backward, backward), setup_context=partial(_save, save))


def _save(save: Callable[..., None], ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    save(ctx, inputs, output)


def _backward(backward: Callable[..., Any], ctx: Any, *gradients: Tensor | None) -> Any:
    if all(gradient is None for gradient in gradients):
        return (None,) * len(ctx.needs_input_grad)
    return backward(ctx, *gradients)


def empty_gradients(inputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a backward operator returns, to be filled: nothing where no gradient is needed."""
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in zip(inputs, needs))


def wanted(gradients: Iterable[Tensor], needs: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """What autograd gets of it."""
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs))


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, as (9, 0); (0, 0) of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def product_dtype(weight: Tensor) -> torch.dtype:
    """What torch computes a product in: autocast's dtype where that is on (fp64 it leaves alone), or the weight's."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays (gradcheck needs it); everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
