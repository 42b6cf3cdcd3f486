"""rms_norm forward and backward, against torch's own and its compilation.

Floor: the input read twice and the gradient once, output and gradient written.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.cases import Case
from r1fast_kernels import rms_norm


def eager(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    return F.rms_norm(x_TD, weight_D.shape, weight_D, 1e-6)


def test_rms_norm(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    torch._dynamo.reset()
    T, D = case.sizes["T"], case.sizes["D"]
    generator, dtype = harness.generator(), harness.DTYPES[case.dtype]
    x_TD, upstream_TD = (
        torch.randn(T, D, generator=generator, device=harness.DEVICE).to(dtype) for _ in range(2)
    )  # fmt: skip
    leaves = x_TD.requires_grad_(), torch.ones(D, device=harness.DEVICE, dtype=dtype).requires_grad_()
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = harness.in_mode("fwd+bwd", lambda: [eager(*exact_leaves)], exact_leaves, [upstream_TD.double()])()
    forwards = {harness.OURS: rms_norm, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    runs = {
        name: harness.in_mode("fwd+bwd", lambda op=op: [op(*leaves)], leaves, [upstream_TD])
        for name, op in forwards.items()
    }
    size = T * D * x_TD.element_size()
    compare(
        harness.Problem(
            case, runs,
            floor=harness.stream_floor("input twice, gradient, output, its gradient", 3 * size, 2 * size),
            check=harness.agrees_with(exact, 1e-5 if case.dtype == "fp32" else 1e-2),
            gradient_bytes=size,
        )
    )  # fmt: skip
