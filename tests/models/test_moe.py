"""Routing as a training step sees it: replayed experts, the balance loss, what is counted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1fast.models.attention import AttentionPlan
from r1fast.models.lora import LoraConfig, add_adapters, init_adapters
from r1fast.models.moe import AddLoss, sequence_balance_loss
from r1fast.stages.training import changed_routings, count_experts
from tests import zoo
from tests.models.conftest import Checkpoint

MakeCheckpoint = Callable[[str], Checkpoint]
Pack = Callable[[list[Tensor]], tuple[Tensor, Tensor]]
LENGTHS = [5, 1, 0, 9]
NUM_EXPERTS, TOP_K = 6, 2


def routed(num_tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), logits.detach().topk(TOP_K).indices


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_balance_loss_is_the_papers(scoring: str) -> None:
    """Equations 17 to 20 of the V3 report, one sequence, expert and token at a time."""
    logits, ids = routed(sum(LENGTHS))
    plan = AttentionPlan(torch.tensor([0, *LENGTHS]).cumsum(0), sum(LENGTHS), torch.device("cpu"))
    loss = sequence_balance_loss(logits, ids, plan.cu_seqlens.diff().long(), plan.rows_T, scoring)
    want, first = torch.zeros((), dtype=torch.float64), 0
    for length in LENGTHS:
        tokens = range(first, first + length)
        first += length
        for expert in range(NUM_EXPERTS):
            fraction, share = 0.0, torch.zeros((), dtype=torch.float64)
            for t in tokens:
                scores = logits[t].sigmoid() if scoring == "sigmoid" else logits[t].softmax(0)
                fraction += NUM_EXPERTS / (TOP_K * length) * (expert in ids[t].tolist())
                share = share + scores[expert] / scores.sum() / length
            want = want + fraction * share
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(want, logits))


def test_an_even_load_has_balance_loss_1_a_sequence() -> None:
    ids = torch.arange(12).view(6, 2) % NUM_EXPERTS
    loss = sequence_balance_loss(
        torch.zeros(6, NUM_EXPERTS), ids, torch.tensor([3, 3]), torch.arange(6) // 3, "sigmoid"
    )
    torch.testing.assert_close(loss, torch.tensor(2.0))


def test_a_loss_inside_the_model_is_minimised_with_the_rest() -> None:
    x, y = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0))
    (AddLoss.apply(x * y, 5 * y * y) * 7).backward()
    assert (x.grad, y.grad) == (21.0, 14.0 + 30.0)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_the_model_adds_it_where_asked(
    make_checkpoint: MakeCheckpoint, documents: list[Tensor], pack: Pack, family: str
) -> None:
    decoder = make_checkpoint(family).load()
    ids, cu_seqlens = pack(documents)
    gate = next(decoder.moe_layers()).gate.weight
    gradients = []
    for scale in (None, torch.tensor(0.0), torch.tensor(0.5)):
        logits, routing = decoder(ids, cu_seqlens, balance_scale=scale, with_routing=True)
        gradients.append(torch.autograd.grad(logits.square().mean(), gate)[0])
        if scale is None:
            assert routing.balance is None
        else:  # of each layer and sequence 1 where even, at most E / K
            even = len(documents) * routing.expert_ids.shape[1]
            assert 0.5 * even < float(routing.balance) < even * decoder.config.n_routed_experts
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_replayed_experts(make_checkpoint: MakeCheckpoint, documents: list[Tensor], pack: Pack, family: str) -> None:
    decoder = make_checkpoint(family).load()
    ids, cu_seqlens = pack(documents)
    logits, (own, _) = decoder(ids, cu_seqlens, with_routing=True)
    num_experts = decoder.config.n_routed_experts
    assert own.shape == (len(ids), len(list(decoder.moe_layers())), decoder.config.num_experts_per_tok)
    # Its own choice, in another order: the same sum over experts, to rounding.
    torch.testing.assert_close(decoder(ids, cu_seqlens, replay_ids_TLK=own.flip(-1)), logits, rtol=1e-4, atol=1e-4)
    others = (own + 1) % num_experts
    replayed, routing = decoder(ids, cu_seqlens, replay_ids_TLK=others, with_routing=True)
    assert torch.equal(routing.expert_ids, others)
    assert not torch.allclose(replayed, logits, rtol=1e-2)
    assert not changed_routings(own.flip(-1), own).any()
    one_changed = own.clone()
    one_changed[3, 0, 0] = next(e for e in range(num_experts) if e not in own[3, 0])
    assert changed_routings(one_changed, own).nonzero().tolist() == [[3, 0]]


def test_experts_are_counted_layer_by_layer() -> None:
    expert_ids_TLK = torch.tensor([[[0, 1], [2, 3]], [[0, 2], [3, 2]]])
    assert count_experts(expert_ids_TLK, 4).tolist() == [[2, 1, 1, 0], [0, 0, 2, 2]]


class _Sizes(TorchDispatchMode):
    """Elements of every fp32 tensor that an op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found = [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found += [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype == torch.float32]
        return out


def test_adapted_experts_widen_no_rows() -> None:
    """Weights are fp32; T K rows of the experts' width are the dtype of the model's, forward and backward, and weights
    get the gradient of a product that is rounded once."""
    decoder = zoo.decoder("qwen3_moe", vocab_size=64)
    add_adapters(decoder, LoraConfig(r=2, target_modules=["experts.gate_up_proj", "experts.down_proj"]))
    init_adapters(decoder, ((name, 0, p) for name, p in decoder.named_parameters()), seed=0)
    experts = next(x.mlp.experts for x in decoder.layers if hasattr(x.mlp, "experts")).bfloat16()
    num_experts, width, F = experts.down_proj.shape
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(50, width, generator=generator).bfloat16().requires_grad_()
    weights_TK = torch.rand(50, 2, generator=generator).requires_grad_()
    ids_TK = torch.randint(num_experts, (50, 2), generator=generator)
    with _Sizes() as sizes:
        out_TD = experts(x_TD, ids_TK, weights_TK)
        found = torch.autograd.grad(out_TD.sum(), (x_TD, weights_TK))
    assert max(sizes.found) < 100 * F
    exact = [x.detach().double().requires_grad_() for x in (x_TD, weights_TK)]
    want_TD = experts.double()(exact[0], ids_TK, exact[1])
    want = torch.autograd.grad(want_TD.sum(), exact)
    for got, right in zip((out_TD, *found), (want_TD, *want), strict=True):
        assert (got - right).norm() < 0.01 * right.norm()
