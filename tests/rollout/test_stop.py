"""Stop strings and pieces of text under way, on a byte-level tokenizer: against a search in the whole text."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from r1fast import Completion, RolloutEngine, SamplingParams, load_model
from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.rollout import scheduler
from r1fast.rollout.sampling import SampledTokens, completion_text
from r1fast.rollout.texts import Reader, Texts, first_stop
from r1fast.rollout.vllm import VllmEngine
from tests.rollout.test_vllm import StandIn
from tests.zoo import fields, write_checkpoint

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    folder: Path = tmp_path_factory.mktemp("stop")
    write_checkpoint(folder, **fields("qwen3_moe", initializer_range=0.02, max_position_embeddings=256))
    return load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(loaded: tuple[Decoder, Any]) -> RolloutEngine:
    return RolloutEngine(*loaded, enable_return_routed_experts=True)


def sample(engine: Any, **options: Any) -> list[Completion]:
    """Nearly all tokens are as likely as each other: texts of bytes, parts of characters and short words."""
    params = SamplingParams(**{"n": 4, "max_tokens": 60, "seed": 3, **options})
    return [completion for group in engine.generate(PROMPTS, params) for completion in group]


def expected(engine: Any, free: Completion, stop: list[str], *, include: bool = False, after: int = 0) -> tuple:
    """(text, number of tokens, reason), by a search in the text of ever more tokens."""
    model, tokenizer = engine.model, engine.tokenizer
    stop_token = free.token_ids[-1] if free.finish_reason == "stop" else None
    begin = len(completion_text(free.token_ids[:after], model.config, tokenizer))
    for count in range(after + 1, len(free.token_ids) + 1):
        ids = free.token_ids[:count]
        ids = ids[:-1] if ids[-1] == stop_token and count == len(free.token_ids) else ids
        text = completion_text(ids, model.config, tokenizer)
        ends = [(i + len(x), i) for x in stop for i in range(len(text)) if text.startswith(x, i) and i + len(x) > begin]
        if ends:
            end, start = min(ends)
            return text[: end if include else start], count, "stop"
    return free.text, len(free.token_ids), free.finish_reason


STOPS = {
    "one-letter": ["e"],
    "across-tokens": ["\x01", "ab", "th", "re", "d "],
    "several": ["ing", "ng", "q", "zz"],
    "multi-byte": ["é", "ß", "�"],
    "never": ["</nothing>"],
}


@pytest.mark.parametrize("options", [{}, {"include_stop_str_in_output": True}, {"min_tokens": 9}], ids=str)
@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_texts_end_at_the_first_stop_string(engine: RolloutEngine, stop: list[str], options: dict[str, Any]) -> None:
    free = sample(engine, **{key: value for key, value in options.items() if key == "min_tokens"})
    found = sample(engine, stop=stop, **options)
    include, after = options.get("include_stop_str_in_output", False), options.get("min_tokens", 0)
    for before, stopped in zip(free, found, strict=True):
        text, count, reason = expected(engine, before, stop, include=include, after=after)
        assert (stopped.text, len(stopped.token_ids), stopped.finish_reason) == (text, count, reason)
        assert stopped.token_ids == before.token_ids[:count]
        assert stopped.logprobs == pytest.approx(before.logprobs[:count], abs=1e-5)  # batches of other sizes round
        assert before.routed_experts is not None and stopped.routed_experts is not None
        prompt = len(before.routed_experts) + 1 - len(before.token_ids)
        assert stopped.routed_experts.shape[0] == prompt + count - 1
    shortened = sum(len(a.token_ids) != len(b.token_ids) for a, b in zip(free, found, strict=True))
    assert (shortened > 1) == (stop != STOPS["never"])


@pytest.mark.parametrize("change", ["modules", "few-rows", "small-cache", "eight-steps", "prefill-in-parts"])
def test_stops_do_not_depend_on_how_rows_decode(
    loaded: tuple[Decoder, Any], engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """As on a GPU, where rows run on for up to eight steps after the string."""
    stop = ["e", "\x01", "th"]
    want = sample(engine, stop=stop)
    if change == "modules":
        monkeypatch.setattr(scheduler, "fast_decode", lambda model: None)
    if change == "eight-steps":
        monkeypatch.setitem(scheduler.SYNC_STEPS, "cpu", 8)
    block = BlockCache.bytes_per_block(engine.model.config, torch.float32)
    options = {
        "few-rows": {"max_num_seqs": 3},
        "small-cache": {"kv_cache_memory_bytes": 9 * block},
        "prefill-in-parts": {"max_num_batched_tokens": 2},
    }.get(change, {})
    found = sample(RolloutEngine(*loaded, **options), stop=stop)
    assert [(x.text, x.token_ids) for x in found] == [(x.text, x.token_ids) for x in want]


def test_vllm_engine_cuts_what_it_gets(loaded: tuple[Decoder, Any]) -> None:
    """vLLM itself is given no text and samples on."""
    model, tokenizer = loaded
    vllm = VllmEngine(copy.deepcopy(model), tokenizer, StandIn(model))
    free = sample(vllm)
    for before, stopped in zip(free, sample(vllm, stop=STOPS["several"]), strict=True):
        assert (stopped.text, len(stopped.token_ids), stopped.finish_reason) == expected(vllm, before, STOPS["several"])
        assert stopped.logprobs == before.logprobs[: len(stopped.token_ids)]


def test_a_string_that_texts_leave_out_is_a_stop_token(engine: RolloutEngine) -> None:
    """The padding or BOS token by its name: vLLM looks for it in a text that lacks it."""
    bos = engine.tokenizer.bos_token
    free = sample(engine, n=32)
    found = sample(engine, n=32, stop=bos)
    kept = sample(engine, n=32, stop=[bos], include_stop_str_in_output=True)
    cut = [i for i, x in enumerate(free) if engine.tokenizer.bos_token_id in x.token_ids]
    assert len(cut) > 3
    for i in cut:
        assert found[i].token_ids == free[i].token_ids[: free[i].token_ids.index(engine.tokenizer.bos_token_id) + 1]
        assert found[i].finish_reason == "stop" and bos not in found[i].text
        assert kept[i].text == found[i].text + bos


@pytest.mark.parametrize("stop", [[], ["e", "\x01", "th"], ["</nothing>"]], ids=["free", "stop", "never"])
@pytest.mark.parametrize("steps", [1, 8])
def test_pieces_make_up_the_text(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch, stop: list[str], steps: int
) -> None:
    monkeypatch.setitem(scheduler.SYNC_STEPS, "cpu", steps)
    pieces: dict[tuple[int, int], list[str]] = {}
    params = SamplingParams(n=4, max_tokens=60, seed=3, stop=stop)
    outputs = engine.generate(PROMPTS, params, on_text=lambda p, s, text: pieces.setdefault((p, s), []).append(text))
    for p, group in enumerate(outputs):
        for s, completion in enumerate(group):
            found = pieces.get((p, s), [])
            assert "".join(found) == completion.text and "" not in found
    assert max(map(len, pieces.values())) > 30 / steps
    plain = engine.generate(PROMPTS, params)
    assert [[x.token_ids for x in group] for group in plain] == [[x.token_ids for x in group] for group in outputs]


def test_what_on_text_raises_ends_the_call(engine: RolloutEngine) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, SamplingParams(max_tokens=9), on_text=interrupt)
    assert len(sample(engine)) == 12


def test_a_stop_string_is_found_however_its_text_is_cut(engine: RolloutEngine) -> None:
    """Texts with characters of up to four bytes, encoded byte by byte or as the tokenizer does."""
    rng = random.Random(0)
    tokenizer = engine.tokenizer
    by_byte = {byte: tokenizer.convert_tokens_to_ids(x) for byte, x in byte_tokens().items()}
    texts = Texts(SamplingParams(stop=["</答>", "🙂🙂", "aba"]), engine.model.config, tokenizer)
    for _ in range(200):
        text = "".join(rng.choices(["</答>", "</", "答", "🙂", "a", "b", "é", "�", " "], k=12))
        encoded = tokenizer.encode(text, add_special_tokens=False)
        for ids in (encoded, [by_byte[byte] for byte in text.encode()]):
            ids = [*ids, *encoded]
            whole = tokenizer.decode(ids)
            end = first_stop(whole, texts.stop)
            cut = texts.cut(SampledTokens(ids, [0.0] * len(ids)))
            assert texts.of(cut.token_ids) == ((whole[: end[0]], "stop") if end else (whole, "length"))
            assert end is None or texts.find(cut.token_ids[:-1]) is None
            assert len(cut.logprobs) == len(cut.token_ids)
            reader = Reader(texts)
            for token_id in ids:
                reader.push(token_id)
            assert reader.text + reader.pending == whole


def byte_tokens() -> dict[int, str]:
    """GPT-2's names of bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@pytest.mark.parametrize(
    ("text", "stop", "begin", "found"),
    [
        ("xabc", ["abc", "b"], 0, (2, 3)),  # as if characters came one by one
        ("xabc", ["c", "bc"], 0, (2, 4)),  # of two that end together the longer
        ("abab", ["ab"], 1, (0, 2)),
        ("abab", ["ab"], 2, (2, 4)),
        ("ab", ["abc"], 0, None),
        ("", ["a"], 0, None),
    ],
)
def test_first_stop(text: str, stop: list[str], begin: int, found: tuple[int, int] | None) -> None:
    assert first_stop(text, stop, begin) == found


def test_stop_is_checked(loaded: tuple[Decoder, Any]) -> None:
    assert SamplingParams(stop="a").stop_strings == ("a",) and SamplingParams().stop_strings == ()
    for wrong in ("", ["a", ""], [3]):
        with pytest.raises(ValueError, match=r"SamplingParams\.stop is .* expected a string or a list of strings"):
            SamplingParams(stop=[""] if wrong == "" else wrong)
    with pytest.raises(ValueError, match=r"SamplingParams\.stop is text, and there is no tokenizer"):
        RolloutEngine(loaded[0], None).generate([[1]], SamplingParams(stop="a"))
