import math
from pathlib import Path

import pytest
import torch

from r1fast_kernels import sample_tokens, selective_logprobs
from r1fast_kernels.sample_tokens import _uniform
from tests.kernels.backends import (
    BF16,
    FP16,
    FP32,
    FP64,
    SLOW_INTERPRETED,
    Backend,
    assert_as_exact,
    assert_same_bits,
    far_apart,
    needs_cpp,
    of_older_processor,
)

INF, NAN = float("inf"), float("nan")
# In the interpreter a row takes 20 ms, and about 200 where it is truncated.
# Of rows of equal logits no such share is a whole number of tokens: the last bit would decide over one of them.
OPTIONS = [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.63}]
# Interpreted, the last stands for both cuts.
EACH_OPTION = [pytest.param(options, marks=SLOW_INTERPRETED if len(options) == 1 else []) for options in OPTIONS]


# Upper 1e-6 point of chi-square with `degrees` degrees of freedom (Wilson-Hilferty, z = 4.75).
def chi_square_limit(degrees: int) -> float:
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


def logits_of(num_rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def draw_counts(logits_V: torch.Tensor, draws: int, device: str = "cpu", **options: float | str) -> torch.Tensor:
    rows = logits_V.to(device).expand(draws, -1)
    seeds = torch.arange(max(draws, 2000), device=device) * 977 + 5
    if draws < len(seeds):  # too few to hit every token by chance: noise from the middles of so many equal parts
        middles = (2 * torch.arange(draws, device=device) + 1) * len(seeds) // (2 * draws)
        seeds = seeds[_uniform(seeds).argsort()[middles]]
    ids, _ = sample_tokens(rows, seeds_B=seeds, **options)
    return torch.bincount(ids.cpu(), minlength=len(logits_V)).double()


def implementations(backend: Backend) -> list[dict[str, str]]:
    """The reference too: both must pass the checks against numbers known from elsewhere."""
    return [{"impl": impl, "device": backend.device} for impl in ("reference", backend.impl)]


def kept_by_hand(logits_V: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """fp64 weights by a loop over the sorted tokens: the definition, once more and without tensors."""
    weights_V = ((logits_V.double() - logits_V.max()) / temperature).exp()
    order = sorted(range(len(logits_V)), key=lambda v: (-logits_V[v].item(), v))[: top_k or None]
    mass, before = weights_V[order].sum().item(), 0.0
    kept_V = torch.zeros_like(weights_V)
    for v in order:
        if before >= top_p * mass and before > 0:
            break
        kept_V[v] = weights_V[v]
        before += weights_V[v].item()
    return kept_V


def hostile_cases() -> dict[str, torch.Tensor]:
    """What broke other kernels (all below -88, masked vocabularies), and the edges of this one's blocks."""
    one_masked, all_but_one, two_blocks = logits_of(3, 1000), torch.full((3, 1000), -INF), logits_of(3, 5000)
    one_masked[torch.arange(3), one_masked.argmax(1)] = -INF
    all_but_one[torch.arange(3), torch.tensor([0, 999, 500])] = 3.0
    two_blocks[:, :4500] = -INF  # whole blocks, then part of one
    wide = logits_of(3, 301)
    return {
        "below-1e4": logits_of(3, 1000) - 2e4,
        "one-masked": one_masked,
        "all-but-one-masked": all_but_one,
        "first-blocks-masked": two_blocks,
        "last-blocks-masked": two_blocks.flip(1),
        "one-token-holds-all": 50 * torch.nn.functional.one_hot(torch.tensor([0, 17, 999]), 1000).float(),
        "both-zeros": torch.tensor([[0.0, -0.0] * 19 + [0.0]] * 3),  # equal, whatever their bits say
        "subnormal": torch.linspace(-1, 1, 300).expand(3, -1) * 1e-40,  # 71,000 keys from end to end, one weight
        "strided-rows": wide[:, :300],
        "expanded-row": wide[:1, :300].expand(3, 300),
        "strided-columns": logits_of(300, 3).T,
        "one-row": logits_of(1, 1000),
        "V1": torch.randn(3, 1),
        "V7-below-a-vector": logits_of(3, 7),
        "V2049-past-a-cpp-block": logits_of(2, 2049),
        "V4096-a-triton-block": logits_of(2, 4096),
        "V4097-past-a-triton-block": logits_of(2, 4097),
        "V10007-prime": logits_of(2, 10007),
        "B0": torch.zeros(0, 17),
    }


NAMES = tuple(hostile_cases())


def check_draws(backend: Backend, logits: torch.Tensor, temperature: float, **options: float) -> None:
    """Ids against the fp64 cdf of `kept_by_hand`, log-probs by the 2x rule."""
    seeds = torch.arange(len(logits)) * 7919 + 3
    arguments = {"temperature": temperature, "seeds_B": seeds, **options}
    got, got_logprobs = sample_tokens(*backend.to([logits]), **backend.to(arguments), impl=backend.impl)
    want, _ = sample_tokens(logits, **arguments, impl="reference")
    assert got.dtype == torch.int64 and got_logprobs.dtype == torch.float32
    for row, u, id, reference_id in zip(logits, _uniform(seeds).tolist(), got.tolist(), want.tolist()):
        assert row[id] > -INF
        cdf = kept_by_hand(row, temperature, **options).cumsum(0)
        low, high = (cdf[id - 1] if id else 0.0) / cdf[-1], cdf[id] / cdf[-1]
        assert low - 1e-5 <= u <= high + 1e-5, f"{id=} has the cdf from {low} to {high}, {u=}"
        # Another token than the reference's is right only where u is on a step of the cdf, to rounding.
        assert id == reference_id or min(abs(low - u), abs(high - u)) <= 1e-5
    ids = got.cpu()[:, None]
    exact = (logits.double() / temperature).log_softmax(-1).gather(1, ids)
    plain = (logits.to(FP64 if logits.dtype == FP64 else FP32) / temperature).log_softmax(-1).gather(1, ids)
    assert_as_exact(got_logprobs, plain[:, 0].float(), exact[:, 0], 2, "logprobs")


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("options", EACH_OPTION, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=lambda dtype: str(dtype)[6:])
def test_draws_are_those_of_the_reference(
    backend: Backend, dtype: torch.dtype, options: dict[str, float], temperature: float
) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    num_rows = (20 if not options else 2) if backend.interpreted else 100
    check_draws(backend, logits_of(num_rows, 501).to(dtype), temperature, **options)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_rows(backend: Backend, name: str) -> None:
    logits = hostile_cases()[name]
    for options in (OPTIONS[0], OPTIONS[-1]) if backend.interpreted else OPTIONS:  # the last has both cuts
        check_draws(backend, logits[:1] if backend.interpreted and options else logits, 0.7, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_draws_follow_the_distribution(backend: Backend, temperature: float) -> None:
    logits = logits_of(1, 50)[0]
    for options in implementations(backend)[: 1 if backend.interpreted else 2]:  # too many rows to interpret
        counts = draw_counts(logits, 100_000, temperature=temperature, **options)
        expected = (logits.double() / temperature).softmax(0) * 100_000
        assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(49)


def test_truncated_draws_follow_the_renormalised_distribution(backend: Backend) -> None:
    logits = logits_of(1, 20)[0]
    kept = logits.topk(6).indices
    expected = torch.zeros(20, dtype=FP64)
    expected[kept] = logits[kept].double().softmax(0) * 50_000
    for options in implementations(backend)[: 1 if backend.interpreted else 2]:
        counts = draw_counts(logits, 50_000, top_k=6, **options)
        assert not counts[expected == 0].any()
        assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < chi_square_limit(5)


BY_HAND = [
    ({"top_k": 3, "top_p": 0.6}, {0, 1}),  # after top_k: 1/2 1/4 1/8 become 4/7 2/7 1/7
    ({}, {0, 1, 2, 3}),
]
MORE_BY_HAND = [
    ({"top_p": 0.51}, {0, 1}),
    ({"top_p": 0.49}, {0}),
    ({"top_k": 1}, {0}),
    ({"top_k": 3}, {0, 1, 2}),  # 2 and 3 are equal
    ({"top_p": 1e-6}, {0}),
    ({"top_k": 2}, {0, 1}),
    ({"top_k": 3, "top_p": 0.99}, {0, 1, 2}),
    ({"top_p": 0.8}, {0, 1, 2}),
    ({"top_k": 4}, {0, 1, 2, 3}),
    ({"top_k": 5}, {0, 1, 2, 3}),
    ({"top_k": 99}, {0, 1, 2, 3}),
]


@pytest.mark.parametrize(
    ("options", "allowed"), [*BY_HAND, *(pytest.param(*x, marks=SLOW_INTERPRETED) for x in MORE_BY_HAND)], ids=str
)
def test_truncation_by_hand(backend: Backend, options: dict[str, float], allowed: set[int]) -> None:
    logits = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8, 0.0]).log()
    for chosen in implementations(backend):
        draws = 8 if backend.interpreted else 2000  # the least likely has 1/8
        assert set(draw_counts(logits, draws, **options, **chosen).nonzero().flatten().tolist()) == allowed


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 3 / 8}, {"top_k": 6, "top_p": 0.5}], ids=str)
def test_ties_at_the_cut_go_to_the_lowest_token(backend: Backend, options: dict[str, float]) -> None:
    """Equal weights are exact, so that this is also the edge: the third reaches top_p, and the fourth stays out."""
    for chosen in implementations(backend):
        counts = draw_counts(torch.zeros(8), 4 if backend.interpreted else 2000, **options, **chosen)
        assert counts.nonzero().flatten().tolist() == [0, 1, 2]


