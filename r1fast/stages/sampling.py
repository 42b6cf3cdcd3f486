"""Sampling from the model of a stage: rows in, scored samples out, the same on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from r1fast.config import ConfigError
from r1fast.data.templates import RESPONSE_FORMATS
from r1fast.dist.parallelize import generation_phase
from r1fast.models.decoder import Decoder
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams
from r1fast.stages.batch import Prompt, encode_prompts
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
    prefilled: bool  # the prompt opened the reasoning
    routed_experts: np.ndarray | None = None  # of every token but the last: [., L, K]
    rewards: dict[str, float] = field(default_factory=dict)  # by name; nan = does not apply
    failed: bool = False  # a reward's call failed
    reward: float = float("nan")  # weighted sum; nan = unscorable
    advantage: float = 0.0


class Sampler:
    """Generates from a sharded model, each rank its share of the prompts."""

    def __init__(
        self, ctx: StageContext, model: Decoder, tokenizer: Any, options: Any | None = None, *, record: bool = False
    ) -> None:
        """record: samples of a mixture of experts say which experts each token went to."""
        self.ctx, self.model, self.tokenizer = ctx, model, tokenizer
        self.options = options or ctx.stage  # prompt_template, response_format, lengths
        self.engine = RolloutEngine(
            model,
            tokenizer,
            max_num_seqs=ctx.recipe.rollout.max_num_seqs,
            impl=ctx.recipe.kernels.impl,
            enable_return_routed_experts=record and any(True for _ in model.moe_layers()),
        )

    def encode(self, rows: Sequence[dict]) -> list[Prompt]:
        prompts = encode_prompts([row["prompt"] for row in rows], self.tokenizer, self.options)
        for row, (ids, _) in zip(rows, prompts):
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
        prompts: Sequence[Prompt] | None = None,
    ) -> list[Sample]:
        """n samples of every row, group-contiguous, on every rank. Row i draws its noise from (seed, first_id + i)."""
        dist = self.ctx.dist
        prompts = self.encode(rows) if prompts is None else prompts
        mine = range(dist.rank, len(rows), dist.world_size)
        params = SamplingParams(n=n, max_tokens=self.options.max_completion_length, temperature=temperature, seed=seed)
        with self.ctx.phase("generate"), generation_phase(self.model):
            outputs = self.engine.generate(
                [prompts[i].ids for i in mine], params, sequence_ids=[first_id + i for i in mine]
            )
        local = {
            i: [(c.token_ids, c.logprobs, c.finish_reason, c.text, c.routed_experts) for c in completions]
            for i, completions in zip(mine, outputs, strict=True)
        }
        merged = {i: found for part in dist.all_gather_objects(local) for i, found in part.items()}
        return [
            Sample(rows[i], i, prompt.ids, ids, logprobs, finish_reason, text, prompt.prefilled, routed_experts=routed)
            for i, prompt in enumerate(prompts)
            for ids, logprobs, finish_reason, text, routed in merged[i]
        ]


def summary_of(text: str, response_format: str, prefilled: bool = False) -> str:
    """The part of a response that the user reads: what follows the reasoning."""
    parsed = RESPONSE_FORMATS[response_format].parse(text, prefilled=prefilled)
    return (parsed.answer if parsed else None) or ""
