import math
from pathlib import Path
from typing import Any

import pytest
import torch

from r1fast_kernels import group_advantages, grpo_loss
from r1fast_kernels.grpo_loss import op_arguments
from r1fast_kernels.grpo_loss_reference import LossArguments
from tests.kernels.backends import (
    BF16,
    FP16,
    FP32,
    FP64,
    Backend,
    assert_as_exact,
    assert_same_bits,
    needs_cpp,
    of_older_processor,
)
from tests.kernels.loss_settings import LENGTHS, batch, cast, random_batch, random_settings

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
INPUTS = ("logprobs_T", "old_logprobs_T", "ref_logprobs_T", "sampler_logprobs_T", "entropy_T")
NAN = float("nan")


def widest(backend: Backend) -> torch.dtype:
    return FP64 if FP64 in backend.dtypes else FP32


def value_and_gradient(case: dict[str, Any], **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = case["logprobs_T"].detach().clone().requires_grad_()
    loss, _ = grpo_loss(**{**case, **settings, "logprobs_T": leaf})
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def outputs(case: dict[str, Any], **settings: Any) -> dict[str, torch.Tensor]:
    """Loss, gradient of three times the loss (an expanded upstream gradient), and metrics, by name."""
    leaf = case["logprobs_T"].detach().clone().requires_grad_()
    loss, metrics = grpo_loss(**{**case, **settings, "logprobs_T": leaf})
    loss.expand(3).sum().backward()
    assert leaf.grad is not None
    return {"loss": loss.detach(), "gradient": leaf.grad, **metrics}


def assert_exact(backend: Backend, case: dict[str, Any], dtype: torch.dtype, **settings: Any) -> None:
    """The 2x/3x rule against fp64 on the same rounded inputs, for loss, gradient and every metric."""
    case = cast(case, dtype)
    exact = outputs(cast(case, FP64), **settings, impl="reference")
    plain = outputs(case, **settings, impl="reference")
    got = outputs(backend.to(case), **settings, impl=backend.impl)
    assert list(got) == list(plain)
    for name in got:
        assert got[name].dtype == plain[name].dtype, name
        assert_as_exact(got[name], plain[name], exact[name], 3 if name == "gradient" else 2, name)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"beta": 0.1, "is_cap": 1.2, "delta": 1.4, "epsilon_high": 0.28, "num_items": 50, "num_samples": 9},
    "on-policy": {"beta": 0.1, "is_cap": 1.2, "old_logprobs_T": None},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_as_exact_as_torch(backend: Backend, loss_type: str, level: str, options: str) -> None:
    settings = {"loss_type": loss_type, "importance_level": level, **OPTIONS[options]}
    if loss_type == "cispo":
        settings = {**settings, "delta": None, "epsilon_high": 1.1}
    for dtype in backend.dtypes[:1] if backend.interpreted else backend.dtypes:
        assert_exact(backend, batch(), dtype, **settings)


def hostile_cases() -> dict[str, dict[str, Any]]:
    strided = batch([6, 7])
    for name in INPUTS:
        strided[name] = torch.stack([strided[name], torch.full((13,), NAN, dtype=FP64)], 1)[:, 0]
    expanded = batch([6, 7]) | {"advantages_N": torch.tensor(0.7, dtype=FP64).expand(2)}
    wide_mask = batch([6, 7]) | {"cu_seqlens": torch.tensor([0, 6, 13])}
    return {
        "one-token": batch([1], masked=False),
        "empty-samples": batch([0, 0, 5, 4, 0, 3, 0]),
        "T1031-past-a-tile": batch([1031, 2, 0, 1, 61]),
        "T1024-a-tile": batch([1024], masked=False),
        "N67-past-a-tile-of-samples": batch([1, 2] * 33 + [3]),
        "T0": batch([0, 0], masked=False),
        "N0": batch([], masked=False),
        "strided": strided,
        "expanded-advantages": expanded,
        "int64-cu-seqlens": wide_mask,
        "an-advantage-of-0": batch([3, 4]) | {"advantages_N": torch.tensor([0.0, 1.0], dtype=FP64)},
    }


