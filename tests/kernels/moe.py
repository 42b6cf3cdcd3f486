"""Inputs of the tests of the mixture-of-experts ops, and their three oracles in transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from r1fast_kernels import dispatch, grouped_gemm_vendor, moe_experts

NAMES = ("hidden", "gate_up", "down", "weights")


@dataclass(frozen=True)
class Layer:
    hidden_TD: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    upstream_TD: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden_TD, self.gate_up_E2FD, self.down_EDF, self.weights_TK

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> "Layer":
        """The weights of the choices stay fp32 where the rest is narrower."""
        wide = torch.promote_types(dtype, torch.float32) if dtype else None
        tensors = {name: getattr(self, name).detach().to(device, dtype) for name in self.__dataclass_fields__}
        tensors["ids_TK"] = self.ids_TK.to(device)
        tensors["weights_TK"] = self.weights_TK.detach().to(device, wide)
        return Layer(**tensors)


def random_layer(
    num_tokens: int = 41, num_experts: int = 5, k: int = 2, width: int = 12, inner: int = 7, how: str = "random"
) -> Layer:
    """fp64, of values that bf16 holds exactly, so that all dtypes see the same numbers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).bfloat16().double()

    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :k].contiguous()
    if how == "one-takes-all":
        ids.fill_(num_experts // 2)
    elif how == "some-skipped":  # ids >= E, and not sorted to the end
        ids[::3, 0] = num_experts
        ids[1::3, -1] = num_experts + 7
    elif how == "all-skipped":
        ids.fill_(num_experts)
    elif how == "empty-experts":  # the first and the last get nothing
        ids.clamp_(1, max(1, num_experts - 2))
    return Layer(
        normal(num_tokens, width),
        normal(num_experts, 2 * inner, width, scale=width**-0.5),
        normal(num_experts, width, inner, scale=inner**-0.5),
        ids,
        torch.rand(num_tokens, k, generator=generator).bfloat16().double(),
        normal(num_tokens, width),
    )


def vendor_takes_all(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grouped products of any number of bf16 rows on any device are torch's. Rows that it need not write are NaN.

    Returns what it multiplies from now on.
    """
    vendor, seen = grouped_gemm_vendor, list[str]()
    multiply, weight_gradient = vendor.multiply, vendor.weight_gradient

    def poisoned(x_MD: Tensor, weight: Tensor, offsets_E: Tensor, transpose_weight: bool) -> Tensor:
        seen.append("multiply")
        out_MN = multiply(x_MD, weight, offsets_E, transpose_weight)
        out_MN[torch.arange(len(out_MN), device=out_MN.device) >= offsets_E[-1]] = torch.nan
        return out_MN

    def counted(x_MD: Tensor, y_MN: Tensor, offsets_E: Tensor) -> Tensor:
        seen.append("weight_gradient")
        return weight_gradient(x_MD, y_MN, offsets_E)

    monkeypatch.setattr(dispatch, "capability", lambda device: (9, 0))
    monkeypatch.setattr(vendor, "MIN_ROWS", 0)
    monkeypatch.setattr(vendor, "multiply", poisoned)
    monkeypatch.setattr(vendor, "weight_gradient", counted)
    return seen


def run(layer: Layer, needs: tuple[bool, ...] = (True,) * 4, **options: object) -> list[Tensor]:
    """The output, and the gradients that are needed."""
    leaves = [x.detach().clone().requires_grad_(needed) for x, needed in zip(layer.leaves, needs)]
    hidden, gate_up, down, weights = leaves
    out = moe_experts(hidden, gate_up, down, layer.ids_TK, weights, **options)
    wanted = [x for x in leaves if x.requires_grad]
    return [out, *(torch.autograd.grad(out, wanted, layer.upstream_TD) if wanted else ())]


def transformers_experts(layer: Layer, family: str = "deepseek_v3") -> list[Tensor]:
    sizes = {"hidden_size": layer.hidden_TD.shape[1]}
    num_experts, inner = len(layer.down_EDF), layer.down_EDF.shape[2]
    if family == "deepseek_v3":
        config = DeepseekV3Config(moe_intermediate_size=inner, n_routed_experts=num_experts, **sizes)
        experts_class = DeepseekV3Experts
    elif family == "qwen3_moe":
        config = Qwen3MoeConfig(moe_intermediate_size=inner, num_experts=num_experts, **sizes)
        experts_class = Qwen3MoeExperts
    else:
        config = MixtralConfig(intermediate_size=inner, num_local_experts=num_experts, **sizes)
        experts_class = MixtralExperts
    config._experts_implementation = "eager"
    experts = experts_class(config).to(layer.hidden_TD)
    leaves = [x.detach().clone().requires_grad_() for x in layer.leaves]
    parameters = {"gate_up_proj": leaves[1], "down_proj": leaves[2]}
    # Not every release knows skipped choices: they are any expert's, with weight 0.
    kept = layer.ids_TK < num_experts
    out = torch.func.functional_call(
        experts, parameters, (leaves[0], layer.ids_TK.where(kept, 0), leaves[3].where(kept, 0))
    )
    return [out, *torch.autograd.grad(out, leaves, layer.upstream_TD)]


def without_rows(layer: Layer) -> Layer:
    return replace(
        layer, **{name: getattr(layer, name)[:0] for name in ("hidden_TD", "ids_TK", "weights_TK", "upstream_TD")}
    )


@contextmanager
def bf16_products(widened: bool) -> Iterator[None]:
    """Multiply bf16 as the one or the other kind of CPU does: widened to fp32, or as it is."""
    before = torch.ops.r1fast._set_widens_bf16(widened)
    try:
        yield
    finally:
        torch.ops.r1fast._set_widens_bf16(before)
