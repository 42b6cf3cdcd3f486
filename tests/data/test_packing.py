"""Packing by hand-worked examples, and the properties that training relies on."""

import random

import pytest

from r1fast.data.packing import balance, pack


def test_pack_by_hand() -> None:
    # Longest first: 6 alone, 5 alone, 4 with the 6 (room 4), 3 with the 5 (room 5), 2 into the room of 2.
    assert pack([3, 4, 2, 6, 5], 10) == [[0, 2, 4], [1, 3]]
    assert pack([], 8) == []


def test_pack_best_fit_takes_the_fullest_pack_that_has_room() -> None:
    # Rooms after 7 and 5: 3 and 5. The 3 fills the first exactly; first fit on another order would leave both open.
    assert pack([7, 5, 3, 5], 10) == [[0, 2], [1, 3]]


def test_pack_covers_all_within_the_limit_and_wastes_little() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 300) for _ in range(997)]
    packs = pack(lengths, 1024)
    assert sorted(index for members in packs for index in members) == list(range(997))
    assert max(sum(lengths[i] for i in members) for members in packs) <= 1024
    assert sum(lengths) / (len(packs) * 1024) > 0.98
    assert packs == pack(lengths, 1024)


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens and a pack holds 8"):
        pack([8, 9], 8)


def test_balance_by_hand() -> None:
    # 9 | 8 -> 7 to the 8 (15), 3 to the 9 (12), 2 to the 12 (14).
    assert balance([3, 9, 7, 8, 2], 2) == [[0, 1, 4], [2, 3]]
    assert balance([5], 3) == [[0], [], []]


def test_balance_evens_out_tokens() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(10, 1000) for _ in range(256)]
    parts = balance(lengths, 8)
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert sorted(index for part in parts for index in part) == list(range(256))
    assert max(loads) <= 1.02 * sum(lengths) / 8
