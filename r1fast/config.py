"""Recipes as files: YAML with inheritance, overrides, and errors that name the key. The options: schema.py.

Precedence: defaults < the files under `defaults:` < the recipe file < overrides, left to right. Stages merge by name,
and an override addresses a stage by its name or its number: `zero.max_steps=20`, `stages.zero.max_steps=20` or
`stages.0.max_steps=20`. Names are TRL's or verl's where they exist.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from r1fast.recipe_yaml import MAX_DEPTH, check_text, dump_yaml, load_yaml
from r1fast.schema import KINDS, Recipe
from r1fast.translations import translate_value
from r1fast.unknown_keys import unknown

RECIPES = Path(__file__).parent / "recipes"
MAX_BYTES = 256 * 1024  # of a recipe file: 30 times the largest of `recipes`
MAX_PARENTS = 20  # recipes in a row that name each other under `defaults:`
MAX_LINES, MAX_LINE = 40, 1000  # of an error as it is shown


class ConfigError(ValueError):
    """A mistake in what the user asked for. The command line prints it without a traceback and exits with status 2."""


def error_lines(message: str) -> list[str]:
    """An error as the command line shows it: a line for each mistake, none longer than a screen."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return [f"r1fast: {shown(line, MAX_LINE)}" for line in lines[:MAX_LINES] + more]


