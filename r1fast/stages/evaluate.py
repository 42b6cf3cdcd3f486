"""evaluate: pass@1 over k samples with a confidence interval, cons@k, greedy, and the means of the rewards."""

import json
import math
from collections import Counter
from typing import Any

import numpy as np

from r1fast.data.sources import load_rows
from r1fast.models.decoder import Decoder
from r1fast.stages.context import StageContext
from r1fast.stages.sampling import Sample, Sampler, Scorer, summary_of

EVAL_SEED = 1_000_003  # noise of its own: an evaluation never repeats a rollout's


def run(ctx: StageContext) -> dict[str, Any]:
    model, tokenizer = ctx.load(ctx.model_ref, trainable=False)
    return {"eval_after": evaluate(ctx, model, tokenizer)}


def evaluate_start(ctx: StageContext, model: Decoder, tokenizer: Any) -> dict[str, Any] | None:
    """The evaluation of the model that a stage starts from, or what an earlier stage measured the same way."""
    stage = ctx.stage
    if not stage.eval_files or not stage.eval_before:
        return None
    key = _key(ctx, ctx.model_ref)
    if key not in ctx.evaluations:
        ctx.evaluations[key] = evaluate(ctx, model, tokenizer)
    return ctx.evaluations[key]


def evaluate_end(ctx: StageContext, model: Decoder, tokenizer: Any) -> dict[str, Any] | None:
    if not ctx.stage.eval_files:
        return None
    result = evaluate(ctx, model, tokenizer)
    ctx.evaluations[_key(ctx, f"@{ctx.stage.name}")] = result
    return result


def _key(ctx: StageContext, ref: str) -> str:
    stage = ctx.stage
    names = [name for name in type(stage).model_fields if name.startswith("eval_") and name != "eval_before"]
    names += ["prompt_template", "response_format", "prefill_think", "max_completion_length"]
    return json.dumps([ref, *(getattr(stage, name) for name in names)], sort_keys=True)


def evaluate(ctx: StageContext, model: Decoder, tokenizer: Any) -> dict[str, Any]:
    """Measure a model on the stage's eval_files; see the module docstring for the keys."""
    stage = ctx.stage
    rows = load_rows(ctx.sources(stage.eval_files), "prompts", limit=stage.eval_limit)
    sampler = Sampler(ctx, model, tokenizer)
    with ctx.phase("evaluate"), Scorer(ctx, stage.eval_rewards, stage.response_format, stage.prefill_think) as scorer:
        prompts = sampler.encode(rows)
        samples = sampler.generate(
            rows, n=stage.eval_num_samples, temperature=stage.eval_temperature, seed=EVAL_SEED, prompts=prompts
        )
        scorer.score(samples)
        result = summarize(samples, stage.response_format)
        if stage.eval_greedy:
            greedy = sampler.generate(rows, n=1, temperature=0.0, seed=EVAL_SEED, prompts=prompts)
            scorer.score(greedy)
            result["greedy"] = _mean([sample.rewards.get("accuracy", math.nan) for sample in greedy])
    split = ",".join(stage.eval_files)
    return result | {"split": split, "temperature": stage.eval_temperature, "k": stage.eval_num_samples}


def summarize(samples: list[Sample], response_format: str) -> dict[str, Any]:
    """pass@1 is the mean accuracy over k samples a prompt; its 95% interval is over prompts, the units drawn."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    result: dict[str, Any] = {}
    per_prompt = np.array([_mean([s.rewards.get("accuracy", math.nan) for s in group]) for group in groups.values()])
    per_prompt = per_prompt[~np.isnan(per_prompt)]
    if per_prompt.size:
        result["pass@1"] = float(per_prompt.mean())
        spread = per_prompt.std(ddof=1) if per_prompt.size > 1 else 0.0
        result["pass@1_ci"] = float(1.96 * spread / math.sqrt(per_prompt.size))
        result["n"] = int(per_prompt.size)
        result["cons@k"] = _mean([_majority(group, response_format) for group in groups.values()])
    for name in samples[0].rewards if samples else ():
        if name != "accuracy":
            result[name] = _mean([sample.rewards[name] for sample in samples])
    result["length"] = _mean([len(sample.completion_ids) for sample in samples])
    return {name: value for name, value in result.items() if not (isinstance(value, float) and math.isnan(value))}


def _majority(group: list[Sample], response_format: str) -> float:
    """Accuracy of the most frequent answer of a group (ties: the first); nan where accuracy does not apply."""
    answers = [summary_of(sample.text, response_format).strip() for sample in group]
    given = Counter(answer for answer in answers if answer)
    if all(math.isnan(s.rewards.get("accuracy", math.nan)) for s in group):
        return math.nan
    if not given:
        return 0.0
    winner = given.most_common(1)[0][0]
    return group[answers.index(winner)].rewards["accuracy"]


def _mean(values: list[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan
