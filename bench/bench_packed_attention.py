"""packed_attention forward and backward, with RoPE, against torch's flash kernel on the same sequences as a batch.

mla: 16 rotated channels that the heads share beside 16 of their own, values of 32; gqa: 2 key heads of 64 channels. On
a GPU 64 and 128 channels, values of 128, and key heads of 128: ours is what layers call, with sums in one order as in
training, "any order" the same without; each library of models/flash.py that is there has a row.
Floor: the FLOPs of the visible pairs, as large products of the same dtype.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.cases import Case
from bench.head import can_multiply
from r1fast.models import attention, flash
from r1fast.models.rope import Rope
from r1fast.parallel.ordered import ordered_sums
from r1fast_kernels import packed_attention
from r1fast_kernels.packed_attention import packed_attention_reference, rotate_reference


def random_leaves(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, Tensor], Tensor]:
    """q, k, v and for mla k_pe; cos and sin; the gradient from above."""
    T, H, generator = case.sizes["N"] * case.sizes["L"], case.sizes["H"], harness.generator()
    mla, on_gpu = case.mode == "mla", case.device == "cuda"
    own, shared, e = (128, 64, 128) if on_gpu else (16, 16, 32)
    d = 128 if on_gpu else 64

    def normal(*size: int) -> Tensor:
        return torch.randn(T, *size, generator=generator, device=harness.DEVICE).to(dtype)

    sizes = ((H, own + shared), (H, own), (H, e)) if mla else ((H, d), (2, d), (2, d))
    q, k, v = (normal(*size) for size in sizes)
    leaves = [q, k, v, *([normal(shared)] if mla else [])]
    angles_Tr = 6 * torch.rand(T, (shared if mla else d) // 2, generator=generator, device=harness.DEVICE)
    rope = angles_Tr.cos().to(dtype), angles_Tr.sin().to(dtype)
    return [x.requires_grad_() for x in leaves], rope, normal(H, v.shape[-1])


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


def of_layers(
    leaves: list[Tensor], rope: tuple[Tensor, Tensor], cu_seqlens: Tensor, scale: float
) -> dict[str, Callable[[], Tensor]]:
    """What a model's layers call, with the best library, and with each of those that are here."""
    device, options = leaves[0].device, {"k_pe_TR": leaves[3] if len(leaves) == 4 else None}
    turned = Rope(*rope, False)

    def by(found: tuple[flash.Library, ...]) -> Callable[[], Tensor]:
        plan = attention.AttentionPlan(cu_seqlens, len(leaves[0]), device)
        plan.flash = found
        return lambda: attention.packed_attention(*leaves[:3], plan, turned, scale, **options)

    found = flash.libraries(device)
    return {"any order": by(found), **{library.name: by((library,)) for library in found if library.call is not None}}


def in_order(run: harness.Run) -> harness.Run:
    def ordered() -> harness.Outputs:
        with ordered_sums(torch.device(harness.DEVICE), True):
            return run()

    return ordered


def test_packed_attention(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    N, L, H = (case.sizes[letter] for letter in "NLH")
    dtype, scale = harness.DTYPES[case.dtype], 0.2
    leaves, rope, upstream = random_leaves(case, dtype)
    cu_seqlens = torch.arange(N + 1, dtype=torch.int32) * L

    wide = [x.detach().double().requires_grad_() for x in leaves]
    wide_rope = rope[0].double(), rope[1].double()
    exact = harness.in_mode(
        "fwd+bwd",
        lambda: [packed_attention_reference(*wide[:3], cu_seqlens, scale, wide[3] if wide[3:] else None, wide_rope)],
        wide, [upstream.double()],
    )()  # fmt: skip
    forwards = {"SDPA": lambda: composed(leaves, rope, N, scale)}
    if case.device == "cpu":
        k_pe = leaves[3] if len(leaves) == 4 else None
        forwards[harness.OURS] = lambda: packed_attention(*leaves[:3], cu_seqlens, scale=scale, k_pe_TR=k_pe, rope=rope)
    else:
        forwards |= of_layers(leaves, rope, cu_seqlens, scale)
    runs = {name: harness.in_mode("fwd+bwd", lambda op=op: [op()], leaves, [upstream]) for name, op in forwards.items()}
    if case.device == "cuda":
        runs[harness.OURS] = in_order(runs["any order"])
    d, e = leaves[0].shape[-1], leaves[2].shape[-1]
    flops = N * H * L * (L + 1) / 2 * (8.0 * d + 6.0 * e)
    size = 8192 if harness.DEVICE == "cuda" else 1024
    x_DD = torch.randn(size, size, device=harness.DEVICE).to(dtype if can_multiply(leaves[0]) else torch.float32)
    floor = harness.Floor(
        f"{flops / 1e9:.3g} GFLOP of visible pairs in products of {size} x {size}", lambda: x_DD @ x_DD,
        scale=flops / (2.0 * size**3), flops=flops,
    )  # fmt: skip
    compare(
        harness.Problem(
            case, runs, floor=floor, check=harness.agrees_with(exact, 1e-5 if case.dtype == "fp32" else 2e-2),
            gradient_bytes=sum(x.nbytes for x in leaves),
        )
    )  # fmt: skip
