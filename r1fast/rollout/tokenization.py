"""Prompts as token ids: text, the same for training, evaluation and `generate`, and chats."""

import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from r1fast.data.rows import canonical
from r1fast.data.templates import Messages, check_variables, render_chat
from r1fast.wording import one_line

Chat = Sequence[Mapping[str, Any]]  # {"role", "content"}
RawPrompt = str | Sequence[int] | Chat


def is_chat(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def encode_raw_prompts(
    prompts: Sequence[RawPrompt], tokenizer: PreTrainedTokenizerBase | None, **chat_options: Any
) -> list[list[int]]:
    """Text as the tokenizer encodes it by default, chats by its chat template (chat_options: render_chat's), ids as
    they are. ValueError where the tokenizer is missing, or cannot."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    chats = [(index, prompt) for index, prompt in enumerate(prompts) if is_chat(prompt)]
    if tokenizer is None:
        if texts or chats:
            kind = "string prompts" if texts else "messages"
            raise ValueError(f"got {kind} but no tokenizer; give RolloutEngine one, or prompts as token ids")
        return [_token_ids(prompt, index) for index, prompt in enumerate(prompts)]
    of_texts = iter(encode_text_prompts(texts, tokenizer))
    # The template writes BOS itself.
    rendered = [_rendered(chat, tokenizer, f"prompt {index}", **chat_options) for index, chat in chats]  # type: ignore[arg-type]
    of_chats = iter(encode_texts(rendered, tokenizer))
    return [
        next(of_texts) if isinstance(prompt, str) else next(of_chats) if is_chat(prompt) else _token_ids(prompt, index)
        for index, prompt in enumerate(prompts)
    ]


def _token_ids(prompt: Any, index: int) -> list[int]:
    """A list, an array or a tensor of integers."""
    if not isinstance(prompt, Mapping):
        with suppress(TypeError):
            return list(map(operator.index, prompt))
    raise ValueError(f"prompt {index} is {prompt!r:.80}; expected text, a list of token ids, or messages")


def _rendered(
    chat: Chat,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """Messages are read as those of a data set's rows."""
    if not tokenizer.chat_template:
        advice = "render the prompt yourself (r1fast.render_prompt) and give generate the text or its token ids"
        raise ValueError(f"{where} is a chat, and the tokenizer has no chat template; {advice}")
    asked = [dict(turn) if isinstance(turn, Mapping) else turn for turn in chat]
    opening: Messages = []
    if continue_final_message:
        asked, opening = asked[:-1], asked[-1:]
        if opening[0].get("role") != "assistant" or not isinstance(opening[0].get("content"), str):
            got = "expected {role: assistant, content: string} as the last message, whose content the model continues"
            raise ValueError(f"{where}: continue_final_message: {got}")
    row = canonical({"prompt": asked, "tools": variables.pop("tools", None)}, "prompts", where)
    messages, variables["tools"] = row["prompt"], row["tools"]
    try:
        check_variables(str(tokenizer.chat_template), tuple(name for name in variables if name != "tools"))
        return render_chat([*messages, *opening], tokenizer, continue_final_message=continue_final_message, **variables)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text by default: its BOS token (Llama), or nothing (Qwen)."""
    inside, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(whole) - len(inside) + 1):
        if whole[start : start + len(inside)] == inside:
            return list(whole[:start])
    raise ValueError(f"the tokenizer encodes 'a' as {inside}, and with its special tokens as {whole}, without those")


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids, none added; ValueError for whatever the tokenizer raises."""
    if not texts:
        return []
    try:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    except BaseException as error:
        # Rust's panics come as an exception that is no Exception, and whose class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer fails on it: {one_line(error)}") from error


def encode_text_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts as the tokenizer encodes them by default, but open at the end, as a prompt has to be.

    A text that begins with what the tokenizer would put there, such as a chat template's BOS token, gets no second one.
    """
    if not texts:
        return []
    leading = leading_ids(tokenizer)
    encoded = encode_texts(texts, tokenizer)
    return [ids if ids[: len(leading)] == leading else [*leading, *ids] for ids in encoded]
