"""Policy losses written as one's own would be: `loss_type: r1fast.losses.sapo`, or `r1fast.losses.gspo_token`."""

import torch
from torch import Tensor

from r1fast.policy_loss import PolicyLossInputs

# Of the sigmoid, where the advantage is positive and where it is not (TRL's sapo_temperature_pos and _neg).
SAPO_TEMPERATURES = 1.0, 1.05


def sapo(inputs: PolicyLossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Soft Adaptive Policy Optimization (arXiv 2511.20347): a sigmoid of the ratio in place of the clip."""
    positive, others = SAPO_TEMPERATURES
    temperature_T = torch.where(inputs.advantages_T > 0, positive, others)
    gate_T = torch.sigmoid(temperature_T * (inputs.importance_ratio_T - 1)) * 4 / temperature_T
    return -gate_T * inputs.advantages_T, {"sapo_gate": gate_T}


def gspo_token(inputs: PolicyLossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO with a gradient for each token (arXiv 2507.18071, equation 13): the value is the sample's ratio."""
    log_ratio_T = inputs.sample_mean_T((inputs.logprobs_T - inputs.old_logprobs_T).detach())
    ratio_T = (log_ratio_T + inputs.logprobs_T - inputs.logprobs_T.detach()).exp()
    o = inputs.options
    clipped_T = ratio_T.clamp(1 - o.epsilon, 1 + (o.epsilon if o.epsilon_high is None else o.epsilon_high))
    loss_T = -torch.minimum(ratio_T * inputs.advantages_T, clipped_T * inputs.advantages_T)
    return loss_T, {"clip_ratio/region_mean": (ratio_T != clipped_T).to(loss_T.dtype)}
