"""Response formats and prompt templates: what is well formed, and the exact strings of the papers and models."""

import pytest

from r1fast.data.templates import (
    FEW_SHOT_STOP,
    RESPONSE_FORMATS,
    get_response_format,
    render_prompt,
)

THINK_ANSWER = RESPONSE_FORMATS["think_answer"]
SPECIAL = RESPONSE_FORMATS["special_token"]
SUMMARY = RESPONSE_FORMATS["think_summary"]


class FakeTokenizer:
    """What templates ask of a tokenizer."""

    def __init__(self, bos_token="<bos>", chat_template=None):
        self.bos_token, self.eos_token = bos_token, "<eos>"
        self.chat_template = chat_template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "<bos>" + "".join(f"[{m['role']}]{m['content']}" for m in messages) + self.chat_template


@pytest.mark.parametrize("name", list(RESPONSE_FORMATS))
def test_parse_reads_back_what_render_wrote(name):
    layout = RESPONSE_FORMATS[name]
    parsed = layout.parse(layout.render("3*4 is 12\n\n2+12 is 14", "it is 14"))
    assert (parsed.reasoning, parsed.answer, parsed.well_formed) == ("3*4 is 12\n\n2+12 is 14", "it is 14", True)


def test_render_is_the_layout_of_the_papers():
    assert THINK_ANSWER.render("R", "A") == "<think>R</think><answer>A</answer>"
    assert SPECIAL.render("R", "A") == "|special_token|R|special_token|A"
    assert SUMMARY.render("R", "A") == "<think>\nR\n</think>\n\nA"


@pytest.mark.parametrize("name", list(RESPONSE_FORMATS))
def test_prefilled_reasoning_is_well_formed_without_its_opening_tag(name):
    layout = RESPONSE_FORMATS[name]
    completion = layout.render("some thought", "14").removeprefix(layout.prefill)
    assert layout.parse(completion, prefilled=True).well_formed
    assert not layout.parse(completion).well_formed
    assert not layout.parse(layout.prefill + completion, prefilled=True).well_formed, "a second opening tag"
    assert layout.is_prefilled("question" + layout.prefill) and not layout.is_prefilled(layout.prefill + "question")


MALFORMED = {
    "empty think": "<think></think><answer>14</answer>",
    "blank think": "<think> \n\t </think><answer>14</answer>",
    "three characters": "<think>a b c</think><answer>14</answer>",
    "empty answer": "<think>real thought</think><answer> </answer>",
    "text after the answer": "<think>real thought</think><answer>14</answer> and more",
    "text after it on a line of its own": "<think>real thought</think><answer>14</answer>\nmore",
    "text before": "Well: <think>real thought</think><answer>14</answer>",
    "text between": "<think>real thought</think> so <answer>14</answer>",
    "nested think": "<think>real <think>thought</think></think><answer>14</answer>",
    "repeated think": "<think>real thought</think><think>again</think><answer>14</answer>",
    "repeated answer": "<think>real thought</think><answer>13</answer><answer>14</answer>",
    "answer closed inside think": "<think>real thought</answer></think><answer>14",
    "answer inside think": "<think>real thought <answer>14</answer></think>",
    "wrong order": "<answer>14</answer><think>real thought</think>",
    "unclosed answer": "<think>real thought</think><answer>14",
    "unclosed think": "<think>real thought<answer>14</answer>",
    "no tags": "14",
    "nothing": "",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_think_answer(text):
    assert not THINK_ANSWER.parse(text).well_formed


def test_whitespace_around_tags_is_tolerated():
    parsed = THINK_ANSWER.parse("\n<think>\nreal thought\n</think>\n<answer>\n14\n</answer>\n")
    assert (parsed.reasoning, parsed.answer, parsed.well_formed, parsed.closed) == ("real thought", "14", True, True)
    assert SUMMARY.parse("<think>real thought</think>14").well_formed


@pytest.mark.parametrize(
    "text",
    [
        "|special_token|thought|special_token|",
        "|special_token|thought",
        "|special_token||special_token|14",
        "thought|special_token|14",
        "|special_token|thought|special_token|14|special_token|15",
        "x |special_token|thought|special_token|14",
    ],
)
def test_malformed_special_token(text):
    assert not SPECIAL.parse(text).well_formed


def test_malformed_text_still_gives_its_last_answer():
    assert THINK_ANSWER.parse(MALFORMED["repeated answer"]).answer == "14"
    assert THINK_ANSWER.parse(MALFORMED["unclosed think"]).reasoning == "real thought"
    unclosed = THINK_ANSWER.parse(MALFORMED["unclosed answer"])
    assert (unclosed.answer, unclosed.closed) == ("14", False)
    assert THINK_ANSWER.parse("14").answer is None
    assert SPECIAL.parse("thought|special_token|14").answer == "14"
    assert SPECIAL.parse("|special_token|thought goes on").answer is None
    assert SUMMARY.parse("<think>\ncut off in the mid").answer is None
    assert SUMMARY.parse("<think>\ncut off in the mid").reasoning == "cut off in the mid"


def test_r1_zero_is_the_papers_text():
    expected = (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
        "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: what is {2+3}*4?. Assistant:"
    )
    assert render_prompt("what is {2+3}*4?", "r1_zero") == expected
    assert render_prompt([{"role": "user", "content": "what is {2+3}*4?"}], "r1_zero") == expected
    assert render_prompt("what is {2+3}*4?", "r1_zero", prefill_think=True) == expected + " <think>"


def test_chat_is_the_released_models_layout():
    assert render_prompt("q", "chat") == "<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜>"
    assert render_prompt("q", "chat", prefill_think=True).endswith("q<｜Assistant｜><think>\n")
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na1"},
        {"role": "user", "content": "q2"},
    ]
    assert render_prompt(turns, "chat") == (
        "<｜begin▁of▁sentence｜>be brief<｜User｜>q1<｜Assistant｜>\n\na1<｜end▁of▁sentence｜>"
        "<｜User｜>q2<｜Assistant｜>"
    )


def test_few_shot_shows_problem_solution_summary():
    examples = [{"prompt": "1+1?", "reasoning": "one more than one", "answer": "2"}]
    assert render_prompt("2+2?", "few_shot", examples=examples) == (
        "Problem: 1+1?\nSolution: |special_token|one more than one|special_token|Summary: 2"
        + FEW_SHOT_STOP
        + " 2+2?\nSolution:"
    )
    assert "<think>one more than one</think><answer>Summary: 2</answer>" in render_prompt(
        "2+2?", "few_shot", examples=examples, response_format="think_answer"
    )
    assert render_prompt("2+2?", "few_shot").count("Problem:") == 3


def test_plain_is_the_prompt_itself():
    assert render_prompt("2+2=", "plain") == "2+2="
    assert render_prompt("2+2=", "plain", prefill_think=True, response_format="special_token") == "2+2=|special_token|"


def test_tokenizer_template_is_not_prefilled_twice():
    opens = FakeTokenizer(chat_template="[assistant]<think>\n")
    plain = FakeTokenizer(chat_template="[assistant]")
    assert render_prompt("q", "tokenizer", tokenizer=opens, prefill_think=True) == "<bos>[user]q[assistant]<think>\n"
    assert render_prompt("q", "tokenizer", tokenizer=plain, prefill_think=True) == "<bos>[user]q[assistant]<think>\n"


def test_chat_without_a_bos_token_begins_with_the_user():
    assert render_prompt("q", "chat", tokenizer=FakeTokenizer(bos_token=None)).startswith("<｜User｜>")


class FailingTemplate(FakeTokenizer):
    """A chat template is a program: it may raise, and it may forget a turn."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        if messages[0]["role"] == "system":
            raise RuntimeError("no system\nrole here")
        return messages[-1]["content"]


def test_a_chat_template_that_fails_or_forgets_is_an_error():
    tokenizer = FailingTemplate(chat_template="x")
    assert render_prompt("q", "tokenizer", tokenizer=tokenizer) == "q"
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    with pytest.raises(ValueError, match="chat template fails on it: RuntimeError: no system role here"):
        render_prompt(asked, "tokenizer", tokenizer=tokenizer)
    turns = [("user", "one"), ("assistant", "<think>hm</think>two"), ("user", "three")]
    messages = [{"role": role, "content": content} for role, content in turns]
    with pytest.raises(ValueError, match="leaves out the turn of 'user' 'one'"):
        render_prompt(messages, "tokenizer", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="leaves out the turn of 'assistant' 'two'"):
        render_prompt(messages[1:], "tokenizer", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_response_format("think_anser"), "did you mean 'think_answer'"),
        (lambda: render_prompt("q", "tokenizer"), "needs a tokenizer with a chat_template"),
        (lambda: render_prompt([{"role": "user", "content": "a"}] * 2, "r1_zero"), "takes one user message"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
