"""What the model is fed: encoding with one BOS and one EOS, which tokens are learned, the packed layout, limits."""

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from r1fast.config import ConfigError
from r1fast.data.rows import Row
from r1fast.data.templates import RESPONSE_FORMATS
from r1fast.data.tokenizer import train_tokenizer
from r1fast.schema import PretrainStage
from r1fast.stages.packed import Example, collate, empty_batch, encode_examples, encode_prompts, length_problems
from r1fast.stages.reward_model import score_examples
from tests.tiny_checkpoint import TEXTS

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"prompt_template": "chat", "response_format": "think_answer", "prefill_think": False}


def options(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**OPTIONS, "chat_template_kwargs": {}, "today": None, **changes})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture
def without_bos() -> PreTrainedTokenizerBase:
    """As Qwen's."""
    found = train_tokenizer(TEXTS, 320)
    found.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    found.bos_token = None
    return found


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_packed_layout() -> None:
    """Two examples by hand: inputs drop each last token; a learned token's input is the one before it."""
    batch = collate([Example([1, 2, 3], [4, 5], {"a": 0.5, "m": [1, 0]}), Example([6], [7], {"a": 2.0, "m": [1]})], CPU)
    assert batch.input_ids_T.tolist() == [1, 2, 3, 4, 6]
    assert (batch.cu_seqlens.tolist(), batch.loss_cu_seqlens.tolist()) == ([0, 4, 5], [0, 2, 3])
    assert batch.loss_index_M.tolist() == [2, 3, 4] and batch.target_ids_M.tolist() == [4, 5, 7]
    assert batch.values["a"].tolist() == [0.5, 2.0] and batch.values["m"].tolist() == [1, 0, 1]
    assert batch.cu_seqlens.dtype == batch.loss_cu_seqlens.dtype == torch.int32


def test_empty_batch_learns_nothing() -> None:
    batch = empty_batch(CPU)
    assert batch.input_ids_T.numel() > 0 and batch.loss_index_M.numel() == batch.target_ids_M.numel() == 0


@pytest.mark.parametrize("template", ["chat", "plain", "r1_zero", "tokenizer"])
def test_one_bos_and_one_eos_whatever_the_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    rows = [{"prompt": "one ?", "completion": "two"}]
    (example,) = encode_examples(rows, tokenizer, options(prompt_template=template, response_format="think_summary"))
    ids = example.prompt_ids + example.completion_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def test_messages_and_prompt_with_completion_are_the_same_example(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "one ?"}, {"role": "assistant", "content": "two"}]
    rows = [{"messages": turns}, {"prompt": "one ?", "completion": "two"}, {"prompt": turns[:1], "completion": "two"}]
    first, *others = encode_examples(rows, tokenizer, options())
    assert others == [first, first]
    assert text_of(tokenizer, first.completion_ids) == f"two{tokenizer.eos_token}"


def test_all_turns_but_the_last_are_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("system", "red"), ("user", "one ?"), ("assistant", "two"), ("user", "three ?"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,) = encode_examples([row], tokenizer, options())
    assert text_of(tokenizer, example.completion_ids) == f"four{tokenizer.eos_token}"
    prompt = text_of(tokenizer, example.prompt_ids)
    assert all(text in prompt for text in ("red", "one ?", "two", "three ?")) and "four" not in prompt


def test_text_is_learned_from_its_first_token(tokenizer: PreTrainedTokenizerBase, without_bos) -> None:
    (example,) = encode_examples([{"text": "red blue"}], tokenizer, options())
    assert example.prompt_ids == [tokenizer.bos_token_id]
    assert text_of(tokenizer, example.completion_ids) == f"red blue{tokenizer.eos_token}"
    (example,) = encode_examples([{"text": "red blue"}], without_bos, options())
    assert example.prompt_ids == [tokenizer.eos_token_id]  # something has to stand before the first token


def test_unmasked_prompts_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "one ?", "completion": "two"}]
    stage = {"name": "base", "kind": "pretrain", "train_files": ["-"], "architecture": {}, "max_steps": 1, **OPTIONS}
    stages = [PretrainStage.model_validate({**stage, "mask_prompt": mask}) for mask in (True, False)]
    masked, whole = (encode_examples(rows, tokenizer, stage)[0] for stage in stages)
    assert whole.prompt_ids + whole.completion_ids == masked.prompt_ids + masked.completion_ids
    assert len(whole.prompt_ids) == 1 < len(masked.prompt_ids)


@pytest.mark.parametrize("completion", ["<think> yes </think> no", " yes </think> no"], ids=["opened", "not-opened"])
def test_prefilled_prompts_open_the_reasoning_once(tokenizer: PreTrainedTokenizerBase, completion: str) -> None:
    rows = [{"prompt": "one ?", "completion": completion}]
    (example,) = encode_examples(rows, tokenizer, options(prefill_think=True))
    text = text_of(tokenizer, example.prompt_ids + example.completion_ids)
    assert text.count("<think>") == 1 and text.endswith(f"<think> yes </think> no{tokenizer.eos_token}")
    assert text_of(tokenizer, example.prompt_ids).endswith("<think>")


def test_reasoning_of_a_turn_is_learned_in_the_stage_format(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "\n3", "reasoning_content": "red\n"}]
    for name, layout in RESPONSE_FORMATS.items():
        for row in ({"messages": turns}, {"prompt": "1+2?", "completion": turns[1:]}):
            (example,) = encode_examples([row], tokenizer, options(response_format=name))
            learned = text_of(tokenizer, example.completion_ids)
            assert learned == layout.render("red", "3") + tokenizer.eos_token


