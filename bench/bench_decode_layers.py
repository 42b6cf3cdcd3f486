"""A decode step through all layers and the head in one call, against their own modules: B rows behind T tokens each.

The models of bench_generate. `modules` runs our ops one after the other, `eager` torch's. Floor: 2 FLOPs of each active
parameter and row, as products of B rows.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import harness
from bench.bench_generate import MODELS
from bench.bench_train_step import active_parameters
from bench.cases import Case
from bench.head import can_multiply
from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.rollout.fast_decode import fast_decode
from r1fast_kernels import use
from r1fast_kernels.decode_attention import BLOCK


def test_decode_layers(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    B, T = case.sizes["B"], case.sizes["T"]
    dtype, config = harness.DTYPES[case.dtype], ModelConfig.from_hf(MODELS[case.mode])
    if not can_multiply(torch.empty(0, dtype=dtype)):
        pytest.skip(f"torch has no fast {case.dtype} product on this CPU")
    model = Decoder(config)
    model.init_weights(harness.generator())
    model.to(dtype).eval()
    width = -(-T // BLOCK)
    table_BN = torch.randperm(B * width, generator=harness.generator()).view(B, width).int()
    positions_B = torch.full((B,), T - 1)
    ids_B = torch.randint(config.vocab_size, (B,), generator=harness.generator())

    def decode(impl: str | None, dtype: torch.dtype = dtype, *, fast: bool = False) -> Callable[[], harness.Outputs]:
        cache = BlockCache(config, B * width, dtype, "cpu")
        for buffer in cache.buffers:
            buffer.copy_(torch.randn(buffer.shape, generator=harness.generator()))

        decoder = (fast_decode(model) if fast else None) or model

        def run() -> harness.Outputs:
            with use(impl):
                return [decoder.decode(ids_B, positions_B, cache, table_BN)]

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

    contenders = {harness.OURS: decode(None, fast=True), "modules": decode(None), "eager": decode("reference")}
    floor = harness.products_floor(2.0 * active_parameters(model) * B, B, dtype)
    compare(harness.Problem(case, contenders, floor=floor, check=check))
