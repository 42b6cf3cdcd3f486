"""Generation from real checkpoints, with transformers and the training forward as oracles."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from r1fast.models.weights import load_model
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import Completion, SampledTokens, SamplingParams
from r1fast.rollout.texts import completions_of
from tests import zoo

TAG = "|special_token|"
SPECIAL = ["<pad>", "<bos>", "<eos>", TAG]
CHARACTERS = "0123456789+-*/=() abcdefghijklmnopqrstuvwxyz"
VOCAB = len(SPECIAL) + len(CHARACTERS)

COMMON = {
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # spread logits: greedy paths without near ties, samples that differ
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN = {
    "deepseek_v2": {"num_key_value_heads": 4, "q_lora_rank": 24, "n_routed_experts": 8},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 24, "n_routed_experts": 8, "n_group": 4, "topk_group": 2
    },
}  # fmt: skip
FAMILIES = {name: COMMON | OWN.get(name, {"num_key_value_heads": 2}) for name in zoo.FAMILIES}
PROMPTS = [[1, 9, 14, 5], [1] + [7, 22, 31] * 6, [40], [1, 14, 14, 14, 14, 14, 14]]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=[TAG],
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {}
    for family, changes in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        directories[family] = zoo.write_oracle(folder, seed=1, **zoo.fields(family, **changes))
        make_tokenizer().save_pretrained(directories[family])
    return directories


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path], family: str) -> RolloutEngine:
    model, tokenizer = load_model(checkpoints[family], dtype=torch.float32)
    return RolloutEngine(model, tokenizer)


@pytest.fixture(scope="module")
def llama(checkpoints: dict[str, Path]) -> RolloutEngine:
    return RolloutEngine(*load_model(checkpoints["llama"], dtype=torch.float32))


def test_greedy_is_transformers_generate(engine: RolloutEngine, checkpoints: dict[str, Path], family: str) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32).eval()
    params = SamplingParams(max_tokens=24, temperature=0.0)
    for prompt, (completion,) in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        output_1S = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, attention_mask=torch.ones(1, len(prompt))
        )
        assert completion.token_ids == output_1S[0, len(prompt) :].tolist()
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 2 else "length")


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("min_tokens", [0, 12])
def test_logprobs_are_those_of_the_training_forward(engine: RolloutEngine, temperature: float, min_tokens: int) -> None:
    """On-policy ratio 1, also where truncation or min_tokens bent what was sampled."""
    params = SamplingParams(n=3, max_tokens=20, min_tokens=min_tokens, temperature=temperature, top_k=20, top_p=0.95)
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        for completion in group:
            ids_T = torch.tensor(prompt + completion.token_ids)
            with torch.no_grad():
                logits_TV = engine.model(ids_T, torch.tensor([0, len(ids_T)], dtype=torch.int32))
            logprobs_TV = (logits_TV / (temperature or 1.0)).log_softmax(-1)[len(prompt) - 1 : -1]
            expected_S = logprobs_TV.gather(1, ids_T[len(prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected_S, atol=1e-4, rtol=0)


def test_min_tokens_of_a_model_in_float64() -> None:
    """Their log-probs are those of the op that the trainer calls, in float64 here."""
    model = zoo.decoder("llama", **FAMILIES["llama"]).double()
    model.init_weights(torch.Generator().manual_seed(3))
    params = SamplingParams(max_tokens=6, min_tokens=6, seed=1)
    ((found,),) = RolloutEngine(model, None).generate([[5, 6]], params)
    logits_TV = model(torch.tensor([5, 6, *found.token_ids]), torch.tensor([0, 8], dtype=torch.int32))
    want_S = logits_TV[1:-1].log_softmax(-1).gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]
    assert found.logprobs == pytest.approx(want_S.tolist(), abs=1e-6)


def assert_same_completions(got: list[list[Completion]], want: list[list[Completion]], most: int) -> None:
    """But for `most`: products round by the shape of their batch, and one draw in a million is that near to a token's
    edge. Up to there log-probs agree."""
    pairs = [pair for groups in zip(got, want, strict=True) for pair in zip(*groups, strict=True)]
    for one, other in pairs:
        same = [a == b for a, b in zip(one.token_ids, other.token_ids)]
        first = same.index(False) if False in same else len(same)
        assert one.logprobs[:first] == pytest.approx(other.logprobs[:first], abs=1e-5)
    assert sum(one.token_ids != other.token_ids for one, other in pairs) <= most


def test_completion_does_not_depend_on_the_batch(engine: RolloutEngine) -> None:
    """Alone, inside a batch of 256, in waves of 7, and split over two calls: the same tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(4, VOCAB, (int(length),), generator=generator).tolist()
        for length in torch.randint(1, 12, (128,), generator=generator)
    ]
    params = SamplingParams(n=2, max_tokens=10, seed=11)
    together = engine.generate(prompts, params)
    assert together[0][0].token_ids != together[0][1].token_ids

    alone = engine.generate([prompts[13]], params, sequence_ids=[13])
    halves = engine.generate(prompts[:9], params, sequence_ids=range(9))
    halves += engine.generate(prompts[9:], params, sequence_ids=range(9, 128))
    waves = RolloutEngine(engine.model, engine.tokenizer, max_num_seqs=7).generate(prompts, params)
    assert_same_completions(alone, together[13:14], 0)
    assert_same_completions(halves, together, 1)
    assert_same_completions(waves, together, 1)

    reseeded = engine.generate([prompts[13]], SamplingParams(n=2, max_tokens=10, seed=12), sequence_ids=[13])
    assert [one.token_ids for one in reseeded[0]] != [one.token_ids for one in together[13]]


