"""YAML as recipes use it: the scalars of YAML 1.2's core schema, and nothing that reads as something else elsewhere.

1e-6 is a number; yes, on, 1:30, 0777, 1_000 and 2024-01-15 are text. Tags, keys that are not text, a key given twice
and control characters are errors. An alias is a copy: what is expanded counts, so that a few lines cannot fill the
memory. `<<` merges as in YAML 1.1.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

MAX_NODES = 20_000  # scalars, lists and mappings, aliases expanded: ten times the recipe of a whole chain
MAX_DEPTH = 50

_NUMBER = r"(?:0|[1-9][0-9]*)"
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": rf"[-+]?{_NUMBER}|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": rf"[-+]?(?:\.[0-9]+|{_NUMBER}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.nan|\.NaN|\.NAN",
}
_TAG = "tag:yaml.org,2002:"
# A surrogate cannot be written as UTF-8, and no path or option holds a control character.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def load_yaml(text: str) -> Any:
    """What the text says, every alias a copy. Raises ValueError that begins with line and column."""
    try:
        return _Loader(text).load()
    except yaml.MarkedYAMLError as error:
        what, mark = f"{error.context or ''} {error.problem or ''}", error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(where + " ".join(what.split())) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: holds the character U+{int(error.character):04X}; drop it") from None
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode, a version of 5,000 digits
        raise ValueError(f"an escape or a number that cannot be read ({error})") from None


def dump_yaml(data: Any) -> str:
    """YAML that load_yaml, and any reader of YAML 1.1, reads back as `data`."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def check_text(text: str) -> str:
    """The text itself; ValueError if it holds a control character or half a surrogate pair."""
    found = _CONTROL.search(text)
    if found:
        raise ValueError(f"{text[:60]!r} holds the character U+{ord(found[0]):04X}; expected text without it")
    return text


def _wrong(where: Any, problem: str) -> yaml.MarkedYAMLError:
    """where: a node or an event."""
    return yaml.MarkedYAMLError(None, None, problem, where.start_mark)


class _Loader(yaml.SafeLoader):
    """Text -> nodes -> values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.open: list[Any] = []  # from the root to the event that is read, or to the node that is built
        self.count = 0

    def load(self) -> Any:
        node = self.get_single_node()
        self.count = 0
        return None if node is None else self.build(node)

    @contextmanager
    def entered(self, where: yaml.Node | yaml.Event) -> Iterator[None]:
        self.open.append(where)
        self.count += 1
        if len(self.open) > MAX_DEPTH:
            raise _wrong(where, f"nested deeper than {MAX_DEPTH} levels")
        if self.count > MAX_NODES:
            raise _wrong(where, f"more than {MAX_NODES} values, aliases expanded")
        yield
        self.open.pop()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace(_TAG, "!!")[:60]
            raise _wrong(event, f"got the tag {tag}; a recipe has none: write the value alone")
        with self.entered(event):
            return super().compose_node(parent, index)

    def build(self, node: yaml.Node) -> Any:
        if node in self.open:
            raise _wrong(node, "an anchor that contains itself")
        with self.entered(node):
            if isinstance(node, yaml.ScalarNode):
                return _scalar(node)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item) for item in node.value]
            assert isinstance(node, yaml.MappingNode)
            return self.build_mapping(node)

    def build_mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        lines: dict[str, int] = {}
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node)
            if key in lines:
                raise _wrong(key_node, f"key {key[:60]!r} is given twice, first in line {lines[key]}; drop one")
            lines[key] = key_node.start_mark.line + 1
            if key == "<<" and key_node.style is None:
                merged = self.build_merged(value_node)
            else:
                own[key] = self.build(value_node)
        return merged | own

    def build_merged(self, node: yaml.Node) -> dict[str, Any]:
        """What `<<` brings: of a list the first mapping wins."""
        merged: dict[str, Any] = {}
        for part in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
            if not isinstance(part, yaml.MappingNode):
                raise _wrong(part, "<< expects an alias of a mapping, or a list of such")
            merged |= self.build(part)
        return merged


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern in _SCALARS.items():
    for _class in (_Loader, _Dumper):  # text that either version would read as something else is quoted
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)


def _key(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "str":
        return str(_scalar(node))
    kind = "a mapping" if isinstance(node, yaml.MappingNode) else "a sequence"
    shown = repr(node.value[:60]) if isinstance(node, yaml.ScalarNode) else kind
    raise _wrong(node, f"got {shown} as a key, expected text: put it in quotes")


def _scalar(node: yaml.ScalarNode) -> Any:
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if kind == "str":
        try:
            return check_text(text)
        except ValueError as error:
            raise _wrong(node, str(error)) from None
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        value = int(text, 0) if len(text) <= 30 else 1 << 64  # int() refuses thousands of digits
        if not -(1 << 63) <= value < 1 << 64:
            raise _wrong(node, f"the number {text[:40]} has more than 64 bits")
        return value
    if "." in text and text.lower().lstrip("+-") in (".inf", ".nan"):
        return float(text.lower().replace(".", "", 1))
    number = float(text)
    vanished = number == 0 and re.search("[1-9]", re.split("[eE]", text)[0])
    if math.isinf(number) or vanished:
        raise _wrong(node, f"the number {text[:40]} does not fit into 64 bits")
    return number
