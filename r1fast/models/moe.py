"""Mixture of experts: the router (sigmoid with bias and groups, or softmax), routed experts, shared experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1fast.models.config import ModelConfig
from r1fast.models.layers import MLP
from r1fast_kernels import moe_experts, route_topk


class Gate(nn.Module):
    """Chooses K experts per token, in fp32. DeepSeek-V3 selects on sigmoid score + bias, weighs by the score alone."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.uses_mla else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        # The bias moves in steps of 1e-3: it stays fp32 when the model is cast.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """expert ids [T, K], weights [T, K] (fp32) and tokens per expert [E]."""
        config = self.config
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        if self.e_score_correction_bias is None:
            return route_topk(
                logits_TE,
                None,
                top_k=config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
                scoring="softmax",
            )
        return route_topk(
            logits_TE,
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )


class Experts(nn.Module):
    """All experts' SwiGLU weights, stacked: gate then up [E, 2F, D], down [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, expert_width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return moe_experts(x_TD, self.gate_up_proj, self.down_proj, expert_ids_TK, weights_TK)


class MoE(nn.Module):
    """last_counts: tokens per expert [E], summed over training forwards until the reader zeroes it.

    Under activation checkpointing the recomputation counts again: every count doubles, their order does not change.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        shared_width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, shared_width) if shared_width else None
        # Not a buffer: neither saved nor sharded. On the CPU until first use, also in a model built on meta.
        self.last_counts = torch.zeros(config.n_routed_experts, dtype=torch.int64, device="cpu")

    def forward(self, x_TD: Tensor) -> Tensor:
        expert_ids_TK, weights_TK, counts_E = self.gate(x_TD)
        if self.training and torch.is_grad_enabled():
            counts_E = counts_E.detach()
            self.last_counts = self.last_counts.to(counts_E.device) + counts_E
        out_TD = self.experts(x_TD, expert_ids_TK, weights_TK)
        return out_TD if self.shared_experts is None else out_TD + self.shared_experts(x_TD)
