"""grouped_gemm, against its reference (a loop over the experts), torch's grouped_mm, and on a GPU the grouped_gemm
package (`gmm`) and scattermoe where they are installed.

It is the gate/up product of moe_experts: M = T K rows sorted by expert, weights [E, N, D], N = 2 F.
Floor: 2 M D N FLOPs forward, twice that backward, as bare products of all rows with the weight of one expert.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from bench import harness, head
from bench.cases import Case
from r1fast_kernels.grouped_gemm import grouped_gemm

Leaves = tuple[Tensor, Tensor]  # x_MD, weight_END


def random_rows(case: Case) -> tuple[Leaves, Tensor, Tensor]:
    """Leaves, rows of each expert and an upstream gradient. Experts are drawn as in bench_moe_experts."""
    T, D, F, E, K = (case.sizes[letter] for letter in "TDFEK")
    generator, dtype = harness.generator(), harness.DTYPES[case.dtype]

    def normal(*shape: int, scale: float = 1) -> Tensor:
        return torch.randn(*shape, generator=generator, device=harness.DEVICE).mul_(scale).to(dtype)

    ids_TK = torch.rand(T, E, generator=generator, device=harness.DEVICE).topk(K).indices
    counts_E = ids_TK.flatten().bincount(minlength=E)
    leaves = normal(T * K, D).requires_grad_(), normal(E, 2 * F, D, scale=D**-0.5).requires_grad_()
    return leaves, counts_E, normal(T * K, 2 * F)


def floor(case: Case, leaves: Leaves) -> harness.Floor:
    x_MD, weight_ND = leaves[0].detach(), leaves[1][0].detach()
    if not head.can_multiply(x_MD):
        x_MD, weight_ND = x_MD.float(), weight_ND.float()
    (M, D), N = x_MD.shape, len(weight_ND)
    backward = case.mode == "fwd+bwd"
    y_MN = torch.randn(M, N, device=harness.DEVICE).to(x_MD.dtype)  # not zeros: a GPU multiplies those faster
    out_MN, out_MD, out_ND = (torch.empty_like(x) for x in (y_MN, x_MD, weight_ND))

    def run() -> None:
        torch.mm(x_MD, weight_ND.T, out=out_MN)
        if backward:
            torch.mm(y_MN, weight_ND, out=out_MD)
            torch.mm(y_MN.T, x_MD, out=out_ND)

    times = 6 if backward else 2
    return harness.Floor(
        f"{times} M D N FLOPs in bare products ({str(x_MD.dtype).removeprefix('torch.')})", run,
        flops=float(times) * M * D * N,
    )  # fmt: skip


def exact(case: Case, leaves: Leaves, offsets_E: Tensor, upstream_MN: Tensor) -> list[Tensor]:
    """By the reference: in fp64 on a CPU, in fp32 on a GPU, whose memory it has to fit."""
    dtype = torch.float64 if harness.DEVICE == "cpu" else torch.float32
    wide = [x.detach().to(dtype).requires_grad_() for x in leaves]
    out = grouped_gemm(*wide, offsets_E, impl="reference")
    if case.mode == "fwd":
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, wide, upstream_MN.to(dtype))]


def gmm_product(leaves: Leaves, counts_E: Tensor) -> Callable[[], Tensor]:
    """It wants the counts on the host. That they are there is not timed: a training step would wait for them."""
    host_counts_E = counts_E.cpu()

    def forward() -> Tensor:
        from grouped_gemm import ops

        return ops.gmm(*leaves, host_counts_E, trans_b=True)

    return forward


def scattermoe_product(leaves: Leaves, counts_E: Tensor, offsets_E: Tensor) -> Callable[[], Tensor]:
    """Its scatter-to-scatter product with both sides in the order of the experts."""
    x_MD, weight_END = leaves
    experts_M = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(counts_E)
    order_M, ends_E = torch.arange(len(x_MD), device=counts_E.device), offsets_E.long()

    def forward() -> Tensor:
        from scattermoe import parallel_linear

        rows = experts_M, order_M, ends_E
        return parallel_linear(x_MD, weight_END.mT, 1, *rows, grouped_in=True, grouped_out=True)

    return forward


def contenders(leaves: Leaves, counts_E: Tensor) -> dict[str, Callable[[], Tensor]]:
    x_MD, weight_END = leaves
    offsets_E = counts_E.cumsum(0).int()
    found: dict[str, Callable[[], Tensor]] = {
        harness.OURS: lambda: grouped_gemm(x_MD, weight_END, offsets_E),
        "reference": lambda: grouped_gemm(x_MD, weight_END, offsets_E, impl="reference"),
        "grouped_mm": lambda: torch.nn.functional.grouped_mm(x_MD, weight_END.mT, offs=offsets_E),
    }
    # Imported by their first call: one that is installed for another torch says so in its row.
    if harness.DEVICE == "cuda" and importlib.util.find_spec("grouped_gemm"):
        found["gmm"] = gmm_product(leaves, counts_E)
    if harness.DEVICE == "cuda" and importlib.util.find_spec("scattermoe"):
        found["scattermoe"] = scattermoe_product(leaves, counts_E, offsets_E)
    return found


def test_grouped_gemm(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    leaves, counts_E, upstream_MN = random_rows(case)

    def outputs_of(forward: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [forward()]

    runs = {
        name: harness.in_mode(case.mode, outputs_of(forward), leaves, [upstream_MN])
        for name, forward in contenders(leaves, counts_E).items()
    }
    wanted = exact(case, leaves, counts_E.cumsum(0).int(), upstream_MN)
    compare(
        harness.Problem(
            case,
            head.runnable(leaves[0], runs),
            floor=floor(case, leaves),
            check=harness.agrees_with(wanted, 1e-5 if case.dtype == "fp32" else 1e-2),
            gradient_bytes=sum(x.nbytes for x in leaves) if case.mode == "fwd+bwd" else 0,
        )
    )
