"""VllmEngine on a stand-in for vLLM: what it asks for, what it makes of the answers, and how it finds stale weights.

The real vLLM: test_vllm_real.py.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from r1fast import SamplingParams, load_model
from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.parallel.mesh import Dist
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SampledTokens
from r1fast.rollout.vllm import (
    MAX_PUSHES,
    RolloutError,
    VllmEngine,
    WeightsLostError,
    moe_rows,
    whole_state,
)
from r1fast.rollout.vllm_process import InProcess
from r1fast.stages.sampler import vllm_backend
from tests.tiny_checkpoint import DEEPSEEK_V3, write_checkpoint

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14]]


class StandIn:
    """Answers as vLLM would, from a copy of the weights that only `load` renews."""

    def __init__(self, model: Decoder) -> None:
        self.served = copy.deepcopy(model)
        self.loads: list[bool] = []  # zero_first
        self.requests: list[dict[str, Any]] = []
        self.stale = self.raw = False
        self.restarts = 0  # so often are the weights lost

    def load(self, model: Decoder, *, zero_first: bool) -> None:
        self.loads.append(zero_first)
        if not self.stale:
            self.served.load_state_dict(model.state_dict())

    def complete(self, prompts: Sequence[list[int]], requests: Sequence[dict[str, Any]]) -> list[list[SampledTokens]]:
        self.requests += requests
        if self.restarts:
            self.restarts -= 1
            raise WeightsLostError("started again")
        outputs = []
        for prompt, asked in zip(prompts, requests, strict=True):
            names = ("n", "max_tokens", "temperature", "seed", "ignore_eos", "stop_token_ids")
            params = SamplingParams(**{name: asked[name] for name in names})
            (group,) = RolloutEngine(self.served, None).generate([prompt], params)
            scale = asked["temperature"] or 1.0 if self.raw else 1.0  # not what raw log-probs are, but not tempered
            outputs.append(
                [
                    SampledTokens(c.token_ids, [x * scale for x in c.logprobs], finish_reason=c.finish_reason)
                    for c in group
                ]
            )
        return outputs

    def rest(self) -> None:
        self.rested = len(self.loads)


@pytest.fixture(scope="module")
def loaded(base_model: Path) -> tuple[Decoder, Any]:
    return load_model(base_model, dtype="float32")


@pytest.fixture
def engine(loaded: tuple[Decoder, Any]) -> VllmEngine:
    model, tokenizer = loaded
    return VllmEngine(copy.deepcopy(model), tokenizer, StandIn(model))


def ids(outputs: list[list[Any]]) -> list[list[int]]:
    return [completion.token_ids for group in outputs for completion in group]


def move(model: Decoder) -> None:
    """An update that is large enough to be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator))


def test_every_generate_pushes_and_some_check(engine: VllmEngine) -> None:
    params = SamplingParams(n=2, max_tokens=5)
    for _ in range(4):
        engine.generate(PROMPTS, params)
        move(engine.model)
    assert engine.backend.loads == [True, False, False, False]
    assert engine.backend.rested == 4
    of_checks = 2 * len(PROMPTS)  # two temperatures
    assert len(engine.backend.requests) == 3 * of_checks + 4 * len(PROMPTS)  # pushes 1, 2 and 4


def test_completions_are_those_of_the_current_weights(engine: VllmEngine) -> None:
    params = SamplingParams(n=3, max_tokens=6, temperature=0.7)
    before = engine.generate(PROMPTS, params)
    assert engine.generate(PROMPTS, params) == before
    move(engine.model)
    assert ids(engine.generate(PROMPTS, params)) != ids(before)
    assert [len(group) for group in before] == [3, 3, 3]
    assert len({tuple(row) for row in ids(before)}) == 9


def test_stale_weights_are_found_after_an_update(engine: VllmEngine) -> None:
    engine.generate(PROMPTS, SamplingParams(max_tokens=4))
    engine.backend.stale = True
    move(engine.model)
    with pytest.raises(RolloutError, match=r"log-probs of 24 tokens are .* away .* \(push 2\): its weights are stale"):
        engine.generate(PROMPTS, SamplingParams(max_tokens=4))


def test_untempered_logprobs_are_found(engine: VllmEngine) -> None:
    """Greedy tokens alone would not tell: there the two are the same."""
    engine.backend.raw = True
    with pytest.raises(RolloutError, match="logprobs_mode"):
        engine.generate(PROMPTS, SamplingParams(max_tokens=4))


def test_a_nan_logprob_is_found(engine: VllmEngine) -> None:
    with torch.no_grad():
        engine.model.norm.weight[0] = float("nan")
    with pytest.raises(RolloutError, match="nan away"):
        engine.check(PROMPTS, 4)


def test_lost_weights_are_pushed_again(engine: VllmEngine) -> None:
    expected = engine.generate(PROMPTS, SamplingParams(max_tokens=4))
    engine.generate(PROMPTS, SamplingParams(max_tokens=4))
    engine.backend.restarts, engine.backend.loads[:] = MAX_PUSHES - 1, []
    assert engine.generate(PROMPTS, SamplingParams(max_tokens=4)) == expected
    assert engine.backend.loads == [False, True, True]  # another server is zeroed, and checked, as the first was
    engine.backend.restarts = MAX_PUSHES
    with pytest.raises(WeightsLostError, match="started again"):
        engine.generate(PROMPTS, SamplingParams(max_tokens=4))


