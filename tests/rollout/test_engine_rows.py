"""Row bookkeeping of the engine, on a decoder whose next token is a known function of the whole history.

A row that took another row's cache, position, seed or output line would leave the path that `expected_completion`
computes one sample at a time.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from r1fast.rollout import engine as engine_module
from r1fast.rollout import graphs as graphs_module
from r1fast.rollout import input_batch, scheduler
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams, fold_in, sample_keys
from r1fast_kernels import sample_tokens, use
from r1fast_kernels.decode_attention import BLOCK

VOCAB = 23
EOS = 5
MODULUS = 100_003


def hash_step(state: int | Tensor, token: int | Tensor) -> int | Tensor:
    return (state * 31 + token + 1) % MODULUS


def logits_of(state_B: Tensor) -> Tensor:
    """[B, V] fp32, different for each history; the small slope keeps rows from being alike."""
    return 3 * torch.sin(state_B[:, None].double() * torch.arange(1, VOCAB + 1)).float()


class HashCache:
    """Stands for BlockCache: the "keys" of a slot are the hash of the sequence up to its token."""

    made: ClassVar[list["HashCache"]] = []

    def __init__(self, config: object, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.state_S = torch.full((num_blocks * BLOCK,), -1)
        HashCache.made.append(self)

    @staticmethod
    def bytes_per_block(config: object, dtype: torch.dtype) -> int:
        return 1000

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        blocks = self.state_S.view(-1, BLOCK)
        blocks[targets] = blocks[sources].clone()


class HashDecoder(nn.Module):
    """Stands for Decoder; counts the work that it is given."""

    scalar_head = False

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=64, eos_token_id=EOS, ropes={})
        self.embed_tokens = nn.Embedding(VOCAB, 1)
        self.prefill_lengths: list[int] = []
        self.decode_rows: list[int] = []
        self.table_widths: list[tuple[int, int]] = []  # blocks of the longest row of a step, and those that it is given

    def forward(
        self, input_ids_T: Tensor, cu_seqlens: Tensor, *, head: Callable, cache: tuple[HashCache, Tensor]
    ) -> Tensor:
        assert not self.training and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        states_T = []
        for ids in torch.tensor_split(input_ids_T, cu_seqlens[1:-1].long()):
            state = 0
            for token in ids.tolist():
                state = hash_step(state, token)
                states_T.append(state)
            self.prefill_lengths.append(len(ids))
        cache[0].state_S[cache[1]] = torch.tensor(states_T)
        return self._logits(torch.tensor(states_T), head)

    def decode(
        self,
        input_ids_B: Tensor,
        positions_B: Tensor,
        cache: HashCache,
        block_table_BN: Tensor,
        *,
        head: Callable | None = None,
    ) -> Tensor:
        def slots_of(places_B: Tensor) -> Tensor:
            return block_table_BN.long().gather(1, places_B[:, None] // BLOCK)[:, 0] * BLOCK + places_B % BLOCK

        if head is None:
            self.decode_rows.append(len(input_ids_B))
            self.table_widths.append((int(positions_B.max()) // BLOCK + 1, block_table_BN.shape[1]))
        else:
            self.prefill_lengths.append(len(input_ids_B))
        # A padding row is on the first place, where it has nothing to read.
        read_B, written_B = slots_of((positions_B - 1).clamp(min=0)), slots_of(positions_B)
        assert head is not None or not torch.isin(read_B[positions_B > 0], written_B).any()
        states = []
        for before, at, token in zip(read_B, written_B, input_ids_B, strict=True):  # one by one: they may be neighbours
            cache.state_S[at] = hash_step(cache.state_S[before], token)
            states.append(cache.state_S[at].clone())
        return self._logits(torch.stack(states), head or (lambda hidden, weight: hidden))

    @staticmethod
    def _logits(states_T: Tensor, head: Callable) -> Tensor:
        # The head sees each position's state as its hidden row; the weight is the identity of the product.
        return logits_of(head(states_T[:, None].double(), torch.ones(1, 1, dtype=torch.float64))[:, 0].long())


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> HashDecoder:
    monkeypatch.setattr(scheduler, "BlockCache", HashCache)
    monkeypatch.setattr(engine_module, "BlockCache", HashCache)
    monkeypatch.setattr(engine_module, "work_bytes", lambda *args: {"activations": 500})
    monkeypatch.setattr(scheduler, "fast_decode", lambda model: None)
    HashCache.made.clear()
    return HashDecoder()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs on a CPU: what is captured is the code of a step, run again for all rows of its bucket."""
    events: list[str] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        events.append("capture")
        step()
        return lambda: events.append("replay") or step()

    monkeypatch.setitem(graphs_module.CAPTURES, "cpu", lambda: capture)
    return events


