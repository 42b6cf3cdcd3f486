"""Sampling from the model of a stage: rows in, scored samples out, the same on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from r1fast.config import ConfigError, RewardSpec
from r1fast.data.templates import RESPONSE_FORMATS
from r1fast.dist.parallelize import generation_phase
from r1fast.models.decoder import Decoder
from r1fast.rewards.pool import RewardPool
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams
from r1fast.stages.batch import encode_prompts
from r1fast.stages.context import StageContext


@dataclass(slots=True)
class Sample:
    """One completion of one row, and what became of it."""

    row: dict
    group: int  # which prompt of the call
    prompt_ids: list[int]
    completion_ids: list[int]
    sampler_logprobs: list[float]
    finish_reason: str
    text: str
    rewards: dict[str, float] = field(default_factory=dict)  # by name; nan = does not apply
    reward: float = float("nan")  # weighted sum; nan = unscorable
    advantage: float = 0.0


class Sampler:
    """Generates from a sharded model, each rank its share of the prompts."""

    def __init__(self, ctx: StageContext, model: Decoder, tokenizer: Any, options: Any | None = None) -> None:
        self.ctx, self.model, self.tokenizer = ctx, model, tokenizer
        self.options = options or ctx.stage  # prompt_template, response_format, lengths
        self.engine = RolloutEngine(model, tokenizer, max_num_seqs=ctx.recipe.rollout.max_num_seqs)

    def encode(self, rows: Sequence[dict]) -> list[list[int]]:
        prompts = encode_prompts([row["prompt"] for row in rows], self.tokenizer, self.options)
        for row, ids in zip(rows, prompts):
            if len(ids) > self.options.max_prompt_length:
                raise ConfigError(
                    f"stages.{self.ctx.stage.name}: the prompt {str(row['prompt'])[:60]!r} has {len(ids)} tokens, more "
                    f"than max_prompt_length = {self.options.max_prompt_length}; raise it or drop the row"
                )
        return prompts

    def generate(
        self,
        rows: Sequence[dict],
        *,
        n: int,
        temperature: float,
        seed: int,
        first_id: int = 0,
        prompts: Sequence[list[int]] | None = None,
    ) -> list[Sample]:
        """n samples of every row, group-contiguous, on every rank. Row i draws its noise from (seed, first_id + i)."""
        dist = self.ctx.dist
        prompts = self.encode(rows) if prompts is None else prompts
        mine = range(dist.rank, len(rows), dist.world_size)
        params = SamplingParams(n=n, max_tokens=self.options.max_completion_length, temperature=temperature, seed=seed)
        with self.ctx.phase("generate"), generation_phase(self.model):
            outputs = self.engine.generate(
                [prompts[i] for i in mine], params, sequence_ids=[first_id + i for i in mine]
            )
        local = {
            i: [(c.token_ids, c.logprobs, c.finish_reason, c.text) for c in completions]
            for i, completions in zip(mine, outputs, strict=True)
        }
        merged = {i: found for part in dist.all_gather_objects(local) for i, found in part.items()}
        return [Sample(rows[i], i, prompts[i], *found) for i in range(len(rows)) for found in merged[i]]


class Scorer:
    """Rule rewards in worker processes, routed by domain. Rank 0 scores; every rank gets the numbers."""

    def __init__(
        self, ctx: StageContext, rewards: dict[str, Any], response_format: str, prefilled: bool = False
    ) -> None:
        self.ctx, self.response_format, self.prefilled = ctx, response_format, prefilled
        specs = reward_specs(rewards)
        self.functions = {name: spec.function or name for name, spec in specs.items()}
        self.domains = {name: set(spec.domains) for name, spec in specs.items()}
        self.weights = {name: spec.weight for name, spec in specs.items()}
        arguments = pool_arguments(specs)
        workers = ctx.recipe.reward_workers
        self.pool: RewardPool | None = None
        if arguments and ctx.dist.is_main:
            self.pool = RewardPool(arguments, num_workers=workers.num_workers, timeout_s=workers.timeout_s)

    def score(self, samples: Sequence[Sample]) -> int:
        """Fill sample.rewards; returns how many calls failed (their values are nan)."""
        with self.ctx.phase("reward"):
            values, failures = self.ctx.dist.all_gather_objects(self._score(samples) if self.pool else ({}, []))[0]
        for name in self.weights:
            column = values[self.functions[name]]
            for sample, value in zip(samples, column, strict=True):
                wanted = not self.domains[name] or sample.row.get("domain") in self.domains[name]
                sample.rewards[name] = float(value) if wanted else float("nan")
        for failure in failures[:3]:
            self.ctx.message(f"reward failed: {failure}")
        return len(failures)

    def _score(self, samples: Sequence[Sample]) -> tuple[dict[str, np.ndarray], list[str]]:
        assert self.pool is not None
        names = dict.fromkeys(name for sample in samples for name in sample.row if name not in ("prompt", "completion"))
        columns: dict[str, list] = {name: [sample.row.get(name) for sample in samples] for name in names}
        columns["response_format"] = [self.response_format] * len(samples)
        columns["finish_reason"] = [sample.finish_reason for sample in samples]
        columns["prefilled"] = [self.prefilled] * len(samples)
        result = self.pool.score(
            [sample.row["prompt"] for sample in samples],
            [s.text for s in samples],
            [s.completion_ids for s in samples],
            columns,
        )
        return result.values, result.failures

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def reward_specs(rewards: dict[str, Any]) -> dict[str, RewardSpec]:
    return {
        name: RewardSpec(weight=value) if isinstance(value, (int, float)) else RewardSpec.model_validate(value)
        for name, value in rewards.items()
    }


def pool_arguments(specs: dict[str, RewardSpec]) -> dict[str, dict[str, Any]]:
    """What RewardPool is given: each function once, with its keyword arguments."""
    arguments: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        function = spec.function or name
        if function in arguments:
            raise ConfigError(f"reward {name}: the function {function} is used by another reward already; name it once")
        arguments[function] = {"weight": spec.weight, **(spec.model_extra or {})}
    return arguments


def total_rewards(samples: Sequence[Sample], weights: dict[str, float]) -> None:
    """sample.reward = weighted sum of the rewards that apply; nan where none does."""
    for sample in samples:
        terms = [
            weight * sample.rewards[name] for name, weight in weights.items() if not np.isnan(sample.rewards[name])
        ]
        sample.reward = sum(terms) if terms else float("nan")


def summary_of(text: str, response_format: str, prefilled: bool = False) -> str:
    """The part of a response that the user reads: what follows the reasoning."""
    parsed = RESPONSE_FORMATS[response_format].parse(text, prefilled=prefilled)
    return (parsed.answer if parsed else None) or ""
