"""reward_model: a scalar head on the model, trained pairwise (helpfulness) or point-wise (harmlessness); and its use.

A model reads only what `score_on` names: the paper scores helpfulness on the final summary, harmlessness on the whole
response (2501.12948, section 2.3.4). As a reward the score is squashed by a sigmoid.
"""

import math
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast.data.templates import RESPONSE_FORMATS, target_text
from r1fast.models.decoder import Decoder
from r1fast.schema import GRPOStage, RewardModelStage
from r1fast.schema_options import GenerateOptions
from r1fast.stages.context import StageContext, Tokenizer
from r1fast.stages.measures import Mean, Measures, half_width
from r1fast.stages.packed import Example, PackedBatch, Text, encode_with_targets, length_problems, of_rows, tools_of
from r1fast.stages.sampler import Sample, summary_of
from r1fast.stages.training import LossFn, Trainer, map_packed


def run(ctx: StageContext[RewardModelStage]) -> dict[str, Any]:
    stage = ctx.stage
    rows = ctx.rows()
    random.Random(ctx.seed).shuffle(rows)
    prompts = list(dict.fromkeys(str(row["prompt"]) for row in rows))
    held_out = set(prompts[: int(len(prompts) * stage.eval_fraction)])  # by prompt: none is on both sides
    model, tokenizer = ctx.load(ctx.model_ref, trainable=True, scalar_head=True)
    units = encode_units(rows, tokenizer, stage)
    ctx.refuse(f"train_files: {problem}" for problem in length_problems(units, rows, stage))
    train_units = [unit for unit, row in zip(units, rows) if str(row["prompt"]) not in held_out]
    eval_units = [unit for unit, row in zip(units, rows) if str(row["prompt"]) in held_out]
    trainer = Trainer(ctx, model, stage.updates_on(len(train_units)))
    trainer.fit(train_units, stage.batch_size, lambda chosen: preference_loss(len(chosen), ctx))
    ctx.save(model, tokenizer)
    return {"numbers": {"rows": len(train_units), **_agreement(ctx, model, eval_units)}}


def encode_units(rows: Sequence[dict], tokenizer: Tokenizer, stage: RewardModelStage) -> list[list[Example]]:
    """One unit per row: [chosen, rejected], or one labelled example; ConfigError naming a row that gives none."""

    def read(column: str) -> list[Example]:
        return of_rows(rows, lambda part: score_examples(tokenizer, part, _scored(part, column, stage), stage))

    if stage.loss == "pairwise":
        return [[chosen, rejected] for chosen, rejected in zip(read("chosen"), read("rejected"))]
    units = [[example] for example in read("response")]
    for (example,), row in zip(units, rows):
        example.values["label"] = float(row["label"])
    return units


def _scored(rows: Sequence[dict], column: str, stage: RewardModelStage) -> list[str]:
    layout = stage.response_format
    texts = [target_text(row[column], RESPONSE_FORMATS[layout]) for row in rows]
    if stage.score_on == "response":
        return texts
    summaries = [summary_of(text, layout) for text in texts]
    if bad := [text for text, summary in zip(texts, summaries) if text.strip() and not summary]:
        what = f"score_on: summary, but {column} has none in response_format {layout}: {bad[0][:60]!r}"
        raise ValueError(f"{what}; use score_on: response, or name the format of the data")
    return summaries


def score_examples(
    tokenizer: Tokenizer, rows: Sequence[dict], targets: Sequence[Text], options: GenerateOptions
) -> list[Example]:
    """Prompt and what is scored (text, or a chat's last turn), ended by EOS, at whose position the head is read."""
    asked = [row["prompt"] for row in rows]
    prompts, texts = encode_with_targets(asked, targets, tokenizer, options, tools_of(rows))
    eos = tokenizer.eos_token_id
    # The second EOS is the target of the first, which makes the first an input; the head never looks at targets.
    return [Example(prompt, [*ids, eos, eos], {}) for prompt, ids in zip(prompts, texts, strict=True)]


