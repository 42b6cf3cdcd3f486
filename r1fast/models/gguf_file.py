"""A .gguf file (llama.cpp's format) as a checkpoint folder: transformers' reader dequantizes it, once.

The folder lies in Hugging Face's cache of assets (HF_ASSETS_CACHE), in float32. To make it the whole model is held in
memory once: a format for small models. Large ones are released as safetensors.
"""

import json
import logging
import zlib
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from huggingface_hub.utils import WeakFileLock
from tokenizers import pre_tokenizers

from transformers import (  # isort: skip
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
)  # fmt: skip
from transformers import __version__ as transformers_version
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from r1fast.models.model_config import ModelConfig
from r1fast.run_folder import replace_folder
from r1fast.wording import one_line

_EDITION = 2  # of what is made of a file, and kept: one more when that changes
# Keys of an architecture beside those that transformers reads. Any other may change what the model computes.
_SAID_BY_SHAPES = {
    "attention.key_length", "attention.value_length", "expert_feed_forward_length", "expert_shared_feed_forward_length",
}  # fmt: skip
_NO_EFFECT = {"rope.scaling.type", "tensor_data_layout"}  # without a factor; with one layout for all files
logger = logging.getLogger(__name__)


def converted(file: Path) -> Path:
    """The checkpoint folder of a .gguf file. ValueError where transformers' reader would leave out any of it."""
    status = file.stat()
    key = f"{file.resolve()},{status.st_size},{status.st_mtime_ns},{transformers_version},{_EDITION}"
    home = cached_assets_path("r1fast", "gguf", f"{file.stem}-{zlib.crc32(key.encode()):08x}")
    folder = home / "model"
    try:
        with WeakFileLock(home / "lock"):  # of several processes, one reads it
            if not folder.is_dir():
                logger.warning("%s is read once, and kept as %s", file, folder)
                model, tokenizer = _read(file)
                with replace_folder(folder) as partial, redirect_stderr(StringIO()):  # a progress bar
                    model.save_pretrained(partial)
                    _save(tokenizer, partial)
    except OSError as error:
        raise ValueError(f"{home} cannot be written ({one_line(error)}); set HF_ASSETS_CACHE to another") from error
    return folder


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """So that tokenizer.json is what counts: a class such as Qwen2's splits text in its own way, whatever is there."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        problem, model, tokenizer = _parse(file)
    except ImportError as error:
        raise ValueError(f"{file}: reading it needs the package gguf: pip install 'r1fast[gguf]'") from error
    except Exception as error:  # KeyError, IndexError and others where the file is damaged
        text = f"cannot be read as GGUF ({type(error).__name__}: {one_line(error)[:300]})"
        raise ValueError(f"{file}: {text}; take the safetensors of the model, or download it again") from error
    if problem is not None:
        raise ValueError(f"{file}: {problem}; take the safetensors of the model and its tokenizer")
    return model, tokenizer


def _parse(file: Path) -> tuple[str | None, PreTrainedModel, PreTrainedTokenizerBase]:
    """(what of the file transformers' reader leaves out or changes, what it makes of it)"""
    where = {"gguf_file": file.name, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(file.parent, **where)
    ModelConfig.from_hf(config)  # what of it is not supported is said before a weight is read
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with redirect_stderr(StringIO()):  # a progress bar
        parsed = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    model.load_state_dict(parsed["tensors"], strict=False, assign=True)
    model.tie_weights()
    if parsed["tokenizer"].get("pre_tokenizer_type") == "smollm":  # the reader splits as GPT-2 does
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    problems = chain(
        _left_out(file, config, parsed["tensors"]),
        (f"holds no {name}" for name, parameter in model.named_parameters() if parameter.is_meta),
        _changed_tokens(parsed["tokenizer"], tokenizer, config),
    )
    return next(problems, None), model, tokenizer


def _left_out(file: Path, config: PretrainedConfig, tensors: dict[str, Any]) -> Iterator[str]:
    """Keys and weights of the file that the reader passes over."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    prefix = f"{reader.fields['general.architecture'].contents()}."
    keys = {name: field.contents() for name, field in reader.fields.items() if name.startswith(prefix)}
    mapping: Any = GGUF_CONFIG_MAPPING[config.model_type.removesuffix("_text")]
    read = {key for key, name in mapping.items() if name}
    head_dim = ModelConfig.from_hf(config).attention_head_dim
    if keys.get(f"{prefix}rope.dimension_count") == head_dim:
        read.add("rope.dimension_count")
    for name, value in keys.items():
        if name.removeprefix(prefix) not in read | _SAID_BY_SHAPES | _NO_EFFECT:
            yield f"{name}={value!s:.80} is left out by transformers' reader"
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar not in (None, head_dim):
        yield f"says no query_pre_attn_scalar, for which transformers' reader takes {scalar}, with heads of {head_dim}"
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        yield "rope_freqs.weight, which scales the rotary embedding, is left out by transformers' reader"
    num_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    num_read = sum(tensor.numel() for tensor in tensors.values())
    if num_read != num_weights:
        yield f"holds {num_weights} weights, of which transformers' reader knows {num_read}"


def _changed_tokens(
    parsed: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> Iterator[str]:
    """A way to split text that the reader does not know, or tokens that it would cut into pieces."""
    from gguf import TokenType
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    known = {"default", "gpt-2", "smollm", *getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", ())}
    split = parsed.get("pre_tokenizer_type", "default")
    if parsed.get("tokenizer_type") == "gpt2" and split not in known:
        yield f"transformers' reader does not know how its tokenizer splits text (tokenizer.ggml.pre={split!r:.80})"
    whole = (TokenType.CONTROL, TokenType.USER_DEFINED)
    for i, (token, kind) in enumerate(zip(parsed.get("tokens", []), parsed.get("token_type", []))):
        if kind in whole and token.strip() and tokenizer.convert_tokens_to_ids(token) != i:
            yield f"its tokenizer does not come out as it is in the file ({token!r})"
    if len(tokenizer) > config.vocab_size:
        yield f"its tokenizer comes out with {len(tokenizer)} tokens, for {config.vocab_size} rows of the embedding"
