"""The options of a recipe in words, read from the schema itself: types, defaults, and the comments beside them.

`--help grpo` prints them, and the page of options in the documentation is made from them.
"""

import ast
import inspect
import io
import re
import textwrap
import tokenize
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from r1fast.loss_fields import OPTIONS
from r1fast.schema import KINDS, Recipe
from r1fast.schema_options import LossFields, Strict
from r1fast.schema_types import Reads

SHOWN_BOUND = 10_000
SIMPLE = {str: "text", bool: "true or false", int: "integer", float: "number", type(None): "null", Any: "any value"}
_BOUNDS: dict[type, str] = {
    annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<",
}  # fmt: skip
NAMED_ROWS: dict[Any, str] = {
    "prompts": "files of prompts",
    "sft": "files of rows to learn from",
    "pairs": "files of pairs",
}


@dataclass(frozen=True)
class OptionText:
    """An option as a reader sees it."""

    name: str  # with dots below a section of the stage: lora.r
    type: str  # in words: "integer, at least 1"
    default: str  # as YAML; "required" where there is none
    about: str  # may be empty, where the name says all
    group: str  # what it belongs to, a sentence


def topics() -> dict[str, type[BaseModel]]:
    """What can be explained, by name: the kinds of stages, `recipe` (its top level), and every section."""
    sections = _sections(Recipe)
    for stage in KINDS.values():
        sections |= _sections(stage)
    return {**KINDS, "recipe": Recipe, **sections}


def options_of(topic: str) -> list[OptionText]:
    """The options of a kind of stage or a section, those of sections inside it too, group by group.

    Args:
        topic: one of `topics()`.
    Raises KeyError where it is none of them.
    """
    return list(_options(topics()[topic]))


def heading(topic: str) -> str:
    """What a kind of stage or a section is, in a sentence."""
    return _title(topics()[topic])


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Sections inside a model, by the name of their key."""
    found: dict[str, type[BaseModel]] = {}
    for name, hint in _hints(model).items():
        for inner in _models(hint) if name != "stages" else ():
            found[name] = inner
            found |= _sections(inner)
    return found


def _options(model: type[BaseModel], prefix: str = "", group: str = "") -> Iterator[OptionText]:
    hints = _hints(model)
    for owner in model.__mro__:  # its own options first; a class that says more of an inherited option owns it
        sections: list[OptionText] = []
        for name in [name for name in inspect.get_annotations(owner) if name in hints]:
            hint, field = hints.pop(name), model.model_fields[name]
            about = next((said for c in model.__mro__ if (said := _comments(c).get(name))), "")
            yield OptionText(prefix + name, _words(hint), _default(field), about, group or _title(owner))
            for inner in _models(hint) if name != "stages" else ():
                below = f"{prefix}{name}.NAME" if get_origin(_bare(hint)) is dict else f"{prefix}{name}"
                sections += _options(inner, f"{below}.", f"{below}: {_title(inner)}")
        yield from sections


def _hints(model: type[BaseModel]) -> dict[str, Any]:
    hints = get_type_hints(model, include_extras=True)
    return {name: hints[name] for name in model.model_fields}


def _title(model: type) -> str:
    return " ".join((model.__dict__.get("__doc__") or model.__name__).split("\n\n")[0].split())


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, BaseModel):
        return ""  # those of its options
    return "required" if value is PydanticUndefined else _yaml(value)


def _yaml(value: Any) -> str:
    """On one line, with no more quotes than a reader needs."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@cache
def _comments(model: type) -> dict[str, str]:
    """What the source says of each option: the comment lines above it, and those beside it."""
    if model is LossFields:
        return {option.key: _of_the_loss(option) for option in OPTIONS}
    if not issubclass(model, Strict):
        return {}
    source = textwrap.dedent(inspect.getsource(model))
    beside: dict[int, str] = {}
    above: dict[int, str] = {}
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("# ")
        if token.type == tokenize.COMMENT and not text.startswith(("type:", "fmt:", "noqa")):
            alone = not lines[token.start[0] - 1][: token.start[1]].strip()
            (above if alone else beside)[token.start[0]] = text
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or node.end_lineno is None:
            continue
        said = [beside[line] for line in range(node.lineno, node.end_lineno + 1) if line in beside]
        line = node.lineno - 1
        while line in above:
            said.insert(0, above[line])
            line -= 1
        found[ast.unparse(node.target)] = re.sub(r"\bNone\b", "null", " ".join(said))
    return found


def _of_the_loss(option: Any) -> str:
    about = option.about
    takers = f"; of loss_type {', '.join(about.loss_types)}" if about.loss_types else ""
    peers = f" ({about.peers})" if about.peers else ""
    return re.sub(r"\bNone\b", "null", f"{about.meaning}{takers}{peers}")


def _models(hint: Any) -> list[type[BaseModel]]:
    """The sections that a type holds."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [hint]
    return [model for inner in get_args(hint) for model in _models(inner)]


def _bare(hint: Any) -> Any:
    return _bare(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def _words(hint: Any) -> str:
    """A type in words, bounds included: "0 <= number <= 1 or null"."""
    *first, last = dict.fromkeys(_alternatives(hint))
    return f"{', '.join(first)} or {last}" if first else last


def _alternatives(hint: Any) -> list[str]:
    args, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        extras = [part for extra in args[1:] for part in getattr(extra, "metadata", [extra])]
        for extra in extras:
            if isinstance(extra, Reads) and extra.kind != "code":
                return [extra.kind if extra.kind != "data" else NAMED_ROWS.get(extra.rows, "files")]
        first, *others = _alternatives(args[0])
        return [_bounded(first, extras), *others]
    if origin is Literal:
        return [str(arg) for arg in args]
    if origin in (Union, types.UnionType):
        return [words for arg in args for words in _alternatives(arg)]
    if origin is list:
        return [f"list of {_words(args[0])}"]
    if origin is dict:
        inner = _words(args[1])
        return ["options" if inner == SIMPLE[Any] else f"mapping of names to {inner}"]
    return ["options"] if isinstance(hint, type) and issubclass(hint, BaseModel) else [SIMPLE[hint]]


def _bounded(words: str, extras: list[Any]) -> str:
    """Bounds beyond SHOWN_BOUND are left out: they only say what a computer holds."""
    least, most = "", ""
    for extra in extras:
        for kind, sign in _BOUNDS.items():
            if isinstance(extra, kind) and abs(bound := getattr(extra, kind.__name__.lower())) <= SHOWN_BOUND:
                least, most = (f"{sign} {bound:g}", most) if sign[0] == ">" else (least, f"{sign} {bound:g}")
    if least and most:
        sign, bound = least.split()
        return f"{bound} {sign.replace('>', '<')} {words} {most}"
    return f"{words} {least or most}".rstrip()


def help_text(topic: str, width: int) -> str:
    """The options of a topic, as `--help TOPIC` prints them.

    Args:
        topic: one of `topics()`.
        width: of a line, in characters.
    """
    lines, group = textwrap.wrap(f"{topic}: {heading(topic)}", width), heading(topic)
    for option in options_of(topic):
        if option.group != group:
            group = option.group
            lines += ["", *textwrap.wrap(group, width)]
        default = f" (default: {option.default})" if option.default not in ("", "required") else f" {option.default}"
        head = f"  {option.name}: {option.type}{default}".rstrip()
        lines += textwrap.wrap(head, width, subsequent_indent=" " * 6, break_on_hyphens=False)
        lines += textwrap.wrap(
            option.about, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return "\n".join(lines)
