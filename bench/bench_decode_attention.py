"""decode_attention, against torch's attention over the same keys in one padded tensor, which costs a copy to make.

gqa: 8 query heads over 2 key heads of 64 channels; mla: 4 heads over latents of 32 + 16 channels. On a GPU
Qwen2.5-1.5B's 12 over 2 of 128, and 16 heads over DeepSeek-V3's latents.
Floor: the keys and values of all rows, read once.
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
    "cpu": {"gqa": (8, 2, 64, 64), "mla": (4, 1, 48, 32)},
    "cuda": {"gqa": (12, 2, 128, 128), "mla": (16, 1, 576, 512)},
}


def test_decode_attention(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    B, T = case.sizes["B"], case.sizes["T"]
    (H, K, d, e), scale = SHAPES[harness.DEVICE][case.mode], 0.1
    generator, dtype = harness.generator(), harness.DTYPES[case.dtype]
    width = -(-T // BLOCK)
    table_BN = torch.randperm(B * width, generator=generator, device=harness.DEVICE).view(B, width).int()

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=harness.DEVICE).to(dtype)

    q_BHd, k_SKd = normal(B, H, d), normal(B * width * BLOCK, K, d)
    v_SKe = k_SKd[..., :e] if case.mode == "mla" else normal(B * width * BLOCK, K, e)
    inputs = q_BHd, k_SKd, v_SKe, table_BN, torch.full((B,), T, dtype=torch.int32, device=harness.DEVICE)
    slots_BT = slots_of(table_BN, T)
    k_BKTd, v_BKTe = k_SKd[slots_BT].transpose(1, 2).contiguous(), v_SKe[slots_BT].transpose(1, 2).contiguous()

    def sdpa() -> list[Tensor]:
        out = F.scaled_dot_product_attention(q_BHd[:, :, None], k_BKTd, v_BKTe, scale=scale, enable_gqa=H != K)
        return [out.squeeze(2)]

    wide = torch.float64 if harness.DEVICE == "cpu" else torch.float32  # fp64 copies of a GPU's cache do not fit
    exact = [decode_attention_reference(*(x.to(wide) for x in inputs[:3]), *inputs[3:], scale)]
    compare(
        harness.Problem(
            case,
            {harness.OURS: lambda: [decode_attention(*inputs, scale=scale)], "SDPA": sdpa},
            floor=harness.stream_floor("keys and values", k_BKTd.nbytes + (v_BKTe.nbytes if case.mode == "gqa" else 0)),
            check=harness.agrees_with(exact, 1e-5 if case.dtype == "fp32" else 1e-2),
        )
    )  # fmt: skip
