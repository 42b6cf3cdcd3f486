"""What a row holds, under one set of column names. Nothing is dropped: it is used, kept beside, or refused.

    prompts {prompt, answer}   sft {messages} | {prompt, completion} | {text}   pairs {prompt, chosen, rejected}
    labels {prompt, response, label (1 = safe)}   text {text}

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
  to the template: R1's, as our `chat`, leaves it out. Any other field of a turn that says something (tool_calls, name,
  images, ...) is refused.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any, Literal

from r1fast.data.templates import RESPONSE_FORMATS, Messages

Kind = Literal["prompts", "sft", "pairs", "labels", "text"]
Target = str | Messages  # text, or a chat of one turn that has a reasoning

MAX_DEPTH = 100  # lists and objects within each other; pickle and repr give up at some hundreds
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
    "text": {"text": (("content",),)},
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
    for name in _NOT_RENDERED if kind != "text" else ():
        if not _says_nothing(row.get(name)):
            raise ValueError(
                f"{where}: column {name!r} is {shown(row[name])}, which no prompt would show the model; "
                "write it into the prompt, take it out, or drop the row"
            )
    _READERS[kind](row)
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
    if value is None or isinstance(value, str):
        return [value] if value else []
    return [turn[name] for turn in value for name in ("reasoning_content", "content") if turn.get(name)]


def plain(value: Any, column: str, where: str, depth: int = 0) -> Any:
    """A value of Parquet or of a data set as JSON would hold it; NaN and infinities are None."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth > MAX_DEPTH:
        raise ValueError(f"{where}: column {column!r} is nested more than {MAX_DEPTH} levels deep; flatten it")
    if isinstance(value, list):
        if value and all(isinstance(entry, tuple) and len(entry) == 2 for entry in value):  # Arrow's map
            value = _object_of_map(value, column, where)
        else:
            return [plain(entry, column, where, depth + 1) for entry in value]
    if isinstance(value, dict):
        return {key: plain(entry, column, where, depth + 1) for key, entry in value.items()}
    if isinstance(value, Decimal):
        return str(value) if value.is_finite() else None
    if isinstance(value, date | time):  # datetime is a date
        return value.isoformat()
    raise ValueError(f"{where}: column {column!r} holds {shown(value)}, which no stage can use; convert or drop it")


def _object_of_map(entries: list[tuple[Any, Any]], column: str, where: str) -> dict[str, Any]:
    names = [name for name, _ in entries]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"{where}: column {column!r} is a map whose keys are not different strings; convert or drop it"
        )
    return dict(entries)


def shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# Columns


def _absent(row: Mapping[str, Any], column: str) -> bool:
    return row.get(column) is None


def _find(row: Row, column: str, kind: Kind) -> Any:
    """What the column holds, or the alias that stands for it; None where neither is there."""
    if not _absent(row, column):
        return row[column]
    for group in ALIASES[kind][column]:
        given = [name for name in group if not _absent(row, name)]
        if other := next((name for name in given if row[name] != row[given[0]]), None):
            raise ValueError(
                f"{row.where}: columns {given[0]!r} and {other!r} differ, and either may be the {column}; "
                f"name the one that is meant {column!r}"
            )
        if given:
            return _instruction(row) if given[0] == "instruction" else row[given[0]]
    return None


