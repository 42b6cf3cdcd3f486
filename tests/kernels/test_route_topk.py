from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from r1fast_kernels import route_topk
from tests.kernels.backends import BF16, FP16, FP32, FP64, Backend, assert_as_exact, assert_same_bits, needs_cpp

NAN, INF = float("nan"), float("inf")


def random_logits(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)) * 2


def random_bias(num_experts: int) -> Tensor:
    """Around -1: every choice is below 0."""
    return torch.randn(num_experts, generator=torch.Generator().manual_seed(9)) * 0.3 - 1


# One token, past a vector's lanes, prime sizes, K = 1 and K = E, a list of the best and (K > 64) a sort, groups of one.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (37, 32, {"top_k": 4}),
    "T1": (1, 32, {"top_k": 4}),
    "T0": (0, 32, {"top_k": 4}),
    "T17-E1": (17, 1, {"top_k": 1}),
    "K1": (37, 16, {"top_k": 1}),
    "K-is-E-prime": (19, 61, {"top_k": 61}),
    "groups": (37, 32, {"top_k": 6, "n_group": 8, "topk_group": 4}),
    "groups-of-one": (37, 6, {"top_k": 2, "n_group": 6, "topk_group": 3}),
    "all-groups": (37, 32, {"top_k": 6, "n_group": 8, "topk_group": 8}),
    "K70-of-E300": (9, 300, {"top_k": 70}),
    "E2048": (5, 2048, {"top_k": 8}),
}


def run(logits: Tensor, bias: Tensor | None, device: str, **options: Any) -> list[Tensor]:
    """ids, counts, weights and the gradient of a sum in which every weight counts otherwise."""
    leaf = logits.detach().clone().to(device).requires_grad_()
    ids, weights, counts = route_topk(leaf, None if bias is None else bias.to(device), **options)
    scale = torch.linspace(-1, 2, weights.numel(), device=device).view_as(weights)
    (weights * scale).sum().backward()
    return [ids, counts, weights, leaf.grad]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["norm", ""])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_torch(backend: Backend, name: str, scoring: str, norm_topk_prob: bool, dtype: torch.dtype) -> None:
    """The same experts in the same order; weights within 2x and gradients within 3x the error of plain torch."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    num_tokens, num_experts, sizes = CASES[name]
    if backend.interpreted:
        num_tokens = min(num_tokens, 5)
    logits, bias = random_logits(num_tokens, num_experts).to(dtype), random_bias(num_experts)
    options = sizes | {"scoring": scoring, "norm_topk_prob": norm_topk_prob, "routed_scaling_factor": 2.5}
    plain = run(logits, bias, "cpu", impl="reference", **options)
    exact = run(logits.double(), bias.double(), "cpu", replay_ids_TK=plain[0], impl="reference", **options)
    got = run(logits, bias, backend.device, impl=backend.impl, **options)
    assert torch.equal(got[0].cpu(), plain[0]) and torch.equal(got[1].cpu(), plain[1])
    assert got[2].dtype == plain[2].dtype and got[3].dtype == dtype
    assert_as_exact(got[2], plain[2], exact[2], 2, "weights")
    assert_as_exact(got[3], plain[3], exact[3], 3, "gradient")


def by_expert(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """[T, E], 0 where not chosen: the order within K is free."""
    return weights_TK.new_zeros(len(ids_TK), num_experts).scatter(1, ids_TK, weights_TK)


def assert_same_routing(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], logits: Tensor) -> None:
    num_experts = logits.shape[1]
    assert torch.equal(ours[0].sort(1).values, theirs[0].sort(1).values)
    torch.testing.assert_close(by_expert(*ours, num_experts), by_expert(*theirs, num_experts))
    scale = torch.linspace(-1, 2, num_experts)
    gradients = [
        torch.autograd.grad((by_expert(*found, num_experts) * scale).sum(), logits, retain_graph=True)[0]
        for found in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_20000_routings_equal_deepseek_v3(norm_topk_prob: bool) -> None:
    """Biases around -1 push every score below 0: a mask of 0 instead of -inf would choose forbidden groups."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=6,
        norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.randn(32) * 0.5 - 1)
    logits, weights, ids = router(torch.randn(20_000, 16))
    our_ids, our_weights, counts = route_topk(
        logits, router.e_score_correction_bias, top_k=6, n_group=8, topk_group=4, norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=2.5, impl="cpp",
    )  # fmt: skip
    assert_same_routing((our_ids, our_weights), (ids, weights), logits)
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=32))


