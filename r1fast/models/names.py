"""Tensor names on disk and in the decoder.

Our parameter names are Hugging Face's without the leading `model.`; the one other difference is that a MoE layer's
experts are stacked here and one key per expert on disk:

    ours  layers.3.mlp.experts.gate_up_proj [E, 2F, D]    layers.3.mlp.experts.down_proj [E, D, F]
    disk  model.layers.3.mlp.experts.7.{gate,up,down}_proj.weight
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1fast.models.model_config import ModelConfig

StateDict = dict[str, Tensor]
Blocks = Iterable[tuple[str, int, Tensor]]  # of weights: (our name, first row, rows)

_LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.")
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Piece(NamedTuple):
    """Rows of a parameter, or of one entry of a stacked one, and which rows of a tensor on disk they are."""

    name: str  # of the tensor on disk
    shape: tuple[int, ...]  # of the whole tensor on disk
    entry: int | None  # of a stack
    first: int  # row of the parameter, or of that entry
    first_on_disk: int
    num_rows: int

    def within(self, start: int, stop: int) -> tuple[Any, int, int] | None:
        """What the parameter[start:stop] holds of it: (index into that, first row on disk, rows); None: nothing."""
        low, high = self.first, self.first + self.num_rows
        if self.entry is not None:
            index = (self.entry - start, slice(low, high))
            return (index, self.first_on_disk, self.num_rows) if start <= self.entry < stop else None
        low, high = max(start, low), min(stop, high)
        first = self.first_on_disk + low - self.first
        return (slice(low - start, high - start), first, high - low) if low < high else None


def pieces_of(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[Piece]:
    """What makes up a parameter of our name on disk, in order."""
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith(".experts"):
        disk, first, rows = _fused(name, config) or (name, 0, shape[0])
        yield Piece(disk_name(disk, config), (rows, *shape[1:]), None, 0, first, shape[0])
        return
    num_experts, rows, width = shape
    projs = _STACKED[last]
    rows //= len(projs)
    for expert in range(num_experts):
        for i, proj in enumerate(projs):
            disk = disk_name(f"{prefix}.{expert}.{proj}.weight", config)
            yield Piece(disk, (rows, width), expert, i * rows, 0, rows)


def _fused(name: str, config: ModelConfig) -> tuple[str, int, int] | None:
    """Of a projection that is a part of another on disk: that one, the first row there, and all of its rows."""
    module, _, last = name.removesuffix(".weight").rpartition(".")
    queries, keys = (n * config.attention_head_dim for n in (config.num_attention_heads, config.kv_heads))
    own = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    for fused, parts in config.family.fused.items():
        if last in parts and name.endswith(".weight"):
            rows = [own.get(part, config.intermediate_size) for part in parts]
            return f"{module}.{fused}.weight", sum(rows[: parts.index(last)]), sum(rows)
    return None


def to_hf_names(state_dict: StateDict, config: ModelConfig, *, tied: bool) -> StateDict:
    """Our names -> names on disk: experts apart, `model.` in front, no second copy of a tied head."""
    out: dict[str, list[Tensor]] = {}
    for name, tensor in state_dict.items():
        if not (tied and name.startswith("lm_head.")):
            for piece in pieces_of(name, tensor.shape, config):
                part = tensor if piece.entry is None else tensor[piece.entry]
                out.setdefault(piece.name, []).append(part[piece.first : piece.first + piece.num_rows])
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in out.items()}


def standard_name(name: str) -> str:
    """A name on disk as transformers writes it: base models leave out `model.`, reward heads have other names."""
    # Of OpenRLHF; of TRL and LLaMA-Factory; of a Sequential, which may have more layers.
    for head in ("value_head.", "v_head.summary.", "score.0."):
        if name.startswith(head):
            return f"score.{name.removeprefix(head)}"
    return name if name.startswith(("model.", "lm_head.", "score.")) else f"model.{name}"


def is_left_out(name: str, config: ModelConfig) -> bool:
    """Whether a tensor on disk is not the decoder's: DeepSeek's multi-token prediction, and stored rotary tables."""
    return is_mtp(name, config) or name.endswith("rotary_emb.inv_freq")


def is_mtp(name: str, config: ModelConfig) -> bool:
    layer = _LAYER_KEY.match(name)
    return config.family.has_mtp_layers and layer is not None and int(layer[1]) >= config.num_hidden_layers


def disk_name(name: str, config: ModelConfig) -> str:
    for part, on_disk in config.family.renamed.items():
        name = name.replace(part, on_disk)
    return name if name.startswith(("lm_head.", "score.")) else f"model.{name}"


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
