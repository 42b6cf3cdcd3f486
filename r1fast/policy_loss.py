"""A policy loss of one's own, as `loss_type` names it: what the function gets, and how its values become a loss.

    def my_loss(inputs: PolicyLossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        ratio_T = inputs.importance_ratio_T
        return -ratio_T * inputs.advantages_T, {"ratio": ratio_T}

The function takes the place of the surrogate L in r1fast_kernels/grpo_loss.py: importance weights, off-policy mask, KL
and entropy act on it as on the built-in ones, and `loss_aggregation` makes one number of it that depends neither on
micro-batches nor on ranks. Log-probs come from linear_logprobs: no T x V buffer, the logits are computed twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1fast.user_code import load_function
from r1fast_kernels import linear_logprobs
from r1fast_kernels.grpo_loss_reference import Inputs, LossArguments, Packing, grpo_loss_reference
from r1fast_kernels.loss_options import LossOptions

# loss_aggregation -> the built-in loss that is a mean of the same kind
SAME_MEAN = {"sample": "grpo", "token": "dapo", "constant": "dr_grpo"}


@dataclass(frozen=True)
class PolicyLossInputs:
    """T completion tokens of N whole samples, packed: of a part of the step's samples.

    logprobs_T            new log-probs, with gradient
    entropy_T             nats, with gradient; None where the head computes none
    old_logprobs_T        of the policy before the update; on-policy: logprobs_T without its gradient
    ref_logprobs_T        of the reference; None without one (beta 0 and no ref_model)
    sampler_logprobs_T    of the engine that sampled; None where it gave none
    advantages_T          the sample's advantage at each of its tokens
    loss_mask_T           bool; what is returned for a token that it drops does not count
    cu_seqlens            int32 [N + 1]; sample n owns tokens cu_seqlens[n]:cu_seqlens[n + 1]
    options               epsilon, epsilon_high, delta .. of the recipe, under grpo_loss's names
    """

    logprobs_T: Tensor
    entropy_T: Tensor | None
    old_logprobs_T: Tensor
    ref_logprobs_T: Tensor | None
    sampler_logprobs_T: Tensor | None
    advantages_T: Tensor
    loss_mask_T: Tensor
    cu_seqlens: Tensor
    options: LossOptions

    @property
    def importance_ratio_T(self) -> Tensor:
        """exp(new - old log-prob), with gradient."""
        return (self.logprobs_T - self.old_logprobs_T).exp()

    def sample_mean_T(self, values_T: Tensor) -> Tensor:
        """The mean of a sample's tokens that count, at each of its tokens."""
        packing = Packing.build(self.cu_seqlens, self.loss_mask_T, None, len(values_T))
        return packing.mean_samples(packing.keep(values_T))[packing.sample_T]


PolicyLoss = Callable[[PolicyLossInputs], tuple[Tensor, dict[str, Tensor]]]


def own_loss(
    function: PolicyLoss, logprobs_T: Tensor, cu_seqlens: Tensor, *, loss_aggregation: str = "sample", **arguments: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(loss, metrics as of grpo_loss, the function's own metrics: [T] or [N]). arguments: those of grpo_loss.

    Raises ValueError where the function returns something else than it should.
    """
    arguments |= {"loss_type": SAME_MEAN[loss_aggregation]}
    given = LossArguments.of("loss_type", arguments, len(logprobs_T), cu_seqlens)
    own: dict[str, Tensor] = {}

    def surrogate(x: Inputs, ratio_T: Tensor) -> Tensor:
        mask_T = torch.ones_like(x.old_T, dtype=torch.bool) if x.packing.mask_T is None else x.packing.mask_T
        found = function(
            PolicyLossInputs(
                x.logprobs_T, x.entropy_T, x.old_T, x.ref_T, x.sampler_T, x.advantages_N[x.packing.sample_T], mask_T,
                cu_seqlens, given.options,
            )
        )  # fmt: skip
        loss_T, metrics = _checked(function, found, len(x.old_T), len(x.advantages_N))
        own.update({name: values.detach() for name, values in metrics.items()})
        return loss_T

    loss, metrics = grpo_loss_reference(logprobs_T, cu_seqlens, given, surrogate)
    return loss, {name: value for name, value in metrics.items() if not name.startswith("clip_ratio")}, own


def linear_own_loss(
    function: PolicyLoss, hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor, cu_seqlens: Tensor, *,
    temperature: float, **arguments: Any,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """`own_loss` from hidden states, as linear_grpo_loss is grpo_loss from them."""
    logprobs_T, entropy_T = linear_logprobs(
        hidden_TD, weight_VD, target_ids_T, temperature=temperature, with_entropy=True
    )
    return own_loss(function, logprobs_T, cu_seqlens, entropy_T=entropy_T, **arguments)


def loss_problems(name: str) -> Iterator[str]:
    """What is wrong with a loss of one's own, seen by a call on five tokens of two samples."""
    try:
        function = load_function("loss_type", name)
        logprobs_T = torch.linspace(-2.5, -0.5, 5).requires_grad_()
        others: dict[str, Any] = dict.fromkeys(("ref_logprobs_T", "sampler_logprobs_T"), logprobs_T)
        loss, _, _ = own_loss(
            function, logprobs_T, torch.tensor([0, 2, 5], dtype=torch.int32), advantages_N=torch.tensor([1.0, -1.0]),
            old_logprobs_T=logprobs_T - 0.1, entropy_T=(1 - logprobs_T).detach().requires_grad_(), **others,
        )  # fmt: skip
        loss.backward()
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else f"{name} raised {type(error).__name__}: {error}"
        yield f"loss_type: {' '.join(text.split())}"


def _checked(function: PolicyLoss, found: Any, num_tokens: int, num_samples: int) -> tuple[Tensor, dict[str, Tensor]]:
    name = getattr(function, "__name__", repr(function))
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        raise ValueError(f"loss {name} returned {type(found).__name__}, expected (loss_T, metrics: dict)")
    loss_T, metrics = found
    if not isinstance(loss_T, Tensor) or loss_T.shape != (num_tokens,):
        got = tuple(loss_T.shape) if isinstance(loss_T, Tensor) else type(loss_T).__name__
        raise ValueError(
            f"loss {name} returned {got} for {num_tokens} tokens, expected a value each; the mean is loss_aggregation's"
        )
    if not loss_T.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"loss {name} returned values without a gradient; expected a function of inputs.logprobs_T")
    for key, values in metrics.items():
        if not isinstance(values, Tensor) or values.shape not in ((num_tokens,), (num_samples,)):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"loss {name}: metric {key!r} is {got}, expected a value for each of {num_tokens} tokens or "
                f"{num_samples} samples: their mean over the step is what is logged"
            )
    return loss_T, metrics
