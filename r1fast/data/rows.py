"""What a row holds, under one set of column names. Nothing is dropped: it is used, kept beside, or refused.

    prompts {prompt, answer}   sft {messages} | {prompt, completion} | {text}   pairs {prompt, chosen, rejected}
    labels {prompt, response, label (1 = safe)}

- A missing column is taken from an alias (those of TRL, open-r1 and verl), which stays beside it. Of two aliases of
  equal rank that differ, none is taken: which one is meant is not known.
- Alpaca's `input` and Dolly's `context` belong to `instruction`: the prompt is both, with a blank line between. A
  column `system` or `system_prompt` is the prompt's system turn, `tools` (a list, or its JSON) goes to the tokenizer's
  chat template. Images and the like, which others put into a prompt and no template here does, are refused.
- prompt, completion, chosen, rejected and response hold text, a list of its parts, or a chat (chats.py). A chat's last
  turn, the assistant's, is what is learned or scored; its earlier turns are the prompt, or repeat it, or go on after
  it. pairs and labels then need no `prompt` of their own.
- An sft row of several forms is read as messages (or ShareGPT's conversations), else as prompt and completion, else as
  text.
- The reasoning_content (or reasoning, thinking) of the last turn is rendered in the response format of the stage; so is
  an sft row's column of such a name, unless what is learned holds a reasoning of its own. That of earlier turns is left
  to the template. The last turn calls no tool: what a call looks like is the template's matter.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from r1fast.data.chats import REASONING, REASONING_ENDS, chat, reasoning_of, says_nothing, shown, text_or_chat, tools_of
from r1fast.data.templates import Messages
from r1fast.wording import did_you_mean

Kind = Literal["prompts", "sft", "pairs", "labels"]
Target = str | Messages  # text, or a chat of one turn that has a reasoning
# Canonical column -> other names for it: groups in the order in which they are tried.
_PROMPT = (("problem", "question", "instruction", "query"),)
ALIASES: dict[str, dict[str, tuple[tuple[str, ...], ...]]] = {
    "prompts": {
        "prompt": (*_PROMPT, ("messages",), ("conversations",)),
        "answer": (("solution",), ("ground_truth",), ("gold",), ("target",)),
    },
    "sft": {"prompt": _PROMPT, "completion": (("response", "output"), ("answer", "solution"))},
    "pairs": {"prompt": (*_PROMPT, ("conversations",)), "chosen": (), "rejected": ()},
    "labels": {
        "prompt": (*_PROMPT, ("conversations",)),
        "response": (("completion", "output"),),
        "label": (("safe", "is_safe"),),
    },
}
CHAT_COLUMNS = ("messages", "conversations")  # of which an sft row is read, whatever else it holds
_SYSTEM = ("system", "system_prompt")
_NOT_RENDERED = ("chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios")


class Row(dict[str, Any]):
    """The columns of a row, and where it stands: "train.jsonl:17"."""

    __slots__ = ("where",)

    def __init__(self, columns: Mapping[str, Any], where: str) -> None:
        super().__init__(columns)
        self.where = where


def location(row: Mapping[str, Any], index: int) -> str:
    """Where a row stands, or its number where it comes from no source."""
    return row.where if isinstance(row, Row) else f"row {index + 1}"


def canonical(columns: Mapping[str, Any], kind: Kind, where: str) -> Row:
    """The row with its canonical columns checked; ValueError naming `where` for one that cannot be used."""
    row = Row(columns, where)
    try:
        for name in _NOT_RENDERED:
            if not says_nothing(row.get(name)):
                what = f"column {name!r} is {shown(row[name])}, which no prompt would show the model"
                raise ValueError(f"{what}; write it into the prompt, take it out, or drop the row")
        _READERS[kind](row)
        if not says_nothing(row.get("tools")):
            row["tools"] = tools_of(row["tools"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return row


def prompt_and_target(row: Mapping[str, Any]) -> tuple[str | Messages | None, Target]:
    """Of an sft row, what is read and what is learned; plain text has no prompt."""
    if row.get("messages"):
        return row["messages"][:-1], row["messages"][-1:]
    if row.get("completion") is not None:
        return row["prompt"], row["completion"]
    return None, row["text"]


def parts_of(row: Mapping[str, Any], kind: Kind) -> list[str | Messages | None]:
    """What a stage reads of a row, the prompt first (None: plain text without one). Other columns may hold anything."""
    if kind == "sft":
        return list(prompt_and_target(row))
    others = {"prompts": (), "pairs": ("chosen", "rejected"), "labels": ("response",)}[kind]
    return [row[name] for name in ("prompt", *others)]


def texts_of(value: str | Messages | None) -> list[str]:
    """Every text of a prompt or a target."""
    turns = _turns(value or "")
    return [turn[name] for turn in turns for name in ("reasoning_content", "content") if turn.get(name)]


# Columns


def _find(row: Row, column: str, kind: Kind) -> Any:
    """What the column holds, or the alias that stands for it; None where neither is there."""
    for group in ((column,), *ALIASES[kind][column]):
        given = [name for name in group if row.get(name) is not None]
        if other := next((name for name in given[1:] if row[name] != row[given[0]]), None):
            what = f"columns {given[0]!r} and {other!r} differ, and either may be the {column}"
            raise ValueError(f"{what}; name the one that is meant {column!r}")
        if given and given[0] in CHAT_COLUMNS:
            return chat(row[given[0]], given[0])
        if given:
            return _instruction(row) if given[0] == "instruction" else row[given[0]]
    return None


def _need(row: Row, column: str, kind: Kind) -> Any:
    if (value := _find(row, column, kind)) is not None:
        return value
    present = [name for name in row if row[name] is not None]
    aliases = ", ".join(name for group in ALIASES[kind][column] for name in group)
    is_null = f" ({column} is null)" if column in row else ""
    or_aliases = f" (or {aliases})" if aliases else ""
    forms = "; sft rows have messages, or prompt and completion, or text" if kind == "sft" else ""
    listed = ", ".join([*present[:20], *(["..."] if len(present) > 20 else [])]) or "none"
    hint = did_you_mean(column, present)
    raise ValueError(f"no column {column!r}{is_null}{or_aliases}{forms}; columns present: {listed}{hint}")


def _instruction(row: Row) -> Any:
    """Alpaca and Dolly: what to do, and what to do it with."""
    if not isinstance(row["instruction"], str):
        return row["instruction"]
    if not says_nothing(row.get("history")):
        raise ValueError("column 'history' would be lost; write the turns as a chat in 'messages'")
    given = {name: row[name] for name in ("input", "context") if not says_nothing(row.get(name))}
    for name, value in given.items():
        _text(value, name, "the text that instruction is about")
    return "\n\n".join([row["instruction"], *(value for value in given.values() if value.strip())])


def _with_system(prompt: str | Messages, row: Row) -> str | Messages:
    """The prompt after the row's own system turn, where it does not begin with that."""
    for name in _SYSTEM:
        if says_nothing(system := row.get(name)):
            continue
        turns = _turns(prompt)
        turn = {"role": "system", "content": _text(system, name)}
        if turns[0]["role"] == "system" and turns[0] != turn:
            raise ValueError(f"column {name!r} is not the prompt's system turn; leave one of them")
        prompt = prompt if turns[0] == turn else [turn, *turns]
    return prompt


