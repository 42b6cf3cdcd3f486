"""moe_experts, against its reference and transformers' experts (its loop, and torch's grouped products), and on a GPU
Liger, scattermoe and megablocks (its dropless layer over the grouped_gemm package) where they are installed.

Floor: 6 T K D F FLOPs forward, twice that backward, as bare products of all rows with the weights of one expert.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from bench import harness, head
from bench.cases import Case
from r1fast_kernels import hf, moe_experts

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


def experts_module(leaves: Leaves, implementation: str) -> DeepseekV3Experts:
    """Of transformers, on meta."""
    hidden_TD, _, down, _ = leaves
    with torch.device("meta"):
        config = DeepseekV3Config(
            hidden_size=hidden_TD.shape[1], moe_intermediate_size=down.shape[2], n_routed_experts=len(down)
        )
        config._experts_implementation = implementation
        return DeepseekV3Experts(config)


def in_module(leaves: Leaves, ids_TK: Tensor, upstream_TD: Tensor, implementation: str) -> harness.Run:
    """A training step's part in a model of transformers: its call of the module, and gradients that begin as None."""
    hidden_TD, gate_up, down, weights_TK = leaves
    experts = experts_module(leaves, implementation)
    experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(gate_up.detach()), torch.nn.Parameter(down.detach())
    wanted = hidden_TD, experts.gate_up_proj, experts.down_proj, weights_TK

    def run() -> harness.Outputs:
        for leaf in wanted:
            leaf.grad = None
        out_TD = experts(hidden_TD, ids_TK, weights_TK).to(upstream_TD.dtype)
        out_TD.backward(upstream_TD)
        return [out_TD.detach(), *(leaf.grad for leaf in wanted)]

    return run


def transformers_experts(leaves: Leaves, ids_TK: Tensor, implementation: str) -> Callable[[], Tensor]:
    hidden_TD, gate_up, down, weights_TK = leaves
    experts = experts_module(leaves, implementation)
    parameters = {"gate_up_proj": gate_up, "down_proj": down}
    return lambda: torch.func.functional_call(experts, parameters, (hidden_TD, ids_TK, weights_TK))


def scattermoe_experts(leaves: Leaves, ids_TK: Tensor) -> Callable[[], Tensor]:
    """Its GLUMLP.forward, with gate and up in our order."""
    hidden_TD, gate_up, down, weights_TK = leaves

    def forward() -> Tensor:
        from scattermoe import flatten_sort_count, parallel_linear

        order = flatten_sort_count(ids_TK, num_experts=len(down))
        inner = parallel_linear(hidden_TD, gate_up.mT, ids_TK.shape[1], *order, grouped_out=True)
        gate, up = inner.chunk(2, dim=-1)
        gates_TK = weights_TK.to(hidden_TD.dtype)
        return parallel_linear(silu(gate) * up, down.mT, 1, *order, grouped_in=True, gates=gates_TK)

    return forward


MegablocksLeaves = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # hidden, gate, up, down transposed, weights


def to_megablocks(leaves: Leaves) -> MegablocksLeaves:
    """Three weights [E F, D]: its own layout, so that it is not timed copying ours."""
    hidden_TD, gate_up, down, weights_TK = leaves
    copies = (x.detach().flatten(0, 1).contiguous() for x in (*gate_up.chunk(2, dim=1), down.mT))
    gate, up, down_t = (x.requires_grad_() for x in copies)
    return hidden_TD, gate, up, down_t, weights_TK


def from_megablocks(outputs: harness.Outputs, num_experts: int) -> harness.Outputs:
    """Output and gradients of its leaves in the order and layout of ours."""
    if len(outputs) == 1:
        return outputs
    out, hidden, *weights, gates = outputs
    gate, up, down_t = (x.unflatten(0, (num_experts, -1)) for x in weights if x is not None)
    return [out, hidden, torch.cat([gate, up], 1), down_t.mT, gates]


def megablocks_experts(leaves: MegablocksLeaves, ids_TK: Tensor, num_experts: int) -> Callable[[], Tensor]:
    """Its dropless layer behind the router (0.10; its block-sparse kernels refuse Triton from 3.2 on)."""
    hidden_TD, gate, up, down_t, weights_TK = leaves

    @cache
    def layer() -> torch.nn.Module:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import ParallelDroplessMLP

        return ParallelDroplessMLP(
            Arguments(
                hidden_size=hidden_TD.shape[1], ffn_hidden_size=len(gate) // num_experts, moe_num_experts=num_experts,
                moe_top_k=ids_TK.shape[1], moe_loss_weight=0, bias=False, mlp_type="glu", mlp_impl="grouped",
                activation_fn=silu, fp16=False, bf16=True, device=torch.device("meta"),
            )
        )  # fmt: skip

    parameters = {"mlp.w1": gate, "mlp.v1": up, "mlp.w2": down_t}

    def forward() -> Tensor:
        inputs = hidden_TD, None, weights_TK.to(hidden_TD.dtype), ids_TK  # the second only for its auxiliary loss
        return torch.func.functional_call(layer(), parameters, inputs)

    return forward


def floor(case: Case, leaves: Leaves) -> harness.Floor:
    T, D, F, K = (case.sizes[letter] for letter in "TDFK")
    dtype = leaves[0].dtype if head.can_multiply(leaves[0]) else torch.float32
    backward = case.mode != "fwd"

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
    if harness.DEVICE == "cuda" and importlib.util.find_spec("scattermoe"):
        found["scattermoe"] = scattermoe_experts(leaves, ids_TK)
    return found


def test_moe_experts(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    leaves, ids_TK, upstream_TD = random_layer(case)

    def outputs_of(forward: Callable[[], Tensor]) -> Callable[[], Sequence[Tensor]]:
        # transformers' grouped products return fp32 for bf16 inputs with fp32 weights of the choices, others do not.
        return lambda: [forward().to(upstream_TD.dtype)]

    if case.mode == "module":
        hf.register()
        names = {harness.OURS: hf.NAME, "eager": "eager", "grouped_mm": "grouped_mm"}
        runs = {name: in_module(leaves, ids_TK, upstream_TD, found) for name, found in names.items()}
    else:
        runs = {
            name: harness.in_mode(case.mode, outputs_of(forward), leaves, [upstream_TD])
            for name, forward in contenders(leaves, ids_TK).items()
        }
    num_experts = case.sizes["E"]
    if case.mode != "module" and harness.DEVICE == "cuda" and importlib.util.find_spec("megablocks"):
        own = to_megablocks(leaves)
        forward = megablocks_experts(own, ids_TK, num_experts)
        runs["megablocks"] = harness.in_mode(case.mode, outputs_of(forward), own, [upstream_TD])
    wanted = exact(case, leaves, ids_TK, upstream_TD)
    agrees = harness.agrees_with(wanted, 1e-5 if case.dtype == "fp32" else 1e-2)

    def check(name: str, outputs: harness.Outputs) -> None:
        agrees(name, from_megablocks(outputs, num_experts) if name == "megablocks" else outputs)

    compare(
        harness.Problem(
            case,
            head.runnable(leaves[0], runs),
            floor=floor(case, leaves),
            check=check,
            gradient_bytes=sum(x.nbytes for x in leaves) if case.mode != "fwd" else 0,
        )
    )
