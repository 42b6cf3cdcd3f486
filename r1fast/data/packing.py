"""Packing: variable-length sequences laid end to end, so that no position is padding.

sequences    [a b c d]  [e f]  [g h i]            cu_seqlens  [0, 4, 6, 9]
input_ids_T   a b c d    e f    g h i
target_ids_T  b c d 0    f 0    h i 0             the next token inside a sequence; 0 where there is none
loss_mask_T   . . 1 .    1 .    . 1 .             True where the TARGET is to be learned; last positions never
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

RESERVED = ("input_ids", "loss_mask")


@dataclass
class PackedBatch:
    """input_ids_T, target_ids_T int64 [T]; loss_mask_T bool [T]; cu_seqlens int32 [N+1]; extra: tensors of length T."""

    input_ids_T: torch.Tensor
    target_ids_T: torch.Tensor
    loss_mask_T: torch.Tensor
    cu_seqlens: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        """Targets that count in the loss."""
        return int(self.loss_mask_T.sum())

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on a device."""
        return PackedBatch(
            self.input_ids_T.to(device),
            self.target_ids_T.to(device),
            self.loss_mask_T.to(device),
            self.cu_seqlens.to(device),
            {name: tensor.to(device) for name, tensor in self.extra.items()},
        )


def pack(sequences: Sequence[Any], max_tokens: int) -> list[list[int]]:
    """Group sequences into packs of at most max_tokens: best fit, longest first; returns indices, deterministic.

    sequences: anything with a length, or lengths themselves. Each index occurs exactly once; packs and their members
    are in ascending order of index. A sequence longer than max_tokens: ValueError.
    """
    lengths = [_length(sequence) for sequence in sequences]
    packs: list[list[int]] = []
    room_of: list[int] = []
    open_packs: list[tuple[int, int]] = []  # (room, pack), sorted: the first with enough room is the best fit
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > max_tokens:
            raise ValueError(
                f"sequence {index} has {lengths[index]} tokens and a pack holds {max_tokens}; "
                "raise max_tokens, or truncate or drop the sequence"
            )
        slot = bisect_left(open_packs, (lengths[index], -1))
        if slot < len(open_packs):
            _, chosen = open_packs.pop(slot)
        else:
            chosen = len(packs)
            packs.append([])
            room_of.append(max_tokens)
        packs[chosen].append(index)
        room_of[chosen] -= lengths[index]
        insort(open_packs, (room_of[chosen], chosen))
    return sorted(sorted(members) for members in packs)


def balance(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Share sequences among num_parts ranks so that tokens are about equal; returns indices, deterministic.

    Longest first to the lightest part: at most 4/3 of the best possible maximum. Counts may differ, parts may be empty.
    """
    if num_parts < 1:
        raise ValueError(f"balance got num_parts={num_parts}; expected at least 1")
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]  # a heap: lightest first, ties by number
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, part = heapq.heappop(loads)
        parts[part].append(index)
        heapq.heappush(loads, (load + lengths[index], part))
    return [sorted(members) for members in parts]


def collate(sequences: Sequence[Mapping[str, Any]]) -> PackedBatch:
    """Lay sequences end to end.

    Each is a mapping with `input_ids` (list or int tensor of length L) and optionally `loss_mask` (length L, True for
    each token to be learned; default all: what stands first in a sequence is never a target). Every further key is
    either one number per token (length L) or one number for the whole sequence (repeated to L): it goes to `extra`
    at its TARGET token's value, aligned with target_ids_T, with 0 at last positions.
    """
    if not sequences:
        return _empty()
    names = sequences[0].keys()
    for index, sequence in enumerate(sequences):
        if sequence.keys() != names:
            raise ValueError(f"sequence {index} has keys {sorted(sequence)}, expected {sorted(names)} as in the first")
    ids = [torch.as_tensor(sequence["input_ids"], dtype=torch.int64) for sequence in sequences]
    lengths = [tensor.numel() for tensor in ids]
    if 0 in lengths:
        raise ValueError(f"sequence {lengths.index(0)} is empty; drop sequences without tokens before collate")
    masks = [
        _per_token(sequence.get("loss_mask", True), length, "loss_mask", index).bool()
        for index, (sequence, length) in enumerate(zip(sequences, lengths))
    ]
    extra = {}
    for name in names - set(RESERVED):
        rows = [_per_token(sequence[name], lengths[i], name, i) for i, sequence in enumerate(sequences)]
        extra[name] = _next_inside(rows)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return PackedBatch(torch.cat(ids), _next_inside(ids), _next_inside(masks), ends.to(torch.int32), extra)


def _length(sequence: Any) -> int:
    return sequence if isinstance(sequence, int) else len(sequence)


def _per_token(value: Any, length: int, name: str, index: int) -> torch.Tensor:
    tensor = torch.as_tensor(value)
    tensor = tensor.expand(length) if tensor.ndim == 0 else tensor
    if tensor.shape != (length,):
        raise ValueError(
            f"sequence {index}: {name} has shape {tuple(tensor.shape)}, expected ({length},) or one number"
        )
    return tensor


def _next_inside(rows: list[torch.Tensor]) -> torch.Tensor:
    """Shift each row left by one, 0 (False) at its end, and concatenate."""
    return torch.cat([torch.cat([row[1:], row.new_zeros(1)]) for row in rows])


def _empty() -> PackedBatch:
    ids_T = torch.zeros(0, dtype=torch.int64)
    cu_seqlens = torch.zeros(1, dtype=torch.int32)
    return PackedBatch(ids_T, ids_T.clone(), torch.zeros(0, dtype=torch.bool), cu_seqlens)
