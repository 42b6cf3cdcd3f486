"""Row bookkeeping of the engine, on a decoder whose next token is a known function of the whole history.

A row that took another row's cache, position, seed or output line would leave the path that `expected_completion`
computes one sample at a time.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from r1fast.rollout import engine as engine_module
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams, fold_in, sample_keys
from r1fast_kernels import sample_tokens

VOCAB = 23
EOS = 5
MODULUS = 100_003


def hash_step(state: int | Tensor, token: int | Tensor) -> int | Tensor:
    return (state * 31 + token + 1) % MODULUS


def logits_of(state_B: Tensor) -> Tensor:
    """[B, V] fp32, different for each history; the small slope keeps rows from being alike."""
    return 3 * torch.sin(state_B[:, None].double() * torch.arange(1, VOCAB + 1)).float()


class HashCache:
    """Stands for KVCache: the "keys" of a row are the hash of its tokens."""

    def __init__(self, config: object, num_rows: int, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        self.max_len = max_len
        self.state = torch.full((num_rows,), -1)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64)

    def select(self, index_R: Tensor) -> "HashCache":
        other = HashCache(None, 0, self.max_len, torch.float32, torch.device("cpu"))
        other.state, other.lengths = self.state[index_R], self.lengths[index_R]
        return other


class HashDecoder(nn.Module):
    """Stands for Decoder; counts the work that it is given."""

    scalar_head = False

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=64, eos_token_id=EOS)
        self.embed_tokens = nn.Embedding(VOCAB, 1)
        self.prefill_lengths: list[int] = []
        self.decode_rows: list[int] = []

    def forward(self, input_ids_T: Tensor, cu_seqlens: Tensor, *, head: Callable, cache: HashCache) -> Tensor:
        assert not self.training and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        states_T = []
        for row, ids in enumerate(torch.tensor_split(input_ids_T, cu_seqlens[1:-1].long())):
            state = 0
            for token in ids.tolist():
                state = hash_step(state, token)
                states_T.append(state)
            cache.state[row], cache.lengths[row] = state, len(ids)
            self.prefill_lengths.append(len(ids))
        # The head sees each position's state as its hidden row; the weight is the identity of the product.
        states = head(torch.tensor(states_T)[:, None], torch.ones(1, 1, dtype=torch.int64))
        return logits_of(states[:, 0])

    def decode(self, input_ids_B: Tensor, positions_B: Tensor, cache: HashCache) -> Tensor:
        assert torch.equal(positions_B, cache.lengths), "a token is decoded at another place than its row's end"
        assert int(positions_B.max()) < cache.max_len
        self.decode_rows.append(len(input_ids_B))
        cache.state = hash_step(cache.state, input_ids_B)
        cache.lengths = cache.lengths + 1
        return logits_of(cache.state)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> HashDecoder:
    monkeypatch.setattr(engine_module, "KVCache", HashCache)
    return HashDecoder()


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


@pytest.mark.parametrize("trial", range(24))
def test_rows_are_never_mixed(decoder: HashDecoder, trial: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random prompts, duplicates, stops, limits, group and wave sizes; stops also noticed late, as on a GPU."""
    rng = random.Random(trial)
    monkeypatch.setitem(engine_module.SYNC_STEPS, "cpu", rng.choice([1, 1, 5]))
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 12))]
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

    progress: list[tuple[int, int]] = []
    groups = RolloutEngine(decoder, None, max_num_seqs).generate(
        prompts, params, sequence_ids=sequence_ids, on_progress=lambda done, total: progress.append((done, total))
    )

    for prompt, sequence_id, group in zip(prompts, sequence_ids, groups, strict=True):
        assert len(group) == params.n
        for sample, completion in enumerate(group):
            ids, logprobs, reason = expected_completion(prompt, params, sequence_id, sample)
            assert completion.token_ids == ids
            assert completion.finish_reason == reason
            assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)
    total = len(prompts) * params.n
    assert progress[-1] == (total, total)
    assert progress == sorted(set(progress))
    assert max(decoder.decode_rows, default=0) <= max_num_seqs


def test_group_shares_one_prefill(decoder: HashDecoder) -> None:
    prompts = [[1, 2, 3], [4, 4], [9] * 7]
    RolloutEngine(decoder, None, max_num_seqs=64).generate(prompts, SamplingParams(n=16, max_tokens=2))
    assert decoder.prefill_lengths == [3, 2, 7]


def test_wave_holds_whole_groups(decoder: HashDecoder) -> None:
    """10 rows take two groups of 4, so that no prompt is computed twice."""
    prompts = [[i, i] for i in range(5)]
    RolloutEngine(decoder, None, max_num_seqs=10).generate(prompts, SamplingParams(n=4, max_tokens=2, ignore_eos=True))
    assert decoder.prefill_lengths == [2] * 5
    assert decoder.decode_rows == [8, 8, 4]


def test_equal_prompts_share_one_prefill_but_no_noise(decoder: HashDecoder) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    groups = RolloutEngine(decoder, None).generate([[3, 1]] * 8, params)
    assert decoder.prefill_lengths == [2]
    assert len({tuple(group[0].token_ids) for group in groups}) == 8


def test_stopped_rows_are_dropped(decoder: HashDecoder) -> None:
    params = SamplingParams(n=64, max_tokens=40, stop_token_ids=[1, 2, 3])
    (group,) = RolloutEngine(decoder, None).generate([[6]], params)
    needed = sum(len(completion.token_ids) - 1 for completion in group)
    rows = decoder.decode_rows
    assert rows == sorted(rows, reverse=True) and rows[-1] < rows[0]
    # At most a quarter of the rows of a step have stopped already.
    assert needed <= sum(rows) <= needed / 0.75 + 1


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
        ("hello", {}, "one string"),
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
    with pytest.raises(ValueError, match="max_model_len is 65; expected 2 to 64"):
        RolloutEngine(decoder, None, max_model_len=65)
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


@pytest.mark.parametrize("impl", [None, "reference"])
def test_ops_run_the_implementation_asked_for(
    decoder: HashDecoder, monkeypatch: pytest.MonkeyPatch, impl: str | None
) -> None:
    asked = []
    for name in ("sample_tokens", "selective_logprobs"):  # min_tokens brings in the second
        op = getattr(engine_module, name)
        monkeypatch.setattr(
            engine_module, name, lambda *args, op=op, **options: asked.append(options["impl"]) or op(*args, **options)
        )
    RolloutEngine(decoder, None, impl=impl).generate([[1]], SamplingParams(max_tokens=2, min_tokens=2))
    assert asked == [impl] * 4
