"""Hugging Face checkpoints in and out.

Our parameter names are theirs without the leading `model.`; the one other difference is that a MoE layer's experts are
stacked here and one key per expert on disk:

    ours  layers.3.mlp.experts.gate_up_proj [E, 2F, D]    layers.3.mlp.experts.down_proj [E, D, F]
    disk  model.layers.3.mlp.experts.7.{gate,up,down}_proj.weight
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from r1fast.models.config import FAMILIES, ModelConfig
from r1fast.models.decoder import Decoder

StateDict = dict[str, Tensor]

_MAX_SHARD_SIZE = "5GB"
_INDEX_NAME = "model.safetensors.index.json"
_ROUTER_BIAS = "e_score_correction_bias"  # stays fp32 in every checkpoint
_EXPERT_KEY = re.compile(r"(?P<layer>.*\.experts)\.(?P<expert>\d+)\.(?P<proj>gate|up|down)_proj\.weight")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_model(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    *,
    scalar_head: bool | None = None,
) -> tuple[Decoder, PreTrainedTokenizerBase | None]:
    """Any checkpoint of the supported families -> (decoder in eval mode, tokenizer or None if it has none).

    path: folder or Hub id. dtype: torch.dtype, its name, or "auto" (what the checkpoint says).
    scalar_head: None follows the checkpoint; True turns a language model into a reward model whose `score` starts at
    zero, so that its first reward is 0 for everything.
    Raises ValueError naming the path and the key for anything missing, unexpected or unsupported.
    """
    folder = _resolve(path)
    config, is_scalar = _read_config(folder)
    state = load_state_dict(folder)
    if scalar_head and not is_scalar:
        state.pop("lm_head.weight", None)
        state["score.weight"] = torch.zeros(1, config.hidden_size)
    elif scalar_head is False and is_scalar:
        raise ValueError(f"{folder}: is a reward model (`score`), expected a language model with an lm_head")
    decoder = _meta_decoder(config, is_scalar or bool(scalar_head), state, folder)
    target = _resolve_dtype(dtype, folder, state)
    state = {name: tensor.to(device, _dtype_of(name, tensor, target)) for name, tensor in state.items()}
    decoder.load_state_dict(state, assign=True)
    decoder.tie_weights()
    decoder.rotary.to_empty(device=device or "cpu")
    return decoder.eval(), load_tokenizer(folder)


def load_state_dict(path: str | Path) -> StateDict:
    """The tensors of a checkpoint folder (or Hub id) under our names, on the CPU, in the dtypes stored."""
    folder = _resolve(path)
    return from_hf_names(_read_tensors(folder), _read_config(folder)[0].num_hidden_layers, source=folder)


def check_checkpoint(path: str | Path) -> tuple[ModelConfig, bool]:
    """The errors of load_model, without reading a weight: config, tensor names and shapes of a folder.

    Returns the architecture, and whether it is a reward model. A Hub id is checked by its config.json alone, the only
    file that is fetched.
    """
    if not _is_local(path):
        return _read_config(_fetch(str(path), ["config.json"]))
    folder = _resolve(path)
    config, is_scalar = _read_config(folder)
    state = from_hf_names(_read_tensors(folder, shapes_only=True), config.num_hidden_layers, source=folder)
    _meta_decoder(config, is_scalar, state, folder)
    return config, is_scalar


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint folder or Hub id, None if it has none."""
    folder = _resolve(path) if _is_local(path) else _fetch(str(path), ["tokenizer*", "config.json", "vocab*", "*.txt"])
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    file = folder / "tokenizer_config.json"
    declared = json.loads(file.read_text()).get("tokenizer_class") if file.is_file() else None
    if declared in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        # AutoTokenizer goes by model type for some families: a tokenizer of one's own in a Qwen2 checkpoint would get
        # Qwen2's splitting and an extra token (transformers 5.23). tokenizer.json alone is right.
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def save_model(
    decoder_config: ModelConfig,
    state_dict: StateDict,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    scalar_head: bool = False,
    *,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that AutoModelForCausalLM (or ...ForSequenceClassification) and AutoTokenizer load.

    One exception, see load_tokenizer: a qwen2 checkpoint with a tokenizer that is not Qwen2's.

    state_dict: our names, whole tensors on any device. dtype: of the floating-point weights on disk, None as given.
    Raises ValueError if the directory holds weights already and overwrite is False.
    """
    directory = Path(directory)
    stale = sorted([*directory.glob("*.safetensors"), *directory.glob(_INDEX_NAME)])
    if stale and not overwrite:
        raise ValueError(f"{directory}: already holds {stale[0].name}; choose another directory or pass overwrite=True")
    directory.mkdir(parents=True, exist_ok=True)
    for file in stale:
        file.unlink()
    tied = decoder_config.tie_word_embeddings and not scalar_head
    state = to_hf_names(state_dict, tied=tied)
    state = {name: _own_storage(t.detach().to("cpu", _dtype_of(name, t, dtype))) for name, t in state.items()}
    _write_shards(state, directory)

    suffix = "ForSequenceClassification" if scalar_head else "ForCausalLM"
    extra = {"num_labels": 1} if scalar_head else {}
    hf_config = decoder_config.to_hf(dtype=state["model.embed_tokens.weight"].dtype, **extra)
    hf_config.architectures = [type(hf_config).__name__.removesuffix("Config") + suffix]
    hf_config.save_pretrained(directory)
    if not scalar_head:
        tokens = {name: getattr(decoder_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**tokens).save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def to_hf_names(state_dict: StateDict, *, tied: bool) -> StateDict:
    """Our names -> names on disk: experts apart, `model.` in front, no second copy of a tied head."""
    out: StateDict = {}
    for name, tensor in state_dict.items():
        if name.startswith(("lm_head.", "score.")):
            if not (tied and name.startswith("lm_head.")):
                out[name] = tensor
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out |= _split_experts(f"model.{name}", tensor)
        else:
            out[f"model.{name}"] = tensor
    return out


def from_hf_names(stored: StateDict, num_layers: int, *, source: Path) -> StateDict:
    """Names on disk -> our names. Multi-token-prediction layers (past num_layers) and stored rotary tables are left."""
    out: StateDict = {}
    experts: dict[str, dict[tuple[str, int], Tensor]] = {}
    for name, tensor in stored.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if (layer and int(layer[1]) >= num_layers) or name.endswith("rotary_emb.inv_freq"):
            continue
        ours = name.removeprefix("model.")
        if found := _EXPERT_KEY.fullmatch(ours):
            experts.setdefault(found["layer"], {})[found["proj"], int(found["expert"])] = tensor
        else:
            out[ours] = tensor
    for layer_name, parts in experts.items():
        out |= _stack_experts(layer_name, parts, source)
    return out


def _split_experts(name: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    prefix, _, proj = name.rpartition(".")
    for expert, weight in enumerate(stacked):
        if proj == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", weight
        else:
            gate, up = weight.chunk(2)
            yield f"{prefix}.{expert}.gate_proj.weight", gate
            yield f"{prefix}.{expert}.up_proj.weight", up


def _stack_experts(layer_name: str, parts: dict[tuple[str, int], Tensor], source: Path) -> StateDict:
    num_experts = 1 + max(expert for _, expert in parts)
    wanted = [(proj, expert) for expert in range(num_experts) for proj in ("gate", "up", "down")]
    if absent := [f"model.{layer_name}.{e}.{proj}_proj.weight" for proj, e in wanted if (proj, e) not in parts]:
        raise ValueError(f"{source}: missing {_some(absent)}; is the checkpoint complete?")
    gate_up = [torch.cat((parts["gate", e], parts["up", e])) for e in range(num_experts)]
    down = [parts["down", e] for e in range(num_experts)]
    return {f"{layer_name}.gate_up_proj": torch.stack(gate_up), f"{layer_name}.down_proj": torch.stack(down)}


def _is_local(path: str | Path) -> bool:
    """A folder, or what can only be meant as one: Hub ids are `name` or `owner/name`."""
    folder = Path(path).expanduser()
    shape = isinstance(path, Path) or folder.is_absolute() or str(path).startswith(".") or len(folder.parts) > 2
    return shape or folder.exists()


def _resolve(path: str | Path) -> Path:
    """A local folder, or the local snapshot of a Hub repository."""
    if not _is_local(path):
        return _fetch(str(path), ["*.json", "*.safetensors", "tokenizer*", "*.txt"])
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder; expected a checkpoint folder with config.json, or a Hub id")
    return folder


def _fetch(hub_id: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{hub_id}: neither a folder nor a Hub repository that can be reached ({type(error).__name__}); "
            "check the spelling, the network, and HF_TOKEN for gated models"
        ) from error


def _read_config(folder: Path) -> tuple[ModelConfig, bool]:
    """The architecture, and whether the checkpoint has a scalar head."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no config.json; expected a Hugging Face checkpoint folder")
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{file}: model_type is {model_type!r}, expected one of {', '.join(FAMILIES)}")
    if "quantization_config" in values:
        method = values["quantization_config"].get("quant_method")
        raise ValueError(f"{file}: quantization_config ({method}) cannot be read; convert the checkpoint to bf16 first")
    try:
        config = ModelConfig.from_hf(AutoConfig.from_pretrained(folder))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    config = dataclasses.replace(config, eos_token_id=_all_eos_ids(config, folder / "generation_config.json"))
    architectures = values.get("architectures") or ["ForCausalLM"]
    return config, architectures[0].endswith("ForSequenceClassification")


