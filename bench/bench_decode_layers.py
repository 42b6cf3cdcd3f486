"""A decode step through all layers and the head in one call, against their own modules: B rows behind T tokens each.

The models of bench_generate. `modules` runs our ops one after the other, `eager` torch's; on a GPU the two that are
ours are CUDA graphs. Floor: 2 FLOPs of each active parameter and row, as products of B rows.
"""

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from bench import harness, large
from bench.bench_generate import MODELS
from bench.bench_train_step import active_parameters
from bench.cases import Case
from bench.head import can_multiply
from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.rollout.fast_decode import fast_decode
from r1fast.rollout.fused_decode import FusedDecode
from r1fast.rollout.graphs import CudaCapture
from r1fast_kernels import use
from r1fast_kernels.decode_attention import BLOCK


def test_decode_layers(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    B, T = case.sizes["B"], case.sizes["T"]
    dtype, config = harness.DTYPES[case.dtype], ModelConfig.from_hf((MODELS | large.MODELS)[case.mode])
    device = harness.DEVICE
    if not can_multiply(torch.empty(0, dtype=dtype, device=device)):
        pytest.skip(f"torch has no fast {case.dtype} product on this CPU")
    with torch.device(device):
        model = Decoder(config)
    model.init_weights(harness.generator())
    model.to(dtype).eval()
    width = -(-T // BLOCK)
    table_BN = torch.randperm(B * width, generator=harness.generator(), device=device).view(B, width).int()
    positions_B = torch.full((B,), T - 1, device=device)
    ids_B = torch.randint(config.vocab_size, (B,), generator=harness.generator(), device=device)

    def decode(impl: str | None, dtype: torch.dtype = dtype, *, fast: bool = False) -> Callable[[], harness.Outputs]:
        cache = BlockCache(config, B * width, dtype, device)
        for buffer in cache.buffers:
            buffer.copy_(torch.randn(buffer.shape, generator=harness.generator(), device=device))
        decoder, outputs = (fast_decode(model) if fast else None) or model, list[Tensor | None]()
        if isinstance(decoder, FusedDecode):
            stack.enter_context(decoder.stacked())

        def step() -> None:
            with use(impl):
                outputs[:] = [decoder.decode(ids_B, positions_B, cache, table_BN)]

        replay = CudaCapture()(step) if device == "cuda" and impl is None else step  # the reference waits for it

        def run() -> harness.Outputs:
            replay()
            return list(outputs)

        return run

    model.double()
    exact = decode("reference", torch.float64)()[0]
    model.to(dtype)

    def check(name: str, outputs: harness.Outputs) -> None:
        assert isinstance(outputs[0], Tensor) and isinstance(exact, Tensor)
        error_B = (outputs[0] - exact).norm(dim=1) / exact.norm(dim=1)
        # Of random weights a few rows lie between two experts, and go to either.
        error = float(error_B.quantile(0.95))
        assert error < (1e-4 if case.dtype == "fp32" else 3e-2), f"{name}: {error:.2g}"

    floor = harness.products_floor(2.0 * active_parameters(model) * B, B, dtype)
    with ExitStack() as stack:
        contenders = {harness.OURS: decode(None, fast=True), "modules": decode(None), "eager": decode("reference")}
        compare(harness.Problem(case, contenders, floor=floor, check=check))