def score_head(batch: PackedBatch, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """scores_N: the scalar head at the last input of each sequence."""
    last_N = batch.cu_seqlens[1:].long() - 1
    if batch.shared_S is not None:
        last_N = batch.shared_S[last_N]
    return (hidden_TD.index_select(0, last_N).float() @ weight_VD.float().T).squeeze(-1)


def preference_loss(num_units: int, ctx: StageContext[RewardModelStage]) -> LossFn:
    """Mean over the units of -log sigmoid(chosen - rejected) (Bradley-Terry), or of binary cross-entropy."""
    stage = ctx.stage

    def loss_fn(batch: PackedBatch, hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Measures]:
        scores_N = score_head(batch, hidden_TD, weight_VD)
        if stage.loss == "pointwise":
            label_N = batch.values["label"]
            loss = F.binary_cross_entropy_with_logits(scores_N, label_N, reduction="sum")
            right = (scores_N > 0) == (label_N > 0.5)
        else:
            chosen, rejected = scores_N[0::2], scores_N[1::2]
            centre = stage.center_rewards_coefficient * (chosen + rejected).square()
            loss = (centre - F.logsigmoid(chosen - rejected)).sum()
            right = chosen > rejected
        return loss / num_units, {"accuracy": Mean(right.sum(), right.numel())}

    return loss_fn


def _agreement(ctx: StageContext[RewardModelStage], model: Decoder, units: list[list[Example]]) -> dict[str, float]:
    """Held-out share of pairs ranked right, or of labels matched."""
    if not units:
        return {}
    scores = map_packed(ctx, model, [example for unit in units for example in unit], score_head, per_token=False)
    if ctx.stage.loss == "pairwise":
        right = [chosen > rejected for chosen, rejected in zip(scores[0::2], scores[1::2])]
    else:
        right = [(score > 0) == (unit[0].values["label"] > 0.5) for score, unit in zip(scores, units)]
    half = half_width(np.array(right, dtype=float), list(range(len(right))))
    found = {"held_out_accuracy": sum(right) / len(right), "held_out_accuracy_ci": half, "held_out_rows": len(right)}
    return {name: value for name, value in found.items() if not math.isnan(value)}


class RewardModels:
    """The reward models of a GRPO stage, applied to the samples of their domains."""

    def __init__(self, ctx: StageContext[GRPOStage]) -> None:
        self.ctx, self.specs = ctx, ctx.stage.reward_models
        self.weights = {name: spec.weight for name, spec in self.specs.items()}
        load = partial(ctx.load, trainable=False, scalar_head=True)
        self.models = {name: load(spec.model) for name, spec in self.specs.items()}

    def score(self, samples: Sequence[Sample]) -> None:
        """Fill sample.rewards[name] with sigmoid(score); nan off the model's domains."""
        stage = self.ctx.stage
        for name, spec in self.specs.items():
            model, tokenizer = self.models[name]
            chosen = [s for s in samples if spec.applies_to(s.row)]
            for sample in samples:
                sample.rewards[name] = float("nan")
            if not chosen:
                continue
            texts = [s.text for s in chosen]
            if spec.score_on == "summary":
                texts = [summary_of(s.text, stage.response_format, s.prefilled) for s in chosen]
            # The policy's prompts may be rendered otherwise than those that the reward model learned from.
            own: dict[str, Any] = {
                "prompt_template": spec.prompt_template,
                "prefill_think": False,
                "chat_template_kwargs": {},
            }
            options = stage.model_copy(update=own)
            with self.ctx.phase("reward"):
                examples = score_examples(tokenizer, [s.row for s in chosen], texts, options)
                scores = map_packed(self.ctx, model, examples, score_head, per_token=False)
            for sample, score in zip(chosen, torch.tensor(scores).sigmoid().tolist()):
                sample.rewards[name] = score
