"""What a row holds, under one set of column names. Nothing is dropped: it is used, kept beside, or refused.

    prompts {prompt, answer}   sft {messages} | {prompt, completion} | {text}   pairs {prompt, chosen, rejected}
    labels {prompt, response, label (1 = safe)}

- A missing column is taken from an alias (those of TRL, open-r1 and verl), which stays beside it. Of two aliases of
  equal rank that differ, none is taken: which one is meant is not known.
- Alpaca's `input` and Dolly's `context` belong to `instruction`: the prompt is both, with a blank line between. A
  column `system` or `system_prompt` is the prompt's system turn. Tools, images and the like, which others put into a
  prompt and no template here does, are refused.
- prompt, completion, chosen, rejected and response hold text or a chat. A chat's last turn, the assistant's, is what is
  learned or scored; its earlier turns are the prompt, or repeat it, or go on after it. pairs and labels then need no
  `prompt` of their own.
- An sft row of several forms is read as messages, else as prompt and completion, else as text.
- The reasoning_content (or reasoning, thinking) of the last turn is rendered in the response format of the stage; so is
  an sft row's column of such a name, unless what is learned holds a reasoning of its own. That of earlier turns is left
  to the template. Any other field of a turn that says something (tool_calls, name, images, ...) is refused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from r1fast.data.templates import RESPONSE_FORMATS, Messages
from r1fast.wording import did_you_mean

Kind = Literal["prompts", "sft", "pairs", "labels"]
Target = str | Messages  # text, or a chat of one turn that has a reasoning
# Canonical column -> other names for it: groups in the order in which they are tried.
_PROMPT = (("problem", "question", "instruction", "query"),)
ALIASES: dict[str, dict[str, tuple[tuple[str, ...], ...]]] = {
    "prompts": {
        "prompt": (*_PROMPT, ("messages",)),
        "answer": (("solution",), ("ground_truth",), ("gold",), ("target",)),
    },
    "sft": {"prompt": _PROMPT, "completion": (("response", "output"), ("answer", "solution"))},
    "pairs": {"prompt": _PROMPT, "chosen": (), "rejected": ()},
    "labels": {"prompt": _PROMPT, "response": (("completion", "output"),), "label": (("safe", "is_safe"),)},
}
_ROLES = ("system", "user", "assistant")  # those that every template renders
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FIELDS = frozenset(("role", "content", *_REASONING))
_SYSTEM = ("system", "system_prompt")
_NOT_RENDERED = ("tools", "chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios")
_REASONING_ENDS = tuple(layout.think_close for layout in RESPONSE_FORMATS.values())


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
            if not _says_nothing(row.get(name)):
                what = f"column {name!r} is {shown(row[name])}, which no prompt would show the model"
                raise ValueError(f"{what}; write it into the prompt, take it out, or drop the row")
        _READERS[kind](row)
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


def texts_of(value: str | Messages | None) -> list[str]:
    """Every text of a prompt or a target."""
    turns = _turns(value or "")
    return [turn[name] for turn in turns for name in ("reasoning_content", "content") if turn.get(name)]


def shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# Columns


def _says_nothing(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _find(row: Row, column: str, kind: Kind) -> Any:
    """What the column holds, or the alias that stands for it; None where neither is there."""
    for group in ((column,), *ALIASES[kind][column]):
        given = [name for name in group if row.get(name) is not None]
        if other := next((name for name in given[1:] if row[name] != row[given[0]]), None):
            what = f"columns {given[0]!r} and {other!r} differ, and either may be the {column}"
            raise ValueError(f"{what}; name the one that is meant {column!r}")
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
    if not _says_nothing(row.get("history")):
        raise ValueError("column 'history' would be lost; write the turns as a chat in 'messages'")
    given = {name: row[name] for name in ("input", "context") if not _says_nothing(row.get(name))}
    for name, value in given.items():
        _text(value, name, "the text that instruction is about")
    return "\n\n".join([row["instruction"], *(value for value in given.values() if value.strip())])


def _with_system(prompt: str | Messages, row: Row) -> str | Messages:
    """The prompt after the row's own system turn, where it does not begin with that."""
    for name in _SYSTEM:
        if _says_nothing(system := row.get(name)):
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
    # Rewards may do without an answer: format, a preference model.
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | list | dict | None):
        raise ValueError(f"column 'answer' is {shown(answer)}, expected a string, a number or a list of them")
    row["answer"] = str(answer) if isinstance(answer, int | float) else answer