def shown(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def load_recipe(config: str, overrides: list[str]) -> Recipe:
    """Read a recipe by name or file, apply overrides `key.sub=value`, validate. Raises ConfigError."""
    raw = _read(config)
    raw.setdefault("name", Path(config).stem)
    return apply_overrides(raw, overrides, config)


def apply_overrides(raw: dict[str, Any], overrides: list[str], where: str) -> Recipe:
    """A recipe of these values and overrides `key.sub=value`; `where` names it in errors. Raises ConfigError."""
    for override in overrides:
        key, separator, value = override.removeprefix("--").partition("=")
        if not separator or not key:
            raise ConfigError(f"override {shown(override)!r}: expected key.sub=value")
        try:
            check_text(override)
            # The artifact of a stage: YAML reserves the sign.
            parsed = value if value.startswith("@") else load_yaml(value)
        except ValueError as error:
            raise ConfigError(f"override {shown(override)!r}: the value is not valid YAML: {error}") from None
        _assign(raw, key, parsed)
    return validate(raw, where)


def validate(raw: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}  # by key: the members of a union complain one by one
        for detail in error.errors(include_url=False):
            for key, problem in _explain(detail, raw):
                problems.setdefault(key, []).append(problem)
        lines = [f"{where}: {key}: {' or '.join(dict.fromkeys(found))}" for key, found in problems.items()]
        raise ConfigError("\n".join(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    return dump_yaml(recipe.model_dump(mode="json"))


def _read(config: str, seen: tuple[str, ...] = (), done: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The recipe with its parents merged in; `seen` are the files that led here, `done` those read already."""
    done = {} if done is None else done
    path = Path(config)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{config}.yaml"
    text = _read_text(path, config)
    resolved = str(path.resolve())
    if resolved in seen:
        raise ConfigError(f"{path}: defaults form a cycle: {' -> '.join((*seen, resolved))}")
    if len(seen) >= MAX_PARENTS:
        raise ConfigError(f"{path}: defaults: more than {MAX_PARENTS} recipes in a row")
    if resolved in done:
        return done[resolved]
    try:
        raw = load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(raw).__name__}")
    raw = {key: value for key, value in raw.items() if not key.startswith("x-")}  # a place for YAML anchors
    for name, count in Counter(map(_name_of, _stages(raw))).items():  # before a merge by name would drop one of two
        if name is not None and count > 1:
            raise ConfigError(f"{path}: stages: two stages are named {shown(repr(name))}; names must differ")
    parents = raw.pop("defaults", None)
    parents = [] if parents is None else [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: defaults: got {shown(repr(parents))}, expected a recipe or a list of recipes")
    merged: dict[str, Any] = {}
    for parent in parents:
        sibling = str(path.parent / parent)
        merged = _merge(merged, _read(sibling if os.path.isfile(sibling) else parent, (*seen, resolved), done))
    done[resolved] = _merge(merged, raw)
    return done[resolved]


def _read_text(path: Path, config: str) -> str:
    """The text of a recipe file; only regular files of a sane size are read."""
    try:
        status = path.stat()
        is_file, is_large = stat.S_ISREG(status.st_mode), status.st_size > MAX_BYTES
        content = path.read_bytes() if is_file and not is_large else b""
    except (FileNotFoundError, NotADirectoryError):
        names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        advice = f"give a YAML file or one of {', '.join(names)}"
        if os.path.isdir(config):
            advice = f"it is a folder; to go on with a run: --resume --output-dir {shown(config)}"
        raise ConfigError(f"no recipe {shown(config)!r}{_near(config[:80], names)}; {advice}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"recipe {shown(config, 300)!r}: cannot be read ({why})") from None
    if not is_file:
        raise ConfigError(f"{path}: is a folder, a device or a pipe; expected a YAML file")
    if is_large:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes; expected a recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: not valid YAML: line {line}: not UTF-8; save the file as UTF-8") from None


def _near(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _merge(base: dict[Any, Any], top: dict[Any, Any]) -> dict[Any, Any]:
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            out[key] = _merge(old, value)
        elif key == "stages" and isinstance(value, list) and isinstance(old, list):
            by_name = ({_name_of(stage) or id(stage): stage for stage in side} for side in (old, value))
            out[key] = list(_merge(*by_name).values())
        else:
            out[key] = value
    return out


def _name_of(stage: Any) -> str | None:
    name = stage.get("name") if isinstance(stage, dict) else None
    return name if isinstance(name, str) else None


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    where = f"override {shown(key)}"
    stage, rest = _stage_of(raw, key, where)
    path = rest.split(".")
    if "" in path or len(path) > MAX_DEPTH:
        raise ConfigError(f"{where}: expected names with dots between them, as in stages.NAME.key=value")
    before = key.removesuffix(rest).split(".")[:-1]
    node = raw if stage is None else stage
    for depth, part in enumerate(path[:-1], 1):
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            found = ".".join([*before, *path[:depth]])
            raise ConfigError(f"{where}: {shown(found)} is {shown(repr(child))}, which has no keys")
        node = child
    node[path[-1]] = value


def _stage_of(raw: dict[str, Any], key: str, where: str) -> tuple[dict[str, Any] | None, str]:
    """The stage that a key is of, if it is, and its key there: stages.NAME.key, stages.0.key, NAME.key.

    A section of the recipe comes before a stage of its name, and a name before a number. The name of a stage is one
    part, dots and all: of two that fit, the longer.
    """
    rest = key.removeprefix("stages.")
    stages = {name: stage for stage in _stages(raw) if (name := _name_of(stage))}
    if rest == key and (not stages or key.split(".")[0] in Recipe.model_fields):
        return None, key
    if name := max((name for name in stages if rest.startswith(f"{name}.")), key=len, default=""):
        return stages[name], rest.removeprefix(f"{name}.")
    number, _, inner = rest.partition(".")
    if rest == key or not number or not isinstance(raw.get("stages"), list):
        return None, key
    numbered = {str(place): stage for place, stage in enumerate(_stages(raw)) if isinstance(stage, dict)}
    if inner and number in numbered:
        return numbered[number], inner
    if rest in stages:
        raise ConfigError(f"{where}: name a key of the stage, as in {shown(key)}.max_steps=10")
    named = shown(rest.partition(".")[0])
    raise ConfigError(f"{where}: no stage {named!r}{_near(named, stages)}; stages: {', '.join(stages)}")


def _stages(raw: Mapping[str, Any]) -> list[Any]:
    return raw["stages"] if isinstance(raw.get("stages"), list) else []


def _explain(detail: Mapping[str, Any], raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One mistake: the key as the user wrote it, and what was got and expected there; a foreign section has many."""
    loc, kind = detail["loc"], detail["type"]
    names: list[str] = []
    node: Any = raw
    for place, part in enumerate(loc):
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            node = node[part]
        elif not (kind == "missing" and place == len(loc) - 1):
            continue  # the member of a union that was tried, the kind of a stage too
        names.append((_name_of(node) if names == ["stages"] else None) or str(part))
    key = ".".join(shown(" ".join(name.split())) for name in names) or "recipe"
    if kind == "extra_forbidden":
        for below, problem in unknown(loc, detail["input"], filter(None, map(_name_of, _stages(raw)))):
            yield key + shown(" ".join(below.split())), problem
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        got = shown(str(detail["ctx"].get("tag", "nothing")))
        yield f"{key}.kind", f"got {got}{_near(got.lower(), KINDS)}; expected one of {', '.join(KINDS)}"
    elif kind == "missing":
        yield key, "missing; it has no default" if key != "stages" else "missing; a list of {name: .., kind: .., ..}"
    elif said := translate_value(next((name for name in reversed(names) if not name.isdecimal()), ""), detail["input"]):
        yield key, f"got {detail['input']!r}; here {said}"
    elif kind == "value_error":
        yield key, detail["msg"].removeprefix("Value error, ")
    elif kind == "model_type":
        options = getattr(Recipe.model_fields.get(key), "annotation", None)
        known = ", ".join(f"{key}.{name}" for name in getattr(options, "model_fields", {}))
        yield key, f"expected options{f' ({known})' if known else ''}; got {shown(repr(detail['input']))}"
    else:
        yield key, f"{_expected(kind, detail['msg'], detail['input'])}; got {shown(repr(detail['input']))}"


def _expected(kind: str, message: str, got: Any) -> str:
    """Pydantic's message, in the words of YAML where those help."""
    if kind == "dict_type":
        names = [got] if isinstance(got, str) else got if isinstance(got, list) else []
        shape = ", ".join(f"{name}: .." for name in names if isinstance(name, str)) or "NAME: .."
        return f"expected a mapping, {{{shown(shape)}}}"
    if kind == "list_type" and isinstance(got, dict):
        return "expected a list, each of its entries with a dash before it"
    hint = "; write true or false" if kind == "bool_type" else ""
    return f"{message}{'; None is written null' if got == 'None' else hint}"
