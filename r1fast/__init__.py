"""r1fast: DeepSeek-R1-style post-training on kernels written for it.

Shape letters, used as suffixes of tensor names everywhere:
B prompts, G samples per prompt, N samples (B * G), T packed tokens, S padded length, D model width,
H heads, V vocabulary, E experts, K experts per token, F expert width.
"""

from importlib import import_module
from typing import Any

__version__: str  # of what is installed, as pyproject.toml says it

# Resolved on first use: reward workers import this package and must not pay for torch.
_LAZY = {
    "load_model": "r1fast.models.weights",
    "RolloutEngine": "r1fast.rollout.engine",
    "SamplingParams": "r1fast.rollout.sampling",
    "Completion": "r1fast.rollout.sampling",
    "PolicyLossInputs": "r1fast.policy_loss",
    "render_prompt": "r1fast.prompts",
}
__all__ = [
    "Completion",
    "PolicyLossInputs",
    "RolloutEngine",
    "SamplingParams",
    "__version__",
    "load_model",
    "render_prompt",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "__version__":
        from importlib import metadata  # 30 ms, which few ask for

        try:
            return metadata.version("r1fast")
        except metadata.PackageNotFoundError:
            raise AttributeError("r1fast is not installed, only on the path: it has no version") from None
    raise AttributeError(f"module 'r1fast' has no attribute {name!r}")