def gradients(case: dict[str, Any], impl: str) -> dict[str, torch.Tensor]:
    """Loss, gradients of log-probs and entropy, and metrics."""
    leaves = case["logprobs_T"].detach().requires_grad_(), case["entropy_T"].detach().requires_grad_()
    loss, metrics = grpo_loss(**case | {"logprobs_T": leaves[0], "entropy_T": leaves[1]}, impl=impl)
    found = torch.autograd.grad(loss, leaves, torch.tensor(3.0).to(loss), allow_unused=True, materialize_grads=True)
    return {"loss": loss.detach(), "d logprobs": found[0], "d entropy": found[1], **metrics}


@pytest.mark.parametrize("hundred", [pytest.param(n, marks=[pytest.mark.slow] * (n > 0)) for n in range(3)])
def test_random_settings(backend: Backend, hundred: int) -> None:
    """Any options together; the interpreter takes the first few of a hundred, and with -m slow all of them."""
    count = 15 if backend.interpreted and hundred == 0 else 100
    dtype = widest(backend)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == FP64 else {"rtol": 3e-5, "atol": 3e-6}
    for seed in range(100 * hundred, 100 * hundred + count):
        case, settings = cast(random_batch(seed), dtype), random_settings(seed)
        want = gradients(case | settings, "reference")
        got = gradients(backend.to(case) | settings, backend.impl)
        assert list(got) == list(want), settings
        for name in got:
            torch.testing.assert_close(
                got[name].cpu(),
                want[name],
                **tolerance,
                equal_nan=True,
                msg=lambda m, n=name, o=settings: f"{n} {o} {m}",
            )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", hostile_cases())
def test_hostile_shapes(backend: Backend, name: str, level: str) -> None:
    for dtype in backend.dtypes if name == "one-token" else backend.dtypes[:1]:
        assert_exact(backend, hostile_cases()[name], dtype, importance_level=level, beta=0.1, is_cap=1.3)


def test_huge_log_ratios(backend: Backend) -> None:
    """e^90 is infinite in fp32. Where it is clipped the loss is finite and the gradient 0, not 0 times infinity."""
    case = {
        "logprobs_T": torch.tensor([-1.0, -1.0, -80.0, -1.0]),
        "old_logprobs_T": torch.tensor([-91.0, -61.0, -1.0, -1.1]),
        "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32),
        "advantages_N": torch.ones(1),
    }
    want = value_and_gradient(cast(case, FP64), impl="reference")
    got = value_and_gradient(backend.to(case), impl=backend.impl)
    for g, w in zip(got, want):
        torch.testing.assert_close(g.cpu(), w.float())
    assert got[1][:2].tolist() == [0, 0]


