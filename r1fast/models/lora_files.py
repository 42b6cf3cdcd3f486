"""LoRA folders as peft 0.21 writes them: adapter_config.json, adapter_model.safetensors, and a tokenizer beside.

    dense     base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [r, in]        .lora_B.weight [out, r]
    experts   base_model.model.model.layers.3.mlp.experts[.base_layer].lora_A.weight [E r, in]    .. [out, r E]
    whole     base_model.model.score.weight, of modules_to_save; a bias that is trained

Module names are those of transformers' modules. peft wraps stacked experts once for each parameter, gate_up_proj inside
(`.base_layer`) where both have an adapter; rows of A count experts first, columns of B ranks first. In: every weight on
disk gets the factors that are added to its rows as they are read (tensor_files.py), so that any base of any layout will
do. Out: of the adapters of a decoder (lora.py). What else peft has (DoRA, biases of B, ..) is refused by name.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r1fast.models.export import write_generation_config
from r1fast.models.folders import ADAPTER_CONFIG, AGAIN, absolute, eos_ids, is_local, read_json, text_of
from r1fast.models.lora import ALL_LINEAR, Factors, LoraConfig, factors_of, hf_name, matches, target_name
from r1fast.models.model_config import ModelConfig
from r1fast.models.names import disk_name, pieces_of
from r1fast.models.tensor_files import FLOATS, Stored, TensorFiles

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_FILES = (ADAPTER_WEIGHTS, "adapter_model.bin")
_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_KEY = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?")
# Keys of adapter_config.json. Which weights have factors, and of what rank, and which are others, the tensors say.
_READ = {"peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "alpha_pattern", "use_rslora"}
_NO_EFFECT = {
    "auto_mapping", "peft_version", "task_type", "inference_mode", "target_modules", "target_parameters",
    "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "modules_to_save", "rank_pattern",
    "eva_config", "loftq_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "bias",
}  # fmt: skip
# Others (pissa, olora, corda, loftq, ..) begin with another base than the one that is named.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
# transformers 5 stacks the experts' projections of these names. peft 0.21 takes them for those wherever they stand in a
# model with experts: there, dense ones are named as parameters.
_ONCE_EXPERTS = ("gate_proj", "up_proj", "down_proj")


def with_adapter(found: dict[str, Stored], folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """The tensors of a model (by standard name) with a LoRA folder's factors and whole modules.

    Raises ValueError naming the file and what of it is not known, or does not fit the base.
    """
    values, found = adapter_settings(folder), dict(found)
    file = next((file for name in _ADAPTER_FILES if (file := folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder}: no {ADAPTER_WEIGHTS}; expected a LoRA folder as peft writes it, in one file")
    pairs: dict[str, dict[str, Tensor]] = {}
    files = TensorFiles()
    if not (tensors := files.list(file)):
        raise ValueError(f"{file}: holds no tensors; save the adapter again where it was trained")
    for stored in tensors:
        key = stored.name.removeprefix(_PREFIX)
        part, name = _KEY.fullmatch(key), _disk_name(key, config)
        _untie(found, name, config)
        if part is None and name not in found and name != "score.weight":
            advice = "merge it into its base where it was made"
            raise ValueError(f"{file}: {stored.name} is no factor of LoRA, nor a tensor of the base; {advice}")
        if stored.dtype not in FLOATS or 0 in stored.shape or (part and len(stored.shape) != 2):
            raise ValueError(f"{file}: {stored.name} is {stored.dtype} {stored.shape}, expected a matrix of numbers")
        if part is None:
            found[name] = stored
            if name == "score.weight":
                found.pop(_HEAD, None)
            continue
        factor = torch.cat([rows for _, rows in files.rows(stored, 0, stored.shape[0])]).float()
        if part[2].startswith("embedding"):  # (B A)^T: the other way round
            pairs.setdefault(part[1], {})["B" if part[2].endswith("A") else "A"] = factor.T
        else:
            pairs.setdefault(part[1], {})[part[2]] = factor
    files.close()
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{file}: {module} has no lora_{'B' if 'A' in pair else 'A'}; {AGAIN}")
        for name, left, right in _products(module, pair["A"], pair["B"], values, config):
            _untie(found, name, config)
            if name not in found or found[name].shape != (len(left), right.shape[1]):
                shape = found[name].shape if name in found else "no such weight"
                raise ValueError(f"{file}: {module} adapts {name} {len(left), right.shape[1]}; the base has {shape}")
            found[name] = found[name]._replace(products=(*found[name].products, (left, right)))
    return found


def is_reward_adapter(folder: Path) -> bool:
    return bool(adapter_settings(folder).get("task_type") == "SEQ_CLS")


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Of a LoRA folder. ValueError for what is more than LoRA."""
    values = read_json(file := folder / ADAPTER_CONFIG)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {values.get('peft_type')!r:.80}, expected LORA; merge it into its base")
    known = _READ | _NO_EFFECT | {"init_lora_weights"}
    others = [key for key, value in values.items() if key not in known and value]
    others += ["init_lora_weights"] * (values.get("init_lora_weights") not in _INITS)
    for key in others:
        text = f"{key}={values[key]!r:.80} is more than the two factors of LoRA"
        raise ValueError(f"{file}: {text}; merge the adapter into its base (peft's merge_and_unload) and use that")
    try:
        for pattern, alpha in {"": values.get("lora_alpha", 8), **(values.get("alpha_pattern") or {})}.items():
            re.compile(pattern)
            float(alpha)
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"{file}: lora_alpha or alpha_pattern is no number ({text_of(error)}); correct it") from error
    return values


