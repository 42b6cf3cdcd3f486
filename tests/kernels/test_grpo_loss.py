import math
from typing import Any

import pytest
import torch

from r1fast_kernels import group_advantages, grpo_loss

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
LENGTHS = [5, 1, 9, 4, 7, 3]


def batch(lengths: list[int] = LENGTHS, masked: bool = True, seed: int = 0) -> dict[str, Any]:
    """An off-policy batch in fp64 with every input; sample 3 is masked whole."""
    generator = torch.Generator().manual_seed(seed)

    def near(center: torch.Tensor | float, spread: float) -> torch.Tensor:
        return center + spread * torch.randn(sum(lengths), generator=generator, dtype=torch.float64)

    logprobs = near(-1.5, 0.4)
    case = {
        "logprobs_T": logprobs,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "advantages_N": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        "old_logprobs_T": near(logprobs, 0.3),
        "ref_logprobs_T": near(logprobs, 0.3),
        "sampler_logprobs_T": near(logprobs, 0.3),
        "max_completion_length": 12,
    }
    if masked:
        mask = torch.rand(sum(lengths), generator=generator) > 0.25
        mask[case["cu_seqlens"][3] : case["cu_seqlens"][4]] = False
        case["loss_mask_T"] = mask
    return case


def value_and_gradient(case: dict[str, Any], **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = case["logprobs_T"].detach().clone().requires_grad_()
    loss, _ = grpo_loss(**{**case, **settings, "logprobs_T": leaf})
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_every_reduction_by_hand() -> None:
    """Two samples of 1 and 3 tokens, ratio 1: each token's loss is -A, that is -2 and +1."""
    case = {
        "logprobs_T": torch.tensor([-1.0, -0.5, -0.5, -2.0], dtype=torch.float64),
        "cu_seqlens": torch.tensor([0, 1, 4], dtype=torch.int32),
        "advantages_N": torch.tensor([2.0, -1.0], dtype=torch.float64),
        "max_completion_length": 10,
    }
    expected = {
        "grpo": ((-2 + 3 / 3) / 2, [-1.0, 1 / 6, 1 / 6, 1 / 6]),
        "dr_grpo": ((-2 + 3) / 20, [-0.1, 0.05, 0.05, 0.05]),
        "dapo": ((-2 + 3) / 4, [-0.5, 0.25, 0.25, 0.25]),
        "bnpo": ((-2 + 3) / 4, [-0.5, 0.25, 0.25, 0.25]),
        # -min(1, 0.2) A logprob: 0.2 (2 - 3) / 4
        "cispo": (0.2 * (2 * 1.0 - 1 * 3.0) / 4, [-0.1, 0.05, 0.05, 0.05]),
    }
    for loss_type, (value, gradient) in expected.items():
        got = value_and_gradient(case, loss_type=loss_type)
        torch.testing.assert_close(got[0], torch.tensor(value, dtype=torch.float64))
        torch.testing.assert_close(got[1], torch.tensor(gradient, dtype=torch.float64))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_clip_edge_by_hand(advantage: float) -> None:
    """Ratios inside, exactly on, and outside the clip range: on the edge the gradient still flows."""
    logprobs = torch.tensor([-0.6, -0.3, 0.0, 0.4, 0.6], dtype=torch.float64)
    ratios = logprobs.exp()
    epsilon, epsilon_high = 1 - ratios[1].item(), ratios[3].item() - 1  # exact: both ratios lie in [1/2, 2]
    assert ratios[1] == 1 - epsilon and ratios[3] == 1 + epsilon_high
    case = {
        "logprobs_T": logprobs,
        "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        "advantages_N": torch.tensor([advantage], dtype=torch.float64),
        "old_logprobs_T": torch.zeros(5, dtype=torch.float64),
    }
    loss, gradient = value_and_gradient(case, epsilon=epsilon, epsilon_high=epsilon_high, loss_type="dapo")
    clipped = ratios.clamp(max=ratios[3]) if advantage > 0 else ratios.clamp(min=ratios[1])
    active = [1, 1, 1, 1, 0] if advantage > 0 else [0, 1, 1, 1, 1]
    torch.testing.assert_close(loss, -advantage * clipped.sum() / 5)
    torch.testing.assert_close(gradient, -advantage * ratios * torch.tensor(active) / 5)


@pytest.mark.parametrize("epsilon", [0.2, 10.0])
def test_gradient_in_closed_form(epsilon: float) -> None:
    """dl/dlp = -A rho [active] + beta (1 - exp(ref - lp)), times the aggregation weight (DeepSeekMath, eq. 21)."""
    case, beta = batch(masked=False), 0.3
    rho = (case["logprobs_T"] - case["old_logprobs_T"]).exp()
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    advantages = case["advantages_N"][sample]
    active = torch.where(advantages >= 0, rho <= 1 + epsilon, rho >= 1 - epsilon)
    per_token = -advantages * rho * active + beta * (1 - (case["ref_logprobs_T"] - case["logprobs_T"]).exp())
    lengths = torch.tensor(LENGTHS)[sample]
    weights = {"grpo": 1 / (6 * lengths), "dapo": 1 / sum(LENGTHS), "dr_grpo": 1 / (6 * 12)}
    for loss_type, weight in weights.items():
        gradient = value_and_gradient(case, epsilon=epsilon, beta=beta, loss_type=loss_type)[1]
        torch.testing.assert_close(gradient, per_token * weight)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradcheck(loss_type: str, level: str) -> None:
    case = batch()
    settings: dict[str, Any] = {
        "loss_type": loss_type,
        "importance_level": level,
        "beta": 0.1,
        "delta": 1.4,
        "is_cap": 2.0,
    }
    if loss_type == "cispo":
        # Finite differences cannot see that its weight is detached; with every ratio above the cap it is constant.
        settings.update(delta=None, epsilon_high=0.01)
    leaf = case.pop("logprobs_T").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, **case, **settings)[0], (leaf,))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_nan_changes_nothing(loss_type: str) -> None:
    case = batch()
    settings = {"loss_type": loss_type, "beta": 0.1, "is_cap": 2.0}
    clean = value_and_gradient(case, **settings)
    clean_metrics = grpo_loss(**case, **settings)[1]
    for name in ("logprobs_T", "old_logprobs_T", "ref_logprobs_T", "sampler_logprobs_T"):
        case[name] = case[name].masked_fill(~case["loss_mask_T"], float("nan"))
    dirty = value_and_gradient(case, **settings)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert not dirty[1][~case["loss_mask_T"]].any()
    torch.testing.assert_close(grpo_loss(**case, **settings)[1], clean_metrics, rtol=0, atol=0)


