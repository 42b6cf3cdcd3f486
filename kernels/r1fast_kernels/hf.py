"""`moe_experts` inside transformers: any model of its experts interface with SwiGLU experts.

    r1fast_kernels.hf.register()
    AutoModelForCausalLM.from_pretrained(..., experts_implementation="r1fast")

DeepSeek-V3, Qwen3-MoE, Mixtral and their relatives. Not taken, with an error that says so: experts with biases, without
a gate, with interleaved or transposed weights, with a norm after each expert, or with another activation than SiLU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    return moe_experts(hidden_TD, module.gate_up_proj, module.down_proj, expert_ids_TK.long(), weights_TK)


def _is_silu(activation: Any) -> bool:
    """By name, or else by what it does: a function, a module of torch's or one of transformers'."""
    if activation is F.silu or isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation":
        return True
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return False
    x = torch.linspace(-30, 30, 241)
    return torch.equal(activation(x.clone()), F.silu(x))


def _obstacles(module: Any) -> list[str]:
    from transformers.integrations.moe import _default_apply_gate

    if not getattr(module, "has_gate", True):
        return ["its experts have no gate"]
    own_gate = type(module)._apply_gate is not _default_apply_gate
    found = {
        "its experts have biases": getattr(module, "has_bias", False),
        "its weights are transposed": getattr(module, "is_transposed", False),
        "its gate and up rows are interleaved": not getattr(module, "is_concatenated", True),
        "it norms what each expert returns": getattr(module, "has_post_expert_norm", False),
        "it has a gating function of its own": own_gate,
        "its activation is not SiLU": not own_gate and not _is_silu(module.act_fn),
        "its weights are quantised": not torch.is_floating_point(module.gate_up_proj)
        or module.gate_up_proj.element_size() < 2,
    }
    return [text for text, holds in found.items() if holds]
