"""Tensor names on disk and in the decoder.

Our parameter names are Hugging Face's without the leading `model.`, and one for all families (families.py: `renamed`).
A MoE layer's experts are stacked here and one key per expert on disk; projections that a family has fused on disk
(`fused`) are apart here:

    ours  layers.3.mlp.experts.gate_up_proj [E, 2F, D]    layers.3.mlp.experts.down_proj [E, D, F]
    disk  model.layers.3.mlp.experts.7.{gate,up,down}_proj.weight

    ours  layers.3.self_attn.{q,k,v}_proj.weight          disk  model.layers.3.self_attn.qkv_proj.weight
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from r1fast.models.model_config import ModelConfig

StateDict = dict[str, Tensor]

_LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT_KEY = re.compile(r"(?P<layer>.*\.experts)\.(?P<expert>\d+)\.(?P<proj>gate|up|down)_proj\.weight")


def to_hf_names(state_dict: StateDict, config: ModelConfig, *, tied: bool) -> StateDict:
    """Our names -> names on disk: experts apart, `model.` in front, no second copy of a tied head."""
    out: StateDict = {}
    for name, tensor in _fuse(state_dict, config).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out |= {disk_name(part, config): expert for part, expert in _split_experts(name, tensor)}
        elif not (tied and name.startswith("lm_head.")):
            out[disk_name(name, config)] = tensor
    return out


def is_left_out(name: str, config: ModelConfig) -> bool:
    """Whether a tensor on disk is not the decoder's: DeepSeek's multi-token prediction, and stored rotary tables."""
    layer = _LAYER_KEY.match(name)
    is_past = layer is not None and int(layer[1]) >= config.num_hidden_layers
    return (is_past and config.family.has_mtp_layers) or name.endswith("rotary_emb.inv_freq")


def from_hf_names(stored: StateDict, config: ModelConfig, *, source: Path) -> StateDict:
    """Names on disk -> our names."""
    out: StateDict = {}
    experts: dict[str, dict[tuple[str, int], Tensor]] = {}
    for name, tensor in stored.items():
        ours = name.removeprefix("model.")
        for part, on_disk in config.family.renamed.items():
            ours = ours.replace(on_disk, part)
        if parts := _parts_of(ours, config):
            rows = sum(parts.values())
            if len(tensor) != rows:
                raise ValueError(f"{source}: {name} has {len(tensor)} rows, expected {rows} from config.json")
            out |= dict(zip(parts, tensor.split(list(parts.values())), strict=True))
        elif found := _EXPERT_KEY.fullmatch(ours):
            experts.setdefault(found["layer"], {})[found["proj"], int(found["expert"])] = tensor
        else:
            out[ours] = tensor
    for layer_name, of_layer in experts.items():
        out |= _stack_experts(layer_name, of_layer, config, source)
    return out


def _parts_of(name: str, config: ModelConfig) -> dict[str, int]:
    """The projections inside one that is fused on disk, and the rows of each; none of any other tensor."""
    prefix, _, last = name.removesuffix(".weight").rpartition(".")
    if not name.endswith(".weight") or last not in config.family.fused:
        return {}
    queries, keys = (n * config.attention_head_dim for n in (config.num_attention_heads, config.kv_heads))
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return {f"{prefix}.{part}.weight": rows.get(part, config.intermediate_size) for part in config.family.fused[last]}


def _fuse(state_dict: StateDict, config: ModelConfig) -> StateDict:
    """With the projections that are one on disk in one, in place of the first of them."""
    if not config.family.fused:
        return state_dict
    fused_in = {part: fused for fused, parts in config.family.fused.items() for part in parts}
    together: dict[str, list[Tensor]] = {}
    for name, tensor in state_dict.items():
        module, _, last = name.removesuffix(".weight").rpartition(".")
        fused = fused_in.get(last)
        together.setdefault(f"{module}.{fused}.weight" if fused else name, []).append(tensor)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in together.items()}


def _split_experts(name: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    prefix, _, stack = name.rpartition(".")
    projs = ("down_proj",) if stack == "down_proj" else ("gate_proj", "up_proj")
    for expert, weight in enumerate(stacked):
        for proj, part in zip(projs, weight.chunk(len(projs)), strict=True):
            yield f"{prefix}.{expert}.{proj}.weight", part


def _stack_experts(
    layer_name: str, parts: dict[tuple[str, int], Tensor], config: ModelConfig, source: Path
) -> StateDict:
    def on_disk(proj: str, expert: int | str) -> str:
        return disk_name(f"{layer_name}.{expert}.{proj}_proj.weight", config)

    num_experts = 1 + max(expert for _, expert in parts)
    wanted = ((proj, expert) for expert in range(num_experts) for proj in ("gate", "up", "down"))
    missing = (on_disk(proj, e) for proj, e in wanted if (proj, e) not in parts)
    if absent := list(islice(missing, 3)):  # a name may hold any number
        raise ValueError(f"{source}: missing {some(absent)}; is the checkpoint complete?")
    for proj in ("gate", "up", "down"):
        shapes = {tuple(parts[proj, e].shape) for e in range(num_experts)}
        if len(shapes) > 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"{source}: {on_disk(proj, '*')} have shapes {sorted(shapes)}, not one")
    gate_up = [torch.cat((parts["gate", e], parts["up", e])) for e in range(num_experts)]
    down = [parts["down", e] for e in range(num_experts)]
    return {f"{layer_name}.gate_up_proj": torch.stack(gate_up), f"{layer_name}.down_proj": torch.stack(down)}


def disk_name(name: str, config: ModelConfig) -> str:
    for part, on_disk in config.family.renamed.items():
        name = name.replace(part, on_disk)
    return name if name.startswith(("lm_head.", "score.")) else f"model.{name}"


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
