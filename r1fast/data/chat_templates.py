"""Prompt templates as Jinja: a saved model carries one, by which `apply_chat_template` gives its training's prompts.

With add_generation_prompt the token ids are those of the stage's prompts, token for token: rendering here writes out
what the tokenizer puts before a text by default, because chats are encoded without it. Without, the same text goes on
with the assistant's turn, as in supervised fine-tuning.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from r1fast.data.templates import ASSISTANT, PROMPT_TEMPLATES, USER, get_response_format, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_ONE_QUESTION = (
    "{%- if messages[0]['role'] != 'user' or messages|length > 2"
    " or messages|length == 2 and messages[1]['role'] != 'assistant' -%}"
    "{{ raise_exception('this model was trained on single questions: expected one user message') }}"
    "{%- endif -%}"
)


def chat_template(
    template: str,
    *,
    tokenizer: "Tokenizer",
    response_format: str | None = None,
    prefill_think: bool = False,
    leading: str = "",
    variables: Mapping[str, Any] | None = None,
) -> str | dict[str, str] | None:
    """The Jinja template that renders what render_prompt does with these options; None: the tokenizer's own does.

    leading: the text of the special tokens that the tokenizer puts before a text by default.
    variables: of the tokenizer's own template; where a call gives them none, they have these values.
    `few_shot` holds worked examples, which are no chat: None.
    """
    chosen = PROMPT_TEMPLATES[template]
    prefill = get_response_format(response_format or chosen.response_format).prefill if prefill_think else ""
    if template == "chat":
        return _chat(tokenizer, prefill, leading)
    if template == "tokenizer":
        return _tokenizers_own(tokenizer, prefill, variables or {})
    if template == "few_shot":
        return None
    start = _write(leading + chosen.before)
    if leading and not chosen.before:  # a question that begins with it gets no second one
        start = "{%- if not messages[0]['content'].startswith(" + _quote(leading) + ") -%}" + start + "{%- endif -%}"
    gap = chosen.gap if prefill else ""
    end = _write(tokenizer.eos_token or "")
    return (
        f"{_ONE_QUESTION}{start}{{{{- messages[0]['content'] -}}}}{_write(chosen.after)}"
        f"{{%- if messages|length == 2 -%}}{_write(gap)}{{{{- messages[1]['content'] -}}}}{end}"
        f"{{%- elif add_generation_prompt -%}}{_write(gap + prefill)}{{%- endif -%}}"
    )


def _chat(tokenizer: "Tokenizer", prefill: str, leading: str) -> str:
    """As templates.py renders it: earlier assistant turns lose their reasoning, the last message is whole."""
    bos = tokenizer.bos_token or ""
    return (
        f"{_write(bos if bos.startswith(leading) else leading + bos)}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{{- message['content'] -}}"
        "{%- elif message['role'] == 'user' -%}" + _write(USER) + "{{- message['content'] -}}"
        "{%- elif message['role'] == 'assistant' -%}" + _write(ASSISTANT) + "{%- if loop.last -%}"
        "{{- message['content'] -}}{%- else -%}{{- message['content'].split('</think>')[-1] -}}{%- endif -%}"
        + _write(tokenizer.eos_token or "")
        + "{%- else -%}{{ raise_exception('roles are system, user and assistant, got ' + message['role']) }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}" + _write(ASSISTANT + prefill) + "{%- endif -%}"
    )


def _tokenizers_own(tokenizer: "Tokenizer", prefill: str, variables: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The tokenizer's templates with `variables`, which open the reasoning at the end where they do not themselves."""
    rendered = render_prompt("a", "tokenizer", tokenizer=tokenizer, variables=variables) if prefill else ""
    end = "" if rendered.rstrip().endswith(prefill.rstrip()) else prefill
    if not end and not variables:
        return None
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        return {name: _extended(own, end, variables) for name, own in templates.items()}
    return _extended(templates, end, variables)


def _extended(own: str, end: str, variables: Mapping[str, Any]) -> str:
    # The plus keeps the blanks of the template itself.
    start = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif +%}}"
        for name, value in variables.items()
    )
    if end:  # Jinja drops one newline at the end of a template; here that is no longer the end
        own = own.removesuffix("\n") + "{%+ if add_generation_prompt %}{{ " + _quote(end) + " }}{% endif %}"
    return start + own


def _literal(value: Any) -> str:
    """As Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quote(name)}: {_literal(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _write(text: str) -> str:
    return "{{- " + _quote(text) + " -}}" if text else ""


def _quote(text: str) -> str:
    """A Jinja string: its escapes are those of Python, of which JSON's are a part."""
    return json.dumps(text, ensure_ascii=False)
