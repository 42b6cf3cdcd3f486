"""evaluate: pass@1 over k samples with a confidence interval, cons@k, greedy, and the means of the rewards."""

import json
import math
import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch

from r1fast.models.decoder import Decoder
from r1fast.models.names import some
from r1fast.parallel.parallelize import local_tensor
from r1fast.rewards.answers import last_box, plain_number
from r1fast.schema import EvaluateStage
from r1fast.schema_options import EvalOptions, LossOptions
from r1fast.stages.context import StageContext, Tokenizer
from r1fast.stages.sampler import Sample, Sampler, by_group, summary_of
from r1fast.stages.scoring import Scorer

EVAL_SEED = 1_000_003  # noise of its own: an evaluation never repeats a rollout's


def run(ctx: StageContext[EvaluateStage]) -> dict[str, Any]:
    model, tokenizer = ctx.load(ctx.model_ref, trainable=False)
    return {"eval_after": evaluate(ctx, model, tokenizer)}


def evaluate_start(ctx: StageContext[EvalOptions], model: Decoder, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The evaluation of the model that a stage starts from, or what an earlier stage measured the same way."""
    stage = ctx.stage
    if not stage.eval_files or not stage.eval_before:
        return None
    key = _key(ctx, ctx.model_ref)
    if key not in ctx.evaluations:
        ctx.evaluations[key] = evaluate(ctx, model, tokenizer)
    return ctx.evaluations[key]


def evaluate_end(ctx: StageContext[EvalOptions], model: Decoder, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if not ctx.stage.eval_files:
        return None
    ctx.evaluations[_key(ctx, f"@{ctx.stage.name}")] = result = evaluate(ctx, model, tokenizer)
    return result


def _key(ctx: StageContext[EvalOptions], ref: str) -> str:
    stage = ctx.stage
    names = [name for name in type(stage).model_fields if name.startswith("eval_") and name != "eval_before"]
    names += ["prompt_template", "response_format", "prefill_think", "max_completion_length"]
    head = ["lm_head_fp32"] if isinstance(stage, LossOptions) and stage.lm_head_fp32 else []
    return json.dumps([ref, *(getattr(stage, name) for name in names), *head], sort_keys=True)


def evaluate(ctx: StageContext[EvalOptions], model: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """Measure a model on the stage's eval_files; see the module docstring for the keys."""
    stage = ctx.stage
    rows = ctx.rows("eval_files")
    if stage.eval_limit is not None and stage.eval_limit < len(rows):
        rows = random.Random(0).sample(rows, stage.eval_limit)  # from every file, the same in every run
    check_weights(ctx, model)
    sampler = Sampler(ctx, model, tokenizer)
    with ctx.phase("evaluate"), Scorer(ctx, stage.eval_rewards, stage.response_format) as scorer:
        how: dict[str, Any] = {"seed": EVAL_SEED, "prompts": sampler.encode(rows)}
        samples = sampler.generate(rows, n=stage.eval_num_samples, temperature=stage.eval_temperature, **how)
        scorer.score(samples)
        result = summarize(samples, stage.response_format)
        if stage.eval_greedy:
            greedy = sampler.generate(rows, n=1, temperature=0.0, **how)
            scorer.score(greedy)
            result["greedy"] = _mean(_scores(greedy, "accuracy"))
            result["failures"] += sum(bool(sample.failed_rewards) for sample in greedy)
    result = {name: value for name, value in result.items() if not math.isnan(value)}
    settings = {"split": ",".join(stage.eval_files), "temperature": stage.eval_temperature, "k": stage.eval_num_samples}
    return result | settings


@torch.no_grad()
def check_weights(ctx: StageContext, model: Decoder) -> None:
    """ConfigError, on every rank, when a weight or a router's bias is not finite: some of that shows in no logit."""
    local = {name: local_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    sums = torch.stack([t.sum(dtype=torch.float32) for t in local.values()]).tolist()
    bad = [name for name, total in zip(local, sums) if not math.isfinite(total) and not local[name].isfinite().all()]
    if found := sorted({name for names in ctx.dist.all_gather_objects(bad) for name in names}):
        advice = "take an earlier checkpoint, or lower learning_rate"
        raise ctx.error(f"the model holds NaN or Inf in {some(found)}, so it is not evaluated; {advice}")


def summarize(samples: list[Sample], response_format: str) -> dict[str, Any]:
    """pass@1 is the mean accuracy over k samples a prompt; `_half_width` says how sure that is.

    failures: samples on which a reward failed; they score 0. unscorable: prompts whose gold answer gives no accuracy
    at all; n leaves them out.
    """
    groups = by_group(samples)
    scored = [group for group in groups if not math.isnan(_mean(_scores(group, "accuracy")))]
    result: dict[str, Any] = {}
    if scored:
        means = np.array([_mean(_scores(group, "accuracy")) for group in scored])
        # Prompts of one `problem` ask the same; one without it is a problem of its own.
        asked = {first.group: first.row.get("problem") for first, *_ in scored}
        problems = [f"prompt {i}" if problem is None else str(problem) for i, problem in asked.items()]
        result["pass@1"], result["pass@1_ci"] = float(means.mean()), _half_width(means, problems)
        result["n"] = len(scored)
        result["cons@k"] = _mean([_majority(group, response_format) for group in scored])
    for name in samples[0].rewards if samples else ():
        if name != "accuracy":
            result[name] = _mean(_scores(samples, name))
    result["failures"] = sum(bool(sample.failed_rewards) for sample in samples)
    if samples and "accuracy" in samples[0].rewards:
        golds = [sum(group[0].row.get("answer") is not None for group in part) for part in (groups, scored)]
        result["unscorable"] = golds[0] - golds[1]
    return result | {"length": _mean([len(sample.completion_ids) for sample in samples])}


def _half_width(means: np.ndarray, problems: list[str]) -> float:
    """Half of the 95% interval of the mean over prompts.

    Prompts that ask the same problem (column `problem`: in another language, say) are not independent: their deviations
    are added up before they are squared.
    """
    sums: dict[str, float] = defaultdict(float)
    for problem, deviation in zip(problems, means - means.mean()):
        sums[problem] += float(deviation)
    count = len(sums)
    if count < 2:
        return 0.0
    variance = sum(value**2 for value in sums.values()) * count / (count - 1) / len(means) ** 2
    return float(1.96 * math.sqrt(variance))


def _scores(samples: list[Sample], name: str) -> list[float]:
    """nan where the reward does not apply. Where it failed 0: a mean must not rise by what was not measured."""
    return [0.0 if name in sample.failed_rewards else sample.rewards.get(name, math.nan) for sample in samples]


def _majority(group: list[Sample], response_format: str) -> float:
    """Accuracy of the most frequent answer of a group (ties: the one that came first)."""
    answers = [_answer_key(summary_of(s.text, response_format, s.prefilled)) for s in group]
    winners = Counter(answer for answer in answers if answer).most_common(1)
    return _scores(group, "accuracy")[answers.index(winners[0][0])] if winners else 0.0


def _answer_key(summary: str) -> str:
    """Equal for answers that say the same: the last box if there is one, numbers by value."""
    text = last_box(summary).content or summary
    number = plain_number(text)
    return text.strip() if number is None else str(number)


def _mean(values: list[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan
