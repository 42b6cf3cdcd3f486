"""Models before the run: checkpoints and tokenizers, read once each, and architectures that stages are to build."""

import math
import os
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from r1fast.artifacts import inputs_of, start_model
from r1fast.models import weights
from r1fast.models.decoder import Decoder, DecoderLayer
from r1fast.models.lora import LoraConfig, add_adapters
from r1fast.models.model_config import ModelConfig
from r1fast.read_once import once
from r1fast.schema import PretrainStage, Recipe
from r1fast.schema_options import LoraOptions, StageBase, TrainOptions


@once
def checkpoint_of(ref: str) -> tuple[ModelConfig, bool]:
    """(architecture, whether it is a reward model)."""
    return weights.check_checkpoint(ref)


@once
def tokenizer_of(ref: str) -> PreTrainedTokenizerBase | None:
    return weights.load_tokenizer(ref)


def origin(recipe: Recipe, stage: StageBase, *, of_tokenizer: bool = False) -> PretrainStage | str:
    """Where a stage's model (or tokenizer) comes from: the pretrain stage that makes it, or a folder or Hub id."""
    while True:
        ref = start_model(recipe, stage)
        if isinstance(stage, PretrainStage):
            ref = stage.tokenizer if of_tokenizer else None
            if ref is None:
                return stage
        assert ref is not None, "check_references has asked for one"
        if not ref.startswith("@"):
            return ref
        stage = recipe.stage(ref[1:])


def architecture_of(recipe: Recipe, stage: StageBase) -> ModelConfig | None:
    """The architecture of the model that a stage trains; None where it is wrong, which its own stage reports."""
    source = origin(recipe, stage)
    try:
        if isinstance(source, str):
            return checkpoint_of(source)[0]
        return ModelConfig.from_dict({"vocab_size": source.vocab_size, **source.architecture})
    except (ValueError, TypeError, OSError):
        return None


def model_problems(recipe: Recipe, stage: StageBase) -> Iterator[str]:
    for found in inputs_of(recipe, stage):
        if found.stage is not None or found.kind not in ("model", "reward model") or found.key == "tokenizer":
            continue
        try:
            _, is_reward_model = checkpoint_of(found.ref)
        except (ValueError, OSError) as error:
            yield f"{found.key}: {error}"
            continue
        yield from _tokenizer_problems(found.key, found.ref)
        if is_reward_model != (found.kind == "reward model") and stage.kind != "reward_model":
            kinds = ("a language model", "a reward model (a `score` head)")
            yield f"{found.key}: {found.ref} is {kinds[is_reward_model]}, expected {kinds[not is_reward_model]}"
    if isinstance(stage, PretrainStage):
        source = origin(recipe, stage, of_tokenizer=True)
        if isinstance(source, str) and (problems := list(_tokenizer_problems("tokenizer", source))):
            yield from problems
            return
        num_tokens = len(tokenizer_of(source) or ()) if isinstance(source, str) else source.vocab_size
        yield from _architecture_problems(stage, num_tokens)
    if (config := architecture_of(recipe, stage)) is not None:  # through @stages too
        yield from _router_problems(stage, config)
        if isinstance(stage, TrainOptions) and stage.lora is not None:
            yield from _lora_problems(stage.lora, config)


def _router_problems(stage: StageBase, config: ModelConfig) -> Iterator[str]:
    """Options of a router, for a model that has none."""
    for name in ("router_bias_update_rate", "router_aux_loss_coef", "router_replay"):
        value = getattr(stage, name, 0)
        if value and not config.has_router:
            yield f"{name} = {value}: {config.model_type} has no router; drop it"
        elif value and name == "router_bias_update_rate" and not config.has_router_bias:
            yield f"{name} = {value}: the router of {config.model_type} has no bias; leave it at 0"


def _lora_problems(options: LoraOptions, config: ModelConfig) -> Iterator[str]:
    try:
        with_adapters(config, options)
    except ValueError as error:
        yield f"lora.{error}"


def with_adapters(config: ModelConfig, options: LoraOptions) -> Decoder:
    """A decoder with its adapters, on meta; ValueError."""
    with torch.device("meta"):
        decoder = Decoder(config)
    add_adapters(decoder, lora_config(options))
    return decoder


def lora_config(options: LoraOptions) -> LoraConfig:
    return LoraConfig(**options.model_dump(exclude={"merge_and_unload"}))


def _tokenizer_problems(key: str, ref: str) -> Iterator[str]:
    try:
        if tokenizer_of(ref) is None:
            yield f"{key}: {ref} has no tokenizer; expected tokenizer.json in it"
    except ValueError as error:
        yield f"{key}: {error}"


def _architecture_problems(stage: PretrainStage, num_tokens: int) -> Iterator[str]:
    """num_tokens: the entries of its tokenizer, or their limit."""
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
        size, room = f"{needed / 2**30:.3g} GiB in float32", f"{memory / 2**30:.3g} GiB of this machine"
        yield f"architecture: has {needed // 4:.3g} parameters, {size}, more than the {room}"


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the decoder."""
    ends = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) + config.hidden_size
    return ends + sum(math.prod(shape) for layer in layer_shapes(config) for shape in layer)


def kinds_of_layers(config: ModelConfig) -> list[int]:
    """Of each layer the first that is built alike."""
    kinds = [(config.is_moe_layer(i), config.layer(i)) for i in range(config.num_hidden_layers)]
    return [kinds.index(kind) for kind in kinds]


def layer_shapes(config: ModelConfig) -> list[list[torch.Size]]:
    """Of the parameters of each layer: one of each kind is built on meta, so that a huge architecture costs nothing."""
    kinds, shapes = kinds_of_layers(config), dict[int, list[torch.Size]]()
    for i in set(kinds):
        with torch.device("meta"):
            shapes[i] = [parameter.shape for parameter in DecoderLayer(config, i).parameters()]
    return [shapes[i] for i in kinds]