@pytest.mark.parametrize("delta", [None, 1.0, 1.2])
@pytest.mark.parametrize("epsilon_high", [0.0, 0.28])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_ties_as_in_autograd(backend: Backend, epsilon: float, epsilon_high: float, delta: float | None) -> None:
    """A ratio of exactly 1 that lies on the lower edge, the upper edge, or delta; for both signs and 0."""
    case = backend.to({
        "logprobs_T": torch.full((3,), -1.0),
        "old_logprobs_T": torch.full((3,), -1.0),
        "cu_seqlens": torch.arange(4, dtype=torch.int32),
        "advantages_N": torch.tensor([1.0, -1.0, 0.0]),
    })  # fmt: skip
    settings = {"epsilon": epsilon, "epsilon_high": epsilon_high, "delta": delta}
    for level in ("token", "sequence"):
        want = value_and_gradient(case, **settings, importance_level=level, impl="reference")
        got = value_and_gradient(case, **settings, importance_level=level, impl=backend.impl)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_every_reduction_by_hand(backend: Backend) -> None:
    """Two samples of 1 and 3 tokens, ratio 1: each token's loss is -A, that is -2 and +1."""
    case = {
        "logprobs_T": torch.tensor([-1.0, -0.5, -0.5, -2.0], dtype=torch.float64),
        "cu_seqlens": torch.tensor([0, 1, 4], dtype=torch.int32),
        "advantages_N": torch.tensor([2.0, -1.0], dtype=torch.float64),
        "max_completion_length": 10,
    }
    case = backend.to(cast(case, widest(backend)))
    expected = {
        "grpo": ((-2 + 3 / 3) / 2, [-1.0, 1 / 6, 1 / 6, 1 / 6]),
        "dr_grpo": ((-2 + 3) / 20, [-0.1, 0.05, 0.05, 0.05]),
        "dapo": ((-2 + 3) / 4, [-0.5, 0.25, 0.25, 0.25]),
        "bnpo": ((-2 + 3) / 4, [-0.5, 0.25, 0.25, 0.25]),
        # -min(1, 0.2) A logprob: 0.2 (2 - 3) / 4
        "cispo": (0.2 * (2 * 1.0 - 1 * 3.0) / 4, [-0.1, 0.05, 0.05, 0.05]),
    }
    for loss_type, (value, gradient) in expected.items():
        for impl in ("reference", backend.impl):
            got = value_and_gradient(case, loss_type=loss_type, impl=impl)
            torch.testing.assert_close(got[0], torch.tensor(value).to(got[0]))
            torch.testing.assert_close(got[1], torch.tensor(gradient).to(got[1]))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_clip_edge_by_hand(backend: Backend, advantage: float) -> None:
    """Ratios inside, exactly on, and outside the clip range: on the edge the gradient still flows."""
    case = {
        "logprobs_T": torch.tensor([-0.6, -0.3, 0.0, 0.4, 0.6]),
        "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        "advantages_N": torch.tensor([advantage]),
        "old_logprobs_T": torch.zeros(5),
    }
    case = backend.to(cast(case, widest(backend)))
    for impl in ("reference", backend.impl):
        edges = [ratio_of(case, t, impl) for t in (1, 3)]  # one exp may differ from another in the last bit
        epsilon, epsilon_high = 1 - edges[0], edges[1] - 1  # exact: both ratios lie in [1/2, 2]
        assert edges == [1 - epsilon, 1 + epsilon_high]
        loss, gradient = value_and_gradient(
            case, epsilon=epsilon, epsilon_high=epsilon_high, loss_type="dapo", impl=impl
        )
        ratios = case["logprobs_T"].exp()
        clipped = ratios.clamp(max=ratios[3]) if advantage > 0 else ratios.clamp(min=ratios[1])
        active = torch.tensor([1, 1, 1, 1, 0] if advantage > 0 else [0, 1, 1, 1, 1], device=backend.device)
        torch.testing.assert_close(loss, -advantage * clipped.sum() / 5)
        torch.testing.assert_close(gradient, -advantage * ratios * active / 5)


def ratio_of(case: dict[str, Any], t: int, impl: str) -> float:
    """exp(logprob - old_logprob) of one token, as this implementation has it."""
    alone = {name: case[name][t : t + 1] for name in ("logprobs_T", "old_logprobs_T")}
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32, device=case["cu_seqlens"].device)
    metrics = grpo_loss(**alone, cu_seqlens=cu_seqlens, advantages_N=case["advantages_N"], impl=impl)[1]
    return metrics["importance_ratio/max"].item()


@pytest.mark.parametrize("epsilon", [0.2, 10.0])
def test_gradient_in_closed_form(backend: Backend, epsilon: float) -> None:
    """dl/dlp = -A rho [active] + beta (1 - exp(ref - lp)), times the aggregation weight (DeepSeekMath, eq. 21)."""
    case, beta = batch(masked=False, dtype=widest(backend)), 0.3
    rho = (case["logprobs_T"] - case["old_logprobs_T"]).exp()
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    advantages = case["advantages_N"][sample]
    active = torch.where(advantages >= 0, rho <= 1 + epsilon, rho >= 1 - epsilon)
    per_token = -advantages * rho * active + beta * (1 - (case["ref_logprobs_T"] - case["logprobs_T"]).exp())
    lengths = torch.tensor(LENGTHS)[sample]
    weights = {"grpo": 1 / (6 * lengths), "dapo": 1 / sum(LENGTHS), "dr_grpo": 1 / (6 * 12)}
    for loss_type, weight in weights.items():
        for impl in ("reference", backend.impl):
            gradient = value_and_gradient(backend.to(case), epsilon=epsilon, beta=beta, loss_type=loss_type, impl=impl)[
                1
            ]
            torch.testing.assert_close(gradient.cpu(), per_token * weight)


