"""linear_cross_entropy, against eager torch, torch's own chunked op, Liger and CCE.

Floor: the bare products. The gradient of a mean is known in the forward pass, which then has each logit once: 6 T D V.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.cases import Case
from bench.head import Head, exact, floor, liger_logprobs, runnable
from r1fast_kernels import linear_cross_entropy


def eager(hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_TD, weight_VD), ids_T)


def peers(head: Head) -> dict[str, Callable[[], Tensor]]:
    found: dict[str, Callable[[], Tensor]] = {}
    on_gpu = harness.DEVICE == "cuda"
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch >= 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch chunked"] = lambda: F.linear_cross_entropy(*head.leaves, head.ids_T, options=options)
    if on_gpu:
        compiled = torch.compile(eager, dynamic=False)
        found["compile"] = lambda: compiled(*head.leaves, head.ids_T)
    if importlib.util.find_spec("liger_kernel"):
        if on_gpu:
            from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

            # Gradients of the weight summed in fp32, as ours are.
            fused = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
            found["Liger"] = lambda: fused(head.weight_VD, head.hidden_TD, head.ids_T)
        else:
            logprobs = liger_logprobs(head, with_entropy=False)
            found["Liger"] = lambda: -logprobs()[0].mean()
    if on_gpu and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        found["CCE"] = lambda: cce(*head.leaves, head.ids_T)
    return found


def test_linear_cross_entropy(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    torch._dynamo.reset()
    head = Head.random(case)
    forwards: dict[str, Callable[[], Tensor]] = {
        harness.OURS: lambda: linear_cross_entropy(*head.leaves, head.ids_T),
        "eager": lambda: eager(*head.leaves, head.ids_T),
        **peers(head),
    }
    runs = {
        name: harness.in_mode(case.mode, lambda forward=forward: [forward()], head.leaves, [None])
        for name, forward in forwards.items()
    }
    _, _, loss, gradients = exact(head, lambda logprobs_T, _: -logprobs_T.mean())
    compare(
        harness.Problem(
            case, runnable(head.hidden_TD, runs),
            floor=floor(head, num_forwards=1),
            check=harness.agrees_with([loss, *gradients], 1e-5 if case.dtype == "fp32" else 1e-2),
            gradient_bytes=head.gradient_bytes,
        )
    )  # fmt: skip