def test_first_tokens_follow_the_model(llama: RolloutEngine) -> None:
    """Frequencies of 4,000 samples of one position against softmax: chi-square over the tokens expected 8+ times."""
    num_samples = 4000
    engine = RolloutEngine(llama.model, llama.tokenizer, max_num_seqs=num_samples)
    (group,) = engine.generate([PROMPTS[0]], SamplingParams(n=num_samples, max_tokens=1, temperature=0.8))
    counts_V = torch.bincount(torch.tensor([completion.token_ids[0] for completion in group]), minlength=VOCAB)
    with torch.no_grad():
        logits_TV = llama.model(torch.tensor(PROMPTS[0]), torch.tensor([0, len(PROMPTS[0])], dtype=torch.int32))
    expected_V = num_samples * (logits_TV[-1] / 0.8).softmax(-1)
    kept = expected_V >= 8
    chi2 = float(((counts_V - expected_V) ** 2 / expected_V)[kept].sum())
    degrees = int(kept.sum())
    assert degrees > 5
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5  # about four standard deviations; the seed is fixed


def test_weights_are_the_models_own(llama: RolloutEngine) -> None:
    """An optimizer step shows in the next call: nothing is copied or cached between calls."""
    params = SamplingParams(max_tokens=4, temperature=0.0)
    weight = llama.model.lm_head.weight
    saved = weight.detach().clone()
    before = llama.generate(PROMPTS, params)
    try:
        with torch.no_grad():
            weight.neg_()
        assert llama.generate(PROMPTS, params) != before
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert llama.generate(PROMPTS, params) == before


def test_string_prompts_are_encoded(llama: RolloutEngine) -> None:
    params = SamplingParams(n=2, max_tokens=6)
    text = "12+(3*4)="
    ids = llama.tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert llama.generate([text, [5, 6]], params) == llama.generate([ids, [5, 6]], params)


def test_text_keeps_tags_and_drops_eos_pad_bos(llama: RolloutEngine) -> None:
    tag, two = 3, llama.tokenizer.convert_tokens_to_ids("2")
    sampled = [SampledTokens(ids, [0.0] * len(ids)) for ids in ([two, tag, 0, two, 1, 2], [two, 2, two], [two, tag])]
    (completions,) = completions_of(sampled, SamplingParams(n=3), llama.model.config, llama.tokenizer)
    joined = [completion.text.replace(" ", "") for completion in completions]
    assert joined == [f"2{TAG}2", "22", f"2{TAG}"]
    assert [completion.finish_reason for completion in completions] == ["stop", "length", "length"]


def test_stop_token_is_kept_in_ids_and_left_out_of_text(llama: RolloutEngine) -> None:
    digits = llama.tokenizer.convert_tokens_to_ids(list("0123456789"))
    (group,) = llama.generate(["1+1="], SamplingParams(n=32, max_tokens=12, stop_token_ids=digits, ignore_eos=True))
    stopped = [completion for completion in group if completion.finish_reason == "stop"]
    assert stopped
    for completion in stopped:
        assert completion.token_ids[-1] in digits
        assert not set(completion.token_ids[:-1]) & set(digits)
        assert not set(completion.text) & set("0123456789")
        assert len(completion.logprobs) == len(completion.token_ids)


