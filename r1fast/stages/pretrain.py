"""pretrain: next-token training from scratch, tokenizer included, so that the chain runs with nothing to download."""

import random
from functools import reduce
from typing import Any

import torch

from r1fast.config import ConfigError
from r1fast.data.rows import prompt_and_target, texts_of
from r1fast.data.tokenizer import TAGS, train_tokenizer
from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.models.weights import load_tokenizer
from r1fast.schema import PretrainStage
from r1fast.stages.context import StageContext, Tokenizer
from r1fast.stages.evaluate import evaluate_end
from r1fast.stages.sft import encode_rows, train


def run(ctx: StageContext[PretrainStage]) -> dict[str, Any]:
    stage = ctx.stage
    rows = ctx.rows()
    tokenizer = make_tokenizer(ctx, rows)
    examples = encode_rows(ctx, visited(stage, rows, ctx.seed), tokenizer)
    model = build_model(ctx, tokenizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    train(ctx, model, tokenizer, examples, stage.max_steps)
    ctx.save(model, tokenizer)
    numbers = {"parameters": num_parameters, "vocabulary": len(tokenizer), "documents": len(examples)}
    return {"eval_after": evaluate_end(ctx, model, tokenizer), "numbers": numbers}


def visited(stage: PretrainStage, rows: list[dict], seed: int) -> list[dict]:
    """The rows that the steps take: others would be encoded for nothing."""
    return random.Random(seed).sample(rows, min(stage.max_steps * stage.batch_size, len(rows)))


def make_tokenizer(ctx: StageContext[PretrainStage], rows: list[dict]) -> Tokenizer:
    if ctx.stage.tokenizer is not None:
        tokenizer = load_tokenizer(ctx.model_path(ctx.stage.tokenizer))
        assert tokenizer is not None, "preflight has read it"
        return tokenizer
    return tokenizer_of_rows(rows, ctx.stage.vocab_size)


def tokenizer_of_rows(rows: list[dict], vocab_size: int) -> Tokenizer:
    texts = (text for row in rows[:20_000] for part in prompt_and_target(row) for text in texts_of(part))
    without_tags = (reduce(lambda text, tag: text.replace(tag, "\n"), TAGS, text) for text in texts)
    return train_tokenizer(without_tags, vocab_size)


def build_model(ctx: StageContext[PretrainStage], tokenizer: Tokenizer) -> Decoder:
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