def test_a_prompt_has_its_seed_whatever_it_is_sampled_with(engine: VllmEngine) -> None:
    params = SamplingParams(n=2, max_tokens=6, seed=3)
    together = engine.generate(PROMPTS, params, sequence_ids=[7, 8, 9])
    first = engine.backend.requests[-len(PROMPTS)]["seed"]
    assert engine.generate(PROMPTS[2:], params, sequence_ids=[9]) == together[2:]
    assert engine.generate(PROMPTS[2:], params, sequence_ids=[10]) != together[2:]
    assert engine.generate(PROMPTS, SamplingParams(n=2, max_tokens=6, seed=4), sequence_ids=[7, 8, 9]) != together
    engine.generate([PROMPTS[0] + together[0][0].token_ids], params, sequence_ids=[7])  # it goes on
    assert engine.backend.requests[-1]["seed"] != first
    seeds = [asked["seed"] for asked in engine.backend.requests]
    assert all(0 <= seed < 1 << 62 for seed in seeds)


def test_greedy_samples_are_asked_for_once(engine: VllmEngine) -> None:
    params = SamplingParams(n=3, max_tokens=4, temperature=0.0)
    (group,) = engine.generate(PROMPTS[:1], params)
    assert len(group) == 3 and group[0] == group[1] == group[2]
    assert engine.backend.requests[-1]["n"] == 1
    (own,) = RolloutEngine(engine.model, engine.tokenizer).generate(PROMPTS[:1], params)
    assert ids([group]) == ids([own])


def test_stop_tokens_are_spelled_out_and_left_out_of_the_text(engine: VllmEngine) -> None:
    stops = list(range(100, 200))
    params = SamplingParams(n=16, max_tokens=6, stop_token_ids=stops)
    (group,) = engine.generate(PROMPTS[:1], params)
    asked = engine.backend.requests[-1]
    assert asked["ignore_eos"] and set(asked["stop_token_ids"]) == {*stops, engine.tokenizer.eos_token_id}
    assert {completion.finish_reason for completion in group} == {"stop", "length"}
    for completion in group:
        stopped = completion.finish_reason == "stop"
        assert stopped == (completion.token_ids[-1] in asked["stop_token_ids"])
        shown = completion.token_ids[:-1] if stopped else completion.token_ids
        shown = [i for i in shown if i != engine.tokenizer.bos_token_id]
        assert completion.text == engine.tokenizer.decode(shown)
        assert len(completion.logprobs) == len(completion.token_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k is 5; expected 0 with vLLM"),
        ({"min_tokens": 2}, "min_tokens is 2; expected 0 with vLLM"),
        ({"temperature": 0.001}, r"temperature is 0\.001; expected 0 or at least 0\.01 with vLLM"),
    ],
)
def test_what_would_change_the_logprobs_is_refused(engine: VllmEngine, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPTS, SamplingParams(max_tokens=4, **options))
    assert engine.backend.loads == []


def test_a_completion_that_vllm_cut_is_an_error(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its max_model_len vLLM ends a completion without a word, and the trainer would take it for one."""
    short = [[SampledTokens([5, 6], [-1.0, -1.0], finish_reason="length")]]
    monkeypatch.setattr(engine.backend, "complete", lambda *_: short)
    with pytest.raises(RolloutError, match=r"after 2 of 4 tokens, of a prompt of 3, .* is its max_model_len too small"):
        engine.generate(PROMPTS[:1], SamplingParams(max_tokens=4))


def test_no_prompts_need_no_vllm(engine: VllmEngine) -> None:
    """A rank may have none."""
    assert engine.generate([], SamplingParams()) == []
    assert engine.backend.loads == []


def test_routed_experts_are_those_of_the_moe_layers() -> None:
    config = ModelConfig.from_dict({"vocab_size": 320, **DEEPSEEK_V3})  # layer 0 is dense, layer 1 has experts
    every = np.arange(5 * 2 * 2, dtype=np.uint8).reshape(5, 2, 2)
    rows = moe_rows(SampledTokens([1, 2, 3], [0.0] * 3, every), 3, config)
    assert rows.dtype == np.int16 and rows.tolist() == every[:, 1:].tolist()
    for wrong in (every[:4], None):
        with pytest.raises(RolloutError, match="--enable-return-routed-experts"):
            moe_rows(SampledTokens([1, 2, 3], [0.0] * 3, wrong), 3, config)


def test_the_state_pushed_is_the_state_dict(tmp_path: Path) -> None:
    """With the router's bias, a buffer, and without the rotary table, which is none of the checkpoint's."""
    model, _ = load_model(write_checkpoint(tmp_path / "moe", **DEEPSEEK_V3), dtype="float32")
    state, expected = whole_state(model), model.state_dict()
    assert state.keys() == expected.keys() and any("e_score_correction_bias" in name for name in state)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_vllm_in_process_ends_before_the_process_group(
    loaded: tuple[Decoder, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(InProcess, "get", lambda *_, **__: events.append("get"))
    monkeypatch.setattr(InProcess, "release", lambda: events.append("release"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: events.append("group"))
    vllm = SimpleNamespace(server_base_url=None, max_model_length=None, gpu_memory_utilization=0.5)
    rollout = SimpleNamespace(max_num_seqs=8, enforce_eager=False, vllm=vllm)
    dist = Dist(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)  # type: ignore[arg-type]
    recipe = SimpleNamespace(rollout=rollout, stages=[])
    vllm_backend(SimpleNamespace(recipe=recipe, param_dtype=torch.float32, dist=dist), loaded[0])  # type: ignore[arg-type]
    assert events == ["get"]
    dist.close()
    assert events == ["get", "release", "group"]
