"""The types that options have: finite, no larger than what they count can be, and marked where they name an input."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

T = TypeVar("T")
Made = Literal["model", "reward model", "data"]
RowKind = Literal["prompts", "sft", "pairs", "labels"]


@dataclass(frozen=True)
class Reads:
    """Marks an option that names what a stage reads. rows: what data hold, or how the options of the stage say it."""

    kind: Literal["model", "reward model", "data", "code"]
    rows: RowKind | Callable[[Any], RowKind] | None = None


Positive = Annotated[int, Field(gt=0, lt=2**31)]  # ops count in int32
Count = Annotated[int, Field(ge=0, lt=2**31)]
Bytes = Annotated[int, Field(gt=0, lt=2**60)]
# What float32 holds, with room for a product.
NonNegative = Annotated[float, Field(ge=0, le=1e18)]
AboveZero = Annotated[float, Field(gt=0, le=1e18)]
Weight = Annotated[float, Field(ge=-1e18, le=1e18)]
Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=1000)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch, numpy and vLLM all take
LearningRate = Annotated[float, Field(gt=0, le=1000)]
RewardName = Annotated[str, Field(min_length=1, max_length=1000)]
Ref = Annotated[str, Field(min_length=1, max_length=4096)]  # a path, a Hub id, a source of data, @stage
ModelRef = Annotated[Ref, Reads("model")]
RewardModelRef = Annotated[Ref, Reads("reward model")]
Prompts = Annotated[Ref, Reads("data", "prompts")]
SFTRows = Annotated[Ref, Reads("data", "sft")]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


Listed = Annotated[list[T], BeforeValidator(_listed)]  # of one thing, that thing alone will do; of none null
Files = Annotated[list[T], Field(min_length=1), BeforeValidator(_listed)]

MAX_NAME_BYTES = 200  # of a folder, with room for an ending: file systems take 255
# In a run folder, or beside it; upper and lower case are one name on some file systems.
_RESERVED = ("latest", "rollout_weights", "tensorboard", "wandb", "trackio")
_RESERVED_ENDINGS = (".yaml", ".json", ".jsonl", ".html", ".partial", ".lock", ".tmp", ".log")


def _folder(name: str) -> str:
    if name != name.strip() or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError(f"{name[:60]!r} is no name of a folder; expected letters, digits, spaces, - _ .")
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise ValueError(f"{name[:60]!r} has {len(name.encode())} bytes; expected 1 to {MAX_NAME_BYTES}")
    return name


def _stage_name(name: str) -> str:
    if name.lower() in _RESERVED or name.lower().endswith(_RESERVED_ENDINGS):
        raise ValueError(f"{name!r} is what a run calls a file of its own; choose another name")
    return _folder(name)


def _day(text: str) -> str:
    if not re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        raise ValueError(f"{text[:60]!r} is no date; expected 2026-01-31, say")
    date.fromisoformat(text)
    return text


def plain(value: Any) -> Any:
    """What YAML can hold, and a saved recipe gives back."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"got {value}, expected a finite number")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        plain(part)
    return value


FolderName = Annotated[str, AfterValidator(_folder)]
StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"), AfterValidator(_stage_name)]
Day = Annotated[str, AfterValidator(_day)]
Plain = Annotated[Any, AfterValidator(plain)]