def _read_prompts(row: Row) -> None:
    row["prompt"] = _with_system(_prompt(_need(row, "prompt", "prompts")), row)
    if row.get("answer") is None and isinstance(row.get("reward_model"), dict):
        row["answer"] = row["reward_model"].get("ground_truth")  # verl; the column stays for verl's rewards
    answer = _find(row, "answer", "prompts")
    if isinstance(answer, float) and not math.isfinite(answer):
        answer = None
    row["answer"] = answer  # as it is: TRL hands numbers to rewards, and some do without (format, a preference model)


def _read_sft(row: Row) -> None:
    chats = [name for name in CHAT_COLUMNS if row.get(name) is not None]
    if chats:
        before, target = _split(row[chats[0]], chats[0], learned=True)
        _ending_with_prompt(before, f"{chats[0]}, without its last turn,")
        for other in [*chats[1:], *(name for name in ("completion",) if row.get(name) is not None)]:
            if _split(row[other], other)[1] != target:
                what = f"columns {chats[0]!r} and {other!r} differ, and either may be learned"
                raise ValueError(f"{what}; drop one of them")
        row["messages"] = [*_with_system(before, row), *_turns(_with_reasoning(target, row), "assistant")]
        return
    named = row.get("prompt") is not None or row.get("completion") is not None
    if not named and row.get("text") is not None and None in (_find(row, x, "sft") for x in ("prompt", "completion")):
        _not_blank(_text(row["text"], "text"), "text")
        return
    _read_targets(row, "sft", ("completion",))
    row["completion"] = _with_reasoning(row["completion"], row)


