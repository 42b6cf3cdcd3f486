"""distill: SFT of a student on a teacher's samples (2501.12948, section 2.4): no RL stage."""

import json
from collections import Counter
from typing import Any

from r1fast.data.sources import load_rows
from r1fast.schema import DistillStage
from r1fast.stages.context import StageContext
from r1fast.stages.reject import sample, select, shuffled
from r1fast.stages.sft import fine_tune


def run(ctx: StageContext[DistillStage]) -> dict[str, Any]:
    stage = ctx.stage
    if stage.teacher is None:
        return fine_tune(ctx, ctx.rows())
    if not (ctx.is_intact("data.jsonl") and ctx.is_intact("dropped.jsonl")):  # else of before a resume
        select(ctx, sample(ctx, stage.teacher, shuffled(ctx)), stage.response_format)
    rows = load_rows([str(ctx.stage_dir / "data.jsonl")], "sft")
    dropped = (ctx.stage_dir / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    result = fine_tune(ctx, rows)
    result["numbers"] |= {"kept": len(rows), "dropped": dict(Counter(json.loads(line)["reason"] for line in dropped))}
    return result
