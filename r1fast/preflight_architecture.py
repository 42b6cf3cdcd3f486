"""Architectures before the run: a pretrain stage's as a checkpoint's config is checked; options of a router."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from r1fast.schema import Recipe


@cache
def checkpoint_of(ref: str) -> tuple[Any, bool]:
    """(architecture, whether it is a reward model); read once for all that is checked, as the tokenizer is."""
    from r1fast.models.weights import check_checkpoint

    return check_checkpoint(ref)


def architecture_problems(stage: Any, num_tokens: int) -> Iterator[str]:
    """What is wrong with a pretrain stage's architecture. num_tokens: the entries of its tokenizer, or their limit."""
    from r1fast.models.model_config import ModelConfig

    try:
        config = ModelConfig.from_dict({"vocab_size": num_tokens, **stage.architecture})
    except (ValueError, TypeError) as error:
        yield f"architecture: {error}"
        return
    if config.vocab_size < num_tokens:
        yield f"architecture.vocab_size = {config.vocab_size} is less than the {num_tokens} entries of the tokenizer"
    positions = config.max_position_embeddings
    for key in ("max_length", *(("max_completion_length",) if stage.eval_files else ())):
        if getattr(stage, key) > positions:
            yield f"{key} = {getattr(stage, key)} is more than architecture.max_position_embeddings = {positions}"
    try:
        needed = 4 * num_parameters(config)
    except RuntimeError as error:  # torch cannot even count them
        yield f"architecture: is too large to be built ({error})"
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:  # every rank initializes the whole model before it is sharded
        yield (
            f"architecture: has {needed // 4:.3g} parameters, {needed / 2**30:.3g} GiB in float32, more than the "
            f"{memory / 2**30:.3g} GiB of this machine"
        )


def vocabulary_of(recipe: Recipe, stage: Any) -> int | str:
    """The most entries of the tokenizer that a stage trains with, or the folder or Hub id that it comes from."""
    while stage.kind != "pretrain" or stage.tokenizer is not None:
        ref: Any = stage.tokenizer if stage.kind == "pretrain" else stage.model or recipe.model.path
        if not ref.startswith("@"):
            return ref
        stage = recipe.stage(ref[1:])
    return stage.vocab_size


def num_parameters(config: Any) -> int:
    """Parameters of the decoder: a layer of each kind is built on meta, so that a huge architecture costs nothing."""
    import torch

    from r1fast.models.decoder import DecoderLayer

    total = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) + config.hidden_size
    for is_moe, count in Counter(config.is_moe_layer(i) for i in range(config.num_hidden_layers)).items():
        first = next(i for i in range(config.num_hidden_layers) if config.is_moe_layer(i) == is_moe)
        with torch.device("meta"):
            layer = DecoderLayer(config, first)
        total += count * sum(math.prod(parameter.shape) for parameter in layer.parameters())
    return total


def architecture_of(recipe: Recipe, stage: Any) -> Any:
    """The architecture of the model that a stage trains; None where it is wrong, which its own stage reports."""
    from r1fast.models.model_config import ModelConfig

    try:
        while stage.kind != "pretrain":
            ref: Any = stage.model or recipe.model.path  # check_references has asked for one
            if not ref.startswith("@"):
                return checkpoint_of(ref)[0]
            stage = recipe.stage(ref[1:])
        return ModelConfig.from_dict({"vocab_size": stage.vocab_size, **stage.architecture})
    except (ValueError, TypeError, OSError):
        return None
