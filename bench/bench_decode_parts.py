"""Everything between the products and the attention of a decode step of B rows, against the same in plain torch: sums
and norms, rotation into the cache, SwiGLU; in all layers, on a GPU as one CUDA graph.

Floor: what these read and write, once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench import harness
from bench.cases import Case
from bench.decode_step import step, step_bytes
from r1fast.rollout.graphs import CudaCapture


def test_decode_parts(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    B, dtype = case.sizes["B"], harness.DTYPES[case.dtype]
    generator, slots_B = harness.generator(), torch.arange(B, device=harness.DEVICE)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=harness.DEVICE).to(dtype)

    run = step(case.mode, B, normal, slots_B)

    def contender(impl: str | None) -> Callable[[], list[Tensor]]:
        outputs: list[Tensor] = []

        def once() -> None:
            outputs[:] = run(impl)

        replay = CudaCapture()(once) if harness.DEVICE == "cuda" else once

        def call() -> list[Tensor]:
            replay()
            return list(outputs)

        return call

    exact = [x.float().clone() for x in run("reference")]
    read, written = step_bytes(case.mode, B, dtype.itemsize)
    compare(
        harness.Problem(
            case,
            {harness.OURS: contender(None), "eager": contender("reference")},
            floor=harness.stream_floor("rows of all layers", read, written),
            check=harness.agrees_with(exact, 1e-2),
        )
    )