def test_live_nan_reaches_the_loss() -> None:
    case = batch()
    case["logprobs_T"][case["loss_mask_T"].nonzero()[0]] = float("nan")
    assert value_and_gradient(case)[0].isnan()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_sum_to_the_whole(loss_type: str, level: str) -> None:
    """Contract 1, for any cut between samples and any order of them; counts are device scalars."""
    case = batch()
    settings = {
        "loss_type": loss_type,
        "importance_level": level,
        "beta": 0.1,
        "is_cap": 2.0,
        "max_completion_length": 12,
    }
    whole_loss, whole_gradient = value_and_gradient(case, **settings)
    counts = {"num_items": case["loss_mask_T"].sum(), "num_samples": torch.tensor(len(LENGTHS))}
    starts = case["cu_seqlens"].tolist()
    for cut in ([[0], [1], [2], [3], [4], [5]], [[5, 2], [0, 3, 1, 4]]):
        total, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(whole_gradient)
        for samples in cut:
            tokens = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in samples])
            part = {k: v[tokens] for k, v in case.items() if k.endswith("_T")}
            part["advantages_N"] = case["advantages_N"][samples]
            part["cu_seqlens"] = torch.tensor([0, *(LENGTHS[n] for n in samples)]).cumsum(0).int()
            loss, part_gradient = value_and_gradient(part, **settings, **counts)
            total, gradient[tokens] = total + loss, part_gradient
        torch.testing.assert_close(total, whole_loss)
        torch.testing.assert_close(gradient, whole_gradient)


def test_bnpo_with_a_global_count_is_dapo() -> None:
    case = batch()
    bnpo = value_and_gradient(case, loss_type="bnpo", num_items=77)
    torch.testing.assert_close(bnpo, value_and_gradient(case, loss_type="dapo", num_items=77), rtol=0, atol=0)


def test_grpo_is_dapo_only_for_equal_lengths() -> None:
    equal = batch([4, 4, 4], masked=False)
    torch.testing.assert_close(value_and_gradient(equal), value_and_gradient(equal, loss_type="dapo"))
    ragged = batch(masked=False)
    assert not torch.isclose(value_and_gradient(ragged)[0], value_and_gradient(ragged, loss_type="dapo")[0])


