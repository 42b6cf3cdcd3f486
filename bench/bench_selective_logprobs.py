"""selective_logprobs with entropy, against torch's log_softmax + gather + entropy, its compilation, TRL and Liger.

Floor: one read of the logits forward; backward one more, and one write of their gradient.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import harness
from bench.cases import Case
from r1fast_kernels import selective_logprobs

LOGIT_BYTES = {"fp32": 4, "bf16": 2}


def eager(logits_TV: Tensor, target_ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """What a trainer writes by hand, in the logits' own dtype: in bf16 faster and rougher than after an upcast."""
    logp_TV = logits_TV.log_softmax(-1)
    return logp_TV.gather(1, target_ids_T[:, None]).squeeze(1), -(logp_TV.exp() * logp_TV).sum(-1)


def baselines(case: Case, logits_TV: Tensor, ids_T: Tensor) -> dict[str, Callable[[], Sequence[Tensor]]]:
    found: dict[str, Callable[[], Sequence[Tensor]]] = {"eager": lambda: eager(logits_TV, ids_T)}
    if logits_TV.dtype != torch.float32:
        found["eager upcast"] = lambda: eager(logits_TV.float(), ids_T)
    if logits_TV.numel() > 1 << 24 and case.mode != "bwd":  # compiled gradients cannot be taken twice
        compiled = torch.compile(eager, dynamic=False)
        found["compile"] = lambda: compiled(logits_TV, ids_T)
    if importlib.util.find_spec("trl"):
        if harness.DEVICE == "cuda":
            from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy
        else:
            from trl.trainer.utils import selective_log_softmax_and_entropy
        found["TRL"] = lambda: selective_log_softmax_and_entropy(logits_TV, ids_T)
    return found


def test_selective_logprobs(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    torch._dynamo.reset()
    T, V = case.sizes["T"], case.sizes["V"]
    generator = harness.generator()
    logits_TV = torch.randn(T, V, generator=generator, device=harness.DEVICE).mul_(3).to(harness.DTYPES[case.dtype])
    logits_TV.requires_grad_()
    ids_T = torch.randint(V, (T,), generator=generator, device=harness.DEVICE)
    upstream = torch.randn(2, T, generator=generator, device=harness.DEVICE).unbind()

    def exact() -> list[Tensor]:
        """fp64, a few rows at a time."""
        parts = []
        for rows in torch.arange(T, device=harness.DEVICE).split(max(1, (1 << 26) // V)):
            leaf = logits_TV[rows].detach().double().requires_grad_()
            outputs = selective_logprobs(leaf, ids_T[rows], with_entropy=True, impl="reference")
            (gradient,) = torch.autograd.grad(outputs, leaf, [x[rows].double() for x in upstream])
            parts.append([*(x.detach() for x in outputs), gradient.float()])
        logprobs_T, entropy_T, gradient_TV = (torch.cat(part) for part in zip(*parts))
        return {
            "fwd": [logprobs_T, entropy_T], "bwd": [gradient_TV], "fwd+bwd": [logprobs_T, entropy_T, gradient_TV]
        }[case.mode]  # fmt: skip

    contenders = {harness.OURS: lambda: selective_logprobs(logits_TV, ids_T, with_entropy=True)}
    contenders |= baselines(case, logits_TV, ids_T)
    runs = {
        # Upstream gradients in the dtype of the outputs: eager's are bf16.
        name: harness.in_mode(case.mode, forward, [logits_TV], _upstream(name, case, upstream))
        for name, forward in contenders.items()
    }
    if harness.DEVICE == "cuda" and case.mode == "fwd" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        # It takes [B, L + 1, V] and leaves the last position out, and it has no entropy.
        logits_1TV, last_1 = logits_TV.detach()[None], selective_logprobs(logits_TV.detach()[-1:], ids_T[-1:])
        runs["Liger"] = lambda: [
            torch.cat([fused_selective_log_softmax(logits_1TV, ids_T[None, :-1], 1.0)[0], last_1]), None
        ]  # fmt: skip
    size = T * V * LOGIT_BYTES[case.dtype]
    reads, writes, floor = {
        "fwd": (1, 0, "the logits read"),
        "bwd": (1, 1, "the logits read, a gradient written"),
        "fwd+bwd": (2, 1, "the logits read twice, a gradient written"),
    }[case.mode]
    compare(
        harness.Problem(
            case, runs,
            floor=harness.stream_floor(floor, reads * size, writes * size),
            check=harness.agrees_with(exact(), 1e-5 if case.dtype == "fp32" else 5e-3),
            gradient_bytes=size * writes,
        )
    )  # fmt: skip


def _upstream(name: str, case: Case, upstream: Sequence[Tensor]) -> list[Tensor]:
    own_dtype = name in ("eager", "compile") or (name == "TRL" and harness.DEVICE == "cpu")
    return [x.to(harness.DTYPES[case.dtype]) if own_dtype else x for x in upstream]