def test_ignore_eos_runs_to_max_tokens(llama: RolloutEngine) -> None:
    params = SamplingParams(n=64, max_tokens=30, temperature=2.0)
    (stopping,) = llama.generate([PROMPTS[0]], params)
    assert any(completion.finish_reason == "stop" for completion in stopping)
    assert all(2 not in completion.token_ids[:-1] for completion in stopping)

    (ignoring,) = llama.generate([PROMPTS[0]], SamplingParams(n=64, max_tokens=30, temperature=2.0, ignore_eos=True))
    assert {(len(completion.token_ids), completion.finish_reason) for completion in ignoring} == {(30, "length")}
    for stop, ignore in zip(stopping, ignoring, strict=True):
        assert ignore.token_ids[: len(stop.token_ids)] == stop.token_ids


def test_too_long_prompt_is_named(llama: RolloutEngine) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has 120 tokens, with max_tokens 10 .*130; max_model_len is 128"):
        llama.generate([[5], [5] * 120], SamplingParams(max_tokens=10))


def test_a_completion_may_not_cross_the_length_of_longrope() -> None:
    """Below 20 tokens and from 21 on: equal to a forward pass; across: refused."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope |= {"original_max_position_embeddings": 20, "partial_rotary_factor": 0.5}
    engine = RolloutEngine(zoo.decoder("phi3", vocab_size=VOCAB, rope_parameters=rope, initializer_range=0.2), None)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for length in (8, 21):
        (completion,) = engine.generate([[5] * length], params)[0]
        ids_T = torch.tensor([5] * length + completion.token_ids)
        with torch.no_grad():
            logprobs_TV = engine.model(ids_T, torch.tensor([0, len(ids_T)], dtype=torch.int32)).log_softmax(-1)
        want = logprobs_TV[length - 1 : -1].gather(1, ids_T[length:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=1e-4, rtol=0)
    for length in (9, 20):
        with pytest.raises(ValueError, match=rf"prompt 0 has {length} tokens.*past 20 this model \(longrope\) turns"):
            engine.generate([[5] * length], params)
    engine.max_num_batched_tokens = 16
    engine.generate([[5] * 8], params)
    with pytest.raises(ValueError, match="cannot come in parts: raise max_num_batched_tokens to 21"):
        engine.generate([[5] * 21], params)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_matches_cpu_greedy(checkpoints: dict[str, Path], family: str) -> None:
    """Rows are dropped late on a GPU (the stop flags are read every few steps): the same completions."""
    params = SamplingParams(n=2, max_tokens=24, temperature=0.0)
    results = []
    for device in ("cpu", "cuda"):
        engine = RolloutEngine(*load_model(checkpoints[family], dtype=torch.float32, device=device))
        results.append([c.token_ids for group in engine.generate(PROMPTS, params) for c in group])
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_recorded_experts_are_those_of_a_forward_pass(checkpoints: dict[str, Path], name: str) -> None:
    """For every token but the last, whatever rows were dropped on the way; and not recorded unless asked for."""
    model, _ = load_model(checkpoints[name], dtype=torch.float32)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    params = SamplingParams(n=5, max_tokens=9, temperature=1.0, stop_token_ids=list(range(20, 30)))
    recording = RolloutEngine(model, None, max_num_seqs=10, enable_return_routed_experts=True)
    outputs = recording.generate(prompts, params)
    for prompt, completions in zip(prompts, outputs, strict=True):
        for completion in completions:
            tokens = torch.tensor([*prompt, *completion.token_ids[:-1]])
            _, routing = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32), with_routing=True)
            assert completion.routed_experts is not None
            assert torch.equal(torch.from_numpy(completion.routed_experts).long(), routing.expert_ids)
    assert len({len(c.token_ids) for completions in outputs for c in completions}) > 3
    plain = RolloutEngine(model, None, max_num_seqs=10).generate(prompts, params)
    assert [c.token_ids for cs in plain for c in cs] == [c.token_ids for cs in outputs for c in cs]
    assert plain[0][0].routed_experts is None


def test_a_dense_model_records_no_experts(llama: RolloutEngine) -> None:
    with pytest.raises(ValueError, match="no mixture-of-experts layer"):
        RolloutEngine(llama.model, None, enable_return_routed_experts=True)
