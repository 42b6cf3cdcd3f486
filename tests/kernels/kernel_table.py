"""The Triton kernels with the types and constants that their launchers give them in production."""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch

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


# Sizes of MoE layers that 16 divides.
_MOE_SIZES = frozenset({"inner", "width", "width_f", "width_x", "width_y", "num_experts"})
_HALF_AND_FULL = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _route() -> list[Kernel]:
    """E 256 with groups (DeepSeek-V3), E 128 without (Qwen3-MoE), a router in bf16, replayed ids; K 8."""
    module = _module("route_topk")
    sizes = dict.fromkeys(("num_tokens", "num_experts", "top_k"), "i32") | {"scale": "fp32"}
    tensors = {"ids_ptr": "*i64", "weights_ptr": "*fp32", "counts_ptr": "*i64", "n_group": "i32", "topk_group": "i32"}
    options = {"num_warps": module.NUM_WARPS}
    kernels = []
    for label, num_groups, group, softmax, dtype in (
        ("deepseek", 8, 32, False, "fp32"), ("qwen", 1, 128, True, "fp32"), ("bf16", 1, 128, True, "bf16"),
        ("E512", 1, 512, False, "fp32"),
    ):  # fmt: skip
        block_e = num_groups * group
        constants = {"SOFTMAX": softmax, "NORM": True, "BLOCK_K": 8, "BLOCK_T": module.block_t(block_e)}
        logits = {"logits_ptr": f"*{dtype}"}
        for replayed in (False, True):
            given, absent = ("replay_ptr", "bias_ptr") if replayed else ("bias_ptr", "replay_ptr")
            kernels.append(
                Kernel(
                    f"route_topk-{label}{'-replayed' if replayed else ''}", module._route_kernel,
                    {**logits, given: "*i64" if replayed else "*fp32", **tensors, **sizes},
                    {**constants, absent: None, "LIMITED": num_groups > 1, "NUM_GROUPS": num_groups, "GROUP": group},
                    options, _MOE_SIZES,
                )
            )  # fmt: skip
        gradient = {**logits, "ids_ptr": "*i64", "grad_weights_ptr": "*fp32", "grad_ptr": f"*{dtype}", **sizes}
        kernels.append(
            Kernel(
                f"route_topk_backward-{label}", module._route_gradient_kernel, gradient,
                {**constants, "BLOCK_E": block_e}, options, _MOE_SIZES,
            )
        )  # fmt: skip
    return kernels


def _dispatch() -> list[Kernel]:
    """128 and 256 experts: with the skipped choices that is one power of two more."""
    module = _module("moe_dispatch")
    ids = {"ids_ptr": "*i64", "counts_ptr": "*i32", "num_choices": "i32", "num_experts": "i32"}
    order = dict.fromkeys(("totals_ptr", "order_ptr", "slot_ptr", "offsets_ptr"), "*i32")
    prefix = {"counts_ptr": "*i32", "totals_ptr": "*i32", "num_blocks": "i32", "num_experts": "i32"}
    table = {"offsets_ptr": "*i32", "tiles_ptr": "*i32", "num_rows": "i32", "num_tiles": "i32", "num_experts": "i32"}
    kernels = [
        Kernel(
            "moe_dispatch-prefix", module._prefix_kernel, prefix,
            {"BLOCK_B": module.PREFIX_BLOCKS, "BLOCK_E": module.PREFIX_EXPERTS}, {"num_warps": module.PREFIX_WARPS},
            _MOE_SIZES,
        )
    ]  # fmt: skip
    for block_e in (256, 512):
        constants, options = {"BLOCK_M": module.BLOCK_M, "BLOCK_E": block_e}, {"num_warps": module.NUM_WARPS}
        tiles = {"TILE": 128, "BLOCK_E": block_e, "BLOCK_I": module.BLOCK_TILES}
        kernels += [
            Kernel(f"moe_dispatch-count-{block_e}", module._count_kernel, ids, constants, options, _MOE_SIZES),
            Kernel(f"moe_dispatch-order-{block_e}", module._order_kernel, ids | order, constants, options, _MOE_SIZES),
            Kernel(
                f"tile_table-{block_e}", module._tile_kernel, table, tiles, {"num_warps": module.TILE_WARPS}, _MOE_SIZES
            ),
        ]
    return kernels


