"""The tokenizer of a from-scratch model: any text comes back, numbers and tags are one token, saving keeps it."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from r1fast.data.tasks import arithmetic, corpus
from r1fast.data.templates import ASSISTANT, BOS, EOS, USER
from r1fast.data.tokenizer import TAGS, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    rows = corpus.documents(6000)
    return train_tokenizer(
        (row.get(name) for row in rows for name in ("text", "prompt", "completion") if name in row), 900
    )


@pytest.mark.parametrize(
    "text",
    [
        "What is 2 + 3 * 4?",
        "计算 2 + 3 * 4?",
        "|special_token|用户想清洁灯|special_token|要清洁灯, 用软布。",
        "<think>first 3 * 4 = 12</think><answer>12</answer>",
        "tabs\tand  spaces\n\nünïcode 🙂 1234567",
        "",
    ],
)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_answers_of_the_task_are_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = {problem.result for split in arithmetic.SPLITS for problem in arithmetic.problems(split)}
    assert [n for n in answers if len(tokenizer(str(n), add_special_tokens=False).input_ids) != 1] == []


@pytest.mark.parametrize("tag", [*TAGS, BOS, EOS, USER, ASSISTANT])
def test_tags_are_one_token(tokenizer: PreTrainedTokenizerFast, tag: str) -> None:
    assert len(tokenizer(f"x{tag}y", add_special_tokens=False).input_ids) == 3


def test_han_characters_are_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    """A phrase in one token would make held-out combinations unknown words."""
    assert len(tokenizer("清洁灯", add_special_tokens=False).input_ids) == 3


def test_saved_and_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "What is 12 + 3 * 4? 先算"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    chat = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == f"{BOS}<｜User｜>hi<｜Assistant｜>"
