"""collect: cold-start data (2501.12948, section 2.3.1).

Readable, correct samples of the zero model, and of few-shot prompts with worked examples, laid out in the cold-start
form `|special_token|<reasoning>|special_token|<summary>`.
"""

import random
from typing import Any

from r1fast.config import ConfigError
from r1fast.data.sources import load_rows
from r1fast.data.templates import FEW_SHOT_STOP, RESPONSE_FORMATS, render_prompt
from r1fast.rollout.tokenization import encode_text_prompts
from r1fast.schema import FewShotOptions
from r1fast.stages.context import StageContext
from r1fast.stages.packed import Prompt
from r1fast.stages.reject import select, sft_row
from r1fast.stages.sampler import Sample, Sampler

FEW_SHOT_FORMAT = "special_token"  # the layout of the few_shot template's solutions


def run(ctx: StageContext) -> dict[str, Any]:
    stage = ctx.stage
    rows = load_rows(ctx.sources(stage.train_files), "prompts")
    random.Random(ctx.seed).shuffle(rows)
    samples = own_samples(ctx, rows[: stage.num_prompts])
    if stage.few_shot is not None:
        samples += few_shot_samples(ctx, rows[: stage.few_shot.num_prompts], first_group=len(rows))
    kept, dropped = select(ctx, samples, stage.output_format, limit=stage.limit)
    ctx.write_rows("data.jsonl", [sft_row(sample, stage.output_format) for sample in kept])
    by_source = {"zero": sum(s.group < len(rows) for s in kept), "few_shot": sum(s.group >= len(rows) for s in kept)}
    return {"numbers": {"sampled": len(samples), "kept": len(kept), "kept_from": by_source, "dropped": dict(dropped)}}


def own_samples(ctx: StageContext, rows: list[dict]) -> list[Sample]:
    """What the model says by itself, brought into the output form."""
    stage = ctx.stage
    model, tokenizer = ctx.load(ctx.model_ref, trainable=False)
    sampler = Sampler(ctx, model, tokenizer)
    samples = sampler.generate(rows, n=stage.num_samples, temperature=stage.temperature, seed=ctx.seed)
    for sample in samples:
        _reformat(sample, stage.response_format, stage.output_format)
    return samples


def few_shot_samples(ctx: StageContext, rows: list[dict], first_group: int) -> list[Sample]:
    """What a model continues after worked examples in the prompt's language."""
    few_shot: FewShotOptions = ctx.stage.few_shot
    model, tokenizer = ctx.load(few_shot.model or ctx.model_ref, trainable=False)
    examples = load_rows(ctx.sources(few_shot.examples_files), "prompts")
    rng = random.Random(f"{ctx.seed},few_shot")
    texts = []
    for row in rows:
        same = [example for example in examples if example.get("language") == row.get("language")]
        if len(same) < few_shot.num_examples:
            raise ConfigError(
                f"stages.{ctx.stage.name}.few_shot: {len(same)} examples in language {row.get('language')!r}, "
                f"expected at least num_examples = {few_shot.num_examples}"
            )
        shown = rng.sample(same, few_shot.num_examples)
        texts.append(render_prompt(row["prompt"], "few_shot", examples=shown, prefill_think=True))
    prompts = [Prompt(ids, True) for ids in encode_text_prompts(texts, tokenizer)]
    samples = Sampler(ctx, model, tokenizer).generate(
        rows,
        n=few_shot.num_samples,
        temperature=ctx.stage.temperature,
        seed=ctx.seed,
        sequence_ids=range(first_group, first_group + len(rows)),
        prompts=prompts,
    )
    for sample in samples:
        sample.group += first_group
        text, stop, _ = sample.text.partition(FEW_SHOT_STOP)
        sample.text = text
        if stop:  # it went on to a next problem: this one is complete
            sample.finish_reason = "stop"
        _reformat(sample, FEW_SHOT_FORMAT, ctx.stage.output_format)
    return samples


def _reformat(sample: Sample, written: str, wanted: str) -> None:
    """Rewrite a well-formed response from one form into another; leave others for the filter to drop."""
    parsed = RESPONSE_FORMATS[written].parse(sample.text, prefilled=sample.prefilled)
    if parsed.well_formed and parsed.reasoning and parsed.answer:
        sample.text = RESPONSE_FORMATS[wanted].render(parsed.reasoning, parsed.answer.removeprefix("Summary:").strip())
        sample.prefilled = False
