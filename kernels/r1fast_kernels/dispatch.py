"""Which implementation an op runs: what exists, what was built, what was chosen."""

import importlib.util
import logging

import torch

logger = logging.getLogger("r1fast_kernels")

# The implementations that exist, per op. A public function refuses any other name.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "selective_logprobs": ("reference", "cpp"),
    "linear_logprobs": ("reference",),
    "linear_cross_entropy": ("reference",),
    "group_advantages": ("reference",),
    "grpo_loss": ("reference",),
    "linear_grpo_loss": ("reference",),
    "route_topk": ("reference",),
    "moe_experts": ("reference",),
    "sample_tokens": ("reference",),
}

HAS_EXTENSION = importlib.util.find_spec("r1fast_kernels._C") is not None
if HAS_EXTENSION:
    try:
        importlib.import_module("r1fast_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"r1fast_kernels._C was built for another torch than this one ({torch.__version__}): {error}. "
            "Build it again: pip install --no-build-isolation -e ."
        ) from error

_logged: set[tuple[str, str]] = set()


def resolve(op: str, impl: str | None, *, default: str = "reference", reason: str = "the only one so far") -> str:
    """The implementation that this call of `op` runs: `impl`, or `default` when it is None. Logged once per outcome.

    Raises ValueError when `impl` does not exist for this op.
    """
    if impl is not None and impl not in IMPLEMENTATIONS[op]:
        raise ValueError(f"{op}: got impl={impl!r}, expected None or one of {', '.join(IMPLEMENTATIONS[op])}")
    chosen = default if impl is None else impl
    if (op, chosen) not in _logged and not torch.compiler.is_compiling():
        _logged.add((op, chosen))
        logger.info("%s runs %s (%s)", op, chosen, reason if impl is None else "asked for")
    return chosen


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 stays (gradcheck needs it); everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