@pytest.mark.parametrize("ending", ["", "{eos}", "{eos}\n", " {eos}{eos}"], ids=repr)
def test_an_end_token_in_the_data_is_not_added_again(tokenizer: PreTrainedTokenizerBase, ending: str) -> None:
    written = "red" + ending.format(eos=tokenizer.eos_token)
    rows = [{"prompt": "one ?", "completion": written}, {"text": written}]
    for example in encode_examples(rows, tokenizer, options()):
        ids = example.completion_ids
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    (example,) = score_examples(tokenizer, [{"prompt": "one ?"}], [written], options())
    assert example.completion_ids.count(tokenizer.eos_token_id) == 2  # the second is only a target


@pytest.mark.parametrize("written", ["{eos}\n", "<think>", " <think>{eos}"])
def test_a_row_of_which_nothing_is_left_is_refused(tokenizer: PreTrainedTokenizerBase, written: str) -> None:
    rows = [{"prompt": "one ?", "completion": text} for text in ("red", written.format(eos=tokenizer.eos_token))]
    with pytest.raises(ConfigError, match=r"^row 2: .*nothing is left to learn"):
        encode_examples(rows, tokenizer, options(prefill_think=True))


@pytest.mark.parametrize(
    ("ending", "completion", "learned"),
    [
        ("<think>\n", "<think>red</think>5", "red</think>5"),
        ("<think>\n", "<think>\nred</think>5", "red</think>5"),
        ("<think>\n", "\n<think>\n\nred</think>5", "\nred</think>5"),
        ("<think>", "<think>\nred</think>5", "\nred</think>5"),
        ("<think>\n", "red</think>5", "red</think>5"),
        ("<think>\n\n</think>\n\n", "<think></think>\n5", "5"),
        ("", "<think>red</think>5", "<think>red</think>5"),
    ],
)
def test_a_template_that_opens_the_reasoning_does_so_once(
    tokenizer: PreTrainedTokenizerBase, ending: str, completion: str, learned: str
) -> None:
    """R1-Distill's ends in <think> and a line break, others in an empty reasoning."""
    opening = copy.deepcopy(tokenizer)
    opening.chat_template = tokenizer.chat_template + f"{{{{ {ending!r} }}}}"
    rows = [{"prompt": "q?", "completion": completion}]
    how = options(prompt_template="tokenizer", response_format="think_summary")
    (example,) = encode_examples(rows, opening, how)
    assert text_of(tokenizer, example.completion_ids) == learned + tokenizer.eos_token
    assert text_of(tokenizer, example.prompt_ids).endswith(f"<｜Assistant｜>{ending}")


class Failing:
    """A tokenizer that cannot encode one word, and says so as Rust's bindings do."""

    bos_token_id, eos_token_id, eos_token = 0, 1, "<eos>"

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        if any("bad" in text for text in texts):
            raise self.error("no such\nword")
        return {"input_ids": [[2] for _ in texts]}


class PanicException(BaseException):
    pass


@pytest.mark.parametrize("error", [OverflowError, PanicException])
@pytest.mark.parametrize("index", [0, 3, 6])
def test_the_row_that_a_tokenizer_fails_on_is_named(error: type[BaseException], index: int) -> None:
    rows = [Row({"prompt": "q", "completion": "bad" if i == index else "good"}, f"a.jsonl:{i + 1}") for i in range(7)]
    message = rf"^a.jsonl:{index + 1}: the tokenizer fails on it: {error.__name__}: no such word$"
    with pytest.raises(ConfigError, match=message):
        encode_examples(rows, Failing(error), options(prompt_template="plain"))


def test_an_interrupt_is_no_failure_of_a_row() -> None:
    with pytest.raises(KeyboardInterrupt):
        encode_examples(
            [{"prompt": "bad", "completion": "x"}], Failing(KeyboardInterrupt), options(prompt_template="plain")
        )


def test_empty_prompt_needs_a_bos_token(tokenizer: PreTrainedTokenizerBase, without_bos) -> None:
    """Without one there is no input from which the first token could be predicted."""
    (example,) = encode_examples([{"prompt": "", "completion": "x"}], tokenizer, options(prompt_template="plain"))
    assert example.prompt_ids == [tokenizer.bos_token_id]
    with pytest.raises(ValueError, match="the prompt is empty, and the tokenizer"):
        encode_prompts([{"prompt": "one"}, {"prompt": ""}], without_bos, options(prompt_template="plain"))


def test_lengths_count_every_token(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "one ?", "completion": "two"}, {"prompt": "red ? " * 5, "completion": "blue"}]
    units = [[example] for example in encode_examples(rows, tokenizer, options())]
    longest = max(len(unit[0].prompt_ids) + len(unit[0].completion_ids) for unit in units)
    fits = {"max_length": longest, "max_tokens_per_microbatch": longest - 1}
    assert not list(length_problems(units, rows, SimpleNamespace(**fits)))  # type: ignore[arg-type]
    for name, limit in fits.items():
        (problem,) = length_problems(units, rows, SimpleNamespace(**{**fits, name: limit - 1}))  # type: ignore[arg-type]
        assert re.match(rf"row 2: the row 'red .* {limit} tokens, more than {name} = {limit - 1}", problem)
