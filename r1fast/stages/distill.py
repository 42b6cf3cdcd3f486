"""distill: SFT of a student on a teacher's samples (2501.12948, section 2.4): no RL stage."""

import json
import random
from collections import Counter
from typing import Any

from r1fast.data.sources import load_rows
from r1fast.stages.context import StageContext
from r1fast.stages.reject import select, sft_row
from r1fast.stages.sampler import Sampler
from r1fast.stages.sft import fine_tune


def run(ctx: StageContext) -> dict[str, Any]:
    stage = ctx.stage
    if stage.teacher is None:
        return fine_tune(ctx, load_rows(ctx.sources(stage.train_files), "sft"))
    rows, dropped = teacher_rows(ctx)
    result = fine_tune(ctx, rows)
    result["numbers"] |= {"kept": len(rows), "dropped": dict(dropped)}
    return result


def teacher_rows(ctx: StageContext) -> tuple[list[dict], Counter[str]]:
    """The teacher's samples that pass the filters; written to data.jsonl, and read from there on a resume."""
    stage = ctx.stage
    path = ctx.stage_dir / "data.jsonl"
    if ctx.is_intact("data.jsonl") and ctx.is_intact("dropped.jsonl"):
        reasons = (ctx.stage_dir / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
        return load_rows([str(path)], "sft"), Counter(json.loads(line)["reason"] for line in reasons)
    teacher, tokenizer = ctx.load(stage.teacher, trainable=False)
    prompts = load_rows(ctx.sources(stage.train_files), "prompts")
    random.Random(ctx.seed).shuffle(prompts)  # so that num_prompts takes from every file
    samples = Sampler(ctx, teacher, tokenizer).generate(
        prompts[: stage.num_prompts], n=stage.num_samples, temperature=stage.temperature, seed=ctx.seed
    )
    kept, dropped = select(ctx, samples, stage.response_format)
    rows = [sft_row(sample, stage.response_format) for sample in kept]
    ctx.write_rows("data.jsonl", rows)
    return rows, dropped
