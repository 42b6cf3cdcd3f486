"""pretrain: next-token training from scratch, tokenizer included, so that the chain runs with nothing to download."""

import random
from typing import Any

import torch

from r1fast.config import ConfigError
from r1fast.data.rows import prompt_and_target, texts_of
from r1fast.data.sources import load_rows
from r1fast.data.tokenizer import TAGS, train_tokenizer
from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.models.weights import load_tokenizer
from r1fast.stages.context import StageContext
from r1fast.stages.evaluate import evaluate_end
from r1fast.stages.packed import check_lengths, encode_examples
from r1fast.stages.sft import train


def run(ctx: StageContext) -> dict[str, Any]:
    stage = ctx.stage
    rows = load_rows(ctx.sources(stage.train_files), "sft")
    tokenizer = make_tokenizer(ctx, rows)
    # Rows beyond those that the steps visit would be encoded for nothing.
    needed = stage.max_steps * stage.batch_size
    rows = random.Random(ctx.seed).sample(rows, min(needed, len(rows)))
    examples = encode_examples(rows, tokenizer, stage, mask_prompt=stage.mask_prompt)
    check_lengths([[example] for example in examples], rows, stage)
    model = build_model(ctx, tokenizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    train(ctx, model, examples, stage.max_steps)
    ctx.save(model, tokenizer)
    numbers = {"parameters": num_parameters, "vocabulary": len(tokenizer), "documents": len(examples)}
    return {"eval_after": evaluate_end(ctx, model, tokenizer), "numbers": numbers}


def make_tokenizer(ctx: StageContext, rows: list[dict]) -> Any:
    stage = ctx.stage
    if stage.tokenizer is not None:
        return load_tokenizer(ctx.model_path(stage.tokenizer))
    texts = (text for row in rows[:20_000] for part in prompt_and_target(row) for text in texts_of(part))
    return train_tokenizer((_without_tags(text) for text in texts), stage.vocab_size)


def _without_tags(text: str) -> str:
    for tag in TAGS:
        text = text.replace(tag, "\n")
    return text


def build_model(ctx: StageContext, tokenizer: Any) -> Decoder:
    """A decoder with random weights, the same for every number of ranks."""
    vocab_size = -(-len(tokenizer) // 8) * 8  # rows of 32 bytes at least
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        config = ModelConfig.from_dict({"vocab_size": vocab_size, **ids, **ctx.stage.architecture})
    except ValueError as error:
        raise ConfigError(f"stages.{ctx.stage.name}.architecture: {error}") from None
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(ctx.seed))
    return ctx.shard(model.to(ctx.dist.device))