@needs_cpp
@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradcheck(loss_type: str, level: str, impl: str) -> None:
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
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, **case, **settings, impl=impl)[0], (leaf,))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_nan_changes_nothing(backend: Backend, loss_type: str, level: str) -> None:
    case = backend.to(batch(dtype=FP32))
    settings = {"loss_type": loss_type, "importance_level": level, "beta": 0.1, "is_cap": 2.0}
    dirty = case | {name: case[name].masked_fill(~case["loss_mask_T"], NAN) for name in INPUTS}
    for impl in ("reference", backend.impl):
        got = outputs(dirty, **settings, impl=impl)
        torch.testing.assert_close(got, outputs(case, **settings, impl=impl), rtol=0, atol=0)
        assert not got["gradient"][~case["loss_mask_T"]].any()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", INPUTS)
def test_live_nan_reaches_the_loss_and_its_metrics(backend: Backend, name: str, level: str) -> None:
    case = batch(dtype=FP32)
    case[name][case["loss_mask_T"].nonzero()[0]] = NAN
    for old in (case["old_logprobs_T"], None):
        case["old_logprobs_T"] = old
        settings = {"importance_level": level, "beta": 0.1, "is_cap": 2.0}
        want_loss, want = grpo_loss(**case, **settings, impl="reference")
        loss, got = grpo_loss(**backend.to(case), **settings, impl=backend.impl)
        assert (
            loss.isnan()
            == want_loss.isnan()
            == (name != "entropy_T" and not (name == "old_logprobs_T" and old is None))
        )
        assert [k for k, v in got.items() if v.isnan()] == [k for k, v in want.items() if v.isnan()]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_sum_to_the_whole(backend: Backend, loss_type: str, level: str) -> None:
    """Contract 1, for any cut between samples and any order of them; counts are device scalars."""
    case = backend.to(batch(dtype=widest(backend)))
    settings = {
        "impl": backend.impl,
        "loss_type": loss_type,
        "importance_level": level,
        "beta": 0.1,
        "is_cap": 2.0,
        "max_completion_length": 12,
    }
    whole_loss, whole_gradient = value_and_gradient(case, **settings)
    counts = {"num_items": case["loss_mask_T"].sum(), "num_samples": torch.tensor(len(LENGTHS), device=backend.device)}
    starts = case["cu_seqlens"].tolist()
    for cut in ([[0], [1], [2], [3], [4], [5]], [[5, 2], [0, 3, 1, 4]]):
        total, gradient = torch.zeros_like(whole_loss), torch.zeros_like(whole_gradient)
        for samples in cut:
            tokens = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in samples])
            part = {k: v[tokens] for k, v in case.items() if k.endswith("_T")}
            part["advantages_N"] = case["advantages_N"][samples]
            part["cu_seqlens"] = backend.to(torch.tensor([0, *(LENGTHS[n] for n in samples)]).cumsum(0).int())
            loss, part_gradient = value_and_gradient(part, **settings, **counts)
            total, gradient[tokens] = total + loss, part_gradient
        torch.testing.assert_close(total, whole_loss)
        torch.testing.assert_close(gradient, whole_gradient)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_slices_of_tokens_sum_to_the_whole(backend: Backend, loss_type: str) -> None:
    """Cuts inside samples, of one and of no token: with counts_N each slice gives its part of the full gradient."""
    case = backend.to(batch(dtype=widest(backend)))
    settings = {"loss_type": loss_type, "beta": 0.1, "is_cap": 2.0, "impl": backend.impl}
    whole_loss, whole_gradient = value_and_gradient(case, **settings)
    sample = backend.to(torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS)))
    counts = torch.zeros(6, dtype=torch.long, device=backend.device).index_add(0, sample, case["loss_mask_T"].long())
    settings |= {"counts_N": counts, "num_items": case["loss_mask_T"].sum()}
    total, gradients = torch.zeros_like(whole_loss), []
    for begin, end in ((0, 3), (3, 4), (4, 4), (4, 22), (22, 29)):
        part = {k: v[begin:end] for k, v in case.items() if k.endswith("_T")}
        part["cu_seqlens"] = (case["cu_seqlens"] - begin).clamp(0, end - begin)
        rest = {"advantages_N": case["advantages_N"], "max_completion_length": 12}
        loss, gradient = value_and_gradient(part | rest, **settings)
        total = total + loss
        gradients.append(gradient)
        torch.testing.assert_close(loss, value_and_gradient(part | rest, **{**settings, "impl": "reference"})[0])
    torch.testing.assert_close(total, whole_loss)
    torch.testing.assert_close(torch.cat(gradients), whole_gradient)