def _all_eos_ids(config: ModelConfig, generation_config: Path) -> int | list[int] | None:
    """config.json's and those that only generation_config.json knows, such as the end of a turn of chat models."""
    found = [config.eos_token_id]
    if generation_config.is_file():
        found.append(json.loads(generation_config.read_text()).get("eos_token_id"))
    ids = [i for eos in found if eos is not None for i in (eos if isinstance(eos, list) else [eos])]
    ids = list(dict.fromkeys(ids))
    return ids if len(ids) > 1 else ids[0] if ids else None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX_NAME
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder}: no {file.name}; expected model.safetensors, or {_INDEX_NAME} and its shards")
    return files


def _read_tensors(folder: Path, *, shapes_only: bool = False) -> StateDict:
    """Every stored tensor by its name on disk; shapes_only: as meta tensors, from the file headers."""
    stored: StateDict = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if shapes_only:
                        stored[name] = torch.empty(tensors.get_slice(name).get_shape(), device="meta")
                    else:
                        stored[name] = tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error}); copy or download it again") from error
    return stored


def _meta_decoder(config: ModelConfig, scalar_head: bool, state: StateDict, folder: Path) -> Decoder:
    """A decoder on meta that `state` fits; a tied head, absent on disk, is added to `state`."""
    with torch.device("meta"):
        decoder = Decoder(config, scalar_head=scalar_head)
    if config.tie_word_embeddings and not scalar_head and "embed_tokens.weight" in state:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    _check_against(decoder, state, folder)
    return decoder