def _need(row: Row, column: str, kind: Kind) -> Any:
    value = _find(row, column, kind)
    if value is not None:
        return value
    present = [name for name in row if row[name] is not None]
    near = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
    aliases = [name for group in ALIASES[kind][column] for name in group]
    also = f" (or {', '.join(aliases)})" if aliases else ""
    if kind == "sft":
        also += "; sft rows have messages, or prompt and completion, or text"
    empty = f" ({column} is null)" if column in row else ""
    listed = ", ".join(present) if len(present) <= 20 else f"{', '.join(present[:20])}, ..."
    raise ValueError(
        f"{row.where}: no column {column!r}{empty}{also}; columns present: {listed or 'none'}"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _instruction(row: Row) -> Any:
    """Alpaca and Dolly: what to do, and what to do it with."""
    parts = [row["instruction"]]
    if not isinstance(parts[0], str):
        return parts[0]
    if not _says_nothing(row.get("history")):
        raise ValueError(f"{row.where}: column 'history' would be lost; write the turns as a chat in 'messages'")
    for name in ("input", "context"):
        if not _says_nothing(given := row.get(name)):
            if not isinstance(given, str):
                expected = "the text that instruction is about"
                raise ValueError(f"{row.where}: column {name!r} is {shown(given)}, expected {expected}")
            if given.strip():
                parts.append(given)
    return "\n\n".join(parts)


def _with_system(prompt: str | Messages, row: Row) -> str | Messages:
    """The prompt after the row's own system turn, where it does not begin with that."""
    for name in _SYSTEM:
        if _says_nothing(system := row.get(name)):
            continue
        turns = _turns(prompt)
        turn = {"role": "system", "content": _text(system, name, row.where)}
        if turns[0]["role"] == "system" and turns[0] != turn:
            raise ValueError(f"{row.where}: column {name!r} is not the prompt's system turn; leave one of them")
        prompt = prompt if turns[0] == turn else [turn, *turns]
    return prompt


def _read_prompts(row: Row) -> None:
    row["prompt"] = _with_system(_prompt(_need(row, "prompt", "prompts"), row.where), row)
    if _absent(row, "answer") and isinstance(row.get("reward_model"), dict):
        row["answer"] = row["reward_model"].get("ground_truth")  # verl; the column stays for verl's rewards
    # Rewards may do without an answer: format, a preference model.
    row["answer"] = _answer(_find(row, "answer", "prompts"), row.where)


def _read_sft(row: Row) -> None:
    if not _absent(row, "messages"):
        before, target = _cut(_chat(row["messages"], "messages", row.where), "messages", row.where, learned=True)
        _ends_with_user(before, "messages, without its last turn,", row.where)
        row["messages"] = [*_with_system(before, row), *_turns(_with_reasoning(target, row), "assistant")]
        if not _absent(row, "completion") and _split(row["completion"], "completion", row.where)[1] != target:
            raise ValueError(
                f"{row.where}: columns 'messages' and 'completion' differ, and either may be learned; drop one of them"
            )
        return
    own = not _absent(row, "prompt") or not _absent(row, "completion")
    if not own and not _absent(row, "text") and None in (_find(row, name, "sft") for name in ("prompt", "completion")):
        row["text"] = _text(row["text"], "text", row.where)
        _not_blank(row["text"], "text", row.where)
        return
    _read_targets(row, "sft", ("completion",))
    row["completion"] = _with_reasoning(row["completion"], row)


def _with_reasoning(target: Target, row: Row) -> Target:
    """With the reasoning that stands in a column of its own."""
    if not isinstance(target, str) or any(end in target for end in _REASONING_ENDS):
        return target
    turn: dict[str, Any] = {"role": "assistant", "content": target}
    reasoning = _reasoning({**turn, **{name: row.get(name) for name in _REASONING}}, target, f"{row.where}: the row")
    return target if reasoning is None else [{**turn, "reasoning_content": reasoning}]


def _read_pairs(row: Row) -> None:
    _read_targets(row, "pairs", ("chosen", "rejected"))


def _read_labels(row: Row) -> None:
    _read_targets(row, "labels", ("response",))
    label = _need(row, "label", "labels")
    if label not in (0, 1):  # True and False too
        raise ValueError(f"{row.where}: column 'label' is {shown(label)}, expected 1 (safe) or 0")
    row["label"] = int(label)


def _read_text(row: Row) -> None:
    row["text"] = _text(_need(row, "text", "text"), "text", row.where)


_READERS: dict[Kind, Callable[[Row], None]] = {
    "prompts": _read_prompts,
    "sft": _read_sft,
    "pairs": _read_pairs,
    "labels": _read_labels,
    "text": _read_text,
}


# A prompt, and what follows it


def _read_targets(row: Row, kind: Kind, columns: tuple[str, ...]) -> None:
    """Cut chats in `columns` into the prompt and the last turn, which stays."""
    given = _find(row, "prompt", kind)
    given = None if given is None else _prompt(given, row.where)
    prompts, targets = [], {}
    for column in columns:
        before, targets[column] = _split(_need(row, column, kind), column, row.where, learned=kind == "sft")
        prompt = _joined(given, before, column, row.where)
        if prompt is not None:
            prompts.append(_with_system(prompt, row))
    if not prompts:
        _need(row, "prompt", kind)
    if any(_turns(prompt) != _turns(prompts[0]) for prompt in prompts):
        raise ValueError(
            f"{row.where}: {' and '.join(columns)} differ before their last turn, which alone is scored; "
            "give both the same earlier turns"
        )
    row |= {**targets, "prompt": prompts[0]}


def _split(value: Any, column: str, where: str, *, learned: bool = False) -> tuple[Messages, Target]:
    """(earlier turns, the last turn); text is a last turn."""
    if not isinstance(value, str):
        return _cut(_chat(value, column, where), column, where, learned=learned)
    if learned:
        _not_blank(value, column, where)
    return [], value


def _cut(turns: Messages, column: str, where: str, *, learned: bool) -> tuple[Messages, Target]:
    """Of a checked chat. learned: an empty last turn would teach an immediate end."""
    *before, last = turns
    if last["role"] != "assistant":
        raise ValueError(
            f"{where}: {column} ends with a turn of {last['role']!r}, expected 'assistant': its last turn is what is "
            "learned"
        )
    if learned:
        _not_blank(last["content"], column, where)
    return before, [last] if "reasoning_content" in last else last["content"]


def _joined(prompt: str | Messages | None, before: Messages, column: str, where: str) -> str | Messages | None:
    """The whole prompt: `before` repeats it (perhaps with a system turn), goes on after it, or is all there is."""
    if before and (prompt is None or before[0]["role"] != "assistant"):
        turns = [] if prompt is None else _turns(prompt)
        if turns and before[-len(turns) :] != turns:
            raise ValueError(
                f"{where}: {column} begins with other turns than those of the prompt; make them the same, "
                f"or leave only the assistant's turn in {column}"
            )
        whole = before if len(before) > len(turns) else prompt
    else:
        whole = [*_turns(prompt), *before] if before and prompt is not None else prompt
    return None if whole is None else _prompt(whole, where)


def _turns(value: str | Messages, role: str = "user") -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


# Values


def _prompt(value: Any, where: str) -> str | Messages:
    if isinstance(value, str):
        return value
    turns = _chat(value, "prompt", where)
    _ends_with_user(turns, "prompt", where)
    return turns


def _ends_with_user(turns: Messages, column: str, where: str) -> None:
    if not turns or turns[-1]["role"] != "user":
        ending = f"with a turn of {turns[-1]['role']!r}" if turns else "before any turn"
        raise ValueError(f"{where}: {column} ends {ending}, expected 'user': the model answers that turn")


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} is {shown(value)}, expected a string")
    return value


