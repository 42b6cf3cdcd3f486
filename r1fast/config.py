"""Recipes as files: YAML with inheritance, overrides, and errors that name the key. The options: schema.py.

Precedence: defaults < the files under `defaults:` < the recipe file < overrides, left to right. Stages merge by name,
and an override addresses a stage by its name: `stages.zero.max_steps=20`. Names are TRL's or verl's where they exist.
"""

import stat
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from r1fast.recipe_yaml import MAX_DEPTH, check_text, dump_yaml, load_yaml
from r1fast.schema import KINDS, Recipe

RECIPES = Path(__file__).parent / "recipes"
MAX_BYTES = 256 * 1024  # of a recipe file: 30 times the largest of `recipes`
MAX_PARENTS = 20  # recipes in a row that name each other under `defaults:`
MAX_LINES, MAX_LINE = 10, 1000  # of an error as it is shown


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
        _assign(raw, key, _parse_value(override, value))
    return validate(raw, where)


def _parse_value(override: str, value: str) -> Any:
    try:
        check_text(override)
        # The artifact of a stage: YAML reserves the sign.
        return value if value.startswith("@") else load_yaml(value)
    except ValueError as error:
        raise ConfigError(f"override {shown(override)!r}: the value is not valid YAML: {error}") from None


def validate(raw: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}  # by key: the members of a union complain one by one
        for detail in error.errors(include_url=False):
            key, problem = _explain(detail, raw)
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
    _check_names(raw, path)
    parents = raw.pop("defaults", None)
    parents = [] if parents is None else [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: defaults: got {shown(repr(parents))}, expected a recipe or a list of recipes")
    merged: dict[str, Any] = {}
    for parent in parents:
        sibling = path.parent / parent
        merged = _merge(merged, _read(str(sibling) if _exists(sibling) else parent, (*seen, resolved), done))
    done[resolved] = _merge(merged, raw)
    return done[resolved]


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or NUL: opening the recipe by its name says so
        return False


def _read_text(path: Path, config: str) -> str:
    """The text of a recipe file; only regular files of a sane size are read."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        near = get_close_matches(config[:80], names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"no recipe {shown(config)!r}{hint}; give a YAML file or one of {', '.join(names)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"recipe {shown(config)!r}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path}: is a folder, a device or a pipe; expected a YAML file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes; expected a recipe")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: not valid YAML: line {line}: not UTF-8; save the file as UTF-8") from None


def _check_names(raw: dict[str, Any], path: Path) -> None:
    """Names within one file, before a merge by name would drop one of two."""
    names: list[Any] = []
    for stage in raw["stages"] if isinstance(raw.get("stages"), list) else []:
        name = stage.get("name") if isinstance(stage, dict) else None
        if name is not None and name in names:
            raise ConfigError(f"{path}: stages: two stages are named {shown(repr(name))}; names must differ")
        names.append(name)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = _merge(out[key], value)
        elif key == "stages" and isinstance(out.get(key), list) and isinstance(value, list):
            out[key] = _merge_stages(out[key], value)
        else:
            out[key] = value
    return out


def _merge_stages(base: list[Any], top: list[Any]) -> list[Any]:
    merged = list(base)
    places = {name: i for i, stage in enumerate(base) if (name := _name_of(stage)) is not None}
    for stage in top:
        place = places.get(_name_of(stage) or "")
        if place is None:
            merged.append(stage)
        else:
            merged[place] = _merge(merged[place], stage)
    return merged


def _name_of(stage: Any) -> str | None:
    name = stage.get("name") if isinstance(stage, dict) else None
    return name if isinstance(name, str) else None


def _parts(raw: dict[str, Any], key: str) -> list[str]:
    """The key's parts; the name of a stage is one part, dots and all: of two that fit, the longer."""
    stages = raw.get("stages")
    names = [_name_of(stage) for stage in stages] if isinstance(stages, list) else []
    fitting = [name for name in names if name and key.startswith(f"stages.{name}.")]
    if fitting:
        name = max(fitting, key=len)
        return ["stages", name, *key.removeprefix(f"stages.{name}.").split(".")]
    return key.split(".")


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    parts = _parts(raw, key)
    where = f"override {shown(key)}"
    if "" in parts or len(parts) > MAX_DEPTH:
        raise ConfigError(f"{where}: expected names with dots between them, as in stages.NAME.key=value")
    node: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            node = _stage_of(node, part, where)
            if last:
                raise ConfigError(f"{where}: name a key of the stage, as in {shown(key)}.max_steps=10")
        elif last:
            node[part] = value
        else:
            child = node.setdefault(part, {})
            if not isinstance(child, (dict, list)):
                path = shown(".".join(parts[: depth + 1]))
                raise ConfigError(f"{where}: {path} is {shown(repr(child))}, which has no keys")
            node = child


def _stage_of(stages: list[Any], part: str, where: str) -> dict[str, Any]:
    names = [_name_of(stage) for stage in stages]
    if part not in names:
        known = [name for name in names if name]
        near = get_close_matches(part, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{where}: no stage {shown(part)!r}{hint}; stages: {', '.join(known)}")
    return stages[names.index(part)]


def _explain(detail: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[str, str]:
    """One mistake: the key as the user wrote it, and what was got and expected there."""
    loc = list(detail["loc"])
    model: Any = Recipe
    names: list[str] = []
    node: Any = raw
    if loc[:1] == ["stages"] and len(loc) > 1 and isinstance(loc[1], int):
        node = raw["stages"][loc[1]]
        names, loc = ["stages", _name_of(node) or str(loc[1])], loc[2:]
        if loc and loc[0] in KINDS:
            model, loc = KINDS[str(loc[0])], loc[1:]
    kind = detail["type"]
    for place, part in enumerate(loc):
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            node = node[part]
        elif not (kind == "missing" and place == len(loc) - 1):
            continue  # the member of a union that was tried
        names.append(str(part))
    key = ".".join(shown(" ".join(name.split())) for name in names) or "recipe"
    if kind == "extra_forbidden":
        return key, _unknown(loc, model)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        got = shown(str(detail["ctx"].get("tag", "nothing")))
        near = get_close_matches(got, KINDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"{key}.kind", f"got {got}{hint}; expected one of {', '.join(KINDS)}"
    if kind == "missing":
        return key, "missing; it has no default"
    if kind == "value_error":
        return key, detail["msg"].removeprefix("Value error, ")
    hint = "; write true or false" if kind == "bool_type" else ""
    return key, f"{detail['msg']}{hint}; got {shown(repr(detail['input']))}"


def _unknown(loc: list[Any], model: Any) -> str:
    for part in loc[:-1]:
        if part not in getattr(model, "model_fields", {}):
            continue  # the user's own name in a mapping, such as that of a reward model
        annotation = model.model_fields[part].annotation
        models = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = models[0] if models else None
    known = list(getattr(model, "model_fields", {}))
    near = get_close_matches(shown(str(loc[-1])), known, n=1)
    return "unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
