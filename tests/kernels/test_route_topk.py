import pytest
import torch
from transformers import DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from r1fast_kernels import route_topk


def by_expert(ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[T, E], 0 where not chosen: the order within K is free."""
    return torch.zeros(len(ids_TK), num_experts).scatter(1, ids_TK, weights_TK)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_equals_deepseek_v3(norm_topk_prob: bool) -> None:
    """Biases around -1 push every score below 0: a mask of 0 instead of -inf would choose forbidden groups."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=6,
        norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.randn(32) * 0.5 - 1)
    logits, weights, ids = router(torch.randn(5000, 16))
    our_ids, our_weights, counts = route_topk(
        logits, router.e_score_correction_bias, top_k=6, n_group=8, topk_group=4, norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    assert torch.equal(our_ids.sort(1).values, ids.sort(1).values)
    torch.testing.assert_close(by_expert(our_ids, our_weights, 32), by_expert(ids, weights, 32))
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=32))
    ours, theirs = (torch.autograd.grad(w.square().sum(), logits, retain_graph=True)[0] for w in (our_weights, weights))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_equals_qwen3_moe(norm_topk_prob: bool) -> None:
    torch.manual_seed(0)
    router = Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=16, num_experts=32, num_experts_per_tok=4, norm_topk_prob=norm_topk_prob)
    )
    torch.nn.init.normal_(router.weight)
    logits, weights, ids = router(torch.randn(2000, 16))
    our_ids, our_weights, _ = route_topk(logits, None, top_k=4, norm_topk_prob=norm_topk_prob, scoring="softmax")
    torch.testing.assert_close(by_expert(our_ids, our_weights, 32), by_expert(ids, weights, 32))


def test_by_hand_with_groups() -> None:
    """Bias decides who is chosen; the weights do not contain it."""
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.6]])
    bias = torch.tensor([0.0, 0.0, 0.2, 0.0])
    # Groups {0, 1}: 1.0 and {2, 3}: 1.3. Only the second is kept, though expert 0 has the best score.
    ids, weights, counts = route_topk(scores.logit(), bias, top_k=1, n_group=2, topk_group=1, norm_topk_prob=False)
    assert ids.tolist() == [[2]] and counts.tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(weights, torch.tensor([[0.5]]))


def test_ties_go_to_the_lowest_expert() -> None:
    ids, weights, _ = route_topk(torch.zeros(3, 64), torch.zeros(64), top_k=5, n_group=8, topk_group=2)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_every_expert_and_no_token() -> None:
    ids, _, counts = route_topk(torch.randn(4, 6), None, top_k=6)
    assert torch.equal(ids.sort(1).values, torch.arange(6).expand(4, 6)) and counts.tolist() == [4] * 6
    ids, weights, counts = route_topk(torch.zeros(0, 6), None, top_k=2)
    assert ids.shape == weights.shape == (0, 2) and not counts.any()


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="n_group to divide the experts"):
        route_topk(torch.zeros(1, 6), None, top_k=1, n_group=4)
    with pytest.raises(ValueError, match="1 <= top_k <= 2"):
        route_topk(torch.zeros(1, 6), None, top_k=3, n_group=3, topk_group=1)
    with pytest.raises(ValueError, match="expected sigmoid or softmax"):
        route_topk(torch.zeros(1, 6), None, top_k=3, scoring="relu")
