"""The turns of a chat under one spelling: {role, content}, and what else a template reads of them.

- ShareGPT's {from, value} is read as {role, content}: human, gpt, function_call, observation, ... are roles there. The
  roles developer and function are system and tool, model (Gemma's) is assistant.
- Content may be a list of parts {type: text, text}, which are joined; parts of another type are refused.
- reasoning_content (or reasoning, thinking) stands in turns of the assistant.
- tool_calls, of turns before the last, are OpenAI's: [{type: function, function: {name, arguments}}], or name and
  arguments alone. Arguments become an object, as templates expect, where they are its JSON. Turns of role tool answer
  them. A null in either is left out: Parquet gives every object the fields of all others.
- Any other field of a turn that says something (images, weight, ...) is refused.
"""

import ast
import contextlib
import json
from typing import Any

from r1fast.data.templates import RESPONSE_FORMATS, Messages

REASONING = ("reasoning_content", "reasoning", "thinking")
REASONING_ENDS = tuple(layout.think_close for layout in RESPONSE_FORMATS.values())
ROLES = ("system", "user", "assistant", "tool")
_SPOKEN = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool",
}  # fmt: skip
_FROM = _SPOKEN | {"function_call": "assistant"}
_FIELDS = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "tool_calls", *REASONING),
    "tool": ("role", "content", "name", "tool_call_id"),
}


def shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def says_nothing(value: Any) -> bool:
    return value is None or value in ("", [], {})


def text_or_chat(value: Any, column: str) -> str | Messages:
    """Text (or the parts of one), or a chat of at least one turn; ValueError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):  # LLaMA-Factory's pairs: one turn
        value = [value]
    if not isinstance(value, list) or not value:
        or_text = "" if isinstance(value, list) else "a string or "
        raise ValueError(f"column {column!r} is {shown(value)}, expected {or_text}a list of {{role, content}}")
    if all(isinstance(part, dict) and "type" in part and not {"role", "from"} & part.keys() for part in value):
        return _joined_parts(value, column)
    return [_turn(turn, f"{column}[{index}]") for index, turn in enumerate(value)]


def chat(value: Any, column: str) -> Messages:
    """The same where only a chat will do, or its text: JSON, or as pandas writes lists into a CSV file."""
    held = _held(value) if isinstance(value, str) else value
    found = None if isinstance(held, str) else text_or_chat(held, column)
    if not isinstance(found, list):
        raise ValueError(f"column {column!r} is {shown(value)}, expected a list of {{role, content}}")
    return found


def reasoning_of(turn: dict[str, Any], content: str, where: str) -> dict[str, str]:
    """{"reasoning_content": ...} where the turn has one that content does not hold already."""
    given = {name: turn[name] for name in REASONING if not says_nothing(turn.get(name))}
    if not given:
        return {}
    name, reasoning = next(iter(given.items()))
    if not all(isinstance(value, str) for value in given.values()) or len(set(given.values())) > 1:
        raise ValueError(f"{where} has {shown(given)}, expected one reasoning, a string")
    held = any(end in content for end in REASONING_ENDS)
    if held and reasoning.strip() not in content:
        raise ValueError(f"{where} has {name!r}, and another reasoning in content; leave one of them")
    return {} if held or not reasoning.strip() else {"reasoning_content": reasoning}


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The functions that a model may call, as a template takes them; ValueError for what is no list of them."""
    tools = _decoded(value, "column 'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool_name(tool) for tool in tools):
        expected = "expected a list of {type: function, function: {name, ...}}, or its JSON"
        raise ValueError(f"column 'tools' is {shown(value)}, {expected}")
    return [_without_nulls(tool) for tool in tools]


def tool_name(tool: dict[str, Any]) -> str | None:
    """Of a tool, or of a call of one."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else tool.get("name")
    return name if isinstance(name, str) and name else None


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {shown(turn)}, expected {{role, content: string}}")
    if not says_nothing(turn.get("from")) and says_nothing(turn.get("role")):
        turn = _of_sharegpt(turn, where)
    role = _SPOKEN.get(turn["role"]) if isinstance(turn.get("role"), str) else None
    if role is None:
        raise ValueError(f"{where} has role {turn.get('role')!r}, expected {', '.join(ROLES)}")
    for name, value in turn.items():
        if name in _FIELDS[role] or says_nothing(value):
            continue
        if name in REASONING:
            raise ValueError(f"{where} has {name!r} and role {role!r}, expected it in turns of the assistant only")
        what = f"{where} has {name!r} = {shown(value)}, which would not be learned"
        raise ValueError(f"{what}; write it into content, take it out, or drop the row")
    calls = {} if says_nothing(turn.get("tool_calls")) else {"tool_calls": _calls(turn["tool_calls"], where)}
    content = "" if calls and turn.get("content") is None else turn.get("content")
    if isinstance(content, list) and content:
        content = _joined_parts(content, f"{where}.content")
    if not isinstance(content, str):
        raise ValueError(f"{where} is {shown(turn)}, expected {{role, content: string}}")
    named = {name: turn[name] for name in _FIELDS[role][2:] if role == "tool" and not says_nothing(turn.get(name))}
    return {"role": role, "content": content, **reasoning_of(turn, content, where), **calls, **named}


def _of_sharegpt(turn: dict[str, Any], where: str) -> dict[str, Any]:
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    spoken = _FROM.get(turn["from"]) if isinstance(turn["from"], str) else None
    if spoken is None:
        raise ValueError(f"{where} is from {shown(turn['from'])}, expected {', '.join(_FROM)}")
    if turn["from"] == "function_call":
        return rest | {"role": spoken, "tool_calls": turn.get("value")}
    return rest | {"role": spoken, "content": turn.get("value")}


def _joined_parts(parts: list[Any], where: str) -> str:
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(parts))


def _part(part: Any, where: str) -> str:
    is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    if not is_text or not all(name in ("type", "text") or says_nothing(value) for name, value in part.items()):
        raise ValueError(f"{where} is {shown(part)}, expected {{type: text, text: string}}: the models read text only")
    return part["text"]


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    found = _decoded(value, f"{where}: the tool call")
    return [_call(call, where) for call in (found if isinstance(found, list) else [found])]


def _call(call: Any, where: str) -> dict[str, Any]:
    call = _without_nulls(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not (name := tool_name(call)):
        raise ValueError(f"{where} has the tool call {shown(call)}, expected {{name, arguments}}")
    arguments = _decoded(function.get("arguments", {}), f"{where}: the arguments of {name}")
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: the arguments of {name} are {shown(arguments)}, expected an object")
    known = {"id": call["id"]} if "function" in call and "id" in call else {}
    return {**known, "type": "function", "function": {"name": name, "arguments": arguments}}


def _decoded(value: Any, what: str) -> Any:
    """What a text of JSON stands for; other values are themselves."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is {shown(value)}, expected JSON") from None


def _held(text: str) -> Any:
    """The list that a text stands for; the text itself where it is none."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return read(text)
    return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
