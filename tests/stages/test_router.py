"""The router in a training step: experts replayed or compared, their load, and options that a model cannot take."""

from pathlib import Path
from typing import Any

import pytest
import torch

from r1fast.parallel.mesh import Dist
from r1fast.stages.grpo import Learner
from tests.stages.gradient_cases import GRPO, NoScorer, context
from tests.tiny_checkpoint import DEEPSEEK_V3, QWEN2, write_checkpoint

ROWS = [{"prompt": "red " * (1 + i)} for i in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "moe": write_checkpoint(tmp_path_factory.mktemp("moe"), **DEEPSEEK_V3),
        "dense": write_checkpoint(tmp_path_factory.mktemp("dense"), **QWEN2),
    }


def step(dist: Dist, model: Path, **options: Any) -> tuple[dict[str, Any], list[list[int]], list[list[int]]]:
    """Sample, move the routers, update: metrics, and the experts of all tokens as sampled and as updated, sorted."""
    ctx = context({**GRPO, "beta": 0.0, **options}, dist, str(model))
    decoder, tokenizer = ctx.load(str(model), trainable=True)
    learner = Learner(ctx, decoder, tokenizer, NoScorer(), ROWS)  # type: ignore[arg-type]
    samples = learner.rollout(0)
    for i, sample in enumerate(samples):
        sample.reward = float(i % 3)
    learner.advantage(samples)
    with torch.no_grad():
        for moe in decoder.moe_layers():
            weight = getattr(moe.gate.weight, "_local_tensor", moe.gate.weight)
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    examples = learner.logprobs(samples)
    taken: list[torch.Tensor] = []
    forward = decoder.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        result, routing = forward(*args, **kwargs)
        taken.append(routing.expert_ids)
        return result, routing

    decoder.forward = watched  # type: ignore[method-assign]
    metrics = learner.update(0, examples)
    recorded = [torch.from_numpy(sample.routed_experts) for sample in samples]
    return metrics, *(sorted(torch.cat(ids).flatten(1).tolist()) for ids in (recorded, taken))


def test_experts_are_replayed(dist: Dist, models: dict[str, Path]) -> None:
    """Other routers, the same experts: what the sampler recorded; without replay the share that changed is told."""
    metrics, recorded, taken = step(dist, models["moe"])
    assert 0.2 < metrics["moe/changed_routings"] <= 1 and taken != recorded
    metrics, recorded, taken = step(dist, models["moe"], router_replay=True)
    assert "moe/changed_routings" not in metrics and taken == recorded


def test_nothing_changes_between_sampler_and_update(dist: Dist, models: dict[str, Path]) -> None:
    ctx = context({**GRPO, "beta": 0.0}, dist, str(models["moe"]))
    decoder, tokenizer = ctx.load(str(models["moe"]), trainable=True)
    learner = Learner(ctx, decoder, tokenizer, NoScorer(), ROWS)  # type: ignore[arg-type]
    samples = learner.rollout(0)
    for i, sample in enumerate(samples):
        sample.reward = float(i % 3)
    learner.advantage(samples)
    metrics = learner.update(0, learner.logprobs(samples))
    assert metrics["moe/changed_routings"] == 0
    (load,) = metrics["moe/load"]
    assert len(load) == 4 and sum(load) == pytest.approx(4)
    assert metrics["moe/max_violation"] == pytest.approx(max(load) - 1)
