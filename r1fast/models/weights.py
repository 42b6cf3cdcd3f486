"""Hugging Face checkpoints in and out: folders, Hub repositories, configurations, tokenizers, shards.

Which tensor is which: names.py. Only safetensors are read, and no code that a folder brings along is run.
"""

import dataclasses
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version

from r1fast.models.decoder import Decoder
from r1fast.models.families import FAMILIES
from r1fast.models.model_config import ModelConfig
from r1fast.models.names import StateDict, disk_name, from_hf_names, is_left_out, some, to_hf_names

logger = logging.getLogger(__name__)

_MAX_SHARD_SIZE = "5GB"
_GENERATION_NAME = "generation_config.json"
_INDEX_NAME = "model.safetensors.index.json"
_ROUTER_BIAS = "e_score_correction_bias"  # is fp32 whatever the dtype of the model
_AGAIN = "copy or download it again"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]  # of a Hub repository
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    *,
    scalar_head: bool | None = None,
) -> tuple[Decoder, PreTrainedTokenizerBase | None]:
    """Any checkpoint of the supported families -> (decoder in eval mode, tokenizer or None if it has none).

    path: folder or Hub id. dtype: torch.dtype, its name, or "auto" (what the checkpoint says).
    scalar_head: None follows the checkpoint; True turns a language model into a reward model whose `score` starts at 0.
    Raises ValueError naming the path and the key for anything missing, unexpected or unsupported.
    """
    folder = _resolve(path, ["*.safetensors", *_TOKENIZER_PATTERNS])
    config, is_scalar, state = _read(folder)
    if scalar_head and not is_scalar:
        state.pop("lm_head.weight", None)
        state["score.weight"] = torch.zeros(1, config.hidden_size)
    elif scalar_head is False and is_scalar:
        raise ValueError(f"{folder}: is a reward model (`score`), expected a language model with an lm_head")
    decoder = _decoder_that_fits(config, is_scalar or bool(scalar_head), state, folder)
    target = _resolve_dtype(dtype, folder, state)
    for name, tensor in state.items():
        state[name] = tensor.to(device, torch.float32 if name.endswith(_ROUTER_BIAS) else target)
    decoder.load_state_dict(state, assign=True)
    decoder.tie_weights()
    decoder.rotary.to_empty(device=device or "cpu")
    return decoder.eval(), load_tokenizer(folder)


def check_checkpoint(path: str | Path) -> tuple[ModelConfig, bool]:
    """The architecture, and whether it is a reward model, or an error of load_model; no weight is read.

    A Hub id is checked by its config.json alone, the only file that is fetched.
    """
    folder = _resolve(path, ["config.json"])
    if not _is_local(path):
        return _read_config(folder)
    config, is_scalar, state = _read(folder, shapes_only=True)
    _decoder_that_fits(config, is_scalar, state, folder)
    return config, is_scalar


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """None if it has none; ValueError naming the folder for files that are damaged, or need code of their own."""
    folder = _resolve(path, _TOKENIZER_PATTERNS)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    file = folder / "tokenizer_config.json"
    declared = _read_json(file).get("tokenizer_class") if file.is_file() else None
    # AutoTokenizer goes by model type for some families: a tokenizer of one's own in a Qwen2 checkpoint would get
    # Qwen2's splitting and an extra token (transformers 5.23, whatever the files say). tokenizer.json alone is right.
    own = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    try:
        return (PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"the tokenizer of {folder} cannot be read ({_one_line(error)}); {_AGAIN}") from error