def _check_against(decoder: Decoder, state: StateDict, folder: Path) -> None:
    """Names and shapes, before any copy; keys are reported as they stand on disk."""
    expected = decoder.state_dict()
    missing = [_disk_name(name) for name in expected if name not in state]
    unexpected = [_disk_name(name) for name in state if name not in expected]
    if missing or unexpected:
        problems = [f"missing {_some(missing)}"] if missing else []
        problems += [f"unexpected {_some(unexpected)}"] if unexpected else []
        raise ValueError(f"{folder}: {'; '.join(problems)}; do the weights belong to this config.json?")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{folder}: {_disk_name(name)} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(tensor.shape)} from config.json"
            )


def _disk_name(name: str) -> str:
    return name if name.startswith(("lm_head.", "score.")) else f"model.{name}"


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _resolve_dtype(dtype: torch.dtype | str, folder: Path, state: StateDict) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype
    if name == "auto":
        values = json.loads((folder / "config.json").read_text())
        name = str(values.get("dtype") or values.get("torch_dtype") or state["embed_tokens.weight"].dtype)
    resolved = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(resolved, torch.dtype):
        raise ValueError(f"dtype={dtype!r}, expected a torch.dtype, its name (bfloat16, float16, float32), or 'auto'")
    return resolved


def _dtype_of(name: str, tensor: Tensor, target: torch.dtype | None) -> torch.dtype:
    if name.endswith(_ROUTER_BIAS):
        return torch.float32
    return target if target is not None and tensor.is_floating_point() else tensor.dtype


def _own_storage(tensor: Tensor) -> Tensor:
    """Experts are views of one stack: sharding counts storages, so without a copy they would all fall in one file."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _write_shards(state: StateDict, directory: Path) -> None:
    shards = split_torch_state_dict_into_shards(state, max_shard_size=_MAX_SHARD_SIZE)
    for file_name, names in shards.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, directory / file_name, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / _INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
