"""sft: supervised fine-tuning on packed sequences. Also the loss of pretraining and distillation."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from r1fast.config import ConfigError
from r1fast.data.sources import load_rows
from r1fast.models.decoder import Decoder
from r1fast.stages.context import StageContext
from r1fast.stages.evaluate import evaluate_end, evaluate_start
from r1fast.stages.measures import Measures
from r1fast.stages.packed import Example, PackedBatch, check_lengths, encode_examples
from r1fast.stages.training import LossFn, Trainer
from r1fast_kernels import linear_cross_entropy


def run(ctx: StageContext) -> dict[str, Any]:
    rows = load_rows(ctx.sources(ctx.stage.train_files), "sft")
    return fine_tune(ctx, rows)


def fine_tune(ctx: StageContext, rows: Sequence[dict]) -> dict[str, Any]:
    """Train the stage's model on rows {prompt, completion}, {messages} or {text}; evaluate before and after; save."""
    stage = ctx.stage
    model, tokenizer = ctx.load(ctx.model_ref, trainable=True)
    before = evaluate_start(ctx, model, tokenizer)
    examples = encode_examples(rows, tokenizer, stage)
    if not examples:
        raise ConfigError(f"stages.{stage.name}: no rows to train on in {', '.join(stage.train_files)}")
    check_lengths([[example] for example in examples], rows, stage)
    batches_per_epoch = -(-len(examples) // stage.batch_size)
    steps = stage.num_train_epochs * batches_per_epoch
    train(ctx, model, examples, min(steps, stage.max_steps or steps))
    ctx.save(model, tokenizer)
    return {
        "eval_before": before,
        "eval_after": evaluate_end(ctx, model, tokenizer),
        "numbers": {"rows": len(examples)},
    }


def train(ctx: StageContext, model: Decoder, examples: Sequence[Example], steps: int) -> None:
    units = [[example] for example in examples]
    Trainer(ctx, model, steps).fit(units, lambda chosen: cross_entropy([example for (example,) in chosen], ctx))


def cross_entropy(examples: Sequence[Example], ctx: StageContext) -> LossFn:
    """Mean negative log-likelihood over the learned tokens of `examples`, however they are cut."""
    total = sum(len(example.completion_ids) for example in examples)

    def loss_fn(batch: PackedBatch, hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Measures]:
        hidden_MD = hidden_TD.index_select(0, batch.loss_index_M)
        # Prompt tokens are gone already, so every target counts.
        loss = linear_cross_entropy(hidden_MD, weight_VD, batch.target_ids_M, ignore_index=None, reduction="sum")
        return loss / total, {}

    return loss_fn
