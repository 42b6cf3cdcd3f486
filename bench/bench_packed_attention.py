"""packed_attention forward and backward, with RoPE, against torch's flash kernel on the same sequences as a batch.

mla: 16 rotated channels that the heads share beside 16 of their own, values of 32; gqa: 2 key heads of 64 channels.
Floor: the FLOPs of the visible pairs, as large products of the same dtype.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.cases import Case
from bench.head import can_multiply
from r1fast_kernels import packed_attention
from r1fast_kernels.packed_attention import packed_attention_reference, rotate_reference


def random_leaves(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, Tensor], Tensor]:
    """q, k, v and for mla k_pe; cos and sin; the gradient from above."""
    T, H, generator = case.sizes["N"] * case.sizes["L"], case.sizes["H"], harness.generator()
    mla = case.mode == "mla"

    def normal(*size: int) -> Tensor:
        return torch.randn(T, *size, generator=generator).to(dtype)

    q, k, v = (normal(H, 32), normal(H, 16), normal(H, 32)) if mla else (normal(H, 64), normal(2, 64), normal(2, 64))
    leaves = [q, k, v, *([normal(16)] if mla else [])]
    angles_Tr = 6 * torch.rand(T, 8 if mla else 32, generator=generator)
    rope = angles_Tr.cos().to(dtype), angles_Tr.sin().to(dtype)
    return [x.requires_grad_() for x in leaves], rope, torch.randn(T, H, v.shape[-1], generator=generator).to(dtype)


def composed(leaves: list[Tensor], rope: tuple[Tensor, Tensor], num_sequences: int, scale: float) -> Tensor:
    """Rotated, put together and given to torch's attention. Sequences of one length: nothing is padded."""
    q, k, v = leaves[:3]
    R = 2 * rope[0].shape[-1]
    q = torch.cat((q[..., :-R], rotate_reference(q[..., -R:], *rope, False)), dim=-1)
    if len(leaves) == 4:
        k_pe = rotate_reference(leaves[3][:, None], *rope, False).expand(-1, k.shape[1], -1)
        k = torch.cat((k, k_pe), dim=-1)
    else:
        k = rotate_reference(k, *rope, False)
    q, k, v = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def test_packed_attention(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    N, L, H = (case.sizes[letter] for letter in "NLH")
    dtype, scale = harness.DTYPES[case.dtype], 0.2
    leaves, rope, upstream = random_leaves(case, dtype)
    cu_seqlens = torch.arange(N + 1, dtype=torch.int32) * L

    def ours() -> Tensor:
        k_pe = leaves[3] if len(leaves) == 4 else None
        return packed_attention(*leaves[:3], cu_seqlens, scale=scale, k_pe_TR=k_pe, rope=rope)

    wide = [x.detach().double().requires_grad_() for x in leaves]
    wide_rope = rope[0].double(), rope[1].double()
    exact = harness.in_mode(
        "fwd+bwd",
        lambda: [packed_attention_reference(*wide[:3], cu_seqlens, scale, wide[3] if wide[3:] else None, wide_rope)],
        wide, [upstream.double()],
    )()  # fmt: skip
    forwards = {harness.OURS: ours, "SDPA": lambda: composed(leaves, rope, N, scale)}
    runs = {name: harness.in_mode("fwd+bwd", lambda op=op: [op()], leaves, [upstream]) for name, op in forwards.items()}
    d, e = leaves[0].shape[-1], leaves[2].shape[-1]
    flops = N * H * L * (L + 1) / 2 * (8.0 * d + 6.0 * e)
    x_DD = torch.randn(1024, 1024).to(dtype if can_multiply(leaves[0]) else torch.float32)
    floor = harness.Floor(
        f"{flops / 1e9:.3g} GFLOP of visible pairs in products of 1024 x 1024", lambda: x_DD @ x_DD,
        scale=flops / (2.0 * 1024**3), flops=flops,
    )  # fmt: skip
    compare(
        harness.Problem(
            case, runs, floor=floor, check=harness.agrees_with(exact, 1e-5 if case.dtype == "fp32" else 2e-2),
            gradient_bytes=sum(x.nbytes for x in leaves),
        )
    )  # fmt: skip
