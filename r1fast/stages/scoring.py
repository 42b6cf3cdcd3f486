"""Rewards of samples: rule functions in worker processes, routed by domain, and the weighted sum."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from r1fast.config import ConfigError
from r1fast.rewards.pool import RewardPool, headline
from r1fast.schema_options import RewardSpec, reward_specs
from r1fast.stages.context import StageContext
from r1fast.stages.sampler import Sample, by_group


class NothingScored(ConfigError):
    """No reward gave any sample a value: going on would cost time and teach nothing. Raised on every rank."""


class Scorer(AbstractContextManager["Scorer"]):
    """The rule rewards of a stage. Rank 0 scores; every rank gets the numbers.

    A reward sees the rows of its domains only: one worker pool for each set of domains.
    """

    def __init__(self, ctx: StageContext, rewards: Mapping[str, Any], response_format: str) -> None:
        self.ctx, self.response_format = ctx, response_format
        self.specs = reward_specs(rewards)
        self.weights = {name: spec.weight for name, spec in self.specs.items()}
        by_domains = pool_arguments(self.specs) if ctx.dist.is_main else {}
        workers = ctx.recipe.reward_workers.model_dump()
        self.pools = {domains: RewardPool(arguments, **workers) for domains, arguments in by_domains.items()}
        self.failures: list[str] = []  # of the last call of `score`, one line each

    def score(self, samples: Sequence[Sample]) -> int:
        """Fill sample.rewards (nan where a reward does not apply or failed) and sample.failed_rewards.

        Returns how many values are missing, or 0, because a reward failed.
        """
        with self.ctx.phase("reward"):
            values, failed, failures = self.ctx.dist.all_gather_objects(self._score(samples))[0]
        for i, sample in enumerate(samples):
            sample.failed_rewards = [name for name in self.specs if failed[name][i]]
            for name in self.specs:
                sample.rewards[name] = float(values[name][i])
        self.failures = [headline(failure) for failure in failures]  # the pool logs a whole traceback, once
        for failure in self.failures[:3]:
            self.ctx.message(f"reward failed: {failure}")
        return sum(len(sample.failed_rewards) for sample in samples)

    def nothing_scored(self, samples: Sequence[Sample]) -> NothingScored:
        """The error of a batch in which no sample has a value."""
        empty = [name for name in self.specs if all(np.isnan(sample.rewards[name]) for sample in samples)]
        silent = [name for name in empty if not any(name in sample.failed_rewards for sample in samples)]
        reasons = self.failures[:3] + [f"reward {name!r} gave None for every sample" for name in silent]
        what = f"stages.{self.ctx.stage.name}: none of {len(samples)} samples could be scored: {'; '.join(reasons)}"
        return NothingScored(f"{what}; correct the reward, or the columns that it reads")

    def _score(self, samples: Sequence[Sample]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
        values = {name: np.full(len(samples), np.nan) for name in self.specs}
        failed = {name: np.zeros(len(samples), dtype=bool) for name in self.specs}
        failures: list[str] = []
        for domains, pool in self.pools.items():
            index = [i for i, s in enumerate(samples) if not domains or s.row.get("domain") in domains]
            if not index:
                continue
            chosen = [samples[i] for i in index]
            prompts, texts = [sample.row["prompt"] for sample in chosen], [sample.text for sample in chosen]
            result = pool.score(prompts, texts, [s.completion_ids for s in chosen], self._columns(chosen))
            for name, spec in self.specs.items():
                if tuple(spec.domains) == domains:
                    function = str(spec.function)
                    values[name][index] = result.values[function]
                    failed[name][index] = result.failed_by[function] | result.exceeded[function]
            failures += result.failures
        return values, failed, failures

    def _columns(self, samples: Sequence[Sample]) -> dict[str, list]:
        ours = ("prompt", "completion", "completion_ids")
        names = dict.fromkeys(name for sample in samples for name in sample.row if name not in ours)
        return {name: [sample.row.get(name) for sample in samples] for name in names} | {
            "group_ids": [sample.group for sample in samples],
            "response_format": [self.response_format] * len(samples),
            "finish_reason": [sample.finish_reason for sample in samples],
            "prefilled": [sample.prefilled for sample in samples],
        }

    def __exit__(self, *error: object) -> None:
        for pool in self.pools.values():
            pool.close()


def pool_arguments(specs: dict[str, RewardSpec]) -> dict[tuple[str, ...], dict[str, dict[str, Any]]]:
    """What the RewardPool of each set of domains is given: each function once, with its keyword arguments."""
    pools: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for name, spec in specs.items():
        arguments = pools.setdefault(tuple(spec.domains), {})
        function = str(spec.function)
        if function in arguments:
            raise ConfigError(f"reward {name}: the function {function} is used by another reward already; name it once")
        arguments[function] = dict(spec.model_extra or {})
    return pools


def total_rewards(samples: Sequence[Sample], weights: dict[str, float]) -> None:
    """sample.reward = weighted sum of the rewards that apply; nan where none does.

    A group is compared with itself, so its sums have the same terms: a reward that failed on all samples of a group is
    left out of the group, and where it failed on some, these are nan.
    """
    for group in by_group(samples):
        counted = [name for name in weights if not all(np.isnan(sample.rewards[name]) for sample in group)]
        for sample in group:
            terms = {name: weights[name] * sample.rewards[name] for name in counted}
            known = [term for term in terms.values() if not np.isnan(term)]
            failed = any(np.isnan(term) and name in sample.failed_rewards for name, term in terms.items())
            sample.reward = sum(known) if known and not failed else float("nan")


def punish_overlong(samples: Sequence[Sample], max_length: int, buffer_length: int) -> None:
    """sample.rewards["overlong"]: DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).

    0 up to max_length - buffer_length tokens, from there linearly down to -1 at max_length. nan where no other reward
    applies: a length alone does not make a sample scorable.
    """
    for sample in samples:
        excess = len(sample.completion_ids) - (max_length - buffer_length)
        scorable = not all(np.isnan(value) for value in sample.rewards.values())
        sample.rewards["overlong"] = min(0.0, -excess / buffer_length) if scorable else float("nan")
