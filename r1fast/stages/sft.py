"""sft: supervised fine-tuning on packed sequences. Also the loss of pretraining and distillation."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from r1fast.models.decoder import Decoder
from r1fast.schema import PretrainStage, SFTStage
from r1fast.stages.context import StageContext, Tokenizer
from r1fast.stages.evaluate import Validation, evaluate_end, evaluate_start
from r1fast.stages.measures import Measures
from r1fast.stages.packed import Example, PackedBatch, encode_examples, length_problems
from r1fast.stages.training import LossFn, Trainer
from r1fast_kernels import linear_cross_entropy


def run(ctx: StageContext[SFTStage]) -> dict[str, Any]:
    return fine_tune(ctx, ctx.rows())


def fine_tune(ctx: StageContext[SFTStage], rows: Sequence[dict]) -> dict[str, Any]:
    """Train the stage's model on rows {prompt, completion}, {messages} or {text}; evaluate before and after; save."""
    model, tokenizer = ctx.load(ctx.model_ref, trainable=True)
    before = evaluate_start(ctx, model, tokenizer)
    train(ctx, model, tokenizer, encode_rows(ctx, rows, tokenizer), ctx.stage.updates_on(len(rows)))
    ctx.save(model, tokenizer)
    after = evaluate_end(ctx, model, tokenizer)
    return {"eval_before": before, "eval_after": after, "numbers": {"rows": len(rows)}}


def encode_rows(
    ctx: StageContext[PretrainStage | SFTStage], rows: Sequence[dict], tokenizer: Tokenizer
) -> list[Example]:
    examples = encode_examples(rows, tokenizer, ctx.stage)
    problems = length_problems([[example] for example in examples], rows, ctx.stage)
    ctx.refuse(f"train_files: {problem}" for problem in problems)
    return examples


def train(
    ctx: StageContext[PretrainStage | SFTStage], model: Decoder, tokenizer: Tokenizer, examples: Sequence[Example],
    steps: int,
) -> None:  # fmt: skip
    def loss_of(chosen: Sequence[Sequence[Example]]) -> LossFn:
        return cross_entropy([example for (example,) in chosen], ctx)

    trainer = Trainer(ctx, model, steps, validation=Validation(ctx, model, tokenizer))
    trainer.fit([[example] for example in examples], ctx.stage.batch_size, loss_of)


def cross_entropy(examples: Sequence[Example], ctx: StageContext) -> LossFn:
    """Mean negative log-likelihood over the learned tokens of `examples`, however they are cut."""
    total = sum(len(example.completion_ids) for example in examples)

    def loss_fn(batch: PackedBatch, hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Measures]:
        hidden_MD = hidden_TD.index_select(0, batch.loss_index_M)
        # Prompt tokens are gone already, so every target counts.
        loss = linear_cross_entropy(hidden_MD, weight_VD, batch.target_ids_M, ignore_index=None, reduction="sum")
        return loss / total, {}

    return loss_fn