def _not_blank(text: str, column: str, where: str) -> None:
    if not text.strip():
        raise ValueError(f"{where}: {column} is empty and would teach the model to say nothing; drop the row")


def _answer(value: Any, where: str) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float | list | dict):
        raise ValueError(f"{where}: column 'answer' is {shown(value)}, expected a string, a number or a list of them")
    return str(value) if isinstance(value, int | float) else value


# Chats


def _chat(value: Any, column: str, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        expected = "a list of {role, content}"
        if column != "messages" and not isinstance(value, list):
            expected = f"a string or {expected}"
        raise ValueError(f"{where}: column {column!r} is {shown(value)}, expected {expected}")
    return [_turn(turn, where, column, index) for index, turn in enumerate(value)]


def _turn(turn: Any, row: str, column: str, index: int) -> dict[str, Any]:
    """{role, content}, and reasoning_content where there is one."""
    where = f"{row}: {column}[{index}]"
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {shown(turn)}, expected {{role, content: string}}")
    for name, value in turn.items():
        if name not in _FIELDS and not _says_nothing(value):
            raise ValueError(
                f"{where} has {name!r} = {shown(value)}, which would not be learned; write it into content, "
                "take it out, or drop the row"
            )
    if turn.get("role") not in _ROLES:
        raise ValueError(f"{where} has role {turn.get('role')!r}, expected {', '.join(_ROLES)}")
    content = _content(turn, where)
    known = {"role": turn["role"], "content": content}
    if turn.keys() <= {"role", "content"}:
        return known
    reasoning = _reasoning(turn, content, where)
    return known if reasoning is None else {**known, "reasoning_content": reasoning}


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _content(turn: dict[str, Any], where: str) -> str:
    content = turn.get("content")
    if isinstance(content, list) and content:
        content = "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(f"{where} is {shown(turn)}, expected {{role, content: string}}")
    return content


def _part(part: Any, where: str) -> str:
    is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    if not is_text or not all(name in ("type", "text") or _says_nothing(value) for name, value in part.items()):
        raise ValueError(f"{where} is {shown(part)}, expected {{type: text, text: string}}: the models read text only")
    return part["text"]


def _reasoning(turn: dict[str, Any], content: str, where: str) -> str | None:
    given = {name: turn[name] for name in _REASONING if not _says_nothing(turn.get(name))}
    if not given:
        return None
    name, reasoning = next(iter(given.items()))
    if not all(isinstance(value, str) for value in given.values()) or len(set(given.values())) > 1:
        raise ValueError(f"{where} has {shown(given)}, expected one reasoning, a string")
    if turn["role"] != "assistant":
        raise ValueError(f"{where} has {name!r} and role {turn['role']!r}, expected it in turns of the assistant only")
    if any(end in content for end in _REASONING_ENDS):
        if reasoning.strip() not in content:
            raise ValueError(f"{where} has {name!r}, and another reasoning in content; leave one of them")
        return None
    return reasoning if reasoning.strip() else None