@needs_cpp
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_equals_qwen3_moe(norm_topk_prob: bool) -> None:
    torch.manual_seed(0)
    router = Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=16, num_experts=128, num_experts_per_tok=8, norm_topk_prob=norm_topk_prob)
    )
    torch.nn.init.normal_(router.weight)
    logits, weights, ids = router(torch.randn(2000, 16))
    ours = route_topk(logits, None, top_k=8, norm_topk_prob=norm_topk_prob, scoring="softmax", impl="cpp")
    assert_same_routing(ours[:2], (ids, weights), logits)


@needs_cpp
def test_equals_mixtral() -> None:
    torch.manual_seed(0)
    router = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2))
    torch.nn.init.normal_(router.weight)
    logits, weights, ids = router(torch.randn(2000, 16))
    ours = route_topk(logits, None, top_k=2, scoring="softmax", impl="cpp")
    assert_same_routing(ours[:2], (ids, weights), logits)


def test_by_hand_with_groups(backend: Backend) -> None:
    """Bias decides who is chosen; the weights do not contain it."""
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.6]], device=backend.device)
    bias = torch.tensor([0.0, 0.0, 0.2, 0.0], device=backend.device)
    # Groups {0, 1}: 1.0 and {2, 3}: 1.3. Only the second is kept, though expert 0 has the best score.
    ids, weights, counts = route_topk(
        scores.logit(), bias, top_k=1, n_group=2, topk_group=1, norm_topk_prob=False, impl=backend.impl
    )
    assert ids.tolist() == [[2]] and counts.tolist() == [0, 0, 1, 0]
    assert weights.item() == pytest.approx(0.5)


def test_ties_go_to_the_lowest_expert(backend: Backend) -> None:
    zeros = torch.zeros(3, 64, device=backend.device)
    options = {"n_group": 8, "topk_group": 2, "impl": backend.impl}
    ids, weights, _ = route_topk(zeros, zeros[0], top_k=5, **options)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    few_values = torch.randint(3, (11, 64), generator=torch.Generator().manual_seed(0)).float()
    got = route_topk(few_values.to(backend.device), None, top_k=9, **options)
    assert torch.equal(got[0].cpu(), route_topk(few_values, None, top_k=9, **(options | {"impl": "reference"}))[0])


