"""Which implementation an op runs: what exists, what was built, what was chosen."""

import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger("r1fast_kernels")

# The implementations that exist, per op. A public function refuses any other name.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("selective_logprobs", "linear_logprobs", "linear_cross_entropy", "group_advantages", "grpo_loss",
     "linear_grpo_loss", "route_topk", "moe_dispatch", "grouped_gemm", "moe_experts", "sample_tokens",
     "decode_attention"),
    ("reference", "cpp", "triton"),
) | dict.fromkeys(("rms_norm", "packed_attention", "decode_layers"), ("reference", "cpp"))  # fmt: skip

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
            "Build it again: pip install --no-build-isolation -e ."
        ) from error

_logged: set[tuple[str, str]] = set()


def choose(op: str, impl: str | None, tensor: Tensor) -> str:
    """The implementation that this call of `op` on `tensor` runs: `impl`, or the best when it is None.

    Logged once per outcome. Raises ValueError when `impl` does not exist for this op, or cannot run here.
    """
    exists = IMPLEMENTATIONS[op]
    if impl is not None and impl not in exists:
        raise ValueError(f"{op}: got impl={impl!r}, expected None or one of {', '.join(exists)}")
    fused = "triton" if tensor.device.type == TRITON_DEVICE else "cpp"
    obstacle = _obstacle(impl or fused, tensor) if impl or fused in exists else f"no {fused} kernel: torch's own"
    if impl is not None and obstacle is not None:
        raise ValueError(f"{op}: impl={impl!r} cannot run here: {obstacle}")
    if impl is not None:
        chosen, reason = impl, "asked for"
    elif obstacle is not None:
        chosen, reason = "reference", obstacle
    else:
        chosen, reason = fused, f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
    log_choice(op, chosen, reason)
    return chosen


def log_choice(op: str, chosen: str, reason: str) -> None:
    if (op, chosen) not in _logged and not torch.compiler.is_compiling():
        _logged.add((op, chosen))
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


def product_dtype(weight: Tensor) -> torch.dtype:
    """What torch computes a product in: autocast's dtype where that is on (fp64 it leaves alone), or the weight's."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays (gradcheck needs it); everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
