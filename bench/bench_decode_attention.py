"""decode_attention, against torch's attention over the same keys in one padded tensor, which costs a copy to make.

gqa: 8 query heads over 2 key heads of 64 channels; mla: 4 heads over latents of 32 + 16 channels. On a GPU
Qwen2.5-1.5B's 12 over 2 of 128, and 16 heads over DeepSeek-V3's latents; mla128: all of its 128, for torch as 128
queries of one head (latents of each head do not fit).
Floor: the keys and values of all rows, read once; of 128 heads the products, which take longer.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.cases import Case
from r1fast_kernels import decode_attention
from r1fast_kernels.decode_attention import BLOCK, decode_attention_reference, slots_of

# H, K, d, e
SHAPES = {
    "cpu": {"gqa": (8, 2, 64, 64), "mla": (4, 1, 48, 32), "mla128": (8, 1, 48, 32)},
    "cuda": {"gqa": (12, 2, 128, 128), "mla": (16, 1, 576, 512), "mla128": (128, 1, 576, 512)},
}


def square_products(flops: float) -> harness.Floor:
    """As many FLOPs of products of square matrices."""
    size = 4096 if harness.DEVICE == "cuda" else 64
    x = torch.ones(size, size, dtype=torch.bfloat16, device=harness.DEVICE)
    return harness.Floor(f"{flops / 1e9:,.3g} GFLOP, products", lambda: x @ x, flops / (2.0 * size**3), flops=flops)


def test_decode_attention(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    B, T = case.sizes["B"], case.sizes["T"]
    (H, K, d, e), scale = SHAPES[harness.DEVICE][case.mode], 0.1
    generator, dtype = harness.generator(), harness.DTYPES[case.dtype]
    width = -(-T // BLOCK)
    table_BN = torch.randperm(B * width, generator=generator, device=harness.DEVICE).view(B, width).int()

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=harness.DEVICE).to(dtype)

    q_BHd, k_SKd = normal(B, H, d), normal(B * width * BLOCK, K, d)
    v_SKe = k_SKd[..., :e] if case.mode != "gqa" else normal(B * width * BLOCK, K, e)
    inputs = q_BHd, k_SKd, v_SKe, table_BN, torch.full((B,), T, dtype=torch.int32, device=harness.DEVICE)
    slots_BT = slots_of(table_BN, T)
    k_BKTd, v_BKTe = k_SKd[slots_BT].transpose(1, 2).contiguous(), v_SKe[slots_BT].transpose(1, 2).contiguous()

    def sdpa() -> list[Tensor]:
        if case.mode == "mla128":
            return [F.scaled_dot_product_attention(q_BHd[:, None], k_BKTd, v_BKTe, scale=scale)[:, 0]]
        out = F.scaled_dot_product_attention(q_BHd[:, :, None], k_BKTd, v_BKTe, scale=scale, enable_gqa=H != K)
        return [out.squeeze(2)]

    wide = torch.float64 if harness.DEVICE == "cpu" else torch.float32  # fp64 copies of a GPU's cache do not fit
    exact = [decode_attention_reference(*(x.to(wide) for x in inputs[:3]), *inputs[3:], scale)]
    if case.mode == "mla128":
        floor = square_products(2.0 * B * T * H * (d + e))
    else:
        floor = harness.stream_floor("keys and values", k_BKTd.nbytes + (v_BKTe.nbytes if case.mode == "gqa" else 0))
    compare(
        harness.Problem(
            case,
            {harness.OURS: lambda: [decode_attention(*inputs, scale=scale)], "SDPA": sdpa},
            floor=floor,
            check=harness.agrees_with(exact, 1e-5 if case.dtype == "fp32" else 1e-2),
        )
    )  # fmt: skip
