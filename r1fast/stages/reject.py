"""reject: rejection sampling. Many candidates a prompt; the correct, complete and readable ones become SFT rows.

Also what `collect` and `distill` sample with: one filter, one record of why each sample was dropped.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from r1fast.data.rows import CHAT_COLUMNS
from r1fast.data.templates import RESPONSE_FORMATS
from r1fast.rewards.filters import check_completion
from r1fast.schema import RejectStage
from r1fast.schema_options import SampleOptions
from r1fast.stages.context import StageContext
from r1fast.stages.sampler import Sample, Sampler
from r1fast.stages.scoring import Scorer, total_rewards


def run(ctx: StageContext[RejectStage]) -> dict[str, Any]:
    samples = sample(ctx, ctx.model_ref, shuffled(ctx))
    kept, dropped = select(ctx, samples, ctx.stage.response_format)
    return {"numbers": {"sampled": len(samples), "kept": len(kept), "dropped": dict(dropped)}}


def sample(ctx: StageContext[SampleOptions], ref: str, rows: list[dict]) -> list[Sample]:
    """What the model `ref` says to the first num_prompts rows."""
    stage = ctx.stage
    model, tokenizer = ctx.load(ref, trainable=False)
    return Sampler(ctx, model, tokenizer).generate(
        rows[: stage.num_prompts], n=stage.num_samples, temperature=stage.temperature, top_p=stage.top_p, seed=ctx.seed
    )


def shuffled(ctx: StageContext[SampleOptions]) -> list[dict]:
    """The stage's prompts in an order of which the first are from every file."""
    rows = ctx.rows()
    random.Random(ctx.seed).shuffle(rows)
    return rows


def select(
    ctx: StageContext[SampleOptions], samples: Sequence[Sample], response_format: str, *, limit: int | None = None
) -> tuple[list[Sample], Counter[str]]:
    """The samples that pass every filter, at most max_per_prompt different ones a prompt.

    Writes them to data.jsonl and the others to dropped.jsonl, with the reason that is counted.
    """
    stage = ctx.stage
    with Scorer(ctx, stage.rewards, response_format) as scorer:
        scorer.score(samples)
        judged = [s for s in samples if s.failed_rewards or not all(map(math.isnan, s.rewards.values()))]
        if judged and all(s.failed_rewards for s in judged):
            raise scorer.nothing_scored(judged)
        total_rewards(samples, scorer.weights)
    kept: list[Sample] = []
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    per_prompt: Counter[int] = Counter()
    for found in samples:
        key = (str(found.row["prompt"]), found.text)
        reason = drop_reason(found, stage, response_format)
        if reason is None and key in seen:
            reason = "duplicate"
        if reason is None and stage.max_per_prompt and per_prompt[found.group] >= stage.max_per_prompt:
            reason = "enough_for_prompt"
        if reason is None and limit is not None and len(kept) >= limit:
            reason = "enough_in_all"
        if reason is None:
            kept.append(found)
            seen.add(key)
            per_prompt[found.group] += 1
        else:
            rows.append({"prompt": found.row["prompt"], "completion": found.text, "reason": reason})
    ctx.write_rows("dropped.jsonl", rows)
    dropped = Counter(row["reason"] for row in rows)
    if not kept:
        where = f"look at {ctx.stage_dir}/dropped.jsonl"
        raise ctx.error(f"none of {len(samples)} samples passed: {dict(dropped)}; {where}")
    ctx.write_rows("data.jsonl", [sft_row(found, response_format) for found in kept])
    return kept, dropped


def drop_reason(sample: Sample, stage: SampleOptions, response_format: str) -> str | None:
    """A sample to which no reward applies is not judged, unless it has a gold that none can read."""
    if sample.failed_rewards:
        return "reward failed"
    if math.isnan(sample.reward) and sample.row.get("answer") is not None:
        return "gold unreadable"
    parsed = RESPONSE_FORMATS[response_format].parse(sample.text, prefilled=sample.prefilled)
    if not parsed.well_formed:
        asked = sample.asked_format or response_format
        return f"not in format {asked}" if sample.finish_reason == "stop" else "truncated"
    if sample.reward < stage.min_reward:  # not where it is nan
        return "incorrect" if list(stage.rewards) == ["accuracy"] else "reward below min_reward"
    language = sample.row.get("language")
    return check_completion(parsed, finish_reason=sample.finish_reason, language=language, **stage.filters.model_dump())


def sft_row(sample: Sample, response_format: str) -> dict[str, Any]:
    """A kept sample as an SFT row: its columns, and the completion with its reasoning opened."""
    opening = RESPONSE_FORMATS[response_format].prefill if sample.prefilled else ""
    # Other forms of the row's own solution would be learned from in place of the sample.
    row = {name: value for name, value in sample.row.items() if name not in (*CHAT_COLUMNS, "text")}
    return {**row, "completion": opening + sample.text}