def _untie(found: dict[str, Stored], name: str, config: ModelConfig) -> None:
    """peft changes one of two tied weights: then they are two."""
    if config.tie_word_embeddings and name in (_EMBEDDING, _HEAD):
        for one, other in ((_EMBEDDING, _HEAD), (_HEAD, _EMBEDDING)):
            if one in found:
                found.setdefault(other, found[one])


def _disk_name(key: str, config: ModelConfig) -> str:
    return disk_name(key.replace(".base_layer.", ".").removeprefix("model."), config)


def _products(
    module: str, a: Tensor, b: Tensor, values: dict[str, Any], config: ModelConfig
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(weight on disk, left [rows, r], right [r, columns]): what is added to it is left right."""
    name = module.replace(".base_layer", "").removeprefix("model.")
    if not name.endswith(".experts"):
        yield _disk_name(f"{name}.weight", config), _scale(f"model.{name}", len(a), values) * b, a
        return
    num_experts, width, inner = config.n_routed_experts, config.hidden_size, config.expert_width
    shapes = {(2 * inner, width): "gate_up_proj", (width, inner): "down_proj"}
    if num_experts == 0 or len(a) % num_experts or a.shape[0] != b.shape[1] or (len(b), a.shape[1]) not in shapes:
        text = f"factors {tuple(a.shape)} and {tuple(b.shape)} of {module} are none of {num_experts} stacked experts"
        raise ValueError(f"{text} of {width} x {inner}; does the adapter belong to this base?")
    rank, name = len(a) // num_experts, f"{name}.{shapes[len(b), a.shape[1]]}"
    b_EOr = _scale(f"model.{name}", rank, values) * b.reshape(-1, rank, num_experts).permute(2, 0, 1)
    a_ErI = a.reshape(num_experts, rank, -1)
    for piece in pieces_of(name, (num_experts, len(b), a.shape[1]), config):
        assert piece.entry is not None
        rows = slice(piece.first, piece.first + piece.num_rows)
        yield piece.name, b_EOr[piece.entry, rows], a_ErI[piece.entry]


def _scale(name: str, rank: int, values: dict[str, Any]) -> float:
    patterns = values.get("alpha_pattern") or {}
    found = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", name))
    alpha = next(found, values.get("lora_alpha", 8))  # peft's default
    return float(alpha) / (math.sqrt(rank) if values.get("use_rslora") else rank)


class Export(NamedTuple):
    """What a LoRA folder holds."""

    factors: dict[str, Factors]  # by our name of the weight
    whole: dict[str, Tensor]  # modules to save, by our name
    lora: LoraConfig


def export_of(model: Any, lora: LoraConfig, whole: Callable[[Tensor], Tensor]) -> Export:
    """Of a decoder. whole: gathers a parameter; collective where it is."""
    head = {"score.weight": whole(model.score.weight.detach())} if model.scalar_head else {}
    return Export(factors_of(model, whole), head, lora)


def save_adapter(
    folder: Path, export: Export, config: ModelConfig, base: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a LoRA folder that peft's PeftModel.from_pretrained loads on the base, a folder or Hub id[@revision]."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in export.whole.items()}
    fused: dict[str, list[Factors]] = {}
    for name, (a, b, scale) in export.factors.items():
        shape = (*b.shape[:-1], a.shape[-1])
        fused.setdefault(hf_name(name, shape, config), []).append(Factors(a, b, scale))
    for name, parts in fused.items():
        a, b = parts[0].a, torch.cat([part.b for part in parts], dim=-2)  # A of all is one
        module = target_name(name)
        if a.ndim == 3:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
            module, _, attribute = name.rpartition(".")
            if attribute == "gate_up_proj" and f"{module}.down_proj" in fused:
                module += ".base_layer"
        tensors |= {f"{_PREFIX}{module}.lora_A.weight": a, f"{_PREFIX}{module}.lora_B.weight": b}
    save_file({name: x.contiguous().cpu() for name, x in tensors.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    text = json.dumps(_settings(export, config, fused, base), indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(f"{text}\n", encoding="utf-8")
    if not export.whole:
        eos = eos_ids(config.eos_token_id, getattr(tokenizer, "eos_token_id", None))
        write_generation_config(folder, base, dataclasses.replace(config, eos_token_id=eos))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _settings(export: Export, config: ModelConfig, names: Iterable[str], base: str) -> dict[str, Any]:
    lora, targets = export.lora, export.lora.target_modules
    if targets == ALL_LINEAR:
        targets = tuple({target_name(name).rpartition(".")[2] for name in names})
    modules, parameters = set(), set()
    for target in targets:
        for name in (name for name in names if matches(target, name)):
            if not name.endswith(".weight"):
                parameters.add(target if "." in target else f"experts.{target}")
            elif config.has_router and name.endswith(tuple(f".{last}.weight" for last in _ONCE_EXPERTS)):
                parameters.add(f"{target}.weight")
            else:
                modules.add(target)
    path, _, revision = (absolute(base), "", "") if is_local(base) else base.partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if export.whole else "CAUSAL_LM",
        "base_model_name_or_path": path,
        "revision": revision or None,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        # peft knows none of parameters, nor uses it in what is loaded.
        "lora_dropout": 0.0 if parameters else lora.dropout,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted({name.partition(".")[0] for name in export.whole}) or None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
