"""A metric is a mean over stated items (docs/numerics.md, section 5), whatever cuts them into batches and ranks, or
computes them twice."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from r1fast.parallel.mesh import Dist
from r1fast.stages.measures import Max, Mean, merge, numbers
from tests.forks import Forks
from tests.stages.metric_cases import (
    CASES,
    LOSSES,
    MASKED,
    POLICIES,
    SMALL,
    WHOLE,
    examples_of,
    learner,
    measure,
    rollout,
)

EXACT = ("moe/load", "moe/changed_routings", "moe/max_violation", "accuracy")


@pytest.fixture(scope="module")
def whole(dist: Dist, cut_models: dict[str, str]) -> Callable[[str], dict[str, Any]]:
    """Each case in one piece."""
    return cache(lambda case: measure(case, dist, cut_models, WHOLE))


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name in EXACT or value is None:
            assert got[name] == value, name
        else:
            # On-policy, a loss is a sum of terms of both signs: fp32 knows it to 1e-7 of these, not of what is left.
            assert np.asarray(got[name]) == pytest.approx(np.asarray(value), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_micro_batches(case: str, whole, dist: Dist, cut_models: dict[str, str]) -> None:
    assert_same(measure(case, dist, cut_models, SMALL), whole(case))


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("case", CASES)
def test_activation_checkpointing(case: str, kind: str, whole, dist: Dist, cut_models: dict[str, str]) -> None:
    got = measure(case, dist, cut_models, WHOLE, trainer={"activation_checkpointing": kind})
    assert got == whole(case)  # to the bit


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sequence-moe", "token-dense", "sft-moe"])
def test_compile(case: str, whole, dist: Dist, cut_models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend="aot_eager"))
    assert_same(measure(case, dist, cut_models, SMALL, trainer={"compile": True}), whole(case))


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, whole, two_ranks: dict[str, Any]) -> None:
    assert_same(two_ranks["metrics"][case], whole(case))


@pytest.fixture(scope="module")
def three_ranks(cut_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("three_ranks") / "results.pt"
    forks.run("tests.stages.rank_cases", output, *cut_models.values(), ranks=3)
    return torch.load(output, weights_only=False)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_three_ranks(case: str, whole, three_ranks: dict[str, Any]) -> None:
    assert_same(three_ranks["metrics"][case], whole(case))


def by_definition(dist: Dist, model: str, options: dict[str, Any]) -> dict[str, float]:
    """Every metric of the policy in fp64, sample by sample, over all that the updates learned from."""
    found = learner(dist, model, options)
    stage, moe = found.stage, bool(found.policy.config.n_routed_experts)
    sampled = rollout(moe, options)
    tokens: dict[str, list[float]] = {name: [] for name in ("ratio", "kl", "entropy", "gap", "sign")}
    sequences: dict[str, list[float]] = {"ratio": [], "sign": []}
    changed: list[bool] = []
    for sample, example in zip(sampled, examples_of(found, sampled), strict=True):
        ids_T = torch.tensor(sample.prompt_ids + sample.completion_ids)
        cu_seqlens = torch.tensor([0, len(ids_T) - 1], dtype=torch.int32)
        with torch.no_grad():
            logits_TV, routing = found.policy(ids_T[:-1], cu_seqlens, with_routing=True)
        if moe and (not stage.skip_zero_variance_groups or example.values["advantage"]):
            recorded = torch.from_numpy(sample.routed_experts).long()
            changed += (routing.expert_ids.sort(-1).values != recorded.sort(-1).values).any(-1).flatten().tolist()
        truncated = stage.mask_truncated_completions and sample.finish_reason == "length"
        if truncated or (stage.skip_zero_variance_groups and not example.values["advantage"]):
            continue
        logp_CV = logits_TV[len(sample.prompt_ids) - 1 :].double().log_softmax(-1)
        logp_C = logp_CV.gather(1, torch.tensor(sample.completion_ids)[:, None])[:, 0]
        old_C, sampler_C = (torch.tensor(example.values[name]).double() for name in ("old", "sampler"))
        ref_C = torch.tensor(example.values["ref"]).double() if stage.beta else logp_C
        sign = float(np.sign(example.values["advantage"]))
        tokens["ratio"] += (logp_C - old_C).exp().tolist()
        tokens["kl"] += ((ref_C - logp_C).exp() - (ref_C - logp_C) - 1).tolist()
        tokens["entropy"] += (-(logp_CV.exp() * logp_CV).sum(-1)).tolist()
        tokens["gap"] += (old_C - sampler_C).abs().tolist()
        tokens["sign"] += [sign] * len(logp_C)
        sequences["ratio"].append(float((logp_C - old_C).mean().exp()))
        sequences["sign"].append(sign)
    items = sequences if stage.importance_sampling_level == "sequence" else tokens
    ratio, sign = np.array(items["ratio"]), np.array(items["sign"])
    want = {
        "importance_ratio/mean": ratio.mean(), "importance_ratio/max": ratio.max(),
        "entropy": np.mean(tokens["entropy"]),
        "sampling/sampling_logp_difference/mean": np.mean(tokens["gap"]),
        "sampling/sampling_logp_difference/max": np.max(tokens["gap"]),
    }  # fmt: skip
    if stage.loss_type == "cispo":
        want["cispo_clip_ratio"] = np.mean((ratio > stage.epsilon_high) & (sign > 0))
    else:
        low, high = (ratio < 1 - stage.epsilon) & (sign < 0), (ratio > 1 + stage.epsilon) & (sign > 0)
        for name, clipped in (("low", low), ("high", high), ("region", low | high)):
            want[f"clip_ratio/{name}_mean"] = clipped.mean()
    if stage.beta:
        want["kl"] = np.mean(tokens["kl"])
    if moe:
        want["moe/changed_routings"] = np.mean(changed)
    return want


@pytest.mark.parametrize("case", [case for case in CASES if case.rpartition("-")[0] in POLICIES.keys() - LOSSES.keys()])
def test_definitions(case: str, whole, dist: Dist, cut_models: dict[str, str]) -> None:
    name, _, family = case.rpartition("-")
    got = whole(case)
    want = by_definition(dist, cut_models[family], {**POLICIES[name], **WHOLE})
    for metric, value in want.items():
        assert got[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    others = {"loss", "grad_norm", "learning_rate", "moe/load", "moe/max_violation"}
    assert got.keys() - want.keys() == {name for name in others if family == "moe" or "moe" not in name}
    if family == "moe" and "sequence" not in name:
        clips = [value for metric, value in got.items() if "clip_ratio" in metric]
        assert 0 < max(clips) < 1  # else nothing would have been compared


def test_a_rollout_without_a_learned_token_has_no_means(dist: Dist, cut_models: dict[str, str]) -> None:
    found = learner(dist, cut_models["moe"], MASKED)
    sampled = rollout(True, {})
    for sample in sampled:
        sample.finish_reason = "length"
    metrics = found.update(0, examples_of(found, sampled))
    assert metrics["loss"] is None and metrics["grad_norm"] is None
    assert metrics.keys() == {
        "loss", "grad_norm", "learning_rate", "moe/changed_routings", "moe/load", "moe/max_violation"
    }  # fmt: skip


def test_parts_add_up() -> None:
    table = torch.tensor([[1, 3], [2, 2]])
    parts = [{"a": Mean(torch.tensor(3.0), 2), "b": Max(torch.tensor(1.0)), "table": Mean(table, 2)}]
    parts += [{"a": Mean(1.0, 0)}, {"a": Mean(2.0, 3), "b": Max(4.0), "table": Mean(table, 6)}]
    assert numbers(merge(parts)) == {"a": 6.0 / 5, "b": 4.0, "table": [[0.25, 0.75], [0.5, 0.5]]}
    assert numbers(merge([{"a": Mean(0.0, 0)}])) == {"a": None}
    assert merge([merge(parts[:2]), merge(parts[2:])])["a"] == merge(parts)["a"]
