"""Packing by hand-worked examples, and the properties that training relies on."""

import random

import pytest
import torch

from r1fast.data.packing import balance, collate, pack


def test_collate_by_hand() -> None:
    batch = collate(
        [
            {"input_ids": [5, 6, 7, 8], "loss_mask": [False, False, True, True], "advantages": 2.0},
            {"input_ids": [9], "loss_mask": [True], "advantages": 3.0},  # its only token is nobody's target
            {"input_ids": torch.tensor([1, 2]), "loss_mask": [True, True], "advantages": [0.5, -0.5]},
        ]
    )
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 9, 1, 2]
    assert batch.target_ids_T.tolist() == [6, 7, 8, 0, 0, 2, 0]
    assert batch.loss_mask_T.tolist() == [False, True, True, False, False, True, False]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 7]
    assert batch.extra["advantages"].tolist() == [2.0, 2.0, 2.0, 0.0, 0.0, -0.5, 0.0]
    assert batch.num_items == 3
    dtypes = [t.dtype for t in (batch.input_ids_T, batch.target_ids_T, batch.loss_mask_T, batch.cu_seqlens)]
    assert dtypes == [torch.int64, torch.int64, torch.bool, torch.int32]
    assert torch.equal(batch.to("cpu").extra["advantages"], batch.extra["advantages"])


def test_collate_learns_every_target_without_a_mask() -> None:
    batch = collate([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    assert batch.loss_mask_T.tolist() == [True, True, False, True, False]


def test_collate_of_nothing_is_an_empty_batch() -> None:
    batch = collate([])
    assert batch.num_items == 0 and batch.cu_seqlens.tolist() == [0] and batch.input_ids_T.shape == (0,)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([{"input_ids": [1, 2], "loss_mask": [True]}], r"sequence 0: loss_mask has shape \(1,\), expected \(2,\)"),
        ([{"input_ids": [1]}, {"input_ids": [1], "adv": 1.0}], r"sequence 1 has keys \['adv', 'input_ids'\]"),
        ([{"input_ids": [1]}, {"input_ids": []}], "sequence 1 is empty"),
    ],
    ids=["short_mask", "other_keys", "empty"],
)
def test_collate_names_the_wrong_sequence(sequences: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate(sequences)


def test_pack_by_hand() -> None:
    # Longest first: 6 alone, 5 alone, 4 with the 6 (room 4), 3 with the 5 (room 5), 2 into the room of 2.
    assert pack([3, 4, 2, 6, 5], 10) == [[0, 2, 4], [1, 3]]
    assert pack([[0] * 4, [0] * 4, [0] * 4], 8) == [[0, 1], [2]]  # sequences in place of lengths
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
    with pytest.raises(ValueError, match="num_parts=0"):
        balance([1], 0)


def test_balance_evens_out_tokens() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(10, 1000) for _ in range(256)]
    parts = balance(lengths, 8)
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert sorted(index for part in parts for index in part) == list(range(256))
    assert max(loads) <= 1.02 * sum(lengths) / 8
