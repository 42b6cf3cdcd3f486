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


def _advantages() -> list[Kernel]:
    module = _module("group_advantages")
    signature = {
        "rewards_ptr": "*fp32",
        "group_ids_ptr": "*i64",
        "out_ptr": "*fp32",
        "num_samples": "i32",
        "eps": "fp32",
    }
    return [
        Kernel(
            f"group_advantages-{scale}", module._advantages_kernel, signature,
            {"SCALE": scale, "BLOCK_N": module.BLOCK_N}, {"num_warps": module.NUM_WARPS},
        )
        for scale in module.SCALES
    ]  # fmt: skip


# Inputs of grpo_loss that are not given, and its constants: (name, absent, CISPO, SAMPLE_MEAN, SEQUENCE, TRUNCATED_IS).
_GRPO_CASES = (
    ("everything", {"rewards_ptr", "group_ids_ptr"}, False, True, False, True),
    ("fused-rewards", {"advantages_ptr", "mask_ptr", "counts_ptr"}, False, False, False, True),
    ("sequence", {"rewards_ptr", "group_ids_ptr", "counts_ptr"}, False, False, True, True),
    ("sequence-fused-rewards", {"advantages_ptr", "counts_ptr", "total_count_ptr"}, False, True, True, True),
    ("cispo", {"rewards_ptr", "group_ids_ptr", "counts_ptr"}, True, False, False, False),
    ("on-policy", {"rewards_ptr", "group_ids_ptr", "old_ptr", "ref_ptr", "counts_ptr"}, False, False, False, False),
)


def _grpo() -> list[Kernel]:
    module = _module("grpo_loss")
    logprobs = {f"{name}_ptr": "*fp32" for name in ("logprobs", "old", "ref", "sampler", "entropy")}
    samples = {"advantages_ptr": "*fp32", "rewards_ptr": "*fp32", "group_ids_ptr": "*i64", "counts_ptr": "*i64"}
    counts = {"cu_seqlens_ptr": "*i32", "mask_ptr": "*i1", "total_count_ptr": "*i64"}
    results = {"loss_ptr": "*fp32", "grad_ptr": "*fp32", "metrics_ptr": "*fp32", "partials_ptr": "*fp64"}
    scalars = {"finished_ptr": "*i32", "default_count": "i32", "num_samples": "i32"}
    settings = ("advantage_eps", "clip_low", "clip_high", "delta", "beta", "is_cap", "divisor_factor")
    signature = logprobs | samples | counts | results | scalars | dict.fromkeys(settings, "fp32")
    return [
        Kernel(
            f"grpo_loss-{name}", module._grpo_kernel, {k: v for k, v in signature.items() if k not in absent},
            {
                **dict.fromkeys(absent), "SCALE": "group", "CISPO": cispo, "SAMPLE_MEAN": sample_mean,
                "SEQUENCE": sequence, "TRUNCATED_IS": truncated, "BLOCK_T": module.BLOCK_T, "BLOCK_N": module.BLOCK_N,
            },
            {"num_warps": module.NUM_WARPS},
        )
        for name, absent, cispo, sample_mean, sequence, truncated in _GRPO_CASES
    ]  # fmt: skip


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


KERNELS = [*_selective(), *_advantages(), *_grpo(), *_sample()]
