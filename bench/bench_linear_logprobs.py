"""linear_logprobs with entropy, against eager torch, its compilation, and the heads of TRL, Liger and CCE.

Floor: the bare products. Backward needs the logits again, since what flows back is not known before it: 8 T D V FLOPs.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import harness
from bench.cases import Case
from bench.head import Head, eager_logprobs, exact, floor, liger_logprobs, runnable, trl_chunked_logprobs
from r1fast_kernels import linear_logprobs


def peers(head: Head) -> dict[str, Callable[[], Sequence[Tensor]]]:
    found: dict[str, Callable[[], Sequence[Tensor]]] = {}
    if harness.DEVICE == "cuda":
        compiled = torch.compile(eager_logprobs, dynamic=False)
        found["compile"] = lambda: compiled(*head.leaves, head.ids_T)
    if importlib.util.find_spec("trl"):
        found["TRL"] = trl_chunked_logprobs(head)
    if importlib.util.find_spec("liger_kernel"):
        found["Liger"] = liger_logprobs(head, with_entropy=True)
    return found


def cce(head: Head, mode: str, upstream_T: Tensor) -> harness.Run:
    """It has no entropy, and skips what is small in the gradient: less work, and not the same gradient."""
    from cut_cross_entropy import linear_cross_entropy

    def forward() -> list[Tensor]:
        return [-linear_cross_entropy(*head.leaves, head.ids_T, reduction="none")]

    run = harness.in_mode(mode, forward, head.leaves, [upstream_T])
    return lambda: [run()[0], *[None] * (1 if mode == "fwd" else 3)]


def test_linear_logprobs(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    torch._dynamo.reset()
    head = Head.random(case)
    upstream = torch.randn(2, len(head.ids_T), generator=harness.generator(1), device=harness.DEVICE).unbind()
    forwards: dict[str, Callable[[], Sequence[Tensor]]] = {
        harness.OURS: lambda: linear_logprobs(*head.leaves, head.ids_T, with_entropy=True),
        "eager": lambda: eager_logprobs(*head.leaves, head.ids_T),
        **peers(head),
    }
    runs = {
        name: harness.in_mode(case.mode, forward, head.leaves, _upstream(name, head, upstream))
        for name, forward in forwards.items()
    }
    if harness.DEVICE == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        runs["CCE, no entropy"] = cce(head, case.mode, upstream[0].to(head.hidden_TD.dtype))
    backward = case.mode != "fwd"
    logprobs_T, entropy_T, _, gradients = exact(
        head, lambda logprobs_T, entropy_T: (upstream[0] * logprobs_T + upstream[1] * entropy_T).sum()
    )
    want = [logprobs_T, entropy_T, *(gradients if backward else [])]
    compare(
        harness.Problem(
            case, runnable(head.hidden_TD, runs),
            floor=floor(head, 2 if backward else 1, backward),
            check=harness.agrees_with(want, 1e-5 if case.dtype == "fp32" else 1e-2),
            gradient_bytes=head.gradient_bytes if backward else 0,
        )
    )  # fmt: skip


def _upstream(name: str, head: Head, upstream: Sequence[Tensor]) -> list[Tensor]:
    """In the dtype of the contender's outputs."""
    logprobs_dtype, entropy_dtype = torch.float32, torch.float32
    if name in ("eager", "compile"):
        logprobs_dtype = entropy_dtype = head.hidden_TD.dtype
    elif name == "Liger" and harness.DEVICE == "cpu":
        entropy_dtype = head.hidden_TD.dtype
    return [upstream[0].to(logprobs_dtype), upstream[1].to(entropy_dtype)]
