"""grpo: group relative policy optimization (DeepSeekMath 2402.03300, DeepSeek-R1 2501.12948), one rollout a step.

rollout    num_generations completions of prompts_per_step prompts, from the trainer's own weights (rollouts.py)
reward     rule functions and reward models -> one number per completion; None does not count
refill     other prompts for groups of equal reward, where asked for
advantage  per group, before any split into minibatches
log-probs  old (only when a rollout is used for more than one update) and reference, forward only
update     steps_per_generation minibatches -> linear_grpo_loss -> clip -> optimizer
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from r1fast.data.rows import Row, location
from r1fast.models.decoder import Decoder
from r1fast.models.lora import adapters_off
from r1fast.parallel.offload import OffloadedModel
from r1fast.parallel.parallelize import copy_weights
from r1fast.policy_loss import linear_own_loss
from r1fast.schema import GRPOStage
from r1fast.stages.context import StageContext, Tokenizer
from r1fast.stages.evaluate import Validation, evaluate_end, evaluate_start, sample_columns
from r1fast.stages.measures import Max, Mean, Measures, merge, numbers
from r1fast.stages.packed import Example, PackedBatch, permutation
from r1fast.stages.reward_model import RewardModels
from r1fast.stages.rollouts import Rollouts, prompt_problems, unrewarded_problems
from r1fast.stages.sampler import GenerationFailed, Sample, by_group
from r1fast.stages.scoring import NothingScored, Scorer, punish_overlong, total_rewards
from r1fast.stages.training import LossFn, Trainer, map_packed
from r1fast.stopping import Stopped
from r1fast.user_code import load_function
from r1fast_kernels import group_advantages, linear_grpo_loss, linear_logprobs
from r1fast_kernels.loss_options import LossOptions

DEFAULT_IMPORTANCE_CAP = 2.0  # of truncated importance sampling, as verl has it


def run(ctx: StageContext[GRPOStage]) -> dict[str, Any]:
    stage = ctx.stage
    rows = ctx.rows()
    # A step may draw from one file alone; a reward still gets the columns of all.
    columns = dict.fromkeys(name for row in rows for name in row)
    rows = [Row({name: row.get(name) for name in columns}, location(row, i)) for i, row in enumerate(rows)]
    ctx.refuse([*prompt_problems(stage, rows), *unrewarded_problems(stage, rows)])
    policy, tokenizer = ctx.load(ctx.model_ref, trainable=True)
    before = evaluate_start(ctx, policy, tokenizer)
    with Scorer(ctx, stage.rewards, stage.response_format) as scorer:
        Learner(ctx, policy, tokenizer, scorer, rows).train()
    ctx.save(policy, tokenizer)
    return {"eval_before": before, "eval_after": evaluate_end(ctx, policy, tokenizer)}


class Learner:
    """The policy, its reference, and what turns prompts into updates."""

    def __init__(
        self, ctx: StageContext[GRPOStage], policy: Decoder, tokenizer: Tokenizer, scorer: Scorer, rows: list[dict]
    ) -> None:
        self.ctx, self.policy, self.tokenizer, self.scorer = ctx, policy, tokenizer, scorer
        self.stage = ctx.stage
        self.num_steps = self.stage.steps_on(len(rows))
        self.rollouts = Rollouts(ctx, policy, tokenizer, rows)
        self.trainer = Trainer(
            ctx, policy, self.num_steps * self.stage.updates_per_step, validation=Validation(ctx, policy, tokenizer),
            router_replay=self.stage.router_replay,
        )  # fmt: skip
        self.trainer.state_at = lambda step: {"rollouts": step, "sampling": self.rollouts.state()}
        self.reward_models = RewardModels(ctx)
        self.weights = scorer.weights | self.reward_models.weights
        if self.stage.overlong_buffer_length:
            self.weights["overlong"] = self.stage.overlong_penalty
        self.unscored_prompts = 0  # in a row
        self.reference: Decoder | None = None
        self.reference_here: Callable[..., AbstractContextManager[None]] = lambda changed=False: nullcontext()
        if self.stage.loss.beta > 0 and not self.stage.has_reference:
            self.reference = policy  # without its adapter
        elif self.stage.has_reference:
            self.reference, _ = ctx.load(self.stage.ref_model or ctx.model_ref, trainable=False)
            if "reference" in ctx.recipe.trainer.offload:
                self.reference_here = OffloadedModel(self.reference).here
            if self.stage.ref_model_sync_steps:  # then no file holds it
                self.trainer.saved = nn.ModuleDict({"policy": policy, "reference": self.reference})
                self.trainer.offloaded.append(partial(self.reference_here, changed=True))

    def train(self) -> None:
        stage = self.stage
        saved = self.trainer.restore()
        done = saved.get("rollouts", 0)
        if saved:
            self.rollouts.load_state(saved["sampling"])
        with self.ctx.log(self.num_steps, done) as log:
            step = done
            while self.trainer.goes_on(step, self.num_steps):
                start = time.perf_counter()
                try:
                    samples, metrics = self.train_step(step)
                except (GenerationFailed, NothingScored, Stopped):
                    self.trainer.save_good(step)
                    raise
                seconds = time.perf_counter() - start
                metrics |= {"step_time": seconds, "tokens_per_second": metrics["num_tokens"] / seconds}
                log.log(step + 1, metrics)
                if stage.log_completions and (step == 0 or (step + 1) % stage.log_completions_steps == 0):
                    log.samples(step + 1, sample_rows(samples, stage, self.tokenizer))
                step += 1
                self.trainer.save(step, last=step == self.num_steps)
            self.trainer.take_best(step)

    def train_step(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        samples = self.rollout(step)
        metrics: dict[str, float] = {"rewards/failures": self.reward(samples)}
        if self.stage.dynamic_sampling_refills:
            samples = self.refill(step, samples, metrics)
        self.check_scored(samples)
        self.advantage(samples)
        examples = self.logprobs(samples)
        updates = self.trainer.step
        try:
            metrics |= self.update(step, examples) | rollout_metrics(samples)
        except FloatingPointError:
            # As the step before left it, unless a minibatch has moved the weights or the next rollout is under way:
            # then the last checkpoint is what there is.
            if self.trainer.step == updates and not self.ctx.recipe.rollout.async_steps:
                self.rollouts.put_back(by_group(samples))
                self.trainer.save_good(step)
            raise
        if self.stage.partial_rollout_length:
            metrics |= {"partial_rollouts/carried_groups": self.rollouts.num_carried()}
        return samples, metrics

    def rollout(self, step: int) -> list[Sample]:
        groups = self.rollouts.next_groups()
        if not self.stage.dynamic_sampling_refills:
            self._sample_ahead(step)
        return [sample for group in groups for sample in group]

    def _sample_ahead(self, step: int) -> None:
        """With async_steps: begin the next rollout, with the weights of this moment."""
        if self.ctx.recipe.rollout.async_steps and step + 1 < self.num_steps:
            self.rollouts.begin()

    def reward(self, samples: list[Sample]) -> int:
        failures = self.scorer.score(samples)
        self.reward_models.score(samples)
        if self.stage.overlong_buffer_length:
            punish_overlong(samples, self.stage.max_completion_length, self.stage.overlong_buffer_length)
        total_rewards(samples, self.weights)
        return failures

    def check_scored(self, samples: list[Sample]) -> None:
        """Raises NothingScored when no sample of a step has a reward; short steps (partial rollouts) count together."""
        scored = any(not np.isnan(sample.reward) for sample in samples)
        self.unscored_prompts = 0 if scored else self.unscored_prompts + len(by_group(samples))
        if self.unscored_prompts >= self.stage.prompts_per_step:
            raise self.scorer.nothing_scored(samples)

    def refill(self, step: int, samples: list[Sample], metrics: dict[str, float]) -> list[Sample]:
        """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): groups of equal reward give their places to others.

        Groups that are equal after the last refill stay, so that a step has as many as ever.
        """
        groups = by_group(samples)
        refills = discarded = 0
        while refills < self.stage.dynamic_sampling_refills:
            equal = [i for i, group in enumerate(groups) if not has_spread(group)]
            if not equal:
                break
            try:
                fresh = self.rollouts.replacements([groups[i] for i in equal])
            except (GenerationFailed, Stopped):
                self.rollouts.put_back(groups)
                raise
            if fresh:
                metrics["rewards/failures"] += self.reward([sample for group in fresh for sample in group])
            for i, group in zip(equal, fresh):  # partial rollouts may have left some unfinished
                groups[i] = group
            refills, discarded = refills + 1, discarded + len(fresh)
        self._sample_ahead(step)
        metrics |= {"dynamic_sampling/refills": refills, "dynamic_sampling/discarded_groups": discarded}
        return [sample for group in groups for sample in group]

    def advantage(self, samples: list[Sample]) -> None:
        rewards_N = torch.tensor([sample.reward for sample in samples], dtype=torch.float32)
        groups_N = torch.tensor([sample.group for sample in samples])
        advantages_N = group_advantages(rewards_N, groups_N, scale=self.stage.loss.scale_rewards)
        for sample, advantage in zip(samples, advantages_N.tolist()):
            sample.advantage = advantage

    def logprobs(self, samples: list[Sample]) -> list[Example]:
        """What the update needs of each sample: advantage, sampler's log-probs, old and reference log-probs."""
        stage = self.stage
        examples = []
        for sample in samples:
            masked = stage.mask_truncated_completions and sample.finish_reason == "length"
            learned = bool(sample.completion_ids) and not masked
            values = {"advantage": sample.advantage, "sampler": sample.sampler_logprobs}
            examples.append(
                Example(sample.prompt_ids, sample.completion_ids, values, sample.routed_experts, learned=learned)
            )
        with self.ctx.phase("logprobs"):
            if stage.steps_per_generation * stage.num_iterations > 1 and stage.old_logprobs == "policy":
                self._fill(examples, "old", self.policy)
            if self.reference is not None:
                with self.reference_here():
                    self._fill(examples, "ref", self.reference)
        return examples

    def _fill(self, examples: list[Example], name: str, model: Decoder) -> None:
        """example.values[name], of each token: log-probs, or as "entropy" that."""

        def head(batch: PackedBatch, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
            inputs = hidden_TD.index_select(0, batch.loss_index_M), weight_VD, batch.target_ids_M
            entropy = name == "entropy"
            found = linear_logprobs(*inputs, temperature=self.stage.temperature, with_entropy=entropy)
            return found[1] if entropy else found  # type: ignore[return-value]

        replay = self.stage.router_replay and name != "ref"
        with adapters_off(model) if name == "ref" else nullcontext():
            found = map_packed(self.ctx, model, examples, head, per_token=True, router_replay=replay)
        for example, values in zip(examples, found, strict=True):
            example.values[name] = values

    def _entropy_threshold(self, examples: list[Example]) -> Tensor | None:
        """From which entropy on a token of this minibatch has a surrogate; of all tokens, so that no cut matters."""
        top = self.stage.loss.top_entropy_quantile
        if top == 1:
            return None
        with self.ctx.phase("logprobs"):
            self._fill(examples, "entropy", self.policy)
        known = [example.values["entropy"] for example in examples if example.num_learned]
        threshold = np.quantile(np.concatenate(known), 1 - top) if known else math.nan
        # The token at the quantile stays in, however its entropy is rounded in the batch that it is trained in.
        return torch.tensor(threshold - 1e-5, dtype=torch.float32, device=self.ctx.dist.device)

    def update(self, step: int, examples: list[Example]) -> dict[str, Any]:
        stage = self.stage
        history: list[Measures] = []
        for iteration in range(stage.num_iterations):
            count = stage.steps_per_generation
            seed = f"{self.ctx.seed},{step},{iteration}"
            order = permutation(len(examples), seed) if count > 1 else range(len(examples))
            for first, end in pairwise(len(order) * i // count for i in range(count + 1)):
                chosen = [examples[i] for i in order[first:end]]
                active = chosen
                if stage.skip_zero_variance_groups:  # without KL, an advantage of 0 has no gradient
                    active = [example for example in chosen if example.values["advantage"] != 0.0]
                loss = policy_loss(chosen, self.ctx, self._entropy_threshold(chosen))
                with self.ctx.phase("update"):
                    history.append(self.trainer.update(active, loss))
                every = stage.ref_model_sync_steps
                if self.reference is not None and every and self.trainer.step % every == 0:
                    with self.reference_here(changed=True):
                        copy_weights(self.policy, self.reference)
        return numbers(merge(history))


def importance_cap(ctx: StageContext[GRPOStage]) -> float | None:
    """What caps the weights exp(old - sampler log-prob); None where there are none.

    They are 1 up to rounding if the sampler is the policy: the same weights, in a precision in which the two ways to a
    log-prob agree. In bfloat16 a rounding can send a token to another expert (docs/numerics.md, section 2).
    """
    stage, rollout = ctx.stage, ctx.recipe.rollout
    if stage.sampling_importance_cap != "auto":
        return stage.loss.is_cap
    same_weights = rollout.engine == "r1fast" and not rollout.async_steps and stage.partial_rollout_length is None
    exact = stage.old_logprobs == "sampler" or (same_weights and ctx.param_dtype is torch.float32)
    return None if exact or stage.loss.is_min is not None else DEFAULT_IMPORTANCE_CAP


def policy_loss(
    examples: Sequence[Example], ctx: StageContext[GRPOStage], entropy_threshold: Tensor | None = None
) -> LossFn:
    """The GRPO loss of a minibatch, normalised by what all its micro-batches and ranks hold."""
    stage = ctx.stage
    function = load_function("loss_type", stage.loss_type) if stage.is_own_loss else None
    options = stage.loss._replace(is_cap=importance_cap(ctx), max_completion_length=stage.max_completion_length)
    arguments = options._asdict() | {
        "temperature": stage.temperature,
        "num_items": max(float(sum(example.num_learned for example in examples)), 1.0),
        "num_samples": float(len(examples)),
        "entropy_threshold": entropy_threshold,
    }

    def loss_fn(batch: PackedBatch, hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Measures]:
        values = batch.values
        head = hidden_TD.index_select(0, batch.loss_index_M), weight_VD, batch.target_ids_M, batch.loss_cu_seqlens
        given = arguments | {
            "advantages_N": values["advantage"],
            "old_logprobs_T": values["sampler"] if stage.old_logprobs == "sampler" else values.get("old"),
            "ref_logprobs_T": values.get("ref"),
            "sampler_logprobs_T": values["sampler"],
        }
        if function is None:
            loss, metrics = linear_grpo_loss(*head, **given)
            return loss, policy_measures(metrics, batch, options)
        mean = stage.loss_aggregation or "sample"
        loss, metrics, own = linear_own_loss(function, *head, loss_aggregation=mean, **given)
        measured = {name: Mean(values_X.double().sum(), len(values_X)) for name, values_X in own.items()}
        return loss, policy_measures(metrics, batch, options) | measured

    return loss_fn


def policy_measures(metrics: dict[str, Tensor], batch: PackedBatch, options: LossOptions) -> Measures:
    """The op's means of one batch, with what they are means of: tokens, or samples where a value is of a sample."""
    num_tokens, num_samples = len(batch.target_ids_M), len(batch.loss_cu_seqlens) - 1
    of_samples = {"off_policy_mask_ratio"}
    if options.importance_level == "sequence":
        of_samples |= {"importance_ratio", "clip_ratio", "cispo_clip_ratio"}
    if options.is_mode.startswith("sequence"):
        of_samples.add("sampling/importance_sampling_ratio")
    measures: Measures = {}
    for name, value in metrics.items():
        count = num_samples if not of_samples.isdisjoint((name, name.rpartition("/")[0])) else num_tokens
        measures[name] = Max(value) if name.endswith("/max") else Mean(value.double() * count, count)
    return measures


def has_spread(group: list[Sample]) -> bool:
    """Whether rewards differ: by their extremes, as the standard deviation of equal ones need not be exactly 0."""
    scored = [sample.reward for sample in group if not np.isnan(sample.reward)]
    return bool(scored) and min(scored) != max(scored)


def rollout_metrics(samples: list[Sample]) -> dict[str, float]:
    """Every rank holds all samples, so these are plain means; NaN where there is nothing to take one of."""
    rewards = np.array([sample.reward for sample in samples])
    groups = by_group(samples)
    scored = [[sample.reward for sample in group if not np.isnan(sample.reward)] for group in groups]
    spreads = [float(np.std(group, ddof=1)) for group in scored if len(group) > 1]
    lengths = np.array([len(sample.completion_ids) for sample in samples])
    metrics = {
        "reward": float(np.nanmean(rewards)) if any(scored) else math.nan,
        "frac_unscorable": float(np.mean(np.isnan(rewards))),
        "reward_std": float(np.mean(spreads)) if spreads else math.nan,
        "frac_reward_zero_std": float(np.mean([not has_spread(group) for group in groups])),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        "num_tokens": float(lengths.sum() + sum(len(sample.prompt_ids) for sample in samples)),
    }
    for name in samples[0].rewards:
        values = np.array([sample.rewards[name] for sample in samples])
        if not np.all(np.isnan(values)):
            metrics[f"rewards/{name}/mean"] = float(np.nanmean(values))
    return metrics


def sample_rows(samples: list[Sample], stage: GRPOStage, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The first completions of evenly spread prompts, for samples/*.parquet."""
    stride = max(1, len(samples) // stage.log_completions)
    return [
        sample_columns(sample, tokenizer) | {"reward": sample.reward, "advantage": sample.advantage}
        for sample in samples[::stride][: stage.log_completions]
    ]