def test_ties_are_counted_across_blocks(backend: Backend) -> None:
    """5000 equal logits, then a larger one: 4500 of the 5000 stay, from two blocks."""
    logits = torch.zeros(1, 5001)
    logits[0, 5000] = 1.0
    rows, seeds = backend.to((logits.expand(3, -1), torch.tensor([1, 2, 3])))
    ids, _ = sample_tokens(rows, top_k=4501, seeds_B=seeds, impl=backend.impl)
    want, _ = sample_tokens(rows, top_k=4501, seeds_B=seeds, impl="reference")
    assert torch.equal(ids, want)
    if not backend.interpreted:
        seen = draw_counts(logits[0], 100_000, backend.device, top_k=4501, impl=backend.impl).nonzero().flatten()
        assert seen[-2:].tolist() == [4499, 5000] and len(seen) == 4501


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}], ids=str)
def test_a_large_vocabulary_of_near_ties(backend: Backend, options: dict[str, float]) -> None:
    """150k tokens of nearly one probability: an fp32 running sum would move draws by tens of tokens."""
    vocab, num_rows = 151_936, 2 if backend.interpreted else 8
    if backend.interpreted and options:
        pytest.skip("38 blocks x 12 passes are too many to interpret")
    logits = logits_of(num_rows, vocab) * 1e-3
    seeds = torch.arange(num_rows) * 31
    ids, _ = sample_tokens(*backend.to([logits]), seeds_B=backend.to(seeds), impl=backend.impl, **options)
    want, _ = sample_tokens(logits.double(), seeds_B=seeds, impl="reference", **options)
    assert (ids.cpu() - want).abs().max() <= 1


