"""What the three ops over a language-model head share: inputs, the exact result, the floor, and their peers."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.cases import Case
from r1fast_kernels import linear_logprobs
from r1fast_kernels.torch_private import multiplies_bf16

# TRL's trainer passes this (trl/trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE).
TRL_VOCAB_CHUNK = 32768


@dataclass(frozen=True)
class Head:
    hidden_TD: Tensor
    weight_VD: Tensor
    ids_T: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_TD, self.weight_VD

    @property
    def gradient_bytes(self) -> int:
        return sum(x.nbytes for x in self.leaves)

    @staticmethod
    def random(case: Case) -> "Head":
        """Logits of standard deviation 3, as a trained model's: neither uniform nor one-hot."""
        T, D, V = (case.sizes[letter] for letter in "TDV")
        generator, dtype = harness.generator(), harness.DTYPES[case.dtype]
        hidden_TD = torch.randn(T, D, generator=generator, device=harness.DEVICE).to(dtype)
        weight_VD = torch.randn(V, D, generator=generator, device=harness.DEVICE).mul_(3 / D**0.5).to(dtype)
        ids_T = torch.randint(V, (T,), generator=generator, device=harness.DEVICE)
        return Head(hidden_TD.requires_grad_(), weight_VD.requires_grad_(), ids_T)


def eager_logprobs(hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """What a trainer writes by hand, every step in the head's own dtype."""
    logp_TV = F.linear(hidden_TD, weight_VD).log_softmax(-1)
    return logp_TV.gather(1, ids_T[:, None]).squeeze(1), -(logp_TV.exp() * logp_TV).sum(-1)


def exact(head: Head, loss_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(logprobs, entropy, loss, gradients) by the reference in fp32, 256 tokens at a time and each twice.

    First every token's log-probability, then the loss and its derivative by them, then the head backwards.
    """
    hidden_TD, weight_VD = (x.detach().float() for x in head.leaves)
    slices = [slice(start, start + 256) for start in range(0, len(hidden_TD), 256)]

    def reference(rows: slice) -> list[Tensor]:
        return list(linear_logprobs(hidden_TD[rows], weight_VD, head.ids_T[rows], with_entropy=True, impl="reference"))

    with torch.no_grad():
        outputs = [torch.cat(parts) for parts in zip(*(reference(rows) for rows in slices))]
    outputs = [x.requires_grad_() for x in outputs]
    loss = loss_of(*outputs)
    upstream = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
    hidden_TD.requires_grad_()
    weight_VD.requires_grad_()
    for rows in slices:
        torch.autograd.backward(reference(rows), [x[rows] for x in upstream])
    logprobs_T, entropy_T = (x.detach() for x in outputs)
    return logprobs_T, entropy_T, loss.detach(), [hidden_TD.grad, weight_VD.grad]


def can_multiply(factor: Tensor) -> bool:
    """Whether torch multiplies its dtype at full rate. On a CPU without instructions for bf16 it takes minutes (ours
    widens to fp32): such contenders are not run, and the floor is that of fp32."""
    on_cpu_in_bf16 = harness.DEVICE == "cpu" and factor.dtype == torch.bfloat16
    return not on_cpu_in_bf16 or multiplies_bf16()


def runnable(factor: Tensor, runs: dict[str, harness.Run]) -> dict[str, harness.Run]:
    def refuse() -> harness.Outputs:
        raise RuntimeError("not run: torch has no fast bf16 product on this CPU")

    ours = (harness.OURS, "two ops")
    return {name: run if name in ours or can_multiply(factor) else refuse for name, run in runs.items()}


def floor(head: Head, num_forwards: int, backward: bool = True) -> harness.Floor:
    """The bare products, over a tile of the vocabulary, in the head's dtype: logits, d hidden, d weight."""
    hidden_TD, weight_VD = (x.detach() if can_multiply(x) else x.detach().float() for x in head.leaves)
    (T, D), V = hidden_TD.shape, len(weight_VD)
    tile = min(V, 8192 if harness.DEVICE == "cpu" else 32768)
    weight_CD = weight_VD[:tile]
    logits_TC, grad_hidden_TD = hidden_TD.new_empty(T, tile), torch.empty_like(hidden_TD)
    grad_weight_CD = torch.empty_like(weight_CD)

    def run() -> None:
        for _ in range(num_forwards):
            torch.mm(hidden_TD, weight_CD.T, out=logits_TC)
        if backward:
            torch.mm(logits_TC, weight_CD, out=grad_hidden_TD)
            torch.mm(logits_TC.T, hidden_TD, out=grad_weight_CD)

    products = num_forwards + 2 * backward
    library = "cuBLAS" if harness.DEVICE == "cuda" else f"torch.mm, {str(hidden_TD.dtype).removeprefix('torch.')}"
    return harness.Floor(
        f"{2 * products} T D V FLOPs in bare products ({library})", run, V / tile, flops=2.0 * products * T * D * V
    )


def trl_chunked_logprobs(head: Head) -> Callable[[], tuple[Tensor, Tensor]]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    if importlib.util.find_spec("datasets") is None:
        # Its backward pass takes one context manager (for ZeRO-3) from a module that imports all of TRL's needs.
        stand_in = ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
        sys.modules.setdefault("trl.trainer.utils", stand_in)

    return lambda: ChunkedLogProbFunction.apply(
        head.hidden_TD, head.weight_VD, None, head.ids_T, 1.0, TRL_VOCAB_CHUNK, None, 1.0, ("entropy",)
    )[:2]


def liger_logprobs(head: Head, with_entropy: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Its per-token head: CuTe kernels on Hopper, chunks of 512 tokens in torch elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def run() -> tuple[Tensor, ...]:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(*head.leaves, head.ids_T, return_entropy=with_entropy)
        return (-found[0], found[1]) if with_entropy else (-found,)

    return run