def test_bnpo_with_a_global_count_is_dapo(backend: Backend) -> None:
    case = backend.to(batch(dtype=FP32)) | {"num_items": 77, "impl": backend.impl}
    bnpo = value_and_gradient(case, loss_type="bnpo")
    torch.testing.assert_close(bnpo, value_and_gradient(case, loss_type="dapo"), rtol=0, atol=0)


def test_grpo_is_dapo_only_for_equal_lengths(backend: Backend) -> None:
    equal = backend.to(batch([4, 4, 4], masked=False, dtype=FP32)) | {"impl": backend.impl}
    torch.testing.assert_close(value_and_gradient(equal), value_and_gradient(equal, loss_type="dapo"))
    ragged = backend.to(batch(masked=False, dtype=FP32)) | {"impl": backend.impl}
    assert not torch.isclose(value_and_gradient(ragged)[0], value_and_gradient(ragged, loss_type="dapo")[0])


def test_on_policy(backend: Backend) -> None:
    """Without old log-probs the ratio is 1: the value is -mean A, 0 for centred groups, the gradient is not."""
    case = batch(masked=False, dtype=FP32)
    rewards, groups = torch.tensor([1.0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    fused = {k: case[k] for k in ("logprobs_T", "cu_seqlens")} | {"rewards_N": rewards, "group_ids_N": groups}
    fused = backend.to(fused) | {"impl": backend.impl}
    loss, gradient = value_and_gradient(fused)
    assert loss.abs() < 1e-7 and gradient.abs().min() > 1e-3
    metrics = grpo_loss(**fused)[1]
    assert metrics["importance_ratio/mean"] == metrics["importance_ratio/max"] == 1
    # dapo weighs tokens: here the value is not 0.
    assert value_and_gradient(fused, loss_type="dapo")[0].abs() > 1e-3


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_fused_rewards_equal_advantages(backend: Backend, scale: str) -> None:
    case = backend.to(batch(dtype=widest(backend))) | {"impl": backend.impl}
    rewards, groups = backend.to((torch.tensor([1.0, 0, 0, NAN, 1, 3]), torch.tensor([0, 0, 7, 7, 7, 0])))
    case["advantages_N"] = group_advantages(rewards, groups, scale=scale, impl=backend.impl)
    want = value_and_gradient(case)
    del case["advantages_N"]
    got = value_and_gradient(case, rewards_N=rewards, group_ids_N=groups, scale_rewards=scale)
    # The same advantages; a GPU's compiler fuses the products and sums after them differently in the two kernels.
    torch.testing.assert_close(got, want, rtol=3e-7 if backend.name == "cuda" else 0, atol=0)


def test_a_group_without_variance_keeps_only_the_kl_gradient(backend: Backend) -> None:
    case = backend.to(batch(masked=False, dtype=FP32)) | {"impl": backend.impl}
    del case["advantages_N"]
    same = backend.to({"rewards_N": torch.full((6,), 0.1), "group_ids_N": torch.zeros(6, dtype=torch.long)})
    assert not value_and_gradient({**case, **same})[1].any()
    gradient = value_and_gradient({**case, **same}, beta=0.5, loss_type="dapo")[1]
    want = 0.5 * (1 - (case["ref_logprobs_T"] - case["logprobs_T"]).exp()) / sum(LENGTHS)
    torch.testing.assert_close(gradient, want)


def test_where_reference_equals_policy_the_kl_vanishes(backend: Backend) -> None:
    case = backend.to(batch(masked=False, dtype=FP32)) | {"impl": backend.impl}
    case["ref_logprobs_T"] = case["logprobs_T"]
    torch.testing.assert_close(value_and_gradient(case, beta=5.0), value_and_gradient(case, beta=0.0))
    assert grpo_loss(**case, beta=5.0)[1]["kl"] == 0


def test_metrics_by_hand(backend: Backend) -> None:
    log2 = math.log(2)
    case = backend.to({
        "logprobs_T": torch.tensor([-1.0, -1 + log2, -1 - log2, -1 - log2]),
        "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32),
        "advantages_N": torch.tensor([1.0, -1.0]),
        "old_logprobs_T": torch.full((4,), -1.0),
        "sampler_logprobs_T": torch.tensor([-1.0, -1.5, -1.0, 5.0]),
        "ref_logprobs_T": torch.tensor([-1.0, -1.0, -1.0, 5.0]),
        "loss_mask_T": torch.tensor([True, True, True, False]),
        "entropy_T": torch.tensor([0.5, 1.5, 1.0, 70.0]),
    })  # fmt: skip
    case["logprobs_T"].requires_grad_()
    expected = {
        "importance_ratio/mean": (1 + 2 + 0.5) / 3,
        "importance_ratio/max": 2.0,
        "clip_ratio/low_mean": 1 / 3,
        "clip_ratio/high_mean": 1 / 3,
        "clip_ratio/region_mean": 2 / 3,
        "kl": ((0.5 + log2 - 1) + (2 - log2 - 1)) / 3,
        "sampling/sampling_logp_difference/mean": 0.5 / 3,
        "sampling/sampling_logp_difference/max": 0.5,
        "entropy": 1.0,
    }
    for impl in ("reference", backend.impl):
        metrics = grpo_loss(**case, impl=impl)[1]
        assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, abs=1e-6)
        assert all(v.dim() == 0 and not v.requires_grad for v in metrics.values())
        bare = {**case, "ref_logprobs_T": None, "sampler_logprobs_T": None, "entropy_T": None, "impl": impl}
        assert list(grpo_loss(**bare)[1]) == list(expected)[:5]
        assert list(grpo_loss(**bare, loss_type="cispo")[1]) == [*list(expected)[:2], "cispo_clip_ratio"]


def test_corrections_by_hand(backend: Backend) -> None:
    """Two samples of 2 and 3 tokens: weights 2 and 1/2 a token, 1 and 1/8 a sample; the second has moved by ln 2."""
    log2 = math.log(2)
    case = {
        "logprobs_T": torch.tensor([-1.0, -1.0, -1 - log2, -1 - log2, -1 - log2]),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
        "advantages_N": torch.tensor([1.0, -1.0]),
        "sampler_logprobs_T": torch.tensor([-1 - log2, -1 + log2, -1.0, -1.0, -1.0]),
        "entropy_T": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
    }
    case = backend.to(cast(case, widest(backend)))
    weight, dropped = "sampling/importance_sampling_ratio/mean", "off_policy_mask_ratio"
    expected: list[tuple[dict[str, Any], float, dict[str, float]]] = [
        ({"is_mode": "token_truncate", "is_cap": 1.5}, (-1.5 - 0.5 + 3 * 0.5) / 5, {weight: (1.5 + 4 * 0.5) / 5}),
        ({"is_mode": "token_mask", "is_cap": 1.5}, (-0.5 + 3 * 0.5) / 5, {weight: 4 * 0.5 / 5}),
        ({"is_mode": "token_truncate", "is_min": 1.0}, (-2 - 1 + 3) / 5, {weight: 6 / 5}),
        ({"is_mode": "sequence_truncate", "is_cap": 2.0}, (-2 + 3 / 8) / 5, {weight: (1 + 1 / 8) / 2}),
        ({"is_mode": "sequence_mask", "is_min": 0.5}, -2 / 5, {weight: 1 / 2}),
        ({"off_policy_mask_threshold": 0.5}, -2 / 5, {dropped: 1 / 2}),
        ({"off_policy_mask_threshold": 0.7}, 1 / 5, {dropped: 0.0}),
        ({"entropy_coef": 0.1}, (1 - 0.1 * 15) / 5, {"entropy": 3.0}),
        ({"top_entropy_quantile": 0.4}, 2 / 5, {"entropy": 3.0}),  # the two of highest entropy
        ({"top_entropy_quantile": 0.4, "entropy_coef": 0.1}, (2 - 0.1 * 9) / 5, {}),
        ({"positive_advantage_weight": 0.5}, (-1 + 3) / 5, {}),
    ]
    for options, value, metrics in expected:
        for impl in ("reference", backend.impl):
            loss, found = grpo_loss(**case, **options, loss_type="dapo", impl=impl)
            assert loss.item() == pytest.approx(value, abs=1e-6), options
            assert {name: found[name].item() for name in metrics} == pytest.approx(metrics, abs=1e-6), options


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kept", [0, 4], ids=["T0", "all-masked"])
def test_nothing_to_learn_from_is_zero_not_nan(backend: Backend, loss_type: str, kept: int) -> None:
    case = {
        "logprobs_T": torch.zeros(kept),
        "cu_seqlens": torch.tensor([0, 0, kept], dtype=torch.int32),
        "advantages_N": torch.ones(2),
        "loss_mask_T": torch.zeros(kept, dtype=torch.bool),
    }
    case = backend.to(case) | {"impl": backend.impl}
    settings = {"loss_type": loss_type, "max_completion_length": 3}
    for level in ("token", "sequence"):
        loss, gradient = value_and_gradient(case, importance_level=level, **settings)
        assert loss == 0 and not gradient.any()
        assert all(v.isfinite() for v in grpo_loss(**case, importance_level=level, **settings)[1].values())


def test_same_bits_every_time(backend: Backend) -> None:
    lengths = [5, 9, 0, 4] if backend.interpreted else [700 + 397 * (n % 7) for n in range(53)]
    case = backend.to(batch(lengths, dtype=FP32))
    for level in ("token", "sequence"):
        settings = {"importance_level": level, "beta": 0.1, "is_cap": 2.0, "impl": backend.impl}
        assert_same_bits(lambda settings=settings: list(outputs(case, **settings).values()))


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_builds_for_older_processors_agree(capability: str, tmp_path: Path) -> None:
    expression = (
        "[outputs(batch([61, 0, 33, 8], dtype=dtype), importance_level=level, beta=0.1, is_cap=1.2, delta=1.4,"
        " impl='cpp') for dtype in (FP32, FP64) for level in ('token', 'sequence')]"
    )
    for got, want in zip(*of_older_processor(capability, "test_grpo_loss", expression, tmp_path), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@needs_cpp
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True], ids=["advantages", "rewards"])
def test_opcheck(level: str, dtype: torch.dtype, fused: bool) -> None:
    case = batch(dtype=dtype) | {"beta": 0.1, "delta": 1.5, "is_cap": 2.0, "entropy_coef": 0.1, "num_items": 7}
    if fused:
        N = len(case["cu_seqlens"]) - 1
        case |= {"advantages_N": None, "rewards_N": torch.arange(N) * 1.0, "group_ids_N": torch.zeros(N).long()}
    leaf, cu_seqlens = case.pop("logprobs_T").requires_grad_(), case.pop("cu_seqlens")
    case["entropy_T"].requires_grad_()
    given = LossArguments.of("grpo_loss", case | {"importance_level": level}, len(leaf), cu_seqlens)
    torch.library.opcheck(torch.ops.r1fast.grpo_loss.default, (leaf, cu_seqlens, *op_arguments(given, leaf.device)))