@pytest.mark.parametrize("options", EACH_OPTION, ids=str)
def test_a_row_ignores_its_neighbours(backend: Backend, options: dict[str, float]) -> None:
    """Alone, in another order, or in a batch of another size: the same token and the same log-prob, to the bit."""
    num_rows = 3 if backend.interpreted else 64
    logits, seeds = backend.to((logits_of(num_rows, 501), torch.arange(num_rows) * 31))
    shuffle = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1)).to(backend.device)
    for impl in ("reference", backend.impl):
        ids, logprobs = sample_tokens(logits, seeds_B=seeds, impl=impl, **options)
        shuffled = sample_tokens(logits[shuffle], seeds_B=seeds[shuffle], impl=impl, **options)
        assert torch.equal(shuffled[0], ids[shuffle]) and torch.equal(shuffled[1], logprobs[shuffle])
        for row in (0, num_rows // 3, num_rows - 1):
            alone = slice(row, row + 1)
            one_id, one_logprob = sample_tokens(logits[alone], seeds_B=seeds[alone], impl=impl, **options)
            assert one_id == ids[row] and one_logprob == logprobs[row]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.3}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_logprob_is_of_the_untruncated_tempered_distribution(
    backend: Backend, temperature: float, options: dict[str, float]
) -> None:
    num_rows = 4 if backend.interpreted else 40
    logits, seeds = backend.to((logits_of(num_rows, 333), torch.arange(num_rows)))
    for impl in ("reference", backend.impl):
        ids, logprobs = sample_tokens(logits, temperature=temperature, seeds_B=seeds, impl=impl, **options)
        want = selective_logprobs(logits, ids, temperature=temperature, impl="reference")
        torch.testing.assert_close(logprobs, want, rtol=1e-6, atol=2e-6)


