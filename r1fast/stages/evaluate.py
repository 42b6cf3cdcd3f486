"""evaluate: pass@1 over k samples with a confidence interval, pass@k, cons@k, greedy, and the means of the rewards.

The protocol of DeepSeek-R1 (2501.12948, section 3): eval_temperature 0.6, eval_top_p 0.95, eval_num_samples 4 to 64.
"""

import json
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import torch

from r1fast.data.rows import location
from r1fast.models.decoder import Decoder
from r1fast.models.names import some
from r1fast.observe.metrics import write_parquet
from r1fast.observe.scores import metrics_of, number_of, said
from r1fast.parallel.parallelize import local_tensor
from r1fast.rewards.answers import last_box, plain_number
from r1fast.schema import EvaluateStage
from r1fast.schema_options import EvalOptions, LossOptions, ValidationOptions
from r1fast.stages.context import StageContext, Tokenizer
from r1fast.stages.measures import half_width
from r1fast.stages.sampler import Sample, Sampler, by_group, summary_of
from r1fast.stages.scoring import NothingScored, Scorer

# How the model was asked.
_ASKED = ("prompt_template", "response_format", "prefill_think", "chat_template_kwargs", "max_completion_length")
_TRACKED_ROWS = 100  # completions of an evaluation that trackers get
EVAL_SEED = 1_000_003  # noise of its own: an evaluation never repeats a rollout's


def run(ctx: StageContext[EvaluateStage]) -> dict[str, Any]:
    model, tokenizer = ctx.load(ctx.model_ref, trainable=False)
    result = evaluate(ctx, model, tokenizer, "after")
    _track(ctx, result, 0)
    return {"eval_after": result}


