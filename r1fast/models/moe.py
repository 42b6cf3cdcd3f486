"""Mixture of experts: the router (sigmoid with bias and groups, or softmax), routed experts, shared experts."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1fast.models.attention import ForwardPass
from r1fast.models.layers import MLP, Linear
from r1fast.models.model_config import ModelConfig
from r1fast_kernels import grouped_gemm, moe_dispatch, moe_experts, route_topk
from r1fast_kernels.moe_experts import MoveRows
from r1fast_kernels.products import linear_fp32


class _Weighted(torch.autograd.Function):
    """h_m w_m in the dtype of h, rounded once. On a GPU no product in the fp32 of the weights is there as a whole."""

    @staticmethod
    def forward(ctx: Any, h_MF: Tensor, weights_M: Tensor) -> Tensor:
        ctx.save_for_backward(h_MF, weights_M)
        return torch.mul(h_MF, weights_M[:, None], out=torch.empty_like(h_MF))

    @staticmethod
    def backward(ctx: Any, grad_MF: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h_MF, weights_M = ctx.saved_tensors
        grad_h_MF = torch.mul(grad_MF, weights_M[:, None], out=torch.empty_like(h_MF))
        return grad_h_MF, (grad_MF * h_MF).sum(1, dtype=weights_M.dtype)


class Gate(nn.Module):
    """Chooses K experts per token, in fp32. DeepSeek-V3 selects on sigmoid score + bias, weighs by the score alone."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.scoring = config, config.family.router
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.has_router_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "Gate":
        # The bias moves in steps of 1e-3: it stays fp32 when the model is cast.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def forward(self, x_TD: Tensor, replay_ids_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """expert ids [T, K], weights [T, K] (fp32), and the logits [T, E]."""
        logits_TE = linear_fp32(x_TD, self.weight)
        options = {"scoring": self.scoring, "replay_ids_TK": replay_ids_TK, **self.config.routing}
        expert_ids_TK, weights_TK, _ = route_topk(logits_TE, self.e_score_correction_bias, **options)
        return expert_ids_TK, weights_TK, logits_TE


class Experts(nn.Module):
    """All experts' SwiGLU weights, stacked: gate then up [E, 2F, D], down [E, D, F]."""

    gate_up_proj_lora: nn.Module | None
    down_proj_lora: nn.Module | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, expert_width = config.n_routed_experts, config.hidden_size, config.expert_width
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))
        self.register_module("gate_up_proj_lora", None)  # places for adapters (lora.py)
        self.register_module("down_proj_lora", None)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if any(lora.is_on for lora in self.children()):
            return self._adapted(x_TD, expert_ids_TK, weights_TK)
        return moe_experts(x_TD, self.gate_up_proj, self.down_proj, expert_ids_TK, weights_TK)

    def _adapted(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The same by parts, M = T K rows sorted by expert: of the stacked weights there is no gradient to be made."""
        order_M, slot_TK, offsets_E = moe_dispatch(expert_ids_TK, len(self.down_proj))
        token_M = order_M // expert_ids_TK.shape[1]

        def product(x_MI: Tensor, weight_EOI: Tensor, lora: nn.Module | None) -> Tensor:
            out_MO = grouped_gemm(x_MI, weight_EOI, offsets_E)
            return out_MO if lora is None else lora(x_MI, out_MO, offsets_E)

        rows_MD = MoveRows.apply(x_TD, token_M, slot_TK, True)
        gate_MF, up_MF = product(rows_MD, self.gate_up_proj, self.gate_up_proj_lora).chunk(2, dim=-1)
        inner_MF = _Weighted.apply(F.silu(gate_MF) * up_MF, weights_TK.flatten().index_select(0, order_M))
        out_MD = product(inner_MF, self.down_proj, self.down_proj_lora)
        return MoveRows.apply(out_MD, token_M, slot_TK, False)


class AddLoss(torch.autograd.Function):
    """Hands x on, and adds `loss` to whatever is minimised: a layer needs no way to the end of the model for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, torch.ones((), dtype=ctx.dtype, device=grad.device)


def sequence_balance_loss(
    logits_TE: Tensor, expert_ids_TK: Tensor, lengths_N: Tensor, rows_T: Tensor, scoring: str
) -> Tensor:
    """V3's sequence-wise balance loss (2412.19437, eqs 17-20) without its factor, summed over the sequences; fp32.

    sum_e f_e P_e,  f_e = E / (K T) number of tokens that chose e,  P_e = mean_t s_te / sum_e s_te;   1 when even
    """
    num_experts, num_sequences = logits_TE.shape[1], len(lengths_N)
    scores_TE = logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE.softmax(-1)
    shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    chosen_TK = rows_T[:, None] * num_experts + expert_ids_TK
    counts = chosen_TK.new_zeros(num_sequences * num_experts)
    counts.scatter_add_(0, chosen_TK.flatten(), torch.ones_like(chosen_TK).flatten())  # of integers: any order
    counts_NE = counts.view(num_sequences, num_experts).to(shares_TE.dtype)
    # Segments, not index_add: the same bits every time on a GPU.
    shares_NE = torch.segment_reduce(shares_TE, "sum", lengths=lengths_N, axis=0, unsafe=True)
    lengths_N1 = lengths_N.clamp(min=1).to(shares_TE.dtype)[:, None]
    fraction_NE = counts_NE * (num_experts / expert_ids_TK.shape[1]) / lengths_N1
    return (fraction_NE * shares_NE / lengths_N1).sum()


class Routing(NamedTuple):
    """What MoE layers did with the tokens of one forward pass. Returned and not left on the layers: a layer runs again
    where activations are recomputed, and must not be counted twice."""

    expert_ids: Tensor  # [T, K] of a layer, [T, L, K] of a model
    balance: Tensor | None  # 0-d, the balance loss of all sequences, of a model summed over layers; None: off


class MoE(nn.Module):
    """Router, routed experts, shared experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.shared_width) if config.shared_width else None
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if config.family.shared_gate else None

    def forward(
        self, x_TD: Tensor, step: ForwardPass | None = None, replay_ids_TK: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """step: None while decoding. replay_ids_TK: route to these experts."""
        expert_ids_TK, weights_TK, logits_TE = self.gate(x_TD, replay_ids_TK)
        balance = None
        if step is not None and step.balance_scale is not None:
            lengths_N = step.plan.cu_seqlens.diff().long()
            sequences = step.plan.repeat(logits_TE), step.plan.repeat(expert_ids_TK)
            loss = sequence_balance_loss(*sequences, lengths_N, step.plan.rows_T, self.gate.scoring)
            weights_TK = AddLoss.apply(weights_TK, loss * step.balance_scale)
            balance = loss.detach()
        out_TD = self.experts(x_TD, expert_ids_TK, weights_TK)
        if self.shared_experts is not None:
            shared_TD = self.shared_experts(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = self.shared_expert_gate(x_TD).sigmoid() * shared_TD
            out_TD = out_TD + shared_TD
        return out_TD, Routing(expert_ids_TK, balance)
