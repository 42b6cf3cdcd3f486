"""Schedules with preemption: of the bookkeeping alone, and of whole calls of `generate`, which sample what they would
with room for all."""

import random
from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from r1fast.models.cache import BlockCache
from r1fast.rollout import graphs as graphs_module
from r1fast.rollout import scheduler
from r1fast.rollout.admission import Admission, Sample, SequenceGroup, num_blocks_of
from r1fast.rollout.blocks import BlockPool
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.fast_decode import fast_decode
from r1fast.rollout.fused_decode import FusedDecode
from r1fast.rollout.sampling import Completion, SamplingParams
from r1fast_kernels.decode_attention import BLOCK
from tests import zoo
from tests.rollout.test_engine import FAMILIES
from tests.rollout.test_engine_rows import VOCAB, HashDecoder, decoder, graphs

__all__ = ["decoder", "graphs"]  # fixtures

# ---- bookkeeping ----


def make_groups(lengths: list[int], n: int) -> list[SequenceGroup]:
    groups = [SequenceGroup([0] * length) for length in lengths]
    for p, group in enumerate(groups):
        group.waiting += (Sample(p * n + i, 0, group) for i in range(n))
    return groups


def check_blocks(found: Admission) -> None:
    """Every block has as many holders as tables that name it; two rows share full blocks of their prompt alone."""
    tables = [x.blocks for x in found.running] + [prompt.blocks for prompt in found.holding]
    holders = Counter(block for table in tables for block in table)
    assert all(found.pool.num_references(block) == holders[block] for block in range(found.pool.num_blocks))
    assert found.pool.num_free == found.pool.num_blocks - len(holders)
    owners: dict[int, Sample] = {}
    for x in found.running:
        for place, block in enumerate(x.blocks):
            other = owners.setdefault(block, x)
            assert other is x or (
                place < x.prompt.num_full and other.prompt is x.prompt and other.blocks[place] == block
            )


class Hopeful(Admission):
    """Expects nothing: samples enter wherever there is a block."""

    expected_tokens = 0  # type: ignore[assignment]


def play(seed: int) -> Counter[int]:
    """A random schedule, in which samples end when they have as many tokens as were drawn for them. How often each was
    preempted."""
    rng = random.Random(seed)
    n, max_tokens, steps = rng.randint(1, 6), rng.randint(1, 200), rng.choice([1, 3, 8, 20])
    groups = make_groups([rng.randint(1, 70) for _ in range(rng.randint(1, 9))], n)
    ends = [rng.choice([rng.randint(1, max_tokens), max_tokens]) for _ in range(n * len(groups))]
    alone = max(num_blocks_of(len(x.ids)) + x.num_own(max_tokens) for x in groups)
    found = rng.choice([Admission, Hopeful])(
        groups, max_tokens, alone + rng.choice([0, 1, 5, 30]), rng.choice([1, 3, 16]), steps
    )
    ended: list[int] = []
    again: Counter[int] = Counter()

    def leave() -> None:
        for x in [x for x in found.running if found.num_sampled(x) >= ends[x.index]]:
            found.leave(x)
            ended.append(x.index)

    while found.queue or found.running:
        before = list(found.running)
        grown = found.grow()
        assert found.running == before[: len(found.running)], "the youngest go"
        assert not before or found.running, "the oldest stays"
        assert all(before[row].blocks[had : had + len(new)] == new for row, had, new in grown)
        check_blocks(found)
        while (entered := found.enter())[1]:
            prompts, entering = entered
            assert all(prompt.blocks for prompt in prompts) and found.running[-len(entering) :] == entering
            for x in entering:
                again[x.index] += x.num_sampled > 0
                assert x.num_sampled < ends[x.index] and (x.num_sampled == 0 or x.line >= 0)
            check_blocks(found)
            found.entered(entering)
            leave()
            check_blocks(found)
        ages = [x.index for x in found.running]
        assert (ages or not found.queue) and ages == sorted(ages) and len(ages) <= found.max_rows
        waiting = [x.index for prompt in found.queue for x in prompt.waiting]
        assert waiting == sorted(waiting) and (not waiting or ages < waiting), "who is older runs"
        for _ in range(steps):
            for x in found.running:  # fed: the token sampled last; one that has ended stays where it is
                fed = min(len(x.prompt.ids) + found.num_sampled(x), len(x.prompt.ids) + max_tokens - 1)
                assert len(x.blocks) >= num_blocks_of(fed)
                assert found.longest >= fed
            found.step()
        leave()
        check_blocks(found)
        assert found.num_steps <= (1 + max_tokens + steps) * len(ends), "it goes on"
    assert sorted(ended) == list(range(len(ends)))
    assert found.pool.num_free == found.pool.num_blocks and not found.holding
    assert sorted(found.free_lines) == list(range(found.max_rows))
    assert sum(again.values()) == found.num_preempted
    return again


def test_blocks_are_held_by_whom_they_belong_to() -> None:
    played = [play(seed) for seed in range(150)]
    assert sum(bool(again.total()) for again in played) > 30
    assert max(max(again.values()) for again in played) > 1


@pytest.mark.slow
def test_blocks_are_held_by_whom_they_belong_to_in_20_000_schedules() -> None:
    for seed in range(200, 20_200):
        play(seed)


def preempt_the_oldest(self: Admission) -> None:
    self.running.append(self.running.pop(0))
    PREEMPT(self)


PREEMPT, OWN = Admission._preempt, Admission._own
MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "the-oldest-goes": (Admission, "_preempt", preempt_the_oldest),
    "a-block-too-few": (Admission, "_own", lambda self, x, num, expected=0: max(0, OWN(self, x, num, expected) - 1)),
    "prompts-are-kept": (Admission, "_release", lambda self, prompt: None),
    "sisters-are-not-counted": (BlockPool, "add_reference", lambda self, blocks: None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_fault_of_the_bookkeeping_is_seen(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTATIONS[mutation], raising=False)
    with pytest.raises((AssertionError, IndexError)):
        [play(seed) for seed in range(40)]


# ---- calls of `generate` ----


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Admission]:
    """Of each call; checked at each of its steps."""
    found: list[Admission] = []

    class Checked(Admission):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self)

        def step(self) -> None:
            check_blocks(self)
            super().step()

    monkeypatch.setattr(scheduler, "Admission", Checked)
    return found


def same(got: list[list[Completion]], want: list[list[Completion]]) -> bool:
    """To the bit."""
    pairs = [pair for groups in zip(got, want, strict=True) for pair in zip(*groups, strict=True)]
    return all(
        (a.token_ids, a.logprobs, a.finish_reason) == (b.token_ids, b.logprobs, b.finish_reason)
        and np.array_equal(a.routed_experts, b.routed_experts)  # type: ignore[arg-type]
        for a, b in pairs
    )


@pytest.mark.parametrize("with_graphs", [False, True], ids=["steps", "graphs"])
def test_completions_are_those_of_a_roomy_cache(
    decoder: HashDecoder,
    graphs: list[str],
    made: list[Admission],
    with_graphs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder.config.max_position_embeddings = 512
    for trial in range(20):
        check_small_cache(decoder, trial, with_graphs, monkeypatch)
    assert sum(found.num_preempted > 2 for found in made) > 6


def check_small_cache(decoder: HashDecoder, trial: int, with_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random prompts, limits, stops and caches, from one that holds a sample alone; stops also noticed late."""
    rng = random.Random(trial)
    monkeypatch.setitem(scheduler.SYNC_STEPS, "cpu", rng.choice([1, 3, 8]))
    if rng.random() < 0.7:  # nothing is expected: rows enter wherever there is a block
        monkeypatch.setattr(Admission, "expected_tokens", 0)
    monkeypatch.setattr(graphs_module, "STEPS_BEFORE", trial % 3)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))] for _ in range(rng.randint(1, 6))]
    params = SamplingParams(
        n=rng.randint(1, 5), max_tokens=(most := rng.randint(1, 90)), min_tokens=rng.choice([0, most // 2]),
        stop_token_ids=rng.choice([[7], [0, 11]]), ignore_eos=rng.random() < 0.7, seed=rng.randrange(2**63),
    )  # fmt: skip
    options: dict[str, Any] = {"max_num_seqs": rng.choice([3, 8, 64])}
    want = RolloutEngine(decoder, None, enforce_eager=True, **options).generate(prompts, params)
    alone = max(num_blocks_of(len(ids)) + num_blocks_of(len(ids) % BLOCK + most - 1) for ids in prompts) + with_graphs
    options |= {"max_num_batched_tokens": rng.choice([8192, 40, 7]), "enforce_eager": not with_graphs}
    options |= {"kv_cache_memory_bytes": 1000 * (alone + rng.choice([0, 1, 4, 12]))}
    assert same(RolloutEngine(decoder, None, **options).generate(prompts, params), want), f"{trial=}"


SHORT, LONG = [[5, 6, 7], [8] * 16], [list(range(4, 24)) * 7]  # within a block and a full one; too long for C++


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("prompts", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_moe", "gemma3_text", "phi3"])
def test_real_models_sample_the_same(
    family: str, prompts: list[list[int]], steps: int, made: list[Admission], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit in C++, experts included, where prompts are prefilled in the same company, here each alone. By modules
    (the last two) products are of other numbers of rows."""
    monkeypatch.setitem(scheduler.SYNC_STEPS, "cpu", steps)
    model = zoo.decoder(family, **FAMILIES[family] | {"max_position_embeddings": 512})
    model.init_weights(torch.Generator().manual_seed(3))
    params = SamplingParams(n=5, max_tokens=90, seed=2, ignore_eos=True)
    options = {
        "enable_return_routed_experts": model.config.has_router,
        "max_num_batched_tokens": len(prompts[-1]),
    }
    block = BlockCache.bytes_per_block(model.config, torch.float32)
    budget = block * (num_blocks_of(len(prompts[-1])) + 12)
    want = RolloutEngine(model, None, **options).generate(prompts, params)
    got = RolloutEngine(model, None, kv_cache_memory_bytes=budget, **options).generate(prompts, params)
    assert [found.num_preempted > 2 for found in made] == [False, True]
    assert same(got, want) or fast_decode(model) is None
    for x, y in zip(chain(*got), chain(*want), strict=True):
        assert x.token_ids == y.token_ids and x.logprobs == pytest.approx(y.logprobs, abs=1e-5)


MISTAKES = {
    "nothing-is-recomputed": ("_recompute", lambda self, samples: None),
    "no-tail-is-copied": ("_copy_tails", lambda self, entering: None),
    "no-block-is-told": ("_grow", lambda self: self.admission.grow()),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_fault_of_the_scheduler_is_seen(
    decoder: HashDecoder, made: list[Admission], mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder.config.max_position_embeddings = 512
    monkeypatch.setattr(scheduler.Scheduler, *MISTAKES[mistake])
    with pytest.raises(AssertionError):
        [check_small_cache(decoder, trial, False, monkeypatch) for trial in range(20)]


@pytest.mark.parametrize("length", [15, 16, 17])
@pytest.mark.parametrize("max_tokens", [1, 2, 16, 17, 33])
def test_a_sample_that_just_fits(decoder: HashDecoder, made: list[Admission], length: int, max_tokens: int) -> None:
    """Prompts and completions that end with a block, one before it and one behind; two prompts, one after the other."""
    prompts, params = [[1] * length, [2] * length], SamplingParams(n=2, max_tokens=max_tokens, ignore_eos=True)
    want = RolloutEngine(decoder, None).generate(prompts, params)
    alone = num_blocks_of(length) + num_blocks_of(length + max_tokens - 1) - length // BLOCK
    budget = 1000 * alone
    assert same(RolloutEngine(decoder, None, kv_cache_memory_bytes=budget).generate(prompts, params), want)
    assert made[1].pool.num_blocks == alone == made[1].pool.num_free
    with pytest.raises(ValueError, match="raise it, or lower max_tokens"):
        RolloutEngine(decoder, None, kv_cache_memory_bytes=budget - 1).generate(prompts, params)


@pytest.mark.parametrize("length", [4, 41])
def test_longrope_turns_what_is_fed_again_as_before(made: list[Admission], length: int) -> None:
    """On either side of the length at which its angles change."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [3.0] * 2}
    rope |= {"original_max_position_embeddings": 40, "partial_rotary_factor": 0.5}
    model = zoo.decoder("phi3", **FAMILIES["phi3"] | {"rope_parameters": rope})
    model.init_weights(torch.Generator().manual_seed(3))
    params = SamplingParams(n=4, max_tokens=36, seed=5, ignore_eos=True)
    budget = BlockCache.bytes_per_block(model.config, torch.float32) * 7
    want, got = (
        RolloutEngine(model, None, kv_cache_memory_bytes=x).generate([[5] * length], params) for x in (None, budget)
    )
    assert made[1].num_preempted > 0
    for x, y in zip(chain(*got), chain(*want), strict=True):
        assert x.token_ids == y.token_ids and x.logprobs == pytest.approx(y.logprobs, abs=1e-5)


@pytest.mark.parametrize("decode", [FusedDecode, lambda model: None], ids=["fused", "modules"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_other_decoders_feed_whole_samples_again(
    family: str, decode: Any, made: list[Admission], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: in parts."""
    monkeypatch.setattr(scheduler, "fast_decode", decode)
    monkeypatch.setattr(scheduler, "rows_of_part", lambda *_: 7)
    monkeypatch.setitem(scheduler.SYNC_STEPS, "cpu", 8)
    model = zoo.decoder(family, **FAMILIES[family])
    model.init_weights(torch.Generator().manual_seed(3))
    params = SamplingParams(n=4, max_tokens=60, seed=2, ignore_eos=True)
    budget = 9 * BlockCache.bytes_per_block(model.config, torch.float32)
    record = model.config.has_router
    want, got = (
        RolloutEngine(model, None, kv_cache_memory_bytes=x, enable_return_routed_experts=record).generate(SHORT, params)
        for x in (None, budget)
    )
    assert made[1].num_preempted > 1
    for x, y in zip(chain(*got), chain(*want), strict=True):
        assert x.token_ids == y.token_ids and x.logprobs == pytest.approx(y.logprobs, abs=1e-5)
        assert np.array_equal(x.routed_experts, y.routed_experts)  # type: ignore[arg-type]
