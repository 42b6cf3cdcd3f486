"""moe_experts, against its reference, transformers' experts (its loop, and torch's grouped products) and Liger.

Floor: 6 T K D F FLOPs forward, twice that backward, as bare products of all rows with the weights of one expert.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from bench import harness, head
from bench.cases import Case
from r1fast_kernels import moe_experts

Leaves = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden, gate_up, down, weights


def random_layer(case: Case) -> tuple[Leaves, Tensor, Tensor]:
    """Leaves, ids and an upstream gradient. Each token's experts are drawn evenly: their loads differ by chance."""
    T, D, F, E, K = (case.sizes[letter] for letter in "TDFEK")
    generator, dtype = harness.generator(), harness.DTYPES[case.dtype]

    def normal(*shape: int, scale: float = 1) -> Tensor:
        return torch.randn(*shape, generator=generator, device=harness.DEVICE).mul_(scale).to(dtype)

    ids_TK = torch.rand(T, E, generator=generator, device=harness.DEVICE).topk(K).indices
    weights_TK = torch.rand(T, K, generator=generator, device=harness.DEVICE)
    leaves = normal(T, D), normal(E, 2 * F, D, scale=D**-0.5), normal(E, D, F, scale=F**-0.5), weights_TK
    hidden, gate_up, down, weights = (x.requires_grad_() for x in leaves)
    return (hidden, gate_up, down, weights), ids_TK, normal(T, D)


def transformers_experts(leaves: Leaves, ids_TK: Tensor, implementation: str) -> Callable[[], Tensor]:
    hidden_TD, gate_up, down, weights_TK = leaves
    with torch.device("meta"):
        config = DeepseekV3Config(
            hidden_size=hidden_TD.shape[1], moe_intermediate_size=down.shape[2], n_routed_experts=len(down)
        )
        config._experts_implementation = implementation
        experts = DeepseekV3Experts(config)
    parameters = {"gate_up_proj": gate_up, "down_proj": down}
    return lambda: torch.func.functional_call(experts, parameters, (hidden_TD, ids_TK, weights_TK))


def floor(case: Case, leaves: Leaves) -> harness.Floor:
    T, D, F, K = (case.sizes[letter] for letter in "TDFK")
    dtype = leaves[0].dtype if head.can_multiply(leaves[0]) else torch.float32
    backward = case.mode == "fwd+bwd"

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=harness.DEVICE).to(dtype)  # not zeros: a GPU multiplies those faster

    x_MD, gate_up_M2F, inner_MF = new(T * K, D), new(T * K, 2 * F), new(T * K, F)
    gate_up_2FD, down_DF = new(2 * F, D), new(D, F)
    out_MD, out_M2F, out_MF = (torch.empty_like(x) for x in (x_MD, gate_up_M2F, inner_MF))
    out_2FD, out_DF = torch.empty_like(gate_up_2FD), torch.empty_like(down_DF)

    def run() -> None:
        torch.mm(x_MD, gate_up_2FD.T, out=out_M2F)
        torch.mm(inner_MF, down_DF.T, out=out_MD)
        if backward:
            torch.mm(x_MD, down_DF, out=out_MF)
            torch.mm(x_MD.T, inner_MF, out=out_DF)
            torch.mm(gate_up_M2F.T, x_MD, out=out_2FD)
            torch.mm(gate_up_M2F, gate_up_2FD, out=out_MD)

    times = 18 if backward else 6
    return harness.Floor(
        f"{times} T K D F FLOPs in bare products ({str(dtype).removeprefix('torch.')})", run,
        flops=float(times) * T * K * D * F,
    )  # fmt: skip


def exact(case: Case, leaves: Leaves, ids_TK: Tensor, upstream_TD: Tensor) -> list[Tensor]:
    """By the reference: in fp64 on a CPU, in fp32 on a GPU, whose memory it has to fit."""
    dtype = torch.float64 if harness.DEVICE == "cpu" else torch.float32
    wide = [x.detach().to(dtype).requires_grad_() for x in leaves]
    out = moe_experts(*wide[:3], ids_TK, wide[3], impl="reference")
    if case.mode == "fwd":
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, wide, upstream_TD.to(dtype))]


def contenders(leaves: Leaves, ids_TK: Tensor) -> dict[str, Callable[[], Tensor]]:
    hidden_TD, gate_up, down, weights_TK = leaves
    inputs = hidden_TD, gate_up, down, ids_TK, weights_TK
    found: dict[str, Callable[[], Tensor]] = {
        harness.OURS: lambda: moe_experts(*inputs),
        "reference": lambda: moe_experts(*inputs, impl="reference"),
        "eager": transformers_experts(leaves, ids_TK, "eager"),
        "grouped_mm": transformers_experts(leaves, ids_TK, "grouped_mm"),
    }
    if harness.DEVICE == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        found["Liger"] = lambda: LigerFusedMoEFunction.apply(
            hidden_TD, gate_up, down, ids_TK, weights_TK.to(hidden_TD.dtype)
        )
    return found


def test_moe_experts(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    leaves, ids_TK, upstream_TD = random_layer(case)

    def outputs_of(forward: Callable[[], Tensor]) -> Callable[[], Sequence[Tensor]]:
        # transformers' grouped products return fp32 for bf16 inputs with fp32 weights of the choices, others do not.
        return lambda: [forward().to(upstream_TD.dtype)]

    runs = {
        name: harness.in_mode(case.mode, outputs_of(forward), leaves, [upstream_TD])
        for name, forward in contenders(leaves, ids_TK).items()
    }
    compare(
        harness.Problem(
            case,
            head.runnable(leaves[0], runs),
            floor=floor(case, leaves),
            check=harness.agrees_with(exact(case, leaves, ids_TK, upstream_TD), 1e-5 if case.dtype == "fp32" else 1e-2),
            gradient_bytes=sum(x.nbytes for x in leaves) if case.mode == "fwd+bwd" else 0,
        )
    )