@needs_cpp
def test_ties_and_infinities_as_the_reference() -> None:
    """Values of which many are equal, and biases of -inf, which tie with what the groups leave out."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(4, (501, 24), generator=generator).float()
    bias = torch.where(torch.rand(24, generator=generator) < 0.7, -INF, 0.0)
    for k in (1, 5, 12):
        options = {"top_k": k, "n_group": 4, "topk_group": 2}
        ids, reference_ids = (route_topk(logits, bias, impl=impl, **options)[0] for impl in ("cpp", "reference"))
        assert torch.equal(ids, reference_ids)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_nan_stays_in_its_row(backend: Backend, scoring: str) -> None:
    logits = random_logits(9, 16)
    logits[3, 5] = NAN
    logits[4] = NAN
    options = {"top_k": 3, "n_group": 4, "topk_group": 2, "scoring": scoring, "impl": backend.impl}
    ids, weights, counts = route_topk(logits.to(backend.device), None, **options)
    assert ids.min() >= 0 and ids.max() < 16 and counts.sum() == 27
    clean = [0, 1, 2, 5, 6, 7, 8]
    want = route_topk(logits[clean].to(backend.device), None, **options)
    assert torch.equal(ids[clean], want[0]) and torch.equal(weights[clean], want[1])
    assert weights[4].isnan().all()
    if backend.impl == "cpp":
        assert torch.equal(ids, route_topk(logits, None, **(options | {"impl": "reference"}))[0])


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_replayed_ids(backend: Backend, scoring: str) -> None:
    logits = random_logits(5, 16)
    replayed = torch.randint(16, (5, 3), generator=torch.Generator().manual_seed(1))
    results = []
    for impl, device in (("reference", "cpu"), (backend.impl, backend.device)):
        options = {"top_k": 3, "scoring": scoring, "replay_ids_TK": replayed.to(device), "impl": impl}
        results.append([x.cpu() for x in run(logits, random_bias(16), device, **options)])
    assert torch.equal(results[1][0], replayed) and torch.equal(results[1][1], results[0][1])
    torch.testing.assert_close(results[1][2:], results[0][2:], rtol=1e-5, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize("bad", [-1, 16])
def test_a_replayed_id_outside_the_experts_is_an_error(bad: int) -> None:
    replayed = torch.zeros(5, 3, dtype=torch.long)
    replayed[2, 1] = bad
    with pytest.raises(ValueError, match=rf"replay_ids_TK\[2, 1\] is {bad}, expected 0 <= id < 16"):
        route_topk(random_logits(5, 16), None, top_k=3, replay_ids_TK=replayed, impl="cpp")


def test_same_bits_every_time(backend: Backend) -> None:
    logits = random_logits(5 if backend.interpreted else 4099, 32)
    options = {"top_k": 4, "n_group": 8, "topk_group": 4, "impl": backend.impl}
    assert_same_bits(lambda: run(logits, random_bias(32), backend.device, **options))


@needs_cpp
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_gradcheck(norm_topk_prob: bool, scoring: str) -> None:
    leaf = random_logits(4, 7).double().requires_grad_()
    options = {"top_k": 3, "norm_topk_prob": norm_topk_prob, "scoring": scoring, "routed_scaling_factor": 2.5}
    assert torch.autograd.gradcheck(lambda x: route_topk(x, None, impl="cpp", **options)[1], (leaf,))


@needs_cpp
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_opcheck(scoring: str) -> None:
    logits, op = random_logits(5, 8).requires_grad_(), torch.ops.r1fast
    replayed = torch.zeros(5, 2, dtype=torch.long)
    # Not test_aot_dispatch_dynamic: its loss adds to the sum of the first output, which is one of integers here.
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for bias, replay in ((None, None), (random_bias(8), None), (None, replayed)):
        arguments = logits, bias, replay, 2, 4, 2, True, 2.5, scoring
        torch.library.opcheck(op.route_topk.default, arguments, test_utils=checks)
    arguments = logits.detach(), replayed, torch.ones(5, 2), True, 2.5, scoring
    torch.library.opcheck(op.route_topk_backward.default, arguments)


@needs_cpp
def test_compiles_without_a_graph_break() -> None:
    logits, bias = random_logits(5, 8), random_bias(8)
    compiled = torch.compile(
        lambda x: route_topk(x * 2, bias, top_k=2)[1].square().sum(), backend="aot_eager", fullgraph=True
    )
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    compiled(leaf).backward()
    route_topk(other * 2, bias, top_k=2)[1].square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="n_group to divide the experts"):
        route_topk(torch.zeros(1, 6), None, top_k=1, n_group=4)
    with pytest.raises(ValueError, match="1 <= top_k <= 2"):
        route_topk(torch.zeros(1, 6), None, top_k=3, n_group=3, topk_group=1)
    with pytest.raises(ValueError, match="expected sigmoid or softmax"):
        route_topk(torch.zeros(1, 6), None, top_k=3, scoring="relu")
    with pytest.raises(ValueError, match=r"replay ids \(2, 3\), expected \[1, 3\]"):
        route_topk(torch.zeros(1, 6), None, top_k=3, replay_ids_TK=torch.zeros(2, 3, dtype=torch.long))