def test_greedy(backend: Backend) -> None:
    logits = logits_of(40, 5333)
    logits[3, 100] = logits[3, 200] = logits[3, 5300] = 50.0
    logits[4, 5299] = logits[4, 5300] = 50.0
    logits[5] = -1e30
    logits = logits.to(backend.device)
    for impl in ("reference", backend.impl):
        ids, logprobs = sample_tokens(logits, temperature=0.0, top_k=3, top_p=0.5, impl=impl)
        assert ids[3:6].tolist() == [100, 5299, 0]
        assert torch.equal(ids, sample_tokens(logits, temperature=0.0, impl="reference")[0])
        want = selective_logprobs(logits, ids, impl="reference")
        torch.testing.assert_close(logprobs, want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_nearly_greedy(backend: Backend, temperature: float) -> None:
    logits = logits_of(4, 50).to(backend.device)
    ids, logprobs = sample_tokens(logits, temperature=temperature, impl=backend.impl)
    assert torch.equal(ids, logits.argmax(1)) and not logprobs.any()


def test_masked_tokens_and_bf16(backend: Backend) -> None:
    num_rows = 30 if backend.interpreted else 300
    logits = torch.full((num_rows, 90), -INF, dtype=BF16, device=backend.device)
    logits[:, 0], logits[:, 41], logits[:, 89] = -2e4, -2e4, -2e4
    for impl in ("reference", backend.impl):
        ids, logprobs = sample_tokens(logits, seeds_B=torch.arange(num_rows, device=backend.device), impl=impl)
        assert set(ids.tolist()) == {0, 41, 89}
        torch.testing.assert_close(logprobs.cpu(), torch.full((num_rows,), -math.log(3)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("options", [*EACH_OPTION, {"temperature": 0.0}], ids=str)
def test_rows_without_a_distribution(backend: Backend, options: dict[str, float]) -> None:
    """NaN, +inf, or nothing above -inf: a NaN log-prob, some id of the vocabulary, and unharmed neighbours."""
    logits = logits_of(7, 5000)
    logits[1, 4321] = NAN
    logits[2, 0] = NAN
    logits[3] = NAN
    logits[4] = -INF
    logits[5, 77] = INF
    if backend.interpreted:
        logits = logits[:, -700:].clone()
        logits[5, 77] = INF
    logits, seeds = backend.to((logits, torch.arange(7)))
    for impl in ("reference", backend.impl):
        ids, logprobs = sample_tokens(logits, seeds_B=seeds, impl=impl, **options)
        assert ((ids >= 0) & (ids < logits.shape[1])).all()
        bad = logits.isnan().any(1) | (logits.amax(1).abs() == INF)
        assert torch.equal(logprobs.isnan(), bad) and bad.sum() >= 4
        alone = sample_tokens(logits[6:], seeds_B=seeds[6:], impl=impl, **options)
        assert ids[6] == alone[0] and logprobs[6] == alone[1]


def test_consecutive_seeds_are_unrelated(backend: Backend) -> None:
    """Pairs of draws with seeds s and s + 1 fill a 10 x 10 table evenly."""
    for chosen in implementations(backend)[: 1 if backend.interpreted else 2]:
        seeds = torch.arange(100_000, device=backend.device) - 50_000
        rows = torch.zeros(1, 10, device=backend.device).expand(100_000, 10)
        ids = sample_tokens(rows, seeds_B=seeds, impl=chosen["impl"])[0].cpu()
        pairs = torch.bincount(ids[::2] * 10 + ids[1::2], minlength=100).double()
        assert ((pairs - 500) ** 2 / 500).sum() < chi_square_limit(99)


def test_without_seeds_torchs_generator_decides(backend: Backend) -> None:
    logits = logits_of(30, 50).to(backend.device)
    torch.manual_seed(3)
    first = sample_tokens(logits, impl=backend.impl)[0]
    second = sample_tokens(logits, impl=backend.impl)[0]
    torch.manual_seed(3)
    assert torch.equal(sample_tokens(logits, impl=backend.impl)[0], first) and not torch.equal(first, second)


@pytest.mark.parametrize("options", [*EACH_OPTION, {"temperature": 0.0}], ids=str)
def test_same_bits_every_time(backend: Backend, options: dict[str, float]) -> None:
    num_rows = 2 if backend.interpreted else 97
    logits, seeds = backend.to((logits_of(num_rows, 3001), torch.arange(num_rows)))
    assert_same_bits(lambda: sample_tokens(logits, seeds_B=seeds, impl=backend.impl, **options))


def test_rows_beyond_32_bits(backend: Backend) -> None:
    """Rows 2^30 elements apart: the third begins past 2^31. Only the pages that are touched exist."""
    if backend.name == "cuda":
        pytest.skip("memory on a GPU is not handed out page by page")
    logits = far_apart(logits_of(4, 40), (1 << 30, 1))
    got = sample_tokens(logits, seeds_B=torch.arange(4), top_k=9, impl=backend.impl)
    want = sample_tokens(logits.contiguous(), seeds_B=torch.arange(4), top_k=9, impl="reference")
    torch.testing.assert_close(got, want)


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_builds_for_older_processors_agree(capability: str, tmp_path: Path) -> None:
    expression = (
        "[sample_tokens(logits_of(9, 3001).to(dtype), seeds_B=torch.arange(9), impl='cpp', **options)"
        " for dtype in (FP32, BF16, FP64) for options in (*OPTIONS, {'temperature': 0.0})]"
    )
    for got, best in zip(*of_older_processor(capability, "test_sample_tokens", expression, tmp_path), strict=True):
        assert torch.equal(got[0], best[0])
        torch.testing.assert_close(got[1], best[1], rtol=2e-6, atol=2e-6)


@needs_cpp
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_opcheck(temperature: float) -> None:
    seeds = torch.arange(5) if temperature else None
    arguments = logits_of(5, 33), seeds, temperature, 9, 0.8
    torch.library.opcheck(torch.ops.r1fast.sample_tokens.default, arguments)


@needs_cpp
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiles_without_a_graph_break(options: dict[str, float]) -> None:
    logits, seeds = logits_of(5, 33), torch.arange(5)
    compiled = torch.compile(sample_tokens, backend="aot_eager", fullgraph=True)
    for got, want in zip(
        compiled(logits, seeds_B=seeds, **options), sample_tokens(logits, seeds_B=seeds, **options), strict=True
    ):
        assert torch.equal(got, want)


def test_errors_say_what_to_do(backend: Backend) -> None:
    row = torch.zeros(1, 5, device=backend.device)
    for options in ({"temperature": -1.0}, {"temperature": NAN}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(ValueError, match="expected temperature >= 0"):
            sample_tokens(row, **options)
    with pytest.raises(ValueError, match=r"expected \[B, V\] and \[B\]"):
        sample_tokens(row, seeds_B=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected \[B, V\]"):
        sample_tokens(row[:, :0])
    with pytest.raises(ValueError, match=r"torch.int32, expected \[B, V\] and \[B\] int64"):
        sample_tokens(row, seeds_B=torch.zeros(1, dtype=torch.int32, device=backend.device))
    absent = "triton" if backend.impl == "cpp" else "cpp"
    with pytest.raises(ValueError, match=f"impl='{absent}' cannot run here"):
        sample_tokens(row, impl=absent)
    wrong = FP16 if backend.impl == "cpp" else FP64
    with pytest.raises(ValueError, match=f"kernels take float32.* got {str(wrong)[6:]}"):
        sample_tokens(row.to(wrong), impl=backend.impl)
