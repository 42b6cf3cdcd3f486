"""The Triton kernels with the types and constants that their launchers give them in production."""

import sys
from dataclasses import dataclass, field
from typing import Any

import r1fast_kernels  # noqa: F401  (its modules are taken from sys.modules: the package exports the ops by their names)


@dataclass(frozen=True)
class Kernel:
    name: str
    function: Any
    signature: dict[str, str]  # of every argument that is not a constant
    constants: dict[str, Any]  # constexpr arguments, and None for pointers that are not given
    options: dict[str, Any]
    divisible: frozenset[str] = field(default=frozenset({"stride_t", "stride_grad_t", "vocab"}))


def _module(op: str) -> Any:
    return sys.modules[f"r1fast_kernels.{op}"]


def _selective() -> list[Kernel]:
    module = _module("selective_logprobs")
    kernels = []
    for dtype in ("bf16", "fp16", "fp32"):
        for entropy in (True, False):
            scalars = {"stride_t": "i64", "vocab": "i32", "first_id": "i32", "inverse_temperature": "fp32"}
            rows = {"logits_ptr": f"*{dtype}", "ids_ptr": "*i64"}
            constants = {"WITH_ENTROPY": entropy, "BLOCK_V": module.FOLD_BLOCK_V}
            options = {"num_warps": module.FOLD_WARPS}
            label = f"{dtype}{'-entropy' if entropy else ''}"
            whole = {"logprobs_ptr": "*fp32", "entropy_ptr": "*fp32", "stats_ptr": "*fp32"}
            kernels.append(
                Kernel(
                    f"selective_logprobs-{label}", module._fold_kernel, {**rows, **whole, **scalars},
                    {**constants, "state_ptr": None, "HAS_STATE": False}, options,
                )
            )  # fmt: skip
            kernels.append(
                Kernel(
                    f"fold_logits-{label}", module._fold_kernel, {**rows, "state_ptr": "*fp32", **scalars},
                    {**constants, **dict.fromkeys(whole), "HAS_STATE": True}, options,
                )
            )  # fmt: skip
            gradient = {
                **rows, "grad_ptr": f"*{dtype}", "stats_ptr": "*fp32", "entropy_ptr": "*fp32",
                "grad_logprobs_ptr": "*fp32", "grad_entropy_ptr": "*fp32", "stride_grad_t": "i64", **scalars,
            }  # fmt: skip
            constants = {"WITH_ENTROPY": entropy, "BLOCK_V": module.GRADIENT_BLOCK_V}
            if not entropy:
                del gradient["grad_entropy_ptr"]
                constants["grad_entropy_ptr"] = None
            kernels.append(
                Kernel(
                    f"logits_gradient-{label}", module._gradient_kernel, gradient, constants,
                    {"num_warps": module.GRADIENT_WARPS},
                )
            )  # fmt: skip
    return kernels


def _sample() -> list[Kernel]:
    module = _module("sample_tokens")
    signature = {
        "logits_ptr": "", "seeds_ptr": "*i64", "ids_ptr": "*i64", "logprobs_ptr": "*fp32", "stride_b": "i64",
        "vocab": "i32", "inverse_temperature": "fp32", "top_k": "i32", "top_p": "fp32",
    }  # fmt: skip
    kernels = []
    for dtype, shift in zip(("fp32", "bf16", "fp16"), module.KEY_SHIFT.values()):
        for label in ("", "-greedy", "-top_k", "-top_p", "-top_k-top_p"):
            types = {**signature, "logits_ptr": f"*{dtype}"}
            constants = {
                "GREEDY": label == "-greedy", "TOP_K": "top_k" in label, "TOP_P": "top_p" in label, "SHIFT": shift,
                "NUM_BLOCKS": 64, "BLOCK_V": module.BLOCK_V,
            }  # fmt: skip
            if label == "-greedy":
                del types["seeds_ptr"]
                constants["seeds_ptr"] = None
            kernels.append(
                Kernel(
                    f"sample_tokens-{dtype}{label}", module._sample_kernel, types, constants,
                    {"num_warps": module.NUM_WARPS}, frozenset({"stride_b", "vocab"}),
                )
            )  # fmt: skip
    return kernels


KERNELS = [*_selective(), *_sample()]
