"""SamplingParams' validation, and the integer mixing behind per-sample seeds."""

import pytest
import torch

from r1fast.rollout.sampling import SamplingParams, fold_in, sample_keys

MASK = (1 << 64) - 1


def splitmix64_python(x: int) -> int:
    """The published algorithm in unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_known_value() -> None:
    # First output of splitmix64 seeded with 0, as in the reference C code's test vectors.
    assert splitmix64_python(0) == 0xE220A8397B1DCDAF


def test_fold_in_is_splitmix64_in_uint64() -> None:
    generator = torch.Generator().manual_seed(0)
    keys_N = torch.randint(-(2**63), 2**63 - 1, (50,), generator=generator)
    values_N = torch.randint(-(2**40), 2**40, (50,), generator=generator)
    expected = [splitmix64_python((k ^ v) & MASK) for k, v in zip(keys_N.tolist(), values_N.tolist())]
    assert [x & MASK for x in fold_in(keys_N, values_N).tolist()] == expected


def test_keys_do_not_collide() -> None:
    """Every (seed, sequence, sample, position) of a small run has a seed of its own, neighbours included."""
    sequence_ids, samples, positions = torch.meshgrid(
        torch.arange(20), torch.arange(20), torch.arange(20), indexing="ij"
    )
    seeds = [
        fold_in(sample_keys(seed, sequence_ids.flatten(), samples.flatten()), positions.flatten())
        for seed in (0, 1, -1, 2**64 - 2, 10**30)
    ]
    assert len(torch.cat(seeds).unique()) == 5 * 20**3


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_token_ids": [3, -2]}, "stop_token_ids"),
        *(({name: "2"}, name) for name in ("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed")),
        *(({name: None}, name) for name in ("n", "max_tokens", "temperature", "seed")),
        ({"n": 1.5}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
    ],
)
def test_bad_params_name_the_field(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=rf"SamplingParams\.{name} is .*expected"):
        SamplingParams(**options)
