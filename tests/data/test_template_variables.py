"""Chat templates with tools, variables and a clock: what a row and a recipe say arrives, and a day stays the same."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from r1fast.config import ConfigError, load_recipe
from r1fast.data.rows import canonical
from r1fast.data.templates import render_chat, render_prompt
from r1fast.data.tokenizer import train_tokenizer
from r1fast.resume import read_run
from r1fast.schema import Recipe
from r1fast.schema_options import GenerateOptions
from r1fast.stages.packed import encode_examples, encode_prompts, render_prompts
from tests.tiny_checkpoint import TEXTS, write_jsonl, write_recipe

# As Qwen3's: tools as JSON, calls in tags, answers of tools in a turn of the user, an empty reasoning on request.
QWEN = """
{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""  # noqa: E501
# As Llama 3.2's: today's date in a system turn, what a tool says as JSON.
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- for m in messages %}{{- m.role + ": " }}{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- "assistant: " }}{%- endif %}"""  # noqa: E501
CHATML = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOOL_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "2+3?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}],
    },
    {"role": "tool", "content": '{"sum": 5,\n "is": "odd"}'},
]


def with_template(template: str | dict[str, str]) -> PreTrainedTokenizerBase:
    made = train_tokenizer(TEXTS, 320)
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def qwen() -> PreTrainedTokenizerBase:
    return with_template(QWEN)


def options(**changes: Any) -> GenerateOptions:
    return GenerateOptions.model_validate({"name": "s", "kind": "sft", "prompt_template": "tokenizer", **changes})


def test_tools_their_calls_and_answers_are_rendered(qwen: PreTrainedTokenizerBase) -> None:
    row = canonical({"messages": TOOL_TURNS, "tools": [TOOL]}, "prompts", "row 1")
    (text,) = render_prompts([row["prompt"]], qwen, options(), tools=[row["tools"]])
    assert text.split("<|im_end|>\n") == [
        f"<|im_start|>system\n# Tools\n{json.dumps(TOOL)}",
        "<|im_start|>user\n2+3?",
        '<|im_start|>assistant\n<tool_call>add {"a": 2, "b": 3}</tool_call>',
        '<|im_start|>user\n<tool_response>\n{"sum": 5,\n "is": "odd"}\n</tool_response>',
        "<|im_start|>assistant\n",
    ]
    (prompt,) = encode_prompts([row], qwen, options())
    assert qwen.decode(prompt.ids) == text


def test_only_the_answer_after_the_tools_is_learned(qwen: PreTrainedTokenizerBase) -> None:
    messages = [*TOOL_TURNS, {"role": "assistant", "content": "It is 5."}]
    row = canonical({"messages": messages, "tools": [TOOL]}, "sft", "row 1")
    (example,) = encode_examples([row], qwen, options())
    assert qwen.decode(example.completion_ids) == "It is 5." + str(qwen.eos_token)
    assert "<tool_call>add" in qwen.decode(example.prompt_ids) and "# Tools" in qwen.decode(example.prompt_ids)


@pytest.mark.parametrize("template", ["chat", "r1_zero", "plain", "few_shot"])
@pytest.mark.parametrize("asked", [{"messages": TOOL_TURNS}, {"prompt": "p", "tools": [TOOL]}], ids=["calls", "tools"])
def test_other_templates_refuse_tools(template: Any, asked: dict) -> None:
    row = canonical(asked, "prompts", "row 1")
    with pytest.raises(ValueError, match=rf"prompt template '{template}' shows no tools.*use 'tokenizer'"):
        render_prompts([row["prompt"]], None, options(prompt_template=template), tools=[row.get("tools")])


def test_a_template_that_leaves_tools_out_is_refused() -> None:
    chatml = with_template(CHATML)
    with pytest.raises(ValueError, match="leaves out the tool add"):
        render_chat(TOOL_TURNS[:1], chatml, tools=[TOOL])
    with pytest.raises(ValueError, match="leaves out the call of add"):
        render_chat(TOOL_TURNS, chatml)
    silent = with_template(CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"))
    with pytest.raises(ValueError, match="leaves out the turn of 'tool'"):
        render_chat([TOOL_TURNS[0], TOOL_TURNS[2]], silent)
    llama = with_template(LLAMA)
    assert f"tool: {json.dumps(TOOL_TURNS[2]['content'])}" in render_chat([TOOL_TURNS[0], TOOL_TURNS[2]], llama)


def test_variables_of_the_template(qwen: PreTrainedTokenizerBase) -> None:
    (thinks,) = render_prompts(["q"], qwen, options())
    (other,) = render_prompts(["q"], qwen, options(chat_template_kwargs={"enable_thinking": False}))
    assert other == thinks + "<think>\n\n</think>\n\n"
    with pytest.raises(ValueError, match=r"does not read 'enable_thinkin'.* did you mean 'enable_thinking'"):
        render_prompts(["q"], qwen, options(chat_template_kwargs={"enable_thinkin": False}))
    with pytest.raises(ValueError, match="add_generation_prompt is what the prompt itself says"):
        render_prompts(["q"], qwen, options(chat_template_kwargs={"add_generation_prompt": False}))


def test_variables_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "stages: [{name: s, kind: sft, train_files: [a.jsonl], chat_template_kwargs: {enable_thinking: false}}]"
    )
    with pytest.raises(ConfigError, match="chat_template_kwargs does not apply: prompt_template chat has no variables"):
        load_recipe(str(file), [])


@pytest.mark.parametrize("template", [LLAMA, {"default": LLAMA, "tool_use": LLAMA}], ids=["one", "several"])
def test_today_is_the_day_that_the_run_says(template: Any) -> None:
    llama = with_template(template)
    assert f"Today Date: {time.strftime('%d %b %Y')}\n" in render_prompt("q", "tokenizer", tokenizer=llama)
    for day, shown in ((date(2024, 2, 9), "09 Feb 2024"), (date(2031, 12, 31), "31 Dec 2031")):
        text = render_prompt("q", "tokenizer", tokenizer=llama, variables={"today": day})
        assert text.startswith(f"{llama.bos_token}Today Date: {shown}\n\nuser: q")
        own = render_prompt("q", "tokenizer", tokenizer=llama, variables={"today": day, "date_string": "then"})
        assert "Today Date: then\n" in own


def test_every_directive_of_the_clock() -> None:
    """In a loop, from a variable, with a template that begins with white space."""
    formats = ["%Y-%m-%d", "%-d %B %y", "%A, %b %e", "%H:%M:%S %p", "%j", "no date"]
    says = "{% for f in " + repr(formats) + " %}{{ strftime_now(f) }};{% endfor %}{{ messages[0].content }}"
    clock = with_template("\n  " + says)
    day = date(2024, 2, 9)
    expected = ";".join(day.strftime(each) for each in formats)
    assert render_chat([{"role": "user", "content": "q"}], clock, today=day) == f"\n{expected};q"


STAGE = {"name": "s", "kind": "sft", "train_files": ["a.jsonl"], "prompt_template": "tokenizer"}


def test_a_run_keeps_its_first_day() -> None:
    recipe = Recipe.model_validate({"stages": [STAGE]})
    assert recipe.date is None and recipe.stages[0].today is None  # type: ignore[union-attr]
    begun = recipe.begun_on("2024-02-09")
    assert begun.date == "2024-02-09" and begun.stages[0].today == date(2024, 2, 9)  # type: ignore[union-attr]
    assert begun.begun_on("2025-01-01") is begun
    saved = Recipe.model_validate(begun.model_dump(mode="json"))  # what config.yaml holds
    assert saved == begun and saved.stages[0].today == date(2024, 2, 9)  # type: ignore[union-attr]
    without = Recipe.model_validate({"stages": [{**STAGE, "prompt_template": "chat"}]})
    assert without.begun_on("2024-02-09").date is None
    for wrong in ("9.2.2024", "2024-02-30", "20240209"):
        with pytest.raises(ValueError, match="date"):
            Recipe.model_validate({"stages": [STAGE], "date": wrong})


def test_a_resumed_run_renders_the_prompts_of_its_first_day(
    command: Callable[..., int], base_model: Path, tmp_path: Path
) -> None:
    """Also where its recipe is given anew, which says no date."""
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "red ?", "completion": "blue"}])
    config = write_recipe(tmp_path / "mine.yaml", {**STAGE, "max_steps": 1}, model={"path": str(base_model)})
    assert command("--config", config, "--output-dir", "run") == 0
    saved = read_run(tmp_path / "run")
    assert saved.recipe.date == date.today().isoformat()
    yesterday = replace(saved, recipe=saved.recipe.model_copy(update={"date": "2024-02-09"}))
    for asked in (yesterday.with_changes(str(config), []), yesterday.with_changes(None, ["seed=3"])):
        assert asked.date == "2024-02-09" and asked.stages[0].today == date(2024, 2, 9)  # type: ignore[union-attr]
    assert yesterday.with_changes(None, ["date=2024-03-01"]).date == "2024-03-01"