def _tile_constants(blocks: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constants, options) of a product."""
    constants = {"BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_K": blocks.k}
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    return constants | {"GROUP": _module("grouped_gemm").GROUP, "EVEN_K": True}, options


def _grouped() -> list[Kernel]:
    module = _module("grouped_gemm")
    kernels = []
    for name, dtype in _HALF_AND_FULL.items():
        tensors = {"x_ptr": f"*{name}", "weight_ptr": f"*{name}", "out_ptr": f"*{name}", "tiles_ptr": "*i32"}
        sizes = dict.fromkeys(("num_experts", "inner", "width"), "i32")
        for blocks in (module.BLOCKS_FP32 if name == "fp32" else module.BLOCKS_16_BIT).values():
            constants, options = _tile_constants(blocks)
            for transpose in (True, False):
                kernels.append(
                    Kernel(
                        f"grouped_gemm-{name}-{blocks.m}{'' if transpose else '-untransposed'}", module._gemm_kernel,
                        tensors | sizes, {**constants, "TRANSPOSE": transpose, "ZERO_SKIPPED": True}, options,
                        _MOE_SIZES,
                    )
                )  # fmt: skip
        blocks = module.WEIGHT_BLOCKS[dtype.itemsize]
        for gather in ("", "x", "y"):
            types = {
                "x_ptr": f"*{name}", "y_ptr": f"*{name}", "order_ptr": "*i32", "offsets_ptr": "*i32",
                "out_ptr": f"*{name}", **dict.fromkeys(("width_x", "width_y", "top_k"), "i32"),
            }  # fmt: skip
            constants = {
                "GATHER_X": gather == "x", "GATHER_Y": gather == "y", "GROUP": module.GROUP, "BLOCK_M": blocks.k,
                "BLOCK_N": blocks.m, "BLOCK_D": blocks.n,
            }  # fmt: skip
            if not gather:
                del types["order_ptr"]
                constants["order_ptr"] = None
            options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
            kernels.append(
                Kernel(
                    f"grouped_gemm_weight-{name}-gather-{gather or 'none'}", module._weight_kernel, types, constants,
                    options, _MOE_SIZES,
                )
            )  # fmt: skip
    return kernels


def _experts() -> list[Kernel]:
    gemm, module = _module("grouped_gemm"), _module("moe_experts_triton")
    kernels = []
    for name in _HALF_AND_FULL:
        rows = {"weights_ptr": "*fp32", "order_ptr": "*i32", "tiles_ptr": "*i32"}
        sizes = dict.fromkeys(("num_experts", "width", "width_f", "top_k"), "i32")
        forward = dict.fromkeys(("hidden_ptr", "gate_up_ptr", "inner_ptr", "kept_ptr"), f"*{name}")
        backward = dict.fromkeys(("grad_out_ptr", "down_ptr", "kept_ptr", "grad_gate_up_ptr", "inner_ptr"), f"*{name}")
        for blocks in (gemm.BLOCKS_FP32 if name == "fp32" else gemm.BLOCKS_16_BIT).values():
            constants, options = _tile_constants(blocks)
            for label, absent in (("", None), ("-no-grad", "kept_ptr"), ("-recompute", "inner_ptr")):
                kernels.append(
                    Kernel(
                        f"moe_experts-gate_up-{name}-{blocks.m}{label}", module._gate_up_kernel,
                        {k: v for k, v in (forward | rows | sizes).items() if k != absent},
                        constants | ({absent: None} if absent else {}), options, _MOE_SIZES,
                    )
                )  # fmt: skip
            kernels.append(
                Kernel(
                    f"moe_experts-inner_gradient-{name}-{blocks.m}", module._inner_gradient_kernel,
                    backward | rows | sizes | {"partials_ptr": "*fp32"}, constants, options, _MOE_SIZES,
                )
            )  # fmt: skip
        combine = {
            "rows_ptr": f"*{name}", "slot_ptr": "*i32", "offsets_ptr": "*i32", "out_ptr": f"*{name}",
            **dict.fromkeys(("num_tokens", "num_experts", "width", "top_k"), "i32"),
        }  # fmt: skip
        block_d = module.COMBINE_BLOCK_D
        kernels.append(
            Kernel(
                f"moe_experts-combine-{name}", module._combine_kernel, combine,
                {"BLOCK_T": module.COMBINE_BLOCK // block_d, "BLOCK_D": block_d}, {"num_warps": module.COMBINE_WARPS},
                _MOE_SIZES,
            )
        )  # fmt: skip
    weights = {
        "partials_ptr": "*fp32", "slot_ptr": "*i32", "offsets_ptr": "*i32", "out_ptr": "*fp32",
        **dict.fromkeys(("num_choices", "num_experts", "num_partials"), "i32"),
    }  # fmt: skip
    kernels.append(
        Kernel(
            "moe_experts-weights_gradient", module._weights_gradient_kernel, weights, {"BLOCK": module.BLOCK_CHOICES},
            {"num_warps": module.CHOICES_WARPS}, _MOE_SIZES,
        )
    )  # fmt: skip
    return kernels


def _decode() -> list[Kernel]:
    """Qwen2.5's heads (d 128), DeepSeek-V3's latents (512 + 64, values in them), and the merge of several spans."""
    module = _module("decode_attention_triton")
    strides = dict.fromkeys(("stride_qb", "stride_qh", "stride_ks", "stride_kh", "stride_vs", "stride_vh"), "i64")
    sizes = dict.fromkeys(("table_width", "num_heads", "group", "width", "value_width", "num_spans"), "i32")
    tables = {"table_ptr": "*i32", "lengths_ptr": "*i32"}
    kernels = []
    for dtype, kind in zip(("bf16", "fp16", "fp32"), (2, 2, 4)):
        for label, width, shared in (("d128", 128, False), ("d64", 64, False), ("mla", 576, True)):
            block_d, block_r = module.blocks_of(width)
            block_t = (module.WIDE_BLOCK_T if block_d >= 512 else module.BLOCK_T)[kind]
            tensors = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}") | tables
            constants = {
                "SHARED": shared, "BLOCK": module.BLOCK, "SPAN": module.SPAN, "BLOCK_H": module.BLOCK_H,
                "BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_R": block_r, "BLOCK_E": block_d,
            }  # fmt: skip
            warps = module.WIDE_WARPS if block_d >= 512 else module.NUM_WARPS
            options = {"num_warps": warps, "num_stages": module.NUM_STAGES}
            for one_span in (False, True):
                out = {"out_ptr": f"*{dtype}"} if one_span else {"out_ptr": "*fp32", "lse_ptr": "*fp32"}
                kernels.append(
                    Kernel(
                        f"decode_attention-{dtype}-{label}{'-one-span' if one_span else ''}", module._attend_kernel,
                        {**tensors, **out, **strides, **sizes, "scale": "fp32"},
                        {**constants, "ONE_SPAN": one_span} | ({"lse_ptr": None} if one_span else {}), options,
                        frozenset(strides) | {"width", "value_width"},
                    )
                )  # fmt: skip
        kernels.append(
            Kernel(
                f"decode_attention-merge-{dtype}", module._merge_kernel,
                {
                    "parts_ptr": "*fp32", "lse_ptr": "*fp32", "lengths_ptr": "*i32", "out_ptr": f"*{dtype}",
                    **dict.fromkeys(("num_heads", "value_width", "num_spans"), "i32"),
                },
                {"SPAN": module.SPAN, "BLOCK_E": 512}, {"num_warps": module.MERGE_WARPS}, frozenset({"value_width"}),
            )
        )  # fmt: skip
    return kernels


MOE_KERNELS = [*_route(), *_dispatch(), *_grouped(), *_experts()]
KERNELS = [*_selective(), *_advantages(), *_grpo(), *_sample(), *_decode(), *MOE_KERNELS]
