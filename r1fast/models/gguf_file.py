"""A .gguf file (llama.cpp's format) as a checkpoint, by transformers' reader: config, tokenizer, dequantized weights.

transformers reads such a file whole, so every rank holds its weights in fp32 while they are loaded: a format for small
models. Large ones are released as safetensors.
"""

from collections.abc import Callable
from contextlib import redirect_stderr
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from r1fast.wording import one_line

T = TypeVar("T")
SUFFIX = ".gguf"


class _Described(NamedTuple):
    config: PretrainedConfig
    num_weights: int
    special: dict[str, int]  # tokens that are no text


def gguf_config(file: Path) -> PretrainedConfig:
    return _described(file).config


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """ValueError where transformers' reader gives special tokens other ids than the file, as it does beyond ASCII."""
    described, read = _described(file), AutoTokenizer.from_pretrained
    tokenizer = _read(file, lambda: read(file.parent, gguf_file=file.name, trust_remote_code=False))
    moved = [token for token, i in described.special.items() if tokenizer.convert_tokens_to_ids(token) != i]
    if moved or len(tokenizer) > described.config.vocab_size:
        text = f"its tokenizer does not come out as it is in the file ({moved[0] if moved else len(tokenizer)!r})"
        raise ValueError(f"{file}: {text}; take the safetensors and the tokenizer of the model")
    return tokenizer


def gguf_tensors(file: Path) -> dict[str, Tensor]:
    """fp32, under the names of transformers' model. ValueError where its reader leaves out any."""
    described = _described(file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described.config)
    with redirect_stderr(StringIO()):  # a progress bar
        found = _read(
            file, lambda: load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
        )
    num_read = sum(tensor.numel() for tensor in found.values())
    if num_read != described.num_weights:
        text = f"holds {described.num_weights} weights, of which transformers' reader knows {num_read}"
        raise ValueError(f"{file}: {text}; take the safetensors of the model")
    return found


def _described(file: Path) -> _Described:
    return _read(file, lambda: _describe(file, file.stat().st_mtime_ns))


@lru_cache(maxsize=4)
def _describe(file: Path, _: int) -> _Described:
    """Kept, as it takes seconds to read what a file says before its weights."""
    from gguf import GGUFReader, TokenType

    reader = GGUFReader(file)
    scaling = [name for name in reader.fields if ".rope.scaling." in name and not name.endswith(".type")]
    scaling += [tensor.name for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    if scaling:
        raise ValueError(f"{scaling[0]} scales the rotary embedding, which transformers' reader leaves out")
    parsed = load_gguf_checkpoint(str(file))
    tokens, kinds = (parsed["tokenizer"].get(name, []) for name in ("tokens", "token_type"))
    special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == TokenType.CONTROL}
    num_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    return _Described(config, num_weights, special)


def _read(file: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except ImportError as error:
        raise ValueError(f"{file}: reading it needs the package gguf: pip install 'r1fast[gguf]'") from error
    except Exception as error:  # KeyError, IndexError and others where the file is damaged
        text = f"cannot be read as GGUF ({type(error).__name__}: {one_line(error)[:300]})"
        raise ValueError(f"{file}: {text}; take the safetensors of the model, or download it again") from error