def _read_sft(row: Row) -> None:
    if row.get("messages") is not None:
        before, target = _split(row["messages"], "messages", learned=True)
        _ending_with_user(before, "messages, without its last turn,")
        row["messages"] = [*_with_system(before, row), *_turns(_with_reasoning(target, row), "assistant")]
        if row.get("completion") is not None and _split(row["completion"], "completion")[1] != target:
            raise ValueError("columns 'messages' and 'completion' differ, and either may be learned; drop one of them")
        return
    named = row.get("prompt") is not None or row.get("completion") is not None
    if not named and row.get("text") is not None and None in (_find(row, x, "sft") for x in ("prompt", "completion")):
        _not_blank(_text(row["text"], "text"), "text")
        return
    _read_targets(row, "sft", ("completion",))
    row["completion"] = _with_reasoning(row["completion"], row)


def _with_reasoning(target: Target, row: Row) -> Target:
    """With the reasoning that stands in a column of its own."""
    if not isinstance(target, str) or any(end in target for end in _REASONING_ENDS):
        return target
    turn: dict[str, Any] = {"role": "assistant", "content": target}
    turn |= _reasoning({**turn, **{name: row.get(name) for name in _REASONING}}, target, "the row")
    return [turn] if "reasoning_content" in turn else target


def _read_labels(row: Row) -> None:
    _read_targets(row, "labels", ("response",))
    label = _need(row, "label", "labels")
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
    if isinstance(value, str) and column != "messages":
        before, last = [], {"role": "assistant", "content": value}
    else:
        *before, last = _chat(value, column)
    if last["role"] != "assistant":
        ending = f"{column} ends with a turn of {last['role']!r}"
        raise ValueError(f"{ending}, expected 'assistant': its last turn is what is learned")
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
    return value if isinstance(value, str) else _ending_with_user(_chat(value, "prompt"), "prompt")


def _ending_with_user(turns: Messages, column: str) -> Messages:
    if not turns or turns[-1]["role"] != "user":
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


# Chats


def _chat(value: Any, column: str) -> Messages:
    if not isinstance(value, list) or not value:
        or_text = "" if column == "messages" or isinstance(value, list) else "a string or "
        raise ValueError(f"column {column!r} is {shown(value)}, expected {or_text}a list of {{role, content}}")
    return [_turn(turn, f"{column}[{index}]") for index, turn in enumerate(value)]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """{role, content}, and reasoning_content where there is one."""
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {shown(turn)}, expected {{role, content: string}}")
    for name, value in turn.items():
        if name not in _FIELDS and not _says_nothing(value):
            what = f"{where} has {name!r} = {shown(value)}, which would not be learned"
            raise ValueError(f"{what}; write it into content, take it out, or drop the row")
    if turn.get("role") not in _ROLES:
        raise ValueError(f"{where} has role {turn.get('role')!r}, expected {', '.join(_ROLES)}")
    content = turn.get("content")
    if isinstance(content, list) and content:
        content = "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(f"{where} is {shown(turn)}, expected {{role, content: string}}")
    return {"role": turn["role"], "content": content, **_reasoning(turn, content, where)}


def _part(part: Any, where: str) -> str:
    is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    if not is_text or not all(name in ("type", "text") or _says_nothing(value) for name, value in part.items()):
        raise ValueError(f"{where} is {shown(part)}, expected {{type: text, text: string}}: the models read text only")
    return part["text"]


def _reasoning(turn: dict[str, Any], content: str, where: str) -> dict[str, str]:
    """{"reasoning_content": ...} where the turn has one that content does not hold already."""
    given = {name: turn[name] for name in _REASONING if not _says_nothing(turn.get(name))}
    if not given:
        return {}
    name, reasoning = next(iter(given.items()))
    if not all(isinstance(value, str) for value in given.values()) or len(set(given.values())) > 1:
        raise ValueError(f"{where} has {shown(given)}, expected one reasoning, a string")
    if turn["role"] != "assistant":
        raise ValueError(f"{where} has {name!r} and role {turn['role']!r}, expected it in turns of the assistant only")
    held = any(end in content for end in _REASONING_ENDS)
    if held and reasoning.strip() not in content:
        raise ValueError(f"{where} has {name!r}, and another reasoning in content; leave one of them")
    return {} if held or not reasoning.strip() else {"reasoning_content": reasoning}
