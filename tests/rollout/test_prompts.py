"""What the engine makes of text, token ids and messages, and how it samples where nobody says how."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from r1fast import RolloutEngine, SamplingParams, load_model
from r1fast.rollout.sampling import default_params
from tests.zoo import fields, write_checkpoint

USER = {"role": "user", "content": "What is 1 + 2 ?"}
TURNS = [USER, {"role": "assistant", "content": "3"}, {"role": "user", "content": "red ?"}]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer puts BOS before a text, and so does its chat template."""
    folder = tmp_path_factory.mktemp("chat")
    write_checkpoint(folder, **fields("llama", initializer_range=0.2, max_position_embeddings=256))
    said = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "max_new_tokens": 5}
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RolloutEngine:
    """Keeps what it was asked: `asked`, a pair of prompt ids and parameters for each call."""
    engine = RolloutEngine(*load_model(folder, dtype=torch.float32))
    asked: list[tuple[list[list[int]], Any]] = []
    sample = engine._sample
    monkeypatch.setattr(
        engine, "_sample", lambda ids, params, *rest: asked.append((ids, params)) or sample(ids, params, *rest)
    )
    monkeypatch.setattr(engine, "asked", asked, raising=False)
    return engine


def test_a_chat_is_what_transformers_renders(engine: RolloutEngine, folder: Path) -> None:
    """With one BOS: the template's, and no second one of the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine.chat(TURNS, GREEDY)
    engine.chat([TURNS, [USER]], GREEDY)
    engine.generate([[USER], "red", [7, 8]], GREEDY)
    turns, user = (tokenizer.apply_chat_template(x, add_generation_prompt=True)["input_ids"] for x in (TURNS, [USER]))
    assert [ids for ids, _ in engine.asked] == [[turns], [turns, user], [user, tokenizer("red")["input_ids"], [7, 8]]]
    assert user.count(tokenizer.bos_token_id) == 1 and tokenizer("red")["input_ids"][0] == tokenizer.bos_token_id


def test_one_string_is_one_prompt(engine: RolloutEngine) -> None:
    assert engine.generate("red red", GREEDY) == engine.generate(["red red"], GREEDY)


def test_prompts_may_be_any_iterable_and_ids_any_integers(engine: RolloutEngine) -> None:
    want = engine.generate([[5, 6], [7, 8]], GREEDY)
    for prompts in (torch.tensor([[5, 6], [7, 8]]), np.array([[5, 6], [7, 8]]), iter(((5, 6), (7, 8)))):
        assert engine.generate(prompts, GREEDY) == want
    assert all(type(i) is int for ids, _ in engine.asked for prompt in ids for i in prompt)


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        (None, "prompts is None; expected a list of prompts"),
        ({"prompt": "red"}, "prompts is {'prompt': 'red'}; expected a list of prompts"),
        (["red", None], "prompt 1 is None; expected text, a list of token ids, or messages"),
        ([[1.5]], r"prompt 0 is \[1.5\]; expected text"),
        ([["a", "b"]], r"prompt 0 is \['a', 'b'\]; expected text"),
        ([{"prompt_token_ids": [5]}], "prompt 0 is {'prompt_token_ids': .*; expected text"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(engine: RolloutEngine, prompts: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        engine.generate(prompts, GREEDY)
    with pytest.raises(ValueError, match=r"params is \[SamplingParams.*expected one"):
        engine.generate(["red"], [GREEDY])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prompt 0: column 'tools' is .*expected a list of {type: function"):
        engine.chat([USER], GREEDY, chat_template_kwargs={"tools": [{"type": "function"}]})


def test_an_answer_that_has_begun_goes_on(engine: RolloutEngine) -> None:
    begun = [USER, {"role": "assistant", "content": "<think> one"}]
    engine.chat(begun, GREEDY, continue_final_message=True)
    engine.chat([USER], GREEDY)
    (((going_on,), _), ((asked,), _)) = engine.asked
    assert engine.tokenizer.decode(going_on) == engine.tokenizer.decode(asked) + "<think> one"
    with pytest.raises(ValueError, match=r"prompt 0: prompt ends with a turn of 'assistant'"):
        engine.chat(begun)
    with pytest.raises(ValueError, match=r"continue_final_message: expected {role: assistant"):
        engine.chat([USER], continue_final_message=True)


def test_a_template_gets_its_variables(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ messages[0].content }}{% if enable_thinking %}yes{% endif %}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    engine.chat([USER], GREEDY, chat_template_kwargs={"enable_thinking": True})
    assert engine.tokenizer.decode(engine.asked[0][0][0]) == USER["content"] + "yes"
    with pytest.raises(ValueError, match=r"prompt 0: .*does not read 'enable_thought'.*did you mean 'enable_thinking'"):
        engine.chat([USER], GREEDY, chat_template_kwargs={"enable_thought": True})


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", r"messages is 'hello'; expected messages.*generate takes text"),
        ([[USER], "hello"], "conversation 1 is 'hello'"),
        ([{"role": "user"}], r"prompt 0: prompt\[0\] is .*expected {role, content: string}"),
        ([{"role": "robot", "content": "a"}], r"prompt\[0\] has role 'robot'"),
        ([USER, {"role": "user", "content": [{"type": "image", "image": "x"}]}], "the models read text only"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused(engine: RolloutEngine, messages: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        engine.chat(messages)


def test_a_tokenizer_without_a_template_says_what_to_do(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"prompt 1 is a chat, .*no chat template; render .*r1fast\.render_prompt"):
        engine.generate(["a", [USER]])


def test_defaults_are_those_of_the_checkpoint(engine: RolloutEngine) -> None:
    assert engine.default_sampling_params() == SamplingParams(max_tokens=5, temperature=0.5, top_p=0.9, top_k=20)
    assert engine.chat([USER]) == engine.chat([USER], engine.default_sampling_params())
    engine.generate("red " * 252)  # the answer gets what is left
    assert len(engine.asked[-1][0][0]) + 5 > engine.longest


def test_what_the_caller_says_is_not_changed(engine: RolloutEngine) -> None:
    """Not even by defaults of the checkpoint for what the caller left alone."""
    params = SamplingParams(n=2, max_tokens=12, seed=4, ignore_eos=True)
    engine.model.generation_config, said = {}, engine.model.generation_config
    plain = engine.generate([[5, 6]], params)
    engine.model.generation_config = said
    assert engine.generate([[5, 6]], params) == plain


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, SamplingParams(max_tokens=1024)),
        ({"top_k": -1, "temperature": None, "do_sample": False, "max_length": 20}, SamplingParams(max_tokens=1024)),
        ({"max_new_tokens": 32768}, SamplingParams(max_tokens=4095)),
    ],
)
def test_default_params(said: dict, expected: SamplingParams) -> None:
    assert default_params(said, 4095) == expected


@pytest.mark.parametrize("said", [{"temperature": "hot"}, {"top_p": 0}, {"top_k": 2.5}, {"max_new_tokens": True}])
def test_defaults_that_cannot_be_name_the_file(said: dict) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: .*(" + "|".join(said) + ") is .*expected"):
        default_params(said, 100)


def test_penalties_that_are_not_applied_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "r1fast"):
        default_params({"repetition_penalty": 1.1, "min_p": 0.0, "presence_penalty": 1.5}, 100)
    assert caplog.messages == ["generation_config.json: repetition_penalty 1.1, presence_penalty 1.5: not applied"]
