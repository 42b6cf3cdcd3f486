"""A .gguf file (llama.cpp's format) as a checkpoint folder: transformers' reader dequantizes it, once.

The folder lies in Hugging Face's cache of assets (HF_ASSETS_CACHE), in float32. To make it the whole model is held in
memory once: a format for small models. Large ones are released as safetensors.
"""

import logging
import zlib
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from huggingface_hub.utils import WeakFileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from r1fast.run_folder import replace_folder
from r1fast.wording import one_line

SUFFIX = ".gguf"
logger = logging.getLogger(__name__)


def converted(file: Path) -> Path:
    """The checkpoint folder of a .gguf file. ValueError where transformers' reader would leave out any of it."""
    status = file.stat()
    key = f"{file.resolve()},{status.st_size},{status.st_mtime_ns},{transformers_version}"
    home = cached_assets_path("r1fast", "gguf", f"{file.stem}-{zlib.crc32(key.encode()):08x}")
    folder = home / "model"
    try:
        with WeakFileLock(home / "lock"):  # of several processes, one reads it
            if not folder.is_dir():
                logger.warning("%s is read once, and kept as %s", file, folder)
                model, tokenizer = _read(file)
                with replace_folder(folder) as partial, redirect_stderr(StringIO()):  # a progress bar
                    model.save_pretrained(partial)
                    tokenizer.save_pretrained(partial)
    except OSError as error:
        raise ValueError(f"{home} cannot be written ({one_line(error)}); set HF_ASSETS_CACHE to another") from error
    return folder


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
    from gguf import GGUFReader, TokenType

    where = {"gguf_file": file.name, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(file.parent, **where)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with redirect_stderr(StringIO()):  # a progress bar
        parsed = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    model.load_state_dict(parsed["tensors"], strict=False, assign=True)
    model.tie_weights()

    reader = GGUFReader(file)
    num_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    num_read = sum(tensor.numel() for tensor in parsed["tensors"].values())
    scaling = [name for name in reader.fields if ".rope.scaling." in name and not name.endswith(".type")]
    scaling += [tensor.name for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    tokens, kinds = (parsed["tokenizer"].get(name, []) for name in ("tokens", "token_type"))
    special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == TokenType.CONTROL}
    moved = [token for token, i in special.items() if tokenizer.convert_tokens_to_ids(token) != i]
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    problem = None
    if scaling:
        problem = f"{scaling[0]} scales the rotary embedding, which transformers' reader leaves out"
    elif num_read != num_weights:
        problem = f"holds {num_weights} weights, of which transformers' reader knows {num_read}"
    elif missing:
        problem = f"holds no {missing[0]}"
    elif moved or len(tokenizer) > config.vocab_size:
        problem = f"its tokenizer does not come out as it is in the file ({moved[0] if moved else len(tokenizer)!r})"
    return problem, model, tokenizer
