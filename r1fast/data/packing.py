"""How sequences are shared out: packs of at most so many tokens, and ranks with about the same number of tokens."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any


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


def _length(sequence: Any) -> int:
    return sequence if isinstance(sequence, int) else len(sequence)