def evaluate_start(ctx: StageContext[EvalOptions], model: Decoder, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The evaluation of the model that a stage starts from, or what an earlier stage measured the same way."""
    stage = ctx.stage
    if not stage.eval_files or not stage.eval_before:
        return None
    key = _key(ctx, ctx.model_ref)
    if key not in ctx.evaluations:
        ctx.evaluations[key] = evaluate(ctx, model, tokenizer, "before")
    _track(ctx, ctx.evaluations[key], 0)
    return ctx.evaluations[key]


def evaluate_end(ctx: StageContext[EvalOptions], model: Decoder, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if not ctx.stage.eval_files:
        return None
    ctx.evaluations[_key(ctx, f"@{ctx.stage.name}")] = result = evaluate(ctx, model, tokenizer, "after")
    _track(ctx, result, 0 if ctx.stage_log is None else ctx.stage_log.step)
    return result


def _track(ctx: StageContext[EvalOptions], result: dict[str, Any], step: int) -> None:
    """Tell the trackers what was measured after so many steps, of all files and of each."""
    for prefix, part in (("eval", result), *((f"eval/{file}", part) for file, part in result.get("files", {}).items())):
        found = {f"{prefix}/{name}": number_of(part, name) for name in metrics_of([part])}
        ctx.trackers.log(ctx.stage.name, step, {name: value for name, value in found.items() if value is not None})


def _key(ctx: StageContext[EvalOptions], ref: str) -> str:
    stage = ctx.stage
    names = [name for name in EvalOptions.model_fields if name.startswith("eval_") and name != "eval_before"]
    names += _ASKED
    head = ["lm_head_fp32"] if isinstance(stage, LossOptions) and stage.lm_head_fp32 else []
    return json.dumps([ref, *(getattr(stage, name) for name in names), *head], sort_keys=True)


def evaluate(
    ctx: StageContext[EvalOptions], model: Decoder, tokenizer: Tokenizer, name: str, *, limit: int | None = None
) -> dict[str, Any]:
    """Measure a model on the stage's eval_files; see the module docstring for the keys, of all files and of each.

    Every completion is kept in <stage>/evaluations/<name>.parquet. limit: rows at most, None: eval_limit.
    """
    stage, limit = ctx.stage, limit or ctx.stage.eval_limit
    found = [(file, row) for file, rows in ctx.rows_by_file("eval_files") for row in rows]
    limited = {}
    if limit is not None and limit < len(found):
        found, limited = random.Random(0).sample(found, limit), {"limit": limit}  # of all files, the same in every run
    files, rows = [file for file, _ in found], [row for _, row in found]
    check_weights(ctx, model)
    sampler = Sampler(ctx, model, tokenizer)
    with ctx.phase("evaluate"), Scorer(ctx, stage.eval_rewards, stage.response_format) as scorer:
        how: dict[str, Any] = {"seed": EVAL_SEED, "prompts": sampler.encode(rows)}
        sampling: dict[str, Any] = {"temperature": stage.eval_temperature, "top_p": stage.eval_top_p}
        samples = sampler.generate(rows, n=stage.eval_num_samples, **sampling, **how)
        scorer.score(samples)
        greedy = sampler.generate(rows, n=1, temperature=0.0, **how) if stage.eval_greedy else []
        if greedy:
            scorer.score(greedy)

    def keep() -> None:
        kinds = [(one, "sampled") for one in samples] + [(one, "greedy") for one in greedy]
        table = [_table_row(files[one.group], kind, one, tokenizer) for one, kind in kinds]
        write_parquet(ctx.stage_dir / "evaluations" / f"{name}.parquet", table)
        step = 0 if name == "before" or ctx.stage_log is None else ctx.stage_log.step
        ctx.trackers.table(stage.name, step, "eval/completions", table[:_TRACKED_ROWS])

    ctx.dist.on_main(keep)
    result = summarize(samples, greedy, stage.response_format)
    if len(set(files)) > 1:
        result["files"] = {}
        for file in dict.fromkeys(files):
            sampled, first = ([one for one in part if files[one.group] == file] for part in (samples, greedy))
            result["files"][file] = summarize(sampled, first, stage.response_format)
    asked = {name: getattr(stage, name) for name in _ASKED}
    return result | {"split": ",".join(stage.eval_files), **limited, **sampling, "k": stage.eval_num_samples, **asked}


class Validation:
    """Evaluations while a stage trains: which of its steps was best, and whether it should go on.

    They stand in the stage's entry of summary.json, under "validations", with their step.
    """

    def __init__(self, ctx: StageContext[ValidationOptions], model: Decoder, tokenizer: Tokenizer) -> None:
        self.ctx, self.stage, self.model, self.tokenizer = ctx, ctx.stage, model, tokenizer
        self.found: list[dict[str, Any]] = ctx.entry.setdefault("validations", [])

    def is_due(self, step: int) -> bool:
        return self.stage.eval_steps is not None and step > 0 and step % self.stage.eval_steps == 0

    def begin(self, step: int) -> None:
        """After so many steps: what a stopped run measured later is measured again."""
        self.found[:] = [result for result in self.found if result["step"] <= step]

    def has_patience(self, step: int) -> bool:
        """After so many steps; evaluates, where that is due and not done."""
        if self.is_due(step) and all(result["step"] < step for result in self.found):
            limit = self.stage.eval_steps_limit
            result = evaluate(self.ctx, self.model, self.tokenizer, f"step_{step:05d}", limit=limit)
            if self.stage.chooses and (metric := self.stage.metric_for_best_model) not in result:
                what = (
                    f"stages.{self.stage.name}: metric_for_best_model = {metric!r} was not measured after step {step}"
                )
                raise NothingScored(f"{what}: no row of eval_files has what it needs; name another metric or file")
            self.found.append({"step": step, **result})
            self.ctx.write_entry()
            for line in said(result):
                self.ctx.message(f"{self.stage.name} after step {step}: {line}")
            _track(self.ctx, result, step)
        return self.stage.has_patience(self.found)

    def may_be_best(self, step: int) -> bool:
        """Whether its checkpoint may be needed at the end."""
        return self.stage.load_best_model_at_end and self.is_due(step)

    def keeps(self) -> int | None:
        """The step whose checkpoint is needed at the end."""
        return self.stage.best_step(self.found) if self.stage.load_best_model_at_end else None


@torch.no_grad()
def check_weights(ctx: StageContext, model: Decoder) -> None:
    """ConfigError, on every rank, when a weight or a router's bias is not finite: some of that shows in no logit."""
    local = {name: local_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    sums = torch.stack([t.sum(dtype=torch.float32) for t in local.values()]).tolist()
    bad = [name for name, total in zip(local, sums) if not math.isfinite(total) and not local[name].isfinite().all()]
    if found := sorted({name for names in ctx.dist.all_gather_objects(bad) for name in names}):
        advice = "take an earlier checkpoint, or lower learning_rate"
        raise ctx.error(f"the model holds NaN or Inf in {some(found)}, so it is not evaluated; {advice}")


def _table_row(file: str, kind: str, sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    """Of evaluations/*.parquet."""
    where = {"file": file, "row": location(sample.row, sample.group), "kind": kind}
    return {**where, **sample_columns(sample, tokenizer)}


def sample_columns(sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    """A sample as tables have it: the prompt as the model read it; a reward that does not apply is null."""
    rewards = {name: None if math.isnan(value) else value for name, value in sample.rewards.items()}
    prompt = tokenizer.decode(sample.prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    gold = sample.row.get("answer")
    gold = gold if gold is None or isinstance(gold, str) else json.dumps(gold, ensure_ascii=False, default=str)
    said = {"prompt": prompt, "gold": gold, "completion": sample.text, "finish_reason": sample.finish_reason}
    return {**said, "tokens": len(sample.completion_ids), **rewards}


def summarize(samples: list[Sample], greedy: list[Sample], response_format: str) -> dict[str, Any]:
    """pass@1 is the mean accuracy over k samples a prompt, pass@k that of the best; other rewards go by their names.

    `m_ci` is half of the 95% interval of m (`half_width`); `greedy` and `greedy/m` are of greedy answers.

    failures: samples on which a reward failed; they score 0. unscorable: prompts whose gold answer gives no accuracy
    at all; n leaves them out.
    """
    groups = by_group(samples)
    scored = [group for group in groups if not math.isnan(_mean(_scores(group, "accuracy")))]
    result: dict[str, Any] = {}

    def measure(name: str, groups: list[list[Sample]], values: list[float], mean: float | None = None) -> None:
        """The mean of a value a prompt, and its interval; prompts to which it does not apply (nan) do not count."""
        known = [(group[0], value) for group, value in zip(groups, values) if not math.isnan(value)]
        # Prompts of one `problem` ask the same; one without it is a problem of its own.
        asked = [(one.group, one.row.get("problem")) for one, _ in known]
        problems = [f"prompt {i}" if problem is None else str(problem) for i, problem in asked]
        result[name] = _mean(values) if mean is None else mean
        result[f"{name}_ci"] = half_width(np.array([value for _, value in known]), problems)

    if scored:
        measure("pass@1", scored, [_mean(_scores(group, "accuracy")) for group in scored])
        result["n"] = len(scored)
        measure("pass@k", scored, [float(np.nanmax(_scores(group, "accuracy"))) for group in scored])
        measure("cons@k", scored, [_majority(group, response_format) for group in scored])
    for kind, part in (("", groups), ("greedy/", by_group(greedy))):
        for name in samples[0].rewards if part else ():
            if name != "accuracy" or kind:
                label = "greedy" if name == "accuracy" else f"{kind}{name}"
                every = _mean([value for group in part for value in _scores(group, name)])
                measure(label, part, [_mean(_scores(group, name)) for group in part], every)
    result["failures"] = sum(bool(sample.failed_rewards) for sample in [*samples, *greedy])
    if samples and "accuracy" in samples[0].rewards:
        golds = [sum(group[0].row.get("answer") is not None for group in part) for part in (groups, scored)]
        result["unscorable"] = golds[0] - golds[1]
    result["length"] = _mean([len(sample.completion_ids) for sample in samples])
    return {name: value for name, value in result.items() if not math.isnan(value)}


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
