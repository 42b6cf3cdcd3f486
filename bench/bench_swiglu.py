"""swiglu forward and backward, against torch's own and its compilation.

Floor: both inputs read twice and the gradient once, output and two gradients written.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.cases import Case
from r1fast_kernels import swiglu


def eager(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return F.silu(gate_TF) * up_TF


def test_swiglu(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    torch._dynamo.reset()
    T, width = case.sizes["T"], case.sizes["F"]
    generator, dtype = harness.generator(), harness.DTYPES[case.dtype]
    gate_TF, up_TF, upstream_TF = (
        torch.randn(T, width, generator=generator, device=harness.DEVICE).to(dtype) for _ in range(3)
    )  # fmt: skip
    leaves = gate_TF.requires_grad_(), up_TF.requires_grad_()
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = harness.in_mode("fwd+bwd", lambda: [eager(*exact_leaves)], exact_leaves, [upstream_TF.double()])()
    forwards = {harness.OURS: swiglu, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    runs = {
        name: harness.in_mode("fwd+bwd", lambda op=op: [op(*leaves)], leaves, [upstream_TF])
        for name, op in forwards.items()
    }
    size = T * width * gate_TF.element_size()
    compare(
        harness.Problem(
            case, runs,
            floor=harness.stream_floor("inputs twice, gradient, output, two gradients", 5 * size, 3 * size),
            check=harness.agrees_with(exact, 1e-5 if case.dtype == "fp32" else 1e-2),
            gradient_bytes=2 * size,
        )
    )  # fmt: skip
