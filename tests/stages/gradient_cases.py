"""One optimizer step of a stage on any number of ranks: loss, metrics and the gradient that the optimizer would get.

Imported by test_two_ranks.py, and run on several ranks by rank_cases.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from r1fast.parallel.mesh import Dist
from r1fast.schema import Recipe
from r1fast.stages.context import StageContext
from r1fast.stages.grpo import Learner
from r1fast.stages.measures import numbers
from r1fast.stages.packed import Example, encode_examples
from r1fast.stages.reward_model import preference_loss
from r1fast.stages.sampler import Sample, Sampler
from r1fast.stages.sft import cross_entropy
from r1fast.stages.training import Trainer, share

SFT = {
    "name": "sft", "kind": "sft", "train_files": ["-"], "router_bias_update_rate": 0.01,
    "router_aux_loss_coef": 0.1,
}  # fmt: skip
GRPO = {
    "name": "grpo", "kind": "grpo", "train_files": ["-"], "rewards": {"length": 1.0}, "num_generations": 4,
    "prompts_per_step": 3, "max_completion_length": 12, "max_prompt_length": 16, "prompt_template": "plain",
    "max_steps": 9,
}  # fmt: skip
PAIRWISE = {"name": "rm", "kind": "reward_model", "train_files": ["-"], "loss": "pairwise"}
WHOLE, SMALL = {"max_tokens_per_microbatch": 4096}, {"max_tokens_per_microbatch": 30}
# Lengths are far apart, so that a mean per rank or micro-batch is not the mean over all.
SFT_ROWS = [
    {"prompt": "one ?", "completion": "red " * 7},
    {"prompt": "two ? " * 3, "completion": "no"},
    {"prompt": "three ?", "completion": "yes yes"},
    {"text": "the quick brown fox"},
    {"prompt": "four ?", "completion": "good bad " * 2},
]


def context(stage: dict[str, Any], dist: Dist, model: str, **sections: Any) -> StageContext:
    recipe = Recipe.model_validate({"model": {"path": model, "dtype": "float32"}, "stages": [stage], **sections})
    return StageContext(recipe, recipe.stages[0], dist, Path("unused"))


def capture(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    """Collects the gradient of every update; the weights stay as they are."""
    gradients: list[dict[str, torch.Tensor]] = []

    def keep() -> None:
        found = {}
        for name, param in trainer.model.named_parameters():
            grad = param.grad
            assert grad is not None, name
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()
        gradients.append(found)

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    return gradients


def record(metrics: dict[str, float], gradients: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {"metrics": metrics, "gradients": gradients}


def sft(dist: Dist, model: str, rows: list[dict], options: dict[str, Any], *, local: bool = False) -> dict[str, Any]:
    """local: with the mistake of dividing by this rank's tokens."""
    ctx = context({**SFT, **options}, dist, model)
    decoder, tokenizer = ctx.load(model, trainable=True)
    trainer = Trainer(ctx, decoder, 1)
    gradients = capture(trainer)
    examples = encode_examples(rows, tokenizer, ctx.stage)
    counted = examples
    if local:
        counted = [examples[i] for group in share([[example] for example in examples], ctx) for i in group]
    return record(numbers(trainer.update(examples, cross_entropy(counted, ctx))), gradients)


def pairs(dist: Dist, model: str, options: dict[str, Any]) -> dict[str, Any]:
    ctx = context({**PAIRWISE, **options}, dist, model)
    decoder, _ = ctx.load(model, trainable=True, scalar_head=True)
    with torch.no_grad():
        for param in decoder.score.parameters():
            getattr(param, "_local_tensor", param).fill_(0.1)  # at zero nothing below the head would have a gradient
    trainer = Trainer(ctx, decoder, 1)
    gradients = capture(trainer)
    generator = torch.Generator().manual_seed(3)
    lengths = [(3, 9), (5, 2), (12, 4)]
    examples = [Example(ids(4, generator), ids(length, generator)) for pair in lengths for length in pair]
    return record(numbers(trainer.update(examples, preference_loss(len(lengths), ctx), group_size=2)), gradients)


