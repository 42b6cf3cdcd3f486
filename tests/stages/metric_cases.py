"""The metrics of a rollout's updates, or of one step of the other stages, however they are cut; the weights stay.

Old and reference log-probs are moved off the policy's, so that ratios, clips and KL are as after some updates. Imported
by test_metrics_invariance.py, and run on several ranks by rank_cases.py.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from r1fast.parallel.mesh import Dist
from r1fast.stages.context import StageContext
from r1fast.stages.grpo import Learner
from r1fast.stages.measures import numbers
from r1fast.stages.packed import Example, encode_examples
from r1fast.stages.reward_model import preference_loss
from r1fast.stages.sampler import Sample
from r1fast.stages.sft import cross_entropy
from r1fast.stages.training import Trainer
from tests.stages.gradient_cases import GRPO, LOSSES, PAIRWISE, SFT, SFT_ROWS, NoScorer, context, ids, samples

MASKED = {"mask_truncated_completions": True}
SEQUENCE = {"importance_sampling_level": "sequence"}
POLICIES: dict[str, dict[str, Any]] = {
    "token": {"steps_per_generation": 3},
    "sequence": {**SEQUENCE, "steps_per_generation": 3},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, "num_iterations": 2},
    "cispo-sequence": {**SEQUENCE, "loss_type": "cispo", "epsilon_high": 1.01, "delta": None},
    "masked": {**MASKED, "steps_per_generation": 2, "loss_type": "dapo"},
    # One sample an update: those of a truncated one have nothing to learn from.
    "masked-sequence": {**MASKED, **SEQUENCE, "steps_per_generation": 12},
    "skipped": {"skip_zero_variance_groups": True, "beta": 0.0, "steps_per_generation": 3},
    **LOSSES,
}
OTHERS = ["sft", "pairs", "labels"]
CASES = [f"{name}-moe" for name in (*POLICIES, *OTHERS)]
CASES += [f"{name}-dense" for name in ("token", "masked-sequence", *OTHERS)]
WHOLE, SMALL = {"max_tokens_per_microbatch": 4096}, {"max_tokens_per_microbatch": 30}


@cache
def load(dist: Dist, model: str, trainable: bool, scalar_head: bool, checkpointing: str, compile: bool) -> Any:
    """As nothing moves the weights, each model is loaded once."""
    sections = {"trainer": {"activation_checkpointing": checkpointing, "compile": compile}}
    return context(GRPO, dist, model, **sections).load(model, trainable=trainable, scalar_head=scalar_head)


def still_context(stage: dict[str, Any], dist: Dist, model: str, **sections: Any) -> StageContext:
    ctx = context(stage, dist, model, **sections)
    trainer = ctx.recipe.trainer

    def load_once(ref: str, *, trainable: bool, scalar_head: bool = False) -> Any:
        return load(dist, ref, trainable, scalar_head, trainer.activation_checkpointing, trainer.compile)

    ctx.load = load_once  # type: ignore[method-assign]
    return ctx


def still(trainer: Trainer) -> Trainer:
    trainer.optimizer.step = lambda: None  # type: ignore[method-assign]
    return trainer


def rollout(moe: bool, options: dict[str, Any]) -> list[Sample]:
    return samples({"router_replay": moe, "same_rewards": options.get("skip_zero_variance_groups", False)})


def learner(dist: Dist, model: str, options: dict[str, Any], **sections: Any) -> Learner:
    ctx = still_context({"beta": 0.1, **GRPO, **options}, dist, model, **sections)
    decoder, tokenizer = ctx.load(model, trainable=True)
    found = Learner(ctx, decoder, tokenizer, NoScorer(), [{"prompt": "-"}])  # type: ignore[arg-type]
    still(found.trainer)
    return found


def examples_of(learner: Learner, found: list[Sample]) -> list[Example]:
    """With old log-probs up to 0.4 off the policy's, and a reference 1 off."""
    learner.advantage(found)
    examples = learner.logprobs(found)
    generator = torch.Generator().manual_seed(11)
    for example, sample in zip(examples, found, strict=True):
        policy = torch.tensor(sample.sampler_logprobs)
        for name, distance in (("old", 0.4), ("ref", 1.0)):
            if name == "old" or name in example.values:
                noise = distance * (2 * torch.rand(len(policy), generator=generator) - 1)
                example.values[name] = (policy + noise).tolist()
    return examples


def of_policy(dist: Dist, model: str, options: dict[str, Any], **sections: Any) -> dict[str, Any]:
    found = learner(dist, model, options, **sections)
    moe = bool(found.policy.config.n_routed_experts)
    return found.update(0, examples_of(found, rollout(moe, options)))


def of_sft(ctx: StageContext, model: str) -> dict[str, Any]:
    decoder, tokenizer = ctx.load(model, trainable=True)
    examples = encode_examples(SFT_ROWS, tokenizer, ctx.stage)
    return numbers(still(Trainer(ctx, decoder, 1)).update(examples, cross_entropy(examples, ctx)))


def of_preferences(ctx: StageContext, model: str) -> dict[str, Any]:
    decoder, _ = ctx.load(model, trainable=True, scalar_head=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weight = getattr(decoder.score.weight, "_local_tensor", decoder.score.weight)
        whole = torch.randn(decoder.score.weight.shape, generator=generator)
        weight.copy_(whole if len(weight) else whole[:0])  # one row: the first rank has it
    pairwise = ctx.stage.loss == "pairwise"
    examples = [Example(ids(4, generator), ids(length, generator)) for length in (3, 9, 5, 2, 12, 4)]
    if not pairwise:
        examples = [replace(example, values={"label": float(i % 2)}) for i, example in enumerate(examples)]
    units = len(examples) // 2 if pairwise else len(examples)
    trainer = still(Trainer(ctx, decoder, 1))
    return numbers(trainer.update(examples, preference_loss(units, ctx), group_size=2 if pairwise else 1))


def measure(case: str, dist: Dist, models: dict[str, str], cut: dict[str, Any], **sections: Any) -> dict[str, Any]:
    name, _, family = case.rpartition("-")
    model = models[family]
    if name in POLICIES:
        return of_policy(dist, model, {**POLICIES[name], **cut}, **sections)
    if name == "sft":
        stage = {key: SFT[key] for key in ("name", "kind", "train_files")}
        stage |= {"router_aux_loss_coef": 0.1} if family == "moe" else {}
        return of_sft(still_context({**stage, **cut}, dist, model, **sections), model)
    loss = {"loss": "pairwise" if name == "pairs" else "pointwise"}
    return of_preferences(still_context({**PAIRWISE, **loss, **cut}, dist, model, **sections), model)


def run_cases(dist: Dist, models: dict[str, str]) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return {case: measure(case, dist, models, SMALL) for case in CASES}
