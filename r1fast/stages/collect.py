"""collect: cold-start data (2501.12948, section 2.3.1).

Readable, correct samples of the zero model, and of few-shot prompts with worked examples, laid out in the cold-start
form `|special_token|<reasoning>|special_token|<summary>`.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from r1fast.data.rows import location, shown
from r1fast.data.templates import FEW_SHOT_STOP, PROMPT_TEMPLATES, RESPONSE_FORMATS, render_prompt
from r1fast.rollout.tokenization import encode_text_prompts
from r1fast.schema import CollectStage, FewShotOptions
from r1fast.stages.context import StageContext
from r1fast.stages.packed import Prompt
from r1fast.stages.reject import sample, select, shuffled
from r1fast.stages.sampler import Sample, Sampler

FEW_SHOT_FORMAT = PROMPT_TEMPLATES["few_shot"].response_format  # the layout of its solutions


def run(ctx: StageContext[CollectStage]) -> dict[str, Any]:
    stage = ctx.stage
    rows = shuffled(ctx)
    samples = sample(ctx, ctx.model_ref, rows)
    for found in samples:
        _reformat(found, stage.response_format, stage.output_format)
    if stage.few_shot is not None:
        samples += few_shot_samples(ctx, stage.few_shot, rows[: stage.few_shot.num_prompts], first_group=len(rows))
    kept, dropped = select(ctx, samples, stage.output_format, limit=stage.limit)
    zero = sum(found.group < len(rows) for found in kept)
    by_source = {"zero": zero, "few_shot": len(kept) - zero}
    return {"numbers": {"sampled": len(samples), "kept": len(kept), "kept_from": by_source, "dropped": dict(dropped)}}


def few_shot_samples(
    ctx: StageContext[CollectStage], few_shot: FewShotOptions, rows: list[dict], first_group: int
) -> list[Sample]:
    """What a model continues after worked examples in the prompt's language."""
    model, tokenizer = ctx.load(few_shot.model or ctx.model_ref, trainable=False)
    examples = ctx.rows("few_shot.examples_files")
    ctx.refuse(few_shot_problems(few_shot, examples, rows))
    rng = random.Random(f"{ctx.seed},few_shot")
    texts = []
    for row in rows:
        same = [example for example in examples if example.get("language") == row.get("language")]
        chosen = rng.sample(same, few_shot.num_examples)
        texts.append(render_prompt(row["prompt"], "few_shot", examples=chosen, prefill_think=True))
    prompts = [Prompt(ids, True) for ids in encode_text_prompts(texts, tokenizer)]
    samples = Sampler(ctx, model, tokenizer).generate(
        rows, n=few_shot.num_samples, temperature=ctx.stage.temperature, top_p=ctx.stage.top_p, seed=ctx.seed,
        prompts=prompts, sequence_ids=range(first_group, first_group + len(rows)),
    )  # fmt: skip
    for found in samples:
        found.group += first_group
        found.text, stop, _ = found.text.partition(FEW_SHOT_STOP)
        if stop:  # it went on to a next problem: this one is complete
            found.finish_reason = "stop"
        _reformat(found, FEW_SHOT_FORMAT, ctx.stage.output_format)
    return samples


def few_shot_problems(few_shot: FewShotOptions, examples: Sequence[dict], rows: Sequence[dict]) -> Iterator[str]:
    """Examples that are incomplete, or too few in the language of a row."""
    key = "few_shot.examples_files"
    for i, row in enumerate(examples):
        if missing := [name for name in ("reasoning", "answer") if row.get(name) is None]:
            yield f"{key}: {location(row, i)} lacks {' and '.join(missing)}"
        for name in ("prompt", "reasoning", "answer", "language"):
            if not isinstance(row.get(name), str | None):
                yield f"{key}: {location(row, i)}: column {name!r} is {shown(row[name])}, expected a string"
                return
    found = Counter(row.get("language") for row in examples)
    for language in dict.fromkeys(row.get("language") for row in rows):
        if found[language] < (least := few_shot.num_examples):
            expected = f"expected at least num_examples = {least}"
            yield f"{key}: {found[language]} examples in language {language!r}, {expected}"


def _reformat(sample: Sample, written: str, wanted: str) -> None:
    """Rewrite a well-formed response from one form into another; leave others for the filter to drop."""
    sample.asked_format = written
    parsed = RESPONSE_FORMATS[written].parse(sample.text, prefilled=sample.prefilled)
    if parsed.well_formed and parsed.reasoning and parsed.answer:
        sample.text = RESPONSE_FORMATS[wanted].render(parsed.reasoning, parsed.answer.removeprefix("Summary:").strip())
        sample.prefilled = False
