"""`moe_experts` inside transformers: any model of its experts interface with SwiGLU experts.

    r1fast_kernels.hf.register()
    AutoModelForCausalLM.from_pretrained(..., experts_implementation="r1fast")

DeepSeek-V3, Qwen3-MoE, Mixtral and their relatives. Not taken, with an error that says so: experts with biases, without
a gate, with interleaved or transposed weights, with a norm after each expert, or with another activation than SiLU.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import compute_dtype
from .moe_experts import moe_experts

NAME = "r1fast"


def register() -> None:
    """Add "r1fast" to transformers' experts implementations. Needs transformers 5; calling it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(module: Any, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What transformers calls in place of the forward of an experts module; ids >= num_experts are another rank's."""
    obstacles = _obstacles(module)
    if obstacles:
        raise ValueError(
            f'experts_implementation="{NAME}" does not take {type(module).__name__}: {", ".join(obstacles)}; expected '
            'gated SiLU experts, gate_up_proj [E, 2F, D] and down_proj [E, D, F]. Use "grouped_mm" or "eager"'
        )
    weights_TK = weights_TK.to(compute_dtype(hidden_TD))
    return moe_experts(hidden_TD, module.gate_up_proj, module.down_proj, expert_ids_TK.long(), weights_TK)


def _obstacles(module: Any) -> list[str]:
    from transformers.integrations.moe import _default_apply_gate

    if not getattr(module, "has_gate", True):
        return ["its experts have no gate"]
    own_gate = type(module)._apply_gate is not _default_apply_gate
    activation = "" if own_gate else type(module.act_fn).__name__
    found = {
        "its experts have biases": getattr(module, "has_bias", False),
        "its weights are transposed": getattr(module, "is_transposed", False),
        "its gate and up rows are interleaved": not getattr(module, "is_concatenated", True),
        "it norms what each expert returns": getattr(module, "has_post_expert_norm", False),
        "it has a gating function of its own": own_gate,
        f"its activation is {activation}": not own_gate and activation not in ("SiLU", "SiLUActivation"),
        "its weights are quantised": not torch.is_floating_point(module.gate_up_proj)
        or module.gate_up_proj.element_size() < 2,
    }
    return [text for text, holds in found.items() if holds]