def save_model(
    decoder_config: ModelConfig,
    state_dict: StateDict,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scalar_head: bool = False,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that AutoModelForCausalLM (or ...ForSequenceClassification) and AutoTokenizer load.

    But AutoTokenizer gives every qwen2 checkpoint the splitting of Qwen2's tokenizer (transformers 5.23): another one,
    such as that of recipe `tiny`, is read right by load_tokenizer and PreTrainedTokenizerFast alone.

    state_dict: our names, whole tensors on any device. source: the checkpoint that training started from, whose
    generation_config is kept (temperature, ..), but for the ids: the model's, and the tokenizer's end of sequence.
    Raises ValueError if the directory holds weights already and overwrite is False.
    """
    directory = Path(directory)
    stale = sorted([*directory.glob("*.safetensors"), *directory.glob(_INDEX_NAME)])
    if stale and not overwrite:
        raise ValueError(f"{directory}: already holds {stale[0].name}; choose another directory or pass overwrite=True")
    directory.mkdir(parents=True, exist_ok=True)
    for file in stale:
        file.unlink()
    state = to_hf_names(state_dict, decoder_config, tied=decoder_config.tie_word_embeddings and not scalar_head)
    state = {name: _own_storage(tensor.detach().cpu()) for name, tensor in state.items()}
    save_torch_state_dict(state, directory, max_shard_size=_MAX_SHARD_SIZE)

    eos = _eos_ids(decoder_config.eos_token_id, getattr(tokenizer, "eos_token_id", None))
    decoder_config = dataclasses.replace(decoder_config, eos_token_id=eos)
    decoder_config.to_hf(state["model.embed_tokens.weight"].dtype, scalar_head=scalar_head).save_pretrained(directory)
    if not scalar_head:
        _write_generation_config(directory, source, decoder_config)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _write_generation_config(directory: Path, source: str | Path | None, config: ModelConfig) -> None:
    values = {} if source is None else _read_generation_config(_resolve(source, [_GENERATION_NAME]))
    values.pop("_from_model_config", None)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values |= {name: value for name, value in ids.items() if value is not None}
    values["transformers_version"] = transformers_version
    (directory / _GENERATION_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_local(path: str | Path) -> bool:
    """A folder, or what can only be meant as one: Hub ids are `name` or `owner/name`."""
    folder = Path(path).expanduser()
    is_hub_id = isinstance(path, str) and not folder.is_absolute() and path[:1] != "." and len(folder.parts) <= 2
    return not is_hub_id or folder.exists()


def _resolve(path: str | Path, patterns: list[str]) -> Path:
    """A local folder, or the local snapshot of those files of a Hub repository."""
    if _is_local(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"{path}: no such folder; expected a checkpoint folder with config.json, or a Hub id")
        return folder
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        text = f"neither a folder nor a Hub repository that can be reached ({type(error).__name__})"
        raise ValueError(f"{path}: {text}; check the spelling, the network, and HF_TOKEN for gated models") from error


def _read(folder: Path, *, shapes_only: bool = False) -> tuple[ModelConfig, bool, StateDict]:
    """The architecture, whether the checkpoint has a scalar head, and its tensors."""
    config, is_scalar = _read_config(folder)
    state = _read_state(folder, config, shapes_only=shapes_only)
    return config if is_scalar else _share_head(config, state, folder), is_scalar, state


def _read_config(folder: Path) -> tuple[ModelConfig, bool]:
    """The architecture, and whether the checkpoint has a scalar head."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no config.json; expected a Hugging Face checkpoint folder")
    values = _read_json(file)
    model_type = values.get("model_type")
    if model_type not in tuple(FAMILIES):
        raise ValueError(f"{file}: model_type is {model_type!r:.80}, expected one of {', '.join(FAMILIES)}")
    if values.get("quantization_config") is not None:
        method = values["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ValueError(f"{file}: quantization_config ({method}) cannot be read; convert the checkpoint to bf16 first")
    architectures = values.get("architectures") or ["ForCausalLM"]
    if not _is_list_of(str, architectures):
        raise ValueError(f"{file}: architectures is {architectures!r:.80}, expected a list of names")
    try:
        config = ModelConfig.from_hf(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # what transformers raises for a value of a wrong type is no ValueError
        raise ValueError(f"{file}: {_one_line(error)}") from error
    eos = _eos_ids(config.eos_token_id, _read_generation_config(folder).get("eos_token_id"))
    return dataclasses.replace(config, eos_token_id=eos), architectures[0].endswith("ForSequenceClassification")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({_one_line(error)}); {_AGAIN}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: is a JSON {type(values).__name__}, expected an object; {_AGAIN}")
    return values


def _read_generation_config(folder: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    file = folder / _GENERATION_NAME
    values = _read_json(file) if file.is_file() else {}
    eos = values.get("eos_token_id")
    if not (eos is None or _is_list_of(int, eos if isinstance(eos, list) else [eos])):
        raise ValueError(f"{file}: eos_token_id is {eos!r:.80}, expected a token id or a list of them")
    return values


def _eos_ids(*found: int | list[int] | None) -> int | list[int] | None:
    """All of them: chat models end a turn with a token that only generation_config.json, or the tokenizer, knows."""
    ids = list(dict.fromkeys(i for eos in found for i in (eos if isinstance(eos, list) else [eos]) if i is not None))
    return ids if len(ids) > 1 else ids[0] if ids else None


def _is_list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(x, kind) and not isinstance(x, bool) for x in values)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _weight_files(folder: Path) -> list[Path]:
    """As transformers: one file, or else what the index names."""
    index, whole = folder / _INDEX_NAME, folder / "model.safetensors"
    names: Collection[Any] = ["model.safetensors"]
    if index.is_file() and not whole.is_file():
        weight_map = _read_json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{index}: no weight_map of tensor names to files of this folder; {_AGAIN}")
    files = [folder / name for name in sorted(set(names))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder}: no {file.name}; expected model.safetensors, or {_INDEX_NAME} and its shards")
    return files


def _read_state(folder: Path, config: ModelConfig, *, shapes_only: bool = False) -> StateDict:
    """Every tensor of the decoder by our name; shapes_only: as meta tensors, from the file headers.

    Raises ValueError naming file and tensor for one that is not floating point, or that holds NaN or Inf.
    """
    stored: StateDict = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if is_left_out(name, config):
                        continue
                    part = tensors.get_slice(name)
                    shape, dtype = part.get_shape(), part.get_dtype()
                    if 0 in shape:  # as transformers writes the shared experts of a model without them
                        continue
                    if name in stored:
                        raise ValueError(f"{file}: {name} is in another file too; {_AGAIN}")
                    if dtype not in _FLOATS:
                        raise ValueError(f"{file}: {name} has dtype {dtype}, expected one of {', '.join(_FLOATS)}")
                    if shapes_only:
                        stored[name] = torch.empty(shape, dtype=_FLOATS[dtype], device="meta")
                    else:
                        stored[name] = _finite(tensors.get_tensor(name), name, file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({_one_line(error)}); {_AGAIN}") from error
    return from_hf_names(stored, config, source=folder)


def _finite(tensor: Tensor, name: str, file: Path) -> Tensor:
    # A sum is one pass at the speed of memory, and finite only if every element is; that of large ones may not be.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise ValueError(f"{file}: {name} holds NaN or Inf; take an earlier checkpoint, or {_AGAIN}")
    return tensor


def _share_head(config: ModelConfig, state: StateDict, folder: Path) -> ModelConfig:
    """As transformers: tied weights are one where one or two equal ones are stored, and two where those differ."""
    if not config.tie_word_embeddings:
        return config
    names = ("embed_tokens.weight", "lm_head.weight")
    stored = [state[name] for name in names if name in state]
    if len(stored) == 2 and not stored[0].is_meta and not torch.equal(*stored):
        text = "%s: not tied, although tie_word_embeddings is true: lm_head.weight and model.embed_tokens.weight differ"
        logger.warning(text, folder)
        return dataclasses.replace(config, tie_word_embeddings=False)
    if len(stored) == 1:
        state |= dict.fromkeys(names, stored[0])
    return config


def _decoder_that_fits(config: ModelConfig, scalar_head: bool, state: StateDict, folder: Path) -> Decoder:
    """A decoder on meta, with the names and shapes of `state`; keys are reported as they stand on disk."""
    with torch.device("meta"):
        decoder = Decoder(config, scalar_head=scalar_head)
    expected = decoder.state_dict()
    differing = {"missing": expected.keys() - state.keys(), "unexpected": state.keys() - expected.keys()}
    on_disk = {word: [disk_name(name, config) for name in names] for word, names in differing.items() if names}
    if problems := [f"{word} {some(names)}" for word, names in on_disk.items()]:
        raise ValueError(f"{folder}: {'; '.join(problems)}; do the weights belong to this config.json?")
    for name, tensor in expected.items():
        found, wanted = tuple(state[name].shape), tuple(tensor.shape)
        if found != wanted:
            raise ValueError(
                f"{folder}: {disk_name(name, config)} has shape {found}, expected {wanted} from config.json"
            )
    return decoder


def _resolve_dtype(dtype: torch.dtype | str, folder: Path, state: StateDict) -> torch.dtype:
    """ "auto": what config.json says, or else the dtype of the embeddings."""
    said_by = "dtype"
    if dtype == "auto":
        values = _read_json(folder / "config.json")
        dtype = values.get("dtype") or values.get("torch_dtype") or state["embed_tokens.weight"].dtype
        said_by = f"{folder / 'config.json'}: dtype"
    by_name = {str(known).removeprefix("torch."): known for known in _FLOATS.values()}
    if (name := str(dtype).removeprefix("torch.")) not in by_name:
        expected = "a torch.dtype, its name (bfloat16, float16, float32), or 'auto'"
        raise ValueError(f"{said_by}={str(dtype)!r}, expected {expected}")
    return by_name[name]


def _own_storage(tensor: Tensor) -> Tensor:
    """Experts are views of one stack: sharding counts storages, so without a copy they would all fall in one file."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
