"""What to say of a key that is none of a recipe's: where it belongs, what it is called here, or what is near."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel

from r1fast.schema import KINDS, Recipe
from r1fast.translations import translate, translate_last, translations

# Of the command line, with a value and without.
VALUED, FLAGS = ("--config", "--output-dir", "--stages"), ("--resume", "--accept-changes", "--dry-run", "--version")
FEW = 12  # names that are listed where none is near


def unknown(loc: tuple[Any, ...], value: Any, stage_names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with an unknown key, and with each below it where it is a section of another trainer.

    Args:
        loc: where pydantic found it.
        value: what stands there.
        stage_names: of the recipe.
    Returns pairs: keys below it, with dots before ("" for itself), and what to say.
    """
    kind = loc[2] if loc[0] == "stages" else None
    path = [str(part).replace("-", "_") for part in (loc[3:] if kind else loc)]  # as argument parsers write them
    names = list(stage_names)
    section = ".".join(path)
    if isinstance(value, dict) and any(row.theirs.startswith(f"{section}.") for row in translations()):
        for below in _leaves(value):
            row = translate(f"{section}.{below}")
            yield f".{below}", f"unknown key {row}" if row else f"unknown key; nor is {section} a section of a recipe"
        return
    known, is_bare = _known(kind, path[:-1]), len(path) == 1
    if row := translate(section):
        yield "", f"unknown key {row}"
    elif place := _elsewhere(path[-1], kind, names) if is_bare and path[-1] not in known else "":
        yield "", f"unknown key; {place}"
    elif row := translate(path[-1]) or (translate_last(path[-1]) if is_bare else None):
        yield "", f"unknown key {row}"
    else:
        options = (*VALUED, *FLAGS, *names) if is_bare and kind is None else ()
        yield "", f"unknown key{_near(path[-1], known, options, kind)}"


def _leaves(value: dict[Any, Any]) -> Iterator[str]:
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from (f"{name}.{below}" for below in _leaves(inner))
        else:
            yield str(name)


def _elsewhere(name: str, kind: str | None, stage_names: list[str]) -> str:
    """Where a recipe has an option of this name, in words."""
    kinds = [other for other, stage in KINDS.items() if name in stage.model_fields]
    if kind is None and kinds:
        override = f"{stage_names[0] if len(stage_names) == 1 else 'NAME'}.{name}=VALUE"
        return f"stages of kind {', '.join(kinds)} have it: write it in one of them, or on the command line {override}"
    sections = [part for part, field in Recipe.model_fields.items() if name in _options(field.annotation)]
    if sections:
        return f"write {sections[0]}.{name}, beside stages"
    if name in Recipe.model_fields and kind is not None:
        return "it stands beside stages, not in one"
    return f"kind {' and '.join(kinds)} {'has' if len(kinds) == 1 else 'have'} it, not {kind}" if kinds else ""


def _options(annotation: Any) -> dict[str, Any]:
    """Of the section that a type holds, if it holds one."""
    for member in (annotation, *get_args(annotation)):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member.model_fields
    return {}


def _known(kind: str | None, path: list[str]) -> list[str]:
    fields: dict[str, Any] = KINDS[kind].model_fields if kind else Recipe.model_fields
    for part in path:
        if part in fields:  # else the user's own name, such as that of a reward model
            fields = _options(fields[part].annotation)
    return list(fields)


def _near(name: str, known: list[str], options: Iterable[str], kind: str | None) -> str:
    near = get_close_matches(name[:80], [*known, *options], n=3, cutoff=0.6)
    if near:
        *first, last = map(repr, near)
        return f"; did you mean {', '.join(first)} or {last}?" if first else f"; did you mean {last}?"
    return f"; known: {', '.join(known)}" if len(known) <= FEW else f"; --help {kind or 'recipe'} lists what there is"
