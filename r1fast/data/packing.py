"""How sequences are shared out: packs of at most so many tokens, and ranks with about the same number of tokens."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequences into packs of at most max_tokens: best fit, longest first; returns indices, deterministic.

    Each index occurs exactly once; packs and their members are in ascending order of index. A sequence longer than
    max_tokens: ValueError.
    """
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room, pack), sorted: the first with enough room is the best fit
    for index in _longest_first(lengths):
        if lengths[index] > max_tokens:
            raise ValueError(
                f"sequence {index} has {lengths[index]} tokens and a pack holds {max_tokens}; "
                "raise max_tokens, or truncate or drop the sequence"
            )
        slot = bisect_left(open_packs, (lengths[index], -1))
        if slot == len(open_packs):
            open_packs.append((max_tokens, len(packs)))
            packs.append([])
        room, chosen = open_packs.pop(slot)
        packs[chosen].append(index)
        insort(open_packs, (room - lengths[index], chosen))
    return sorted(sorted(members) for members in packs)


def balance(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Share sequences among num_parts ranks so that tokens are about equal; returns indices, deterministic.

    Longest first to the lightest part: at most 4/3 of the best possible maximum. Counts may differ, parts may be empty.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]  # a heap: lightest first, ties by number
    for index in _longest_first(lengths):
        load, part = loads[0]
        parts[part].append(index)
        heapq.heapreplace(loads, (load + lengths[index], part))
    return [sorted(members) for members in parts]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