def _with_reasoning(target: Target, row: Row) -> Target:
    """With the reasoning that stands in a column of its own."""
    if not isinstance(target, str) or any(end in target for end in REASONING_ENDS):
        return target
    turn: dict[str, Any] = {"role": "assistant", "content": target}
    turn |= reasoning_of({name: row.get(name) for name in REASONING}, target, "the row")
    return [turn] if "reasoning_content" in turn else target


def _read_labels(row: Row) -> None:
    _read_targets(row, "labels", ("response",))
    label = _need(row, "label", "labels")
    if isinstance(label, str):  # of a CSV file
        label = {"0": 0, "1": 1, "false": 0, "true": 1}.get(label.lower(), label)
    if label not in (0, 1):  # True and False too
        raise ValueError(f"column 'label' is {shown(label)}, expected 1 (safe) or 0")
    row["label"] = int(label)


_READERS: dict[Kind, Callable[[Row], None]] = {
    "prompts": _read_prompts,
    "sft": _read_sft,
    "pairs": lambda row: _read_targets(row, "pairs", ("chosen", "rejected")),
    "labels": _read_labels,
}


# A prompt, and what follows it


def _read_targets(row: Row, kind: Kind, columns: tuple[str, ...]) -> None:
    """Cut chats in `columns` into the prompt and the last turn, which stays."""
    given = _find(row, "prompt", kind)
    given = None if given is None else _prompt(given)
    prompts, targets = [], {}
    for column in columns:
        before, targets[column] = _split(_need(row, column, kind), column, learned=kind == "sft")
        prompt = _joined(given, before, column)
        if prompt is not None:
            prompts.append(_with_system(_prompt(prompt), row))
    if not prompts:
        _need(row, "prompt", kind)
    if any(_turns(prompt) != _turns(prompts[0]) for prompt in prompts):
        what = f"{' and '.join(columns)} differ before their last turn, which alone is scored"
        raise ValueError(f"{what}; give both the same earlier turns")
    row |= {**targets, "prompt": prompts[0]}


def _split(value: Any, column: str, *, learned: bool = False) -> tuple[Messages, Target]:
    """(earlier turns, the last turn); text is a last turn. learned: an empty one would teach an immediate end."""
    *before, last = chat(value, column) if column in CHAT_COLUMNS else _turns(text_or_chat(value, column), "assistant")
    if last["role"] != "assistant":
        ending = f"{column} ends with a turn of {last['role']!r}"
        raise ValueError(f"{ending}, expected 'assistant': its last turn is what is learned")
    if last.get("tool_calls"):
        what = f"{column} ends with a tool call, which only turns before the last may hold"
        raise ValueError(f"{what}; write it into content, or drop the row")
    if learned:
        _not_blank(last["content"], column)
    return before, [last] if "reasoning_content" in last else last["content"]


def _joined(prompt: str | Messages | None, before: Messages, column: str) -> str | Messages | None:
    """The whole prompt: `before` repeats it (perhaps with a system turn), goes on after it, or is all there is."""
    if prompt is None or not before:
        return before or prompt
    turns = _turns(prompt)
    if before[0]["role"] == "assistant":
        return [*turns, *before]
    if before[-len(turns) :] != turns:
        what = f"{column} begins with other turns than those of the prompt"
        raise ValueError(f"{what}; make them the same, or leave only the assistant's turn in {column}")
    return before if len(before) > len(turns) else prompt


def _turns(value: str | Messages, role: str = "user") -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


# Values


def _prompt(value: Any) -> str | Messages:
    found = text_or_chat(value, "prompt")
    return found if isinstance(found, str) else _ending_with_prompt(found, "prompt")


def _ending_with_prompt(turns: Messages, column: str) -> Messages:
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        ending = f"with a turn of {turns[-1]['role']!r}" if turns else "before any turn"
        raise ValueError(f"{column} ends {ending}, expected 'user': the model answers that turn")
    return turns


def _text(value: Any, column: str, expected: str = "a string") -> str:
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {shown(value)}, expected {expected}")
    return value


def _not_blank(text: str, column: str) -> None:
    if not text.strip():
        raise ValueError(f"{column} is empty and would teach the model to say nothing; drop the row")
