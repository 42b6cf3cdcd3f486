"""A .gguf file (llama.cpp's format) as a checkpoint, by transformers' reader: config, tokenizer, dequantized weights.

transformers reads such a file whole, so every rank holds its weights in fp32 while they are loaded: a format for small
models. Large ones are released as safetensors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from r1fast.wording import one_line

T = TypeVar("T")
SUFFIX = ".gguf"


def gguf_config(file: Path) -> PretrainedConfig:
    return _read(file, lambda: AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False))


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    read = AutoTokenizer.from_pretrained
    return _read(file, lambda: read(file.parent, gguf_file=file.name, trust_remote_code=False))


def gguf_tensors(file: Path) -> dict[str, Tensor]:
    """fp32, under the names of transformers' model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(gguf_config(file))
    return _read(file, lambda: load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"])


def _read(file: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except ImportError as error:
        raise ValueError(f"{file}: reading it needs the package gguf; pip install gguf") from error
    except Exception as error:  # KeyError, IndexError and others where the file is damaged
        text = f"cannot be read as GGUF ({type(error).__name__}: {one_line(error)[:300]})"
        raise ValueError(f"{file}: {text}; take the safetensors of the model, or download it again") from error
