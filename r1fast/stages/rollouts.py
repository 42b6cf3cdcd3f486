"""What a GRPO step learns from: complete groups, sampled at once, in parts over several steps, or a step ahead.

A completion that `partial_rollout_length` cuts keeps its tokens, their log-probs and experts; the next step goes on
from there with the weights of that step. A group is handed on when all its completions have ended, because advantages
compare whole groups:

    step           1        2        3
    group 0   a    ----|    ----.             a waits for b
              b    --.
    group 1   a    -.                         handed on in step 1
              b    ---.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from r1fast.data.rows import location, shown
from r1fast.models.decoder import Decoder
from r1fast.rollout.sampling import SamplingParams
from r1fast.schema import GRPOStage
from r1fast.schema_options import WeightedSpec, reward_specs
from r1fast.stages.context import StageContext, Tokenizer
from r1fast.stages.packed import Prompt, permutation
from r1fast.stages.sampler import BackgroundSampler, GenerationFailed, Sample, Sampler, SamplingCall
from r1fast.stopping import Stopped

Group = list[Sample]  # of one prompt; sample.group is the number of prompts that were drawn before it


class Rollouts:
    """Draws prompts, samples from the policy and hands complete groups on; the same on every rank."""

    def __init__(self, ctx: StageContext[GRPOStage], policy: Decoder, tokenizer: Tokenizer, rows: list[dict]) -> None:
        self.ctx = ctx
        self.stage = ctx.stage
        self.rows = rows
        self.index_of = {id(row): index for index, row in enumerate(rows)}
        self.prompts = PromptOrder(rows, self.stage, ctx.seed)
        if ctx.recipe.rollout.async_steps:
            self.sampler: Sampler = BackgroundSampler(ctx, policy, tokenizer)
        else:
            self.sampler = Sampler(ctx, policy, tokenizer, record=True)
        self.groups: list[Group] = []  # under way: drawn, and not handed on yet
        self.sampled = False  # they have had their part for the next step
        self.running: Callable[[], None] | None = None

    def begin(self) -> None:
        """Start to sample for the next step, with so many new prompts that prompts_per_step are under way."""
        under_way = Counter(self.prompts.domain_of(group[0].row) for group in self.groups)
        self.groups += self._draw(Counter(self.prompts.shares) - under_way)
        self.running = self._start(self.groups)

    def next_groups(self) -> list[Group]:
        """The complete groups of the next step: prompts_per_step of them, or with partial rollouts at least one."""
        self.wait()
        while not self.sampled or not any(self._is_complete(group) for group in self.groups):
            self.begin()
            self.wait()
        self.sampled = False
        complete = [group for group in self.groups if self._is_complete(group)]
        self.groups = [group for group in self.groups if not self._is_complete(group)]
        return complete

    def replacements(self, groups: list[Group]) -> list[Group]:
        """Groups of as many new prompts of the same domains; one that is cut goes on in the next step instead."""
        assert self.running is None, "the sampler is at work on the next step"
        positions = dict(self.prompts.positions)
        fresh = self._draw(Counter(self.prompts.domain_of(group[0].row) for group in groups))
        try:
            self._start(fresh)()
        except (GenerationFailed, Stopped):
            self.prompts.positions = positions
            raise
        self.groups += [group for group in fresh if not self._is_complete(group)]
        return [group for group in fresh if self._is_complete(group)]

    def put_back(self, groups: list[Group]) -> None:
        """Of a step that ends here: the next step hands these groups on again."""
        self.groups, self.sampled = groups + self.groups, True

    def wait(self) -> None:
        """Wait for what is being sampled. Should it fail, its prompts stay, and the next step samples them."""
        if self.running is not None:
            running, self.running = self.running, None
            running()
            self.sampled = True

    def num_carried(self) -> int:
        """Groups that the next step goes on with."""
        return sum(any(sample.completion_ids for sample in group) for group in self.groups)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, the same on every rank. Waits for what is being sampled: its weights will be gone."""
        self.wait()
        groups = [[self._plain(sample) for sample in group] for group in self.groups]
        return {"positions": self.prompts.positions, "groups": groups, "sampled": self.sampled}

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave. ConfigError if a row that was sampled for is another by now."""
        self.prompts.positions |= state["positions"]
        self.groups = [[self._sample(values) for values in group] for group in state["groups"]]
        self.sampled = state["sampled"]

    def _plain(self, sample: Sample) -> dict[str, Any]:
        """The row by its index, with a checksum: it may hold what JSON cannot."""
        values = {field.name: getattr(sample, field.name) for field in fields(Sample)}
        return values | {"row": [self.index_of[id(sample.row)], _checksum(sample.row)]}

    def _sample(self, values: dict[str, Any]) -> Sample:
        index, checksum = values["row"]
        if index >= len(self.rows) or _checksum(self.rows[index]) != checksum:
            what = f"the checkpoint holds completions of row {index + 1}, which has changed"
            self.ctx.refuse([f"train_files: {what}; put the files back, or start a new run"])
        return Sample(**values | {"row": self.rows[index]})

    def _draw(self, counts: Mapping[str, int]) -> list[Group]:
        first, n = self.prompts.num_drawn, self.stage.num_generations
        rows = self.prompts.draw(counts)
        drawn = enumerate(zip(rows, self.sampler.encode(rows), strict=True), first)
        return [
            [Sample(row, number, prompt.ids, [], [], "length", "", prompt.prefilled) for _ in range(n)]
            for number, (row, prompt) in drawn
        ]

    def _start(self, groups: list[Group]) -> Callable[[], None]:
        """Sample (a part of) what is unfinished in these groups; the returned function waits for it."""
        n, part = self.stage.num_generations, self.stage.partial_rollout_length
        if part is None:
            samples = [sample for group in groups for sample in group]
            asked = {group[0].group: group[0] for group in groups}
        else:  # each completion is a sequence of its own; its noise goes on where it was: it depends on the position
            numbered = [(i, sample) for group in groups for i, sample in enumerate(group)]
            asked = {sample.group * n + i: sample for i, sample in numbered if not self._is_finished(sample)}
            samples = list(asked.values())
        rows = [sample.row for sample in asked.values()]
        prompts = [Prompt(s.prompt_ids + s.completion_ids, s.prefilled) for s in asked.values()]
        params = SamplingParams(
            n=n if part is None else 1, max_tokens=part or self.stage.max_completion_length,
            temperature=self.stage.temperature, seed=self.ctx.seed,
        )  # fmt: skip
        wait = self.sampler.start(SamplingCall(rows, prompts, list(asked), params))

        def finish() -> None:
            for sample, found in zip(samples, wait(), strict=True):
                self._extend(sample, found)

        return finish

    def _extend(self, sample: Sample, part: Sample) -> None:
        whole = not sample.completion_ids
        sample.completion_ids = sample.completion_ids + part.completion_ids
        sample.sampler_logprobs = sample.sampler_logprobs + part.sampler_logprobs
        sample.finish_reason = part.finish_reason
        # A character may begin in one part and end in the next.
        sample.text = part.text if whole else self.sampler.text_of(sample.completion_ids)
        known, found = sample.routed_experts, part.routed_experts
        if known is not None and found is not None:  # the experts that the earlier weights took, where they sampled
            found = np.concatenate([known, found[len(known) :]])
        sample.routed_experts = found

    def _is_finished(self, sample: Sample) -> bool:
        return sample.finish_reason == "stop" or len(sample.completion_ids) >= self.stage.max_completion_length

    def _is_complete(self, group: Group) -> bool:
        return all(self._is_finished(sample) for sample in group)


def _checksum(row: dict) -> int:
    return zlib.crc32(repr(row).encode(errors="surrogatepass"))


class PromptOrder:
    """An endless row of prompts for each domain (one, if no weights are given), in a fresh order every epoch.

    The orders are a function of the seed, so that `positions`, how many prompts of each domain were drawn, is all there
    is to save.
    """

    def __init__(self, rows: list[dict], stage: GRPOStage, seed: int) -> None:
        self.seed = f"{seed},{stage.name}"
        weights = self.weights = stage.domain_weights
        by_domain = {name: [row for row in rows if row.get("domain") == name] for name in weights}
        self.pools = by_domain or {"": rows}
        self.shares = _shares(stage.prompts_per_step, weights or {"": 1.0})
        self.positions = dict.fromkeys(self.pools, 0)

    @property
    def num_drawn(self) -> int:
        return sum(self.positions.values())

    def domain_of(self, row: dict) -> str:
        return row["domain"] if self.weights else ""

    def draw(self, counts: Mapping[str, int]) -> list[dict]:
        """The next so many prompts of each domain, domain by domain."""
        chosen = []
        for name, pool in self.pools.items():
            first = self.positions[name]
            self.positions[name] += counts.get(name, 0)
            for position in range(first, self.positions[name]):
                epoch, index = divmod(position, len(pool))
                chosen.append(pool[permutation(len(pool), f"{self.seed},{name},{epoch}")[index]])
        return chosen


def prompt_problems(stage: GRPOStage, rows: Sequence[dict]) -> Iterator[str]:
    """Too few prompts for a step, and domains without a weight or a prompt."""
    if len(rows) < stage.prompts_per_step:
        least = f"prompts_per_step = {stage.prompts_per_step}"
        yield f"train_files: {len(rows)} prompts, fewer than {least}; lower it, or add prompts"
    weights = stage.domain_weights
    yield from (problems := list(domain_problems("domain_weights", "train_files", weights, rows)))
    for name in sorted({str(row.get("domain")) for row in rows} - weights.keys()) if weights and not problems else ():
        yield f"domain_weights: rows of train_files have domain {name!r}; give it a weight (0 leaves it out)"
    for name, spec in stage.reward_models.items():
        yield from domain_problems(f"reward_models.{name}.domains", "train_files", spec.domains, rows)


def unrewarded_problems(stage: GRPOStage, rows: Sequence[dict]) -> Iterator[str]:
    """Rows of a domain that no reward is for: nothing can be learned from them."""
    specs: list[WeightedSpec] = [*reward_specs(stage.rewards).values(), *stage.reward_models.values()]
    if not all(spec.domains for spec in specs):
        return  # one is for all
    rewarded = {name for spec in specs for name in spec.domains}
    for name in dict.fromkeys(str(row.get("domain")) for row in rows):
        if name not in rewarded and (not stage.domain_weights or stage.domain_weights.get(name, 0) > 0):
            yield f"rewards: none applies to the rows of train_files with domain {name!r}; name one, or drop the rows"


def domain_problems(key: str, files: str, names: Iterable[str], rows: Sequence[dict]) -> Iterator[str]:
    """Domains that an option names, and no row has."""
    if not names:
        return
    for i, row in enumerate(rows):
        if not isinstance(row.get("domain"), str | None):
            yield f"{files}: {location(row, i)}: column 'domain' is {shown(row['domain'])}, expected a string ({key})"
            return
    domains = {row.get("domain") for row in rows}
    for name in names:
        if name not in domains:
            yield f"{key}: no row of {files} has domain {name!r}; domains: {sorted(map(str, domains))}"


def _shares(total: int, weights: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to total, as near to the weights as they can be (largest remainder)."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares
