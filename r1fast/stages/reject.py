"""reject: rejection sampling. Many candidates a prompt; the correct, complete and readable ones become SFT rows.

Also what `collect` and `distill` sample with: one filter, one record of why each sample was dropped.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from r1fast.config import ConfigError
from r1fast.data.sources import load_rows
from r1fast.data.templates import RESPONSE_FORMATS
from r1fast.rewards.filters import check_completion
from r1fast.stages.context import StageContext
from r1fast.stages.sampler import Sample, Sampler
from r1fast.stages.scoring import Scorer


def run(ctx: StageContext) -> dict[str, Any]:
    stage = ctx.stage
    model, tokenizer = ctx.load(ctx.model_ref, trainable=False)
    rows = load_rows(ctx.sources(stage.train_files), "prompts")
    random.Random(ctx.seed).shuffle(rows)  # so that num_prompts takes from every file
    rows = rows[: stage.num_prompts]
    sampler = Sampler(ctx, model, tokenizer)
    samples = sampler.generate(rows, n=stage.num_samples, temperature=stage.temperature, seed=ctx.seed)
    kept, dropped = select(ctx, samples, stage.response_format)
    ctx.write_rows("data.jsonl", [sft_row(sample, stage.response_format) for sample in kept])
    return {"numbers": {"sampled": len(samples), "kept": len(kept), "dropped": dict(dropped)}}


def select(
    ctx: StageContext,
    samples: Sequence[Sample],
    response_format: str,
    *,
    limit: int | None = None,
) -> tuple[list[Sample], Counter[str]]:
    """The samples that pass every filter, at most max_per_prompt different ones a prompt; writes dropped.jsonl."""
    stage = ctx.stage
    with Scorer(ctx, {"accuracy": 1.0}, response_format) as scorer:
        scorer.score(samples)
        golds = [sample for sample in samples if sample.row.get("answer") is not None]
        if golds and all(sample.has_failed("accuracy") for sample in golds):
            raise scorer.nothing_scored(golds, ["accuracy"])
    kept: list[Sample] = []
    reasons: list[tuple[Sample, str]] = []
    seen: set[tuple[str, str]] = set()
    per_prompt: Counter[int] = Counter()
    for sample in samples:
        reason = drop_reason(sample, stage.filters, response_format)
        key = (str(sample.row["prompt"]), sample.text)
        if reason is None and key in seen:
            reason = "duplicate"
        if reason is None and stage.max_per_prompt and per_prompt[sample.group] >= stage.max_per_prompt:
            reason = "enough_for_prompt"
        if reason is None and limit is not None and len(kept) >= limit:
            reason = "enough_in_all"
        if reason is None:
            kept.append(sample)
            seen.add(key)
            per_prompt[sample.group] += 1
        else:
            reasons.append((sample, reason))
    ctx.write_rows(
        "dropped.jsonl", [{"prompt": s.row["prompt"], "completion": s.text, "reason": reason} for s, reason in reasons]
    )
    dropped = Counter(reason for _, reason in reasons)
    if not kept:
        raise ConfigError(
            f"stages.{stage.name}: none of {len(samples)} samples passed: {dict(dropped)}; "
            f"look at {ctx.stage_dir}/dropped.jsonl"
        )
    return kept, dropped


def drop_reason(sample: Sample, filters: Any, response_format: str) -> str | None:
    if sample.row.get("answer") is not None and (reason := _why_not_correct(sample)):
        return reason
    return check_completion(
        sample.text,
        response_format=response_format,
        finish_reason=sample.finish_reason,
        language=sample.row.get("language"),
        prefilled=sample.prefilled,
        **filters.model_dump(),
    )


def _why_not_correct(sample: Sample) -> str | None:
    if sample.has_failed("accuracy"):
        return "reward failed"
    if math.isnan(sample.rewards["accuracy"]):
        return "gold unreadable"
    return None if sample.rewards["accuracy"] == 1.0 else "incorrect"


def sft_row(sample: Sample, response_format: str) -> dict[str, Any]:
    """A kept sample as an SFT row: its columns, and the completion with its reasoning opened."""
    opening = RESPONSE_FORMATS[response_format].prefill if sample.prefilled else ""
    # Other forms of the row's own solution would be learned from in place of the sample.
    row = {name: value for name, value in sample.row.items() if name not in ("messages", "text")}
    return {**row, "completion": opening + sample.text}
