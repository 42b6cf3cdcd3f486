"""Recipes as files: YAML with inheritance, overrides, and errors that name the key. The options: schema.py.

Precedence: defaults < the files under `defaults:` < the recipe file < overrides, left to right. Stages merge by name,
and an override addresses a stage by its name: `stages.zero.max_steps=20`. Names are TRL's or verl's where they exist.
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from r1fast.schema import KINDS, Recipe

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """A mistake in what the user asked for. The command line prints it without a traceback and exits with status 2."""


def load_recipe(config: str, overrides: list[str]) -> Recipe:
    """Read a recipe by name or file, apply overrides `key.sub=value`, validate. Raises ConfigError."""
    raw = _unshared(_read(config))
    raw.setdefault("name", Path(config).stem)
    return apply_overrides(raw, overrides, config)


def apply_overrides(raw: dict[str, Any], overrides: list[str], where: str) -> Recipe:
    """A recipe of these values and overrides `key.sub=value`; `where` names it in errors. Raises ConfigError."""
    for override in overrides:
        key, separator, value = override.removeprefix("--").partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: expected key.sub=value")
        _assign(raw, key, _parse_value(override, value))
    return validate(raw, where)


def _unshared(node: Any) -> Any:
    """A copy without aliases: an override of one stage must not reach others through a YAML anchor."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _parse_value(override: str, value: str) -> Any:
    if value.startswith("@"):  # the artifact of a stage; YAML reserves the sign
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def validate(raw: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(detail, raw) for detail in error.errors()]
        raise ConfigError(f"{where}: " + ("\n" + " " * 2).join(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False, allow_unicode=True)


def _read(config: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    path = Path(config)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{config}.yaml"
    if not path.is_file():
        names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        near = get_close_matches(config, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"no recipe {config!r}{hint}; give a YAML file or one of {', '.join(names)}")
    seen_with_this = (*seen, str(path.resolve()))
    if seen_with_this[-1] in seen:
        raise ConfigError(f"{path}: defaults form a cycle: {' -> '.join(seen_with_this)}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(raw).__name__}")
    raw = {key: value for key, value in raw.items() if not str(key).startswith("x-")}  # a place for YAML anchors
    _check_names(raw, path)
    parents = raw.pop("defaults", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: defaults: got {parents!r}, expected a recipe or a list of recipes")
    merged: dict[str, Any] = {}
    for parent in parents:
        sibling = path.parent / parent
        merged = _merge(merged, _read(str(sibling) if sibling.is_file() else parent, seen_with_this))
    return _merge(merged, raw)


def _check_names(raw: dict[str, Any], path: Path) -> None:
    """Names within one file, before a merge by name would drop one of two."""
    stages = raw.get("stages")
    names = [stage.get("name") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    for name in names:
        if name is not None and names.count(name) > 1:
            raise ConfigError(f"{path}: stages: two stages are named {name!r}; names must differ")


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
    by_name = {stage.get("name"): stage for stage in top if isinstance(stage, dict)}
    merged = [_merge(stage, by_name.pop(stage.get("name"), {})) if isinstance(stage, dict) else stage for stage in base]
    return merged + [stage for stage in top if not isinstance(stage, dict) or stage.get("name") in by_name]


def _parts(raw: dict[str, Any], key: str) -> list[str]:
    """The key's parts; the name of a stage is one part, dots and all."""
    stages = raw.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        name = stage.get("name") if isinstance(stage, dict) else None
        if name and key.startswith(f"stages.{name}."):
            return ["stages", name, *key.removeprefix(f"stages.{name}.").split(".")]
    return key.split(".")


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    parts = _parts(raw, key)
    node: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            names = [stage.get("name") for stage in node if isinstance(stage, dict)]
            if part not in names:
                near = get_close_matches(part, [str(name) for name in names], n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ConfigError(f"override {key}: no stage {part!r}{hint}; stages: {', '.join(map(str, names))}")
            if last:
                raise ConfigError(f"override {key}: name a key of the stage, as in {key}.max_steps=10")
            node = node[names.index(part)]
        elif last:
            node[part] = value
        else:
            child = node.setdefault(part, {})
            if not isinstance(child, (dict, list)):
                raise ConfigError(f"override {key}: {'.'.join(parts[: depth + 1])} is {child!r}, which has no keys")
            node = child


def _explain(detail: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    """One line for one mistake: the key as the user wrote it, what was got, what was expected."""
    loc = list(detail["loc"])
    model: Any = Recipe
    shown: list[str] = []
    if loc[:1] == ["stages"] and len(loc) > 1 and isinstance(loc[1], int):
        stage = raw["stages"][loc[1]]
        name = stage.get("name", loc[1]) if isinstance(stage, dict) else loc[1]
        shown, rest = ["stages", str(name)], loc[2:]
        if rest and rest[0] in KINDS:
            model, rest = KINDS[str(rest[0])], rest[1:]
        loc = rest
    shown += [str(part) for part in loc]
    key = ".".join(shown)
    if detail["type"] == "extra_forbidden":
        for part in loc[:-1]:
            if part not in getattr(model, "model_fields", {}):
                continue  # the user's own name in a mapping, such as that of a reward model
            annotation = model.model_fields[part].annotation
            models = [
                a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
            ]
            model = models[0] if models else None
        known = list(getattr(model, "model_fields", {}))
        near = get_close_matches(str(loc[-1]), known, n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        got = detail["ctx"].get("tag", "nothing")
        near = get_close_matches(str(got), KINDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"{key}.kind: got {got}{hint}; expected one of {', '.join(KINDS)}"
    if detail["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = detail["msg"].removeprefix("Value error, ")
    return (
        f"{key or 'recipe'}: {message}; got {detail['input']!r}"
        if detail["type"] != "value_error"
        else f"{key}: {message}"
    )
