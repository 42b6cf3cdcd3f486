"""Every public op with its defaults inside torch.compile(fullgraph=True): no graph break, forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_utils import CrossRefFakeMode

import r1fast_kernels as kernels
from tests.kernels.backends import FP32, needs_cpp

pytestmark = needs_cpp

CU_SEQLENS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP32)


def ids(*shape: int, end: int) -> Tensor:
    return torch.randint(end, shape, generator=torch.Generator().manual_seed(1))


def some_ignored() -> Tensor:
    return ids(8, end=11).where(torch.arange(8) % 3 != 0, -100)


HEAD = {"hidden_TD": normal(8, 6), "weight_VD": normal(11, 6), "target_ids_T": ids(8, end=11)}
LOSS = {"cu_seqlens": CU_SEQLENS, "advantages_N": normal(3)}
OTHERS = {"old_logprobs_T": normal(8, seed=2), "ref_logprobs_T": normal(8, seed=3), "beta": 0.1}
TABLE = {"block_table_BN": torch.tensor([[1, 0], [2, 3]], dtype=torch.int32), "lengths_B": torch.tensor([20, 3]).int()}
MASK = torch.arange(8) % 4 != 1
# By name: an op, and what it needs beside its defaults.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "selective_logprobs": ("selective_logprobs", {"logits_TV": normal(8, 11), "target_ids_T": ids(8, end=11)}),
    "linear_logprobs": ("linear_logprobs", HEAD),
    "linear_cross_entropy": ("linear_cross_entropy", HEAD | {"target_ids_T": some_ignored()}),
    "linear_cross_entropy-sum": ("linear_cross_entropy", HEAD | {"target_ids_T": some_ignored(), "reduction": "sum"}),
    "linear_cross_entropy-none": ("linear_cross_entropy", HEAD | {"target_ids_T": some_ignored(), "reduction": "none"}),
    "group_advantages": ("group_advantages", {"rewards_N": normal(6), "group_ids_N": ids(6, end=2)}),
    "grpo_loss": ("grpo_loss", {"logprobs_T": normal(8)} | LOSS | OTHERS),
    "grpo_loss-masked": ("grpo_loss", {"logprobs_T": normal(8), "loss_mask_T": MASK} | LOSS | OTHERS),
    "linear_grpo_loss": ("linear_grpo_loss", HEAD | LOSS | OTHERS),
    "linear_grpo_loss-rewards": (
        "linear_grpo_loss",
        HEAD | {"cu_seqlens": CU_SEQLENS, "rewards_N": normal(3), "group_ids_N": ids(3, end=1)},
    ),
    "linear_grpo_loss-masked": ("linear_grpo_loss", HEAD | LOSS | OTHERS | {"loss_mask_T": MASK}),
    "linear_grpo_loss-masked sequences": (
        "linear_grpo_loss", HEAD | LOSS | OTHERS | {"loss_mask_T": MASK, "importance_level": "sequence"}
    ),
    "route_topk": ("route_topk", {"router_logits_TE": normal(5, 4), "bias_E": normal(4), "top_k": 2}),
    "moe_dispatch": ("moe_dispatch", {"expert_ids_TK": ids(5, 2, end=4), "num_experts": 3}),
    "grouped_gemm": (
        "grouped_gemm",
        {"x_MD": normal(5, 6), "weight": normal(3, 8, 6), "offsets_E": torch.tensor([2, 2, 4])},
    ),
    "moe_experts": (
        "moe_experts",
        {"hidden_TD": normal(5, 6), "gate_up_E2FD": normal(3, 8, 6), "down_EDF": normal(3, 6, 4),
         "expert_ids_TK": ids(5, 2, end=4), "weights_TK": normal(5, 2).abs()},
    ),
    "decode_attention": (
        "decode_attention",
        {"q_BHd": normal(2, 4, 8), "k_SKd": normal(64, 2, 8), "v_SKe": normal(64, 2, 8), "scale": 0.3} | TABLE,
    ),
    "packed_attention": (
        "packed_attention",
        {"q_THd": normal(8, 4, 8), "k_TKd": normal(8, 2, 8), "v_TKe": normal(8, 2, 8), "cu_seqlens": CU_SEQLENS,
         "scale": 0.3},
    ),
    "rms_norm": ("rms_norm", {"x": normal(5, 6), "weight_D": normal(6)}),
    "sample_tokens": ("sample_tokens", {"logits_BV": normal(5, 11), "seeds_B": ids(5, end=1 << 40)}),
}  # fmt: skip
LEAVES = {
    "hidden_TD", "weight_VD", "logits_TV", "logprobs_T", "router_logits_TE", "x_MD", "weight", "gate_up_E2FD",
    "down_EDF", "weights_TK", "q_THd", "k_TKd", "v_TKe", "x", "weight_D",
}  # fmt: skip


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in tensors(part)]


def run(function: Callable[..., Any], given: dict[str, Any]) -> list[Tensor]:
    """What comes out, and the gradient of every input that has one."""
    given = {
        name: value.detach().clone().requires_grad_(name in LEAVES) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    found = tensors(function(**given))
    leaves = [given[name] for name in given if name in LEAVES]
    wanted = [out for out in found if out.requires_grad]
    gradients = torch.autograd.grad([out.sum() for out in wanted], leaves) if leaves else ()
    return [*(out.detach() for out in found), *gradients]


@pytest.mark.parametrize("name", CALLS)
def test_no_graph_break(name: str) -> None:
    op, given = CALLS[name]
    torch._dynamo.reset()
    function = getattr(kernels, op)
    compiled = torch.compile(lambda **given: function(**given), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, given), run(function, given))


@pytest.mark.parametrize("name", CALLS)
def test_strides_are_those_that_a_graph_expects(name: str) -> None:
    """Of inputs that lie transposed too: what a fake tensor promises is compared after each operator."""
    op, given = CALLS[name]
    transposed = {name: value.mT.contiguous().mT if name in LEAVES and value.dim() > 1 else value
                  for name, value in given.items()}  # fmt: skip
    with CrossRefFakeMode(lambda op: op.namespace != "r1fast"):
        run(getattr(kernels, op), transposed)


def test_random_seeds_are_drawn_inside() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kernels.sample_tokens(x), backend="aot_eager", fullgraph=True)
    found, _ = compiled(normal(5, 11))
    assert ((found >= 0) & (found < 11)).all()


def test_no_op_is_left_out() -> None:
    assert {op for op, _ in CALLS.values()} == set(kernels.__all__)