def expected_completion(
    prompt: list[int], params: SamplingParams, sequence_id: int, sample: int
) -> tuple[list[int], list[float], str]:
    """One sample drawn alone, token by token, from the definition."""
    state, ids, logprobs = 0, [], []
    for token in prompt:
        state = hash_step(state, token)
    key = sample_keys(params.seed, torch.tensor([sequence_id]), torch.tensor([sample]))
    stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (EOS,))}
    while len(ids) < params.max_tokens:
        logits_1V = logits_of(torch.tensor([state]))
        allowed_1V = logits_1V.clone()
        if len(ids) < params.min_tokens:
            allowed_1V[:, sorted(stops)] = -torch.inf
        seed = fold_in(key, torch.tensor([len(prompt) + len(ids)]))
        drawn, _ = sample_tokens(
            allowed_1V, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, seeds_B=seed
        )
        token = int(drawn)
        ids.append(token)
        logprobs.append(float((logits_1V / (params.temperature or 1.0)).log_softmax(-1)[0, token]))
        state = hash_step(state, token)
        if token in stops:
            return ids, logprobs, "stop"
    return ids, logprobs, "length"


@pytest.mark.parametrize("trial", range(60))
def test_rows_are_never_mixed(decoder: HashDecoder, trial: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_schedule(decoder, trial, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rows_are_never_mixed_in_10_000_schedules(decoder: HashDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for trial in range(60, 10_060):
        decoder.decode_rows.clear()
        HashCache.made.clear()
        check_schedule(decoder, trial, monkeypatch)


@pytest.mark.parametrize("trial", range(60))
def test_padding_mixes_no_rows(
    decoder: HashDecoder, graphs: list[str], trial: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "STEPS_BEFORE", trial % 3)
    monkeypatch.setattr(graphs_module, "MOST_PADDING", 1 + trial % 4)
    check_schedule(decoder, trial, monkeypatch)


def check_schedule(decoder: HashDecoder, trial: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random prompts, duplicates, stops, limits, rows, blocks and prefills; stops also noticed late, as on a GPU."""
    rng = random.Random(trial)
    monkeypatch.setitem(scheduler.SYNC_STEPS, "cpu", rng.choice([1, 1, 5]))
    monkeypatch.setattr(input_batch, "LEAST_WIDTH", rng.choice([1, 2, 16]))
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 33))] for _ in range(rng.randint(1, 12))]
    prompts += rng.choices(prompts, k=rng.randint(0, 3))
    max_tokens = rng.randint(1, 30)
    params = SamplingParams(
        n=rng.randint(1, 9),
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens)]),
        temperature=rng.choice([0.0, 0.7, 1.0, 1.3]),
        top_k=rng.choice([0, 0, 4]),
        top_p=rng.choice([1.0, 1.0, 0.8]),
        stop_token_ids=rng.choice([None, [7], [0, 11]]),
        ignore_eos=rng.random() < 0.3,
        seed=rng.randrange(2**63),
    )
    sequence_ids = rng.sample(range(10**6), len(prompts))
    max_num_seqs = rng.choice([1, 3, 8, 64])
    budget = rng.choice([None, 7000, 9500, 20000])  # 7 blocks hold one sample of any prompt, and hardly two

    most = rng.choice([8192, 40, 7])
    engine = RolloutEngine(decoder, None, max_num_seqs, max_num_batched_tokens=most, kv_cache_memory_bytes=budget)
    groups = engine.generate(prompts, params, sequence_ids=sequence_ids)

    for prompt, sequence_id, group in zip(prompts, sequence_ids, groups, strict=True):
        assert len(group) == params.n
        for sample, completion in enumerate(group):
            ids, logprobs, reason = expected_completion(prompt, params, sequence_id, sample)
            assert completion.token_ids == ids
            assert completion.finish_reason == reason
            assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)
    assert max(decoder.decode_rows, default=0) <= max_num_seqs
    assert budget is None or HashCache.made[-1].num_blocks <= budget // 1000


def test_a_step_is_given_the_blocks_of_its_longest_row(decoder: HashDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the next power of two, whatever a completion might grow to; less again when the longest has left."""
    monkeypatch.setattr(input_batch, "LEAST_WIDTH", 1)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    RolloutEngine(decoder, None, max_num_seqs=2).generate([[1] * 33, [2], [3]], params)
    assert all(width == min(1 << (used - 1).bit_length(), 4) for used, width in decoder.table_widths)
    assert [width for _, width in decoder.table_widths] == [4] * 29 + [1] * 15 + [2] * 14


def test_group_shares_one_prefill(decoder: HashDecoder) -> None:
    prompts = [[1, 2, 3], [4, 4], [9] * 7]
    RolloutEngine(decoder, None, max_num_seqs=64).generate(prompts, SamplingParams(n=16, max_tokens=2))
    assert decoder.prefill_lengths == [3, 2, 7]


def test_finished_rows_leave_at_once_and_waiting_ones_enter(decoder: HashDecoder) -> None:
    """64 samples in 8 rows: hardly a step with a row that has stopped, or with one that is empty while others wait."""
    params = SamplingParams(n=16, max_tokens=40, stop_token_ids=[1, 2, 3])
    groups = RolloutEngine(decoder, None, max_num_seqs=8).generate([[6], [7], [8], [9, 9]], params)
    needed = sum(len(completion.token_ids) - 1 for group in groups for completion in group)
    assert sum(decoder.decode_rows) == needed
    full = max(step for step, rows in enumerate(decoder.decode_rows) if rows == 8)
    assert min(decoder.decode_rows[:full]) >= 7  # an eighth of the rows is one
    assert decoder.prefill_lengths == [1, 1, 1, 2]


def test_long_prompts_are_computed_in_parts(decoder: HashDecoder) -> None:
    engine = RolloutEngine(decoder, None, max_num_batched_tokens=16)
    engine.generate([[1] * 50, [2] * 9, [3] * 9], SamplingParams(max_tokens=1))
    assert sorted(decoder.prefill_lengths) == [2, 9, 9, 16, 16, 16]


def test_the_cache_keeps_to_its_budget(decoder: HashDecoder) -> None:
    """16 prompt tokens and 32 new ones are 3 blocks; samples of a prompt share the first. Where few fit whole, more run
    while they are short, and every token is decoded once."""
    params = SamplingParams(n=4, max_tokens=33, ignore_eos=True)
    RolloutEngine(decoder, None, kv_cache_memory_bytes=5999).generate([[1] * 16, [2] * 16], params)
    assert HashCache.made[-1].num_blocks == 5
    assert max(decoder.decode_rows) == 4 and decoder.decode_rows[-1] <= 2 and sum(decoder.decode_rows) == 8 * 32
    RolloutEngine(decoder, None, kv_cache_memory_bytes=10**9).generate([[1] * 16, [2] * 16], params)
    assert HashCache.made[-1].num_blocks == 8 * 2 + 2 and max(decoder.decode_rows) == 8
    with pytest.raises(ValueError, match=r"kv_cache_memory_bytes is 2,999; one completion of 33 .* 16 takes 3,000"):
        RolloutEngine(decoder, None, kv_cache_memory_bytes=2999).generate([[1] * 16], params)


def test_more_than_the_machine_has_is_refused_before_any_work(
    decoder: HashDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twentieth of what is free is left, and 500 bytes are for what generation takes beside keys and values."""
    monkeypatch.setattr(engine_module, "free_memory", lambda device: 19_000)
    params, prompts = SamplingParams(n=4, max_tokens=33, ignore_eos=True), [[1] * 16, [2] * 16]
    text = r"kv_cache_memory_bytes is 1,000,000,000; cpu has 19,000 free, of which .* takes 500 beside .* to 17,550 or"
    with pytest.raises(ValueError, match=text):
        RolloutEngine(decoder, None, kv_cache_memory_bytes=10**9).generate(prompts, params)
    monkeypatch.setattr(engine_module, "free_memory", lambda device: 3600)
    with pytest.raises(
        ValueError, match=r"one completion of 33 .* takes 3,000 bytes; cpu has 3,600 free.*: lower max_"
    ):
        RolloutEngine(decoder, None).generate(prompts, params)
    monkeypatch.setattr(engine_module, "free_memory", lambda device: 7300)
    with pytest.raises(ValueError, match=r"^one .* 3,000 bytes; cpu has 7,300 free, 50% of it beside training, "):
        RolloutEngine(decoder, None, memory_share=0.5).generate(prompts, params)
    assert not HashCache.made and not decoder.prefill_lengths


@pytest.mark.parametrize(("free", "num_blocks"), [(19_000, 17), (3_700, 3), (10**6, 18)])
def test_the_cache_takes_what_is_free(
    decoder: HashDecoder, free: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But no more than the rows need."""
    params, prompts = SamplingParams(n=4, max_tokens=33, ignore_eos=True), [[1] * 16, [2] * 16]
    want = RolloutEngine(decoder, None, kv_cache_memory_bytes=18_000).generate(prompts, params)
    monkeypatch.setattr(engine_module, "free_memory", lambda device: free)
    assert RolloutEngine(decoder, None).generate(prompts, params) == want
    assert HashCache.made[-1].num_blocks == num_blocks


def test_padding_has_a_block_of_its_own_within_the_budget(decoder: HashDecoder, graphs: list[str]) -> None:
    params = SamplingParams(n=4, max_tokens=33, ignore_eos=True)
    RolloutEngine(decoder, None, kv_cache_memory_bytes=5999).generate([[1] * 16, [2] * 16], params)
    assert HashCache.made[-1].num_blocks == 5
    RolloutEngine(decoder, None).generate([[1] * 16, [2] * 16], params)
    assert HashCache.made[-1].num_blocks == 8 * 2 + 2 + 1 and max(decoder.decode_rows) == 8
    with pytest.raises(ValueError, match=r"kv_cache_memory_bytes is 3,999; one completion of 33 .* 16 takes 4,000"):
        RolloutEngine(decoder, None, kv_cache_memory_bytes=3999).generate([[1] * 16], params)


@pytest.mark.parametrize(("impl", "options"), [(None, {"enforce_eager": True}), ("reference", {})])
def test_graphs_are_not_always_wanted(decoder: HashDecoder, graphs: list[str], impl: str | None, options: dict) -> None:
    params = SamplingParams(n=4, max_tokens=40, ignore_eos=True)
    with use(impl):
        (eager,) = RolloutEngine(decoder, None, **options).generate([[1] * 16], params)
    assert not graphs
    (replayed,) = RolloutEngine(decoder, None).generate([[1] * 16], params)
    assert [completion.token_ids for completion in replayed] == [completion.token_ids for completion in eager]
    assert graphs == ["capture"] + ["replay"] * (39 - graphs_module.STEPS_BEFORE - 1)


def test_parameters_that_move_are_noticed(decoder: HashDecoder, graphs: list[str]) -> None:
    step = decoder.decode

    def decode(*args: Tensor, **options: Callable) -> Tensor:
        decoder.embed_tokens.weight.data = decoder.embed_tokens.weight.data.clone()
        return step(*args, **options)

    decoder.decode = decode  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="parameters moved"):
        RolloutEngine(decoder, None).generate([[1]], SamplingParams(max_tokens=4, ignore_eos=True))


def test_equal_prompts_share_one_prefill_but_no_noise(decoder: HashDecoder) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    groups = RolloutEngine(decoder, None).generate([[3, 1]] * 8, params)
    assert decoder.prefill_lengths == [2]
    assert len({tuple(group[0].token_ids) for group in groups}) == 8


def test_stops_when_every_row_has(decoder: HashDecoder) -> None:
    RolloutEngine(decoder, None).generate([[6]], SamplingParams(max_tokens=40, stop_token_ids=list(range(VOCAB))))
    assert decoder.decode_rows == []


def test_min_tokens_then_stop(decoder: HashDecoder) -> None:
    params = SamplingParams(n=8, max_tokens=20, min_tokens=6, stop_token_ids=[i for i in range(VOCAB) if i != 2])
    (group,) = RolloutEngine(decoder, None).generate([[6, 1]], params)
    for completion in group:
        assert completion.token_ids[:6] == [2] * 6, "only token 2 is no stop token"
        assert completion.finish_reason == "stop" and completion.token_ids[-1] != 2


def test_stop_on_the_last_token_is_a_stop(decoder: HashDecoder) -> None:
    params = SamplingParams(max_tokens=1, stop_token_ids=list(range(VOCAB)))
    assert RolloutEngine(decoder, None).generate([[6]], params)[0][0].finish_reason == "stop"
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    assert RolloutEngine(decoder, None).generate([[6]], params)[0][0].finish_reason == "length"


def test_several_eos_ids(decoder: HashDecoder) -> None:
    decoder.config.eos_token_id = [2, EOS]
    groups = RolloutEngine(decoder, None).generate([[i] for i in range(20)], SamplingParams(max_tokens=50))
    endings = {group[0].token_ids[-1] for group in groups if group[0].finish_reason == "stop"}
    assert endings == {2, EOS}


def test_mode_is_restored(decoder: HashDecoder) -> None:
    engine = RolloutEngine(decoder, None)
    for training in (True, False):
        decoder.train(training)
        engine.generate([[1]], SamplingParams(max_tokens=2))
        assert decoder.training is training
    decoder.train()
    decoder.decode = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        engine.generate([[1]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert decoder.training


def test_no_prompts(decoder: HashDecoder) -> None:
    assert RolloutEngine(decoder, None).generate([], SamplingParams()) == []


@pytest.mark.parametrize(
    ("prompts", "options", "match"),
    [
        ([[1], [2] * 50], {"max_tokens": 15}, "prompt 1 has 50 tokens.*max_tokens 15.*65.*max_model_len is 64"),
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1], [VOCAB]], {}, f"prompt 1 has token ids from {VOCAB} .*0 to {VOCAB - 1}"),
        ([[1], [3, -1]], {}, "prompt 1 has token ids from -1"),
        ("hello", {}, "no tokenizer"),
        ([1, 2], {}, r"prompts is one list of token ids; .*wrap it"),
        ([{"role": "user", "content": "a"}], {}, r"prompts is one conversation; .*wrap it"),
        ([[{"role": "user", "content": "a"}]], {}, "got messages but no tokenizer"),
        (["hello"], {}, "no tokenizer"),
        ([[1]], {"stop_token_ids": [VOCAB]}, f"stop_token_ids has {VOCAB}"),
    ],
)
def test_bad_input_is_refused_before_any_work(decoder: HashDecoder, prompts: list, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RolloutEngine(decoder, None).generate(prompts, SamplingParams(**{"max_tokens": 4, **options}))
    assert decoder.prefill_lengths == []


def test_bad_engine_options(decoder: HashDecoder) -> None:
    with pytest.raises(ValueError, match="max_num_seqs is 0"):
        RolloutEngine(decoder, None, max_num_seqs=0)
    with pytest.raises(ValueError, match="max_num_batched_tokens is 0"):
        RolloutEngine(decoder, None, max_num_batched_tokens=0)
    with pytest.raises(ValueError, match="max_model_len is 65; expected 2 to 64"):
        RolloutEngine(decoder, None, max_model_len=65)
    with pytest.raises(ValueError, match=r"memory_share is 1\.5; expected above 0, at most 1"):
        RolloutEngine(decoder, None, memory_share=1.5)
    for wrong in ("8GB", 1e9, 0, True):
        with pytest.raises(ValueError, match=f"kv_cache_memory_bytes is {wrong!r}; expected a number of bytes, or N"):
            RolloutEngine(decoder, None, kv_cache_memory_bytes=wrong)  # type: ignore[arg-type]
    decoder.scalar_head = True
    with pytest.raises(ValueError, match="reward model"):
        RolloutEngine(decoder, None)


def test_sequence_ids_are_one_per_prompt(decoder: HashDecoder) -> None:
    with pytest.raises(ValueError, match=r"3 sequence_ids for 1 prompts"):
        RolloutEngine(decoder, None).generate([[1]], SamplingParams(max_tokens=4), sequence_ids=[1, 2, 3])


def test_max_model_len_is_the_limit_itself(decoder: HashDecoder) -> None:
    engine = RolloutEngine(decoder, None, max_model_len=10)
    assert engine.generate([[1] * 6], SamplingParams(max_tokens=4))
    with pytest.raises(ValueError, match="max_model_len is 10"):
        engine.generate([[1] * 7], SamplingParams(max_tokens=4))
