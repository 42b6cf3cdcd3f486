"""Text prompts as token ids, the same for training, evaluation and `generate`."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from r1fast.wording import one_line


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