def test_on_policy() -> None:
    """Without old log-probs the ratio is 1: the value is -mean A, 0 for centred groups, the gradient is not."""
    case = batch(masked=False)
    rewards, groups = torch.tensor([1.0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    fused = {k: case[k] for k in ("logprobs_T", "cu_seqlens")} | {"rewards_N": rewards, "group_ids_N": groups}
    loss, gradient = value_and_gradient(fused)
    assert loss.abs() < 1e-7 and gradient.abs().min() > 1e-3
    metrics = grpo_loss(**fused)[1]
    assert metrics["importance_ratio/mean"] == metrics["importance_ratio/max"] == 1
    # dapo weighs tokens: here the value is not 0.
    assert value_and_gradient(fused, loss_type="dapo")[0].abs() > 1e-3


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_fused_rewards_equal_advantages(scale: str) -> None:
    case = batch()
    rewards, groups = torch.tensor([1.0, 0, 0, float("nan"), 1, 3]), torch.tensor([0, 0, 7, 7, 7, 0])
    case["advantages_N"] = group_advantages(rewards, groups, scale=scale)
    want = value_and_gradient(case)
    del case["advantages_N"]
    got = value_and_gradient(case, rewards_N=rewards, group_ids_N=groups, scale_rewards=scale)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_group_without_variance_keeps_only_the_kl_gradient() -> None:
    case = batch(masked=False)
    del case["advantages_N"]
    same = {"rewards_N": torch.full((6,), 0.1), "group_ids_N": torch.zeros(6, dtype=torch.long)}
    assert not value_and_gradient({**case, **same})[1].any()
    gradient = value_and_gradient({**case, **same}, beta=0.5, loss_type="dapo")[1]
    want = 0.5 * (1 - (case["ref_logprobs_T"] - case["logprobs_T"]).exp()) / sum(LENGTHS)
    torch.testing.assert_close(gradient, want)


def test_where_reference_equals_policy_the_kl_vanishes() -> None:
    case = batch(masked=False)
    case["ref_logprobs_T"] = case["logprobs_T"]
    torch.testing.assert_close(value_and_gradient(case, beta=5.0), value_and_gradient(case, beta=0.0))
    assert grpo_loss(**case, beta=5.0)[1]["kl"] == 0


def test_metrics_by_hand() -> None:
    log2 = math.log(2)
    case = {
        "logprobs_T": torch.tensor([-1.0, -1 + log2, -1 - log2, -1 - log2], requires_grad=True),
        "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32),
        "advantages_N": torch.tensor([1.0, -1.0]),
        "old_logprobs_T": torch.full((4,), -1.0),
        "sampler_logprobs_T": torch.tensor([-1.0, -1.5, -1.0, 5.0]),
        "ref_logprobs_T": torch.tensor([-1.0, -1.0, -1.0, 5.0]),
        "loss_mask_T": torch.tensor([True, True, True, False]),
    }
    metrics = grpo_loss(**case)[1]
    expected = {
        "importance_ratio/mean": (1 + 2 + 0.5) / 3,
        "importance_ratio/max": 2.0,
        "clip_ratio/low_mean": 1 / 3,
        "clip_ratio/high_mean": 1 / 3,
        "clip_ratio/region_mean": 2 / 3,
        "kl": ((0.5 + log2 - 1) + (2 - log2 - 1)) / 3,
        "sampling/sampling_logp_difference/mean": 0.5 / 3,
        "sampling/sampling_logp_difference/max": 0.5,
    }
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert all(v.dim() == 0 and not v.requires_grad for v in metrics.values())
    assert set(grpo_loss(**{**case, "ref_logprobs_T": None, "sampler_logprobs_T": None})[1]) == set(list(expected)[:5])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kept", [0, 4], ids=["T0", "all-masked"])
def test_nothing_to_learn_from_is_zero_not_nan(loss_type: str, kept: int) -> None:
    case = {
        "logprobs_T": torch.zeros(kept),
        "cu_seqlens": torch.tensor([0, 0, kept], dtype=torch.int32),
        "advantages_N": torch.ones(2),
        "loss_mask_T": torch.zeros(kept, dtype=torch.bool),
    }
    settings = {"loss_type": loss_type, "max_completion_length": 3}
    for level in ("token", "sequence"):
        loss, gradient = value_and_gradient(case, importance_level=level, **settings)
        assert loss == 0 and not gradient.any()
        assert all(v.isfinite() for v in grpo_loss(**case, importance_level=level, **settings)[1].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "ppo"}, "expected one of grpo, bnpo"),
        ({"importance_level": "word"}, "'token' or 'sequence'"),
        ({"beta": 0.1, "ref_logprobs_T": None}, "needs ref_logprobs_T"),
        ({"is_cap": 2.0, "sampler_logprobs_T": None}, "needs sampler_logprobs_T"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "divides by max_completion_length"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta does not apply"),
        ({"rewards_N": torch.zeros(6)}, "got advantages_N, rewards_N, expected either"),
        ({"advantages_N": None}, "got none of them"),
        ({"advantages_N": torch.zeros(5)}, "for 6 samples"),
        ({"cu_seqlens": torch.tensor([0, 5, 6, 15, 19, 26, 30])}, "ends at 30 but there are 29"),
        ({"old_logprobs_T": torch.zeros(3)}, r"got old_logprobs_T \(3,\), expected \(29,\)"),
        ({"impl": "triton"}, "expected None or one of reference"),
    ],
)
def test_errors_say_what_to_do(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_loss(**{**batch(), **change})