def ids(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(10, 300, (count,), generator=generator).tolist()


def samples(options: dict[str, Any]) -> list[Sample]:
    """What a rollout could have given: 3 groups of 4 completions of 1 to 12 tokens, with the noise of a sampler."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for group, same in ((0, False), (1, options.get("same_rewards", False)), (2, options.get("same_rewards", False))):
        prompt = ids(3 + 4 * group, generator)
        for place in range(4):
            length = int(torch.randint(1, 13, (), generator=generator))
            noise = 0.2 * torch.randn(length, generator=generator) - 5.0
            finish = "length" if length > 9 else "stop"
            sample = Sample({"prompt": "-"}, group, prompt, ids(length, generator), noise.tolist(), finish, "", False)
            inputs = len(prompt) + length - 1
            if options.get("router_replay"):  # an MoE layer, two of four experts
                order = torch.rand(inputs, 1, 4, generator=generator).argsort(-1)
                sample.routed_experts = order[..., :2].to(torch.int16).numpy()
            sample.reward = 1.0 if same else float(torch.rand((), generator=generator)) + place
            found.append(sample)
    return found


class NoScorer:
    """Rewards are given; a Learner only asks for the weights."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}


def grpo(dist: Dist, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """From rewards on: advantages, log-probs of old policy and reference, updates."""
    same = {name: options.get(name, False) for name in ("same_rewards", "router_replay")}
    ctx = context({**GRPO, **{key: value for key, value in options.items() if key != "same_rewards"}}, dist, model)
    decoder, tokenizer = ctx.load(model, trainable=True)
    learner = Learner(ctx, decoder, tokenizer, NoScorer(), [{"prompt": "-"}])  # type: ignore[arg-type]
    if learner.reference is not None:
        with torch.no_grad():  # a reference that differs, so that the KL term has a gradient
            for param in learner.reference.parameters():
                getattr(param, "_local_tensor", param).mul_(0.9)
    gradients = capture(learner.trainer)
    rollout = samples(same)
    learner.advantage(rollout)
    return record(learner.update(0, learner.logprobs(rollout)), gradients)


def rollout(dist: Dist, model: str) -> dict[str, Any]:
    """Completions do not depend on which rank samples a prompt."""
    ctx = context(GRPO, dist, model)
    decoder, tokenizer = ctx.load(model, trainable=True)
    rows = [{"prompt": "red " * (1 + i)} for i in range(3)]
    found = Sampler(ctx, decoder, tokenizer).generate(rows, n=4, temperature=1.0, seed=5, sequence_ids=[9, 10, 11])
    return {
        "ids": [sample.completion_ids for sample in found],
        "groups": [sample.group for sample in found],
        "logprobs": [sample.sampler_logprobs for sample in found],
    }


def ahead(dist: Dist, model: str) -> dict[str, Any]:
    """Two rollouts, the second sampled while the weights change: it is that of the weights before."""
    options = {**GRPO, "learning_rate": 0.1, "temperature": 2.0}
    ctx = context(options, dist, model, rollout={"async_steps": 1})
    decoder, tokenizer = ctx.load(model, trainable=True)
    rows = [{"prompt": "red " * i} for i in range(1, 7)]
    learner = Learner(ctx, decoder, tokenizer, NoScorer(), rows)  # type: ignore[arg-type]
    found = []
    for step in range(2):
        rollout = learner.rollout(step)
        found.append([(sample.group, sample.completion_ids, sample.sampler_logprobs) for sample in rollout])
        for i, sample in enumerate(rollout):
            sample.reward = float(i)
        learner.advantage(rollout)
        metrics = learner.update(step, learner.logprobs(rollout))
    return {"rollouts": found, "gap": metrics["sampling/sampling_logp_difference/mean"]}


# By a name of one's own.
LOSSES: dict[str, dict[str, Any]] = {
    "corrected": {
        "loss_type": "grpo", "beta": 0.1, "kl_estimator": "k3_unbiased", "sampling_importance_mode": "sequence_mask",
        "sampling_importance_cap": 3.0, "off_policy_mask_threshold": 0.0, "entropy_coef": 0.01,
        "top_entropy_quantile": 0.5, "num_iterations": 2,
    },
    "of-the-sampler": {"loss_type": "dapo", "beta": 0.0, "old_logprobs": "sampler", "off_policy_mask_threshold": 0.1},
    "gspo-token": {"loss_type": "r1fast.losses.gspo_token", "loss_aggregation": "token", "steps_per_generation": 3},
    "sapo": {
        "loss_type": "r1fast.losses.sapo", "loss_aggregation": "constant", "sampling_importance_mode": "token_mask",
        "sampling_importance_cap": 2.0, "mask_truncated_completions": True, "num_iterations": 2,
    },
}  # fmt: skip
CASES: dict[str, Callable[[Dist, str], dict[str, Any]]] = {
    "sft": lambda dist, model: sft(dist, model, SFT_ROWS, WHOLE),
    "sft-micro": lambda dist, model: sft(dist, model, SFT_ROWS, SMALL),
    "sft-one-row": lambda dist, model: sft(dist, model, SFT_ROWS[:1], WHOLE),  # the second rank gets nothing
    "sft-three-rows-micro": lambda dist, model: sft(dist, model, SFT_ROWS[:3], SMALL),  # unequal numbers of batches
    "pairs": lambda dist, model: pairs(dist, model, WHOLE),
    "pairs-micro": lambda dist, model: pairs(dist, model, SMALL),
    **{
        f"grpo-{name}{suffix}": (lambda dist, model, o={"loss_type": name} | options | cut: grpo(dist, model, o))
        for suffix, cut in (("", WHOLE), ("-micro", SMALL))
        for name, options in {
            **LOSSES,
            "grpo": {"beta": 0.1, "sampling_importance_cap": 2.0},
            "bnpo": {"beta": 0.0, "mask_truncated_completions": True},
            "dr_grpo": {"beta": 0.0, "scale_rewards": "none", "importance_sampling_level": "sequence"},
            "dapo": {"beta": 0.1, "mask_truncated_completions": True, "steps_per_generation": 2, "epsilon_high": 0.3},
            "cispo": {"beta": 0.0, "epsilon_high": 5.0, "num_iterations": 2, "scale_rewards": "batch"},
        }.items()
    },
    **{
        f"grpo-replayed{suffix}": (
            lambda dist, model, o=cut: grpo(dist, model, {**o, "router_replay": True, "num_iterations": 2})
        )
        for suffix, cut in (("", WHOLE), ("-micro", SMALL))
    },
    # one group of three has a gradient; and with one example a rank gets nothing
    "grpo-skipped": lambda dist, model: grpo(
        dist, model, {**WHOLE, "beta": 0.0, "skip_zero_variance_groups": True, "same_rewards": True}
    ),
    "grpo-one-by-one": lambda dist, model: grpo(dist, model, {**WHOLE, "beta": 0.1, "steps_per_generation": 12}),
    "rollout": rollout,
    "ahead": ahead,
    "sft-local-denominator": lambda dist, model: sft(dist, model, SFT_ROWS, WHOLE, local=True),
}


def run_cases(dist: Dist, model: str) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return {name: case(dist, model) for name, case in CASES.items()}
