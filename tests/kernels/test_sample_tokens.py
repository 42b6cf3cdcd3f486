import math

import pytest
import torch

from r1fast_kernels import sample_tokens, selective_logprobs


# Upper 1e-6 point of chi-square with `degrees` degrees of freedom (Wilson-Hilferty, z = 4.75).
def chi_square_limit(degrees: int) -> float:
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


def logits_of(num_rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def draw_counts(logits_V: torch.Tensor, draws: int, **options: float) -> torch.Tensor:
    ids, _ = sample_tokens(logits_V.expand(draws, -1), seeds_B=torch.arange(draws) * 977 + 5, **options)
    return torch.bincount(ids, minlength=len(logits_V)).double()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = logits_of(1, 50)[0]
    counts = draw_counts(logits, 100_000, temperature=temperature)
    expected = (logits.double() / temperature).softmax(0) * 100_000
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(49)


def test_truncated_draws_follow_the_renormalised_distribution() -> None:
    logits = logits_of(1, 20)[0]
    kept = logits.topk(6).indices
    expected = torch.zeros(20, dtype=torch.float64)
    expected[kept] = logits[kept].double().softmax(0) * 50_000
    counts = draw_counts(logits, 50_000, top_k=6)
    assert not counts[expected == 0].any()
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < chi_square_limit(5)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_p": 0.5}, {0}),  # mass of the first is exactly top_p
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 1e-6}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 3, "top_p": 0.6}, {0, 1}),  # after top_k: 1/2 1/4 1/8 become 4/7 2/7 1/7
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({}, {0, 1, 2, 3}),
    ],
    ids=str,
)
def test_truncation_by_hand(options: dict[str, float], allowed: set[int]) -> None:
    logits = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8, 0.0]).log()
    assert set(draw_counts(logits, 2000, **options).nonzero().flatten().tolist()) == allowed


def test_ties_at_the_cut_go_to_the_lowest_token() -> None:
    assert draw_counts(torch.zeros(8), 500, top_k=3).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8}], ids=str)
def test_a_row_ignores_its_neighbours(options: dict[str, float]) -> None:
    """Alone, in another order, or in a batch of another size: the same token and the same log-prob, to the bit."""
    logits, seeds = logits_of(64, 501), torch.arange(64) * 31
    ids, logprobs = sample_tokens(logits, seeds_B=seeds, **options)
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled_ids, shuffled_logprobs = sample_tokens(logits[shuffle], seeds_B=seeds[shuffle], **options)
    assert torch.equal(shuffled_ids, ids[shuffle]) and torch.equal(shuffled_logprobs, logprobs[shuffle])
    for row in (0, 17, 63):
        one_id, one_logprob = sample_tokens(logits[row : row + 1], seeds_B=seeds[row : row + 1], **options)
        assert one_id == ids[row] and one_logprob == logprobs[row]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.3}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_logprob_is_of_the_untruncated_tempered_distribution(temperature: float, options: dict[str, float]) -> None:
    logits = logits_of(40, 333)
    ids, logprobs = sample_tokens(logits, temperature=temperature, seeds_B=torch.arange(40), **options)
    want = selective_logprobs(logits, ids, temperature=temperature)
    torch.testing.assert_close(logprobs, want, rtol=1e-6, atol=2e-6)


def test_greedy() -> None:
    logits = logits_of(40, 333)
    logits[3, 100] = logits[3, 200] = 50.0
    ids, logprobs = sample_tokens(logits, temperature=0.0)
    assert torch.equal(ids, logits.argmax(1)) and ids[3] == 100
    torch.testing.assert_close(logprobs, selective_logprobs(logits, ids), rtol=1e-6, atol=2e-6)


def test_masked_tokens_and_bf16() -> None:
    logits = torch.full((300, 90), -float("inf"))
    logits[:, 0], logits[:, 41], logits[:, 89] = -2e4, -2e4, -2e4
    ids, logprobs = sample_tokens(logits.bfloat16(), seeds_B=torch.arange(300))
    assert set(ids.tolist()) == {0, 41, 89}
    torch.testing.assert_close(logprobs, torch.full((300,), -math.log(3)))


def test_consecutive_seeds_are_unrelated() -> None:
    """Pairs of draws with seeds s and s + 1 fill a 10 x 10 table evenly."""
    ids, _ = sample_tokens(torch.zeros(100_000, 10), seeds_B=torch.arange(100_000) - 50_000)
    pairs = torch.bincount(ids[::2] * 10 + ids[1::2], minlength=100).double()
    assert ((pairs - 500) ** 2 / 500).sum() < chi_square_limit(99)


def test_without_seeds_torchs_generator_decides() -> None:
    logits = logits_of(30, 50)
    torch.manual_seed(3)
    first = sample_tokens(logits)[0]
    second = sample_tokens(logits)[0]
    torch.manual_seed(3)
    assert torch.equal(sample_tokens(logits)[0], first) and not torch.equal(first, second)


def test_no_row_and_errors() -> None:
    assert sample_tokens(torch.zeros(0, 5))[0].shape == (0,)
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(ValueError, match="expected temperature >= 0"):
            sample_tokens(torch.zeros(1, 5), **options)
    with pytest.raises(ValueError, match=r"expected \[B, V\] and \[B\]"):
        sample_tokens(torch.zeros(2, 5), seeds_B=torch.zeros(3, dtype=torch.long))
