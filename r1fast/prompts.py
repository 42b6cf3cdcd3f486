"""The prompts that stages sample from and learn after, for use outside of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from transformers import PreTrainedTokenizerBase

from r1fast.data.rows import canonical
from r1fast.data.templates import PROMPT_TEMPLATES, get_response_format
from r1fast.schema_options import GenerateOptions
from r1fast.stages.packed import encode_prompts, render_prompts
from r1fast.wording import did_you_mean

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]


@overload
def render_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, prompt_template: str = ..., response_format: str = ...,
    prefill_think: bool = ..., chat_template_kwargs: Mapping[str, Any] | None = ..., tokenize: Literal[False] = ...,
) -> str: ...  # fmt: skip


@overload
def render_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, prompt_template: str = ..., response_format: str = ...,
    prefill_think: bool = ..., chat_template_kwargs: Mapping[str, Any] | None = ..., tokenize: Literal[True],
) -> list[int]: ...  # fmt: skip


def render_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_template: str = "tokenizer",
    response_format: str = "think_answer",
    prefill_think: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tokenize: bool = False,
) -> str | list[int]:
    """The prompt of a stage with these options, by the code of the stages, as text or (tokenize) as token ids.

    prompt: a question, messages ([{"role", "content"}, ..]), or a row of a data set under any of the names that stages
    read (`prompt`, `messages`, `problem`, with `system`, ..).
    prompt_template: "tokenizer", the tokenizer's own chat template, is that of the training for a model trained here;
    before the training give the stage's own values of these four options.
    Ids are what the model saw: `RolloutEngine.generate([ids])`. Text that is given to `generate` gets the tokenizer's
    BOS where it has none yet; a chat template of others may mean to have none.
    ValueError for a row without a prompt, an unknown name, or messages that the template cannot render.
    """
    if prompt_template not in PROMPT_TEMPLATES:
        hint = did_you_mean(prompt_template, PROMPT_TEMPLATES)
        expected = f"expected one of {', '.join(PROMPT_TEMPLATES)}{hint}"
        raise ValueError(f"unknown prompt template {prompt_template!r}, {expected}")
    get_response_format(response_format)
    if chat_template_kwargs and prompt_template != "tokenizer":
        raise ValueError(
            f"chat_template_kwargs are of the tokenizer's template; {prompt_template!r} reads none: drop them"
        )
    options: GenerateOptions = GenerateOptions.model_construct(
        prompt_template=prompt_template,  # type: ignore[arg-type]
        response_format=response_format,  # type: ignore[arg-type]
        prefill_think=prefill_think,
        chat_template_kwargs=dict(chat_template_kwargs or {}),
    )
    columns = prompt if isinstance(prompt, Mapping) else {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
    row = canonical(columns, "prompts", "the prompt")
    if tokenize:
        return encode_prompts([row], tokenizer, options)[0].ids
    return render_prompts([row["prompt"]], tokenizer, options, tools=[row.get("tools")])[0]