@needs_cpp
def test_compiles_once_for_all_sizes() -> None:
    """No graph break, and after the first size one more compilation, for sizes that vary."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(case: dict[str, Any]) -> torch.Tensor:
        value, metrics = grpo_loss(**{**case, "logprobs_T": case["logprobs_T"] * 1.0}, beta=0.1, is_cap=2.0)
        return value + metrics["kl"]

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for lengths in ([5, 4, 3, 2], [3, 4, 5, 6, 7], [2, 9, 2, 9, 1, 3], [8] * 7, [2, 3, 11, 40, 5, 6, 7, 8]):
        gradients = []
        for function in (compiled, loss):
            case = batch(lengths, dtype=FP32)
            case["logprobs_T"].requires_grad_()
            function(case).backward()
            gradients.append(case["logprobs_T"].grad)
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "ppo"}, "expected one of grpo, bnpo"),
        ({"kl_estimator": "k4"}, "expected one of k1, k2"),
        ({"is_mode": "mask"}, "expected one of token_truncate"),
        ({"is_min": 0.5, "sampler_logprobs_T": None}, "needs sampler_logprobs_T"),
        ({"entropy_coef": 0.1, "entropy_T": None}, "needs entropy_T"),
        ({"top_entropy_quantile": 0.0}, "more than 0 and at most 1"),
        ({"beta": NAN}, "expected a finite number"),
        ({"epsilon": -0.1}, "at least 0"),
        ({"importance_level": "word"}, "expected one of token, sequence"),
        ({"beta": 0.1, "ref_logprobs_T": None}, "needs ref_logprobs_T"),
        ({"is_cap": 2.0, "sampler_logprobs_T": None}, "needs sampler_logprobs_T"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "divides by max_completion_length"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta does not apply"),
        ({"rewards_N": torch.zeros(6)}, "got advantages_N, rewards_N, expected either"),
        ({"advantages_N": None}, "got none of them"),
        ({"advantages_N": torch.zeros(5)}, r"got advantages_N \(5,\) for 29 tokens of 6 samples"),
        ({"cu_seqlens": torch.tensor([0, 5, 6, 15, 19, 26, 30])}, r"expected \[N \+ 1\] rising from 0 to 29"),
        ({"old_logprobs_T": torch.zeros(3)}, r"got old_logprobs_T \(3,\) for 29 tokens"),
        ({"counts_N": torch.ones(5).long()}, r"got counts_N \(5,\) .* expected \(6,\)"),
        ({"scale_rewards": "std"}, "expected one of group, batch, none"),
        ({"impl": "cuda"}, "expected None or one of reference, cpp, triton"),
    ],
)
def test_errors_say_what_to_do(backend: Backend, change: dict[str, Any], message: str) -> None:
    if backend.name == "cuda" and "cu_seqlens" in change:
        pytest.skip("looking at the boundaries would stop the host")
    for impl in ("reference", backend.impl):
        with pytest.raises(ValueError, match=message):
            grpo_loss(**{**backend.to(batch(dtype=FP32)), "impl": impl, **backend.to(change)})


def test_impl_that_cannot_run_here(backend: Backend) -> None:
    absent = "triton" if backend.impl == "cpp" else "cpp"
    with pytest.raises(ValueError, match=f"impl='{absent}' cannot run here"):
        grpo_loss(**backend.to(batch(dtype=FP32)), impl=absent)
    wrong = FP16 if backend.impl == "cpp" else FP64
    with pytest.raises(ValueError, match=f"kernels take float32.* got {str(wrong)[6:]}"):
        grpo_loss(**backend.to(batch(dtype=wrong)), impl=backend.impl)


@needs_cpp
def test_decreasing_boundaries_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected \[N \+ 1\] rising from 0 to 29"):
        grpo_loss(**{**batch(), "cu_seqlens": torch.tensor([0, 9, 6, 15, 19, 26, 29])}, impl="cpp")
