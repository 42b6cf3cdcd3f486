"""What --resume finds in a run folder, and what may be changed from there on (docs/architecture.md, section 10)."""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from r1fast.artifacts import Artifact, fingerprints, inputs_of
from r1fast.config import ConfigError, apply_overrides, dump_recipe, load_recipe, shown, validate
from r1fast.run_folder import read_record
from r1fast.schema import Recipe
from r1fast.schema_options import EvalOptions, GenerateOptions, SampleOptions, TrainFilesOptions, ValidationOptions

CONFIG, SUMMARY, STAGE = "config.yaml", "summary.json", "stage.json"
_OF_A_STAGE = (STAGE, "checkpoints", "metrics.jsonl", "model", "data.jsonl")  # stage.json comes before all others
_HEADER = re.compile(r"# crc32 ([0-9a-f]{8}) .*")
# A checkpoint holds weights and moments of these; it could not be loaded, or what is changed would go unused.
_IN_THE_CHECKPOINT = ("kind", "model", "architecture", "tokenizer", "vocab_size", "optimizer", "lora")
# Its evaluations under way are compared, and only the checkpoint of the best of them is there.
_IN_THE_VALIDATIONS = (
    *EvalOptions.__annotations__, *GenerateOptions.__annotations__, "eval_steps_limit", "metric_for_best_model",
    "load_best_model_at_end",
)  # fmt: skip
_IN_THE_SAMPLES = (
    "teacher", "train_files", "seed", *TrainFilesOptions.__annotations__, *SampleOptions.__annotations__,
    *GenerateOptions.__annotations__,
)  # fmt: skip
_LENGTHS = ("max_steps", "num_train_epochs")  # a finished stage may be made longer, from its last checkpoint on


@dataclass(frozen=True)
class Change:
    """A setting (or an input) that is not what the run began with."""

    key: str
    old: Any
    new: Any

    def record(self) -> dict[str, Any]:
        return {"key": self.key, "from": self.old, "to": self.new}

    def __str__(self) -> str:
        old, new = (shown(json.dumps(value, ensure_ascii=False)) for value in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


@dataclass(frozen=True)
class Saved:
    """A run that was stopped: its recipe, its summary ({} if it began nothing), and what of it had to be mended."""

    run_dir: Path
    recipe: Recipe
    summary: dict[str, Any]
    notes: list[str]

    def entry(self, name: str) -> dict[str, Any]:
        pending = {"name": name, "status": "pending"}
        return next((entry for entry in self.summary.get("stages", []) if entry["name"] == name), pending)

    def with_changes(self, config: str | None, overrides: list[str]) -> Recipe:
        """The run's recipe, or another one in its place, with overrides. ConfigError."""
        if config is None:
            return apply_overrides(self.recipe.model_dump(mode="json"), overrides, str(self.run_dir / CONFIG))
        recipe = load_recipe(config, overrides)
        recipe = recipe if self.recipe.date is None else recipe.begun_on(self.recipe.date)
        return recipe.model_copy(update={"name": self.recipe.name})

    def is_done(self, name: str) -> bool:
        return self.entry(name)["status"] == "done"

    def is_outdated(self, made: Artifact) -> bool:
        """Whether the stage that makes it has begun, and will still write it."""
        entry = self.entry(made.stage or "")
        return entry["status"] not in ("pending", "done") and made.file not in entry.get("files", {})

    def reopened(self, changes: list[Change]) -> "Saved":
        """With finished stages that are made longer as stopped ones; what they came to is made and measured anew."""
        keys = {change.key for change in changes}
        stages = []
        for entry in self.summary.get("stages", []):
            if entry["status"] == "done" and any(f"stages.{entry['name']}.{key}" in keys for key in _LENGTHS):
                kept = {name: value for name, value in entry.items() if name not in ("eval_after", "numbers")}
                files = {name: value for name, value in entry.get("files", {}).items() if name != "model"}
                entry = {**kept, "status": "stopped", "files": files}
            stages.append(entry)
        return replace(self, summary={**self.summary, "stages": stages})


# What is relied on in the records: one that another version has written may lack it, for all its checksum.


class _Named(BaseModel):
    name: str


class _Settings(BaseModel):
    stages: list[_Named]


class _Entry(_Named):
    status: Literal["pending", "running", "stopped", "failed", "done"]
    seconds: float = 0.0
    phases: dict[str, float] = {}
    memory: dict[str, int] = {}
    settings: dict[str, Any] = {}
    fingerprints: dict[str, str] = {}
    files: dict[str, str] = {}
    eval_after: dict[str, Any] | None = None


class _Summary(BaseModel):
    stages: list[_Entry]
    settings: _Settings | None = None
    changes: list[dict[str, Any]] = []
    evaluations: dict[str, dict[str, Any]] = {}


class _Stage(BaseModel):
    entry: _Entry
    started: str
    machine: dict[str, Any]
    changes: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]


def _read(path: Path, shape: type[BaseModel]) -> dict[str, Any]:
    """A record as it was written; ValueError if it is damaged or of another shape."""
    record = read_record(path)
    try:
        shape.model_validate(record, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path.name} is of another version ({where}: {first['msg'].lower()})") from None
    return record


def config_text(recipe: Recipe) -> str:
    text = dump_recipe(recipe)
    crc = zlib.crc32(text.encode())
    return f"# crc32 {crc:08x} of what follows: settings are changed by --resume key=value, not here\n{text}"


def read_run(run_dir: Path, config: str | None = None) -> Saved:
    """The run in a folder. config: the recipe if config.yaml is to be replaced. Raises ConfigError."""
    notes: list[str] = []
    path = run_dir / CONFIG
    if not any(file.is_file() for file in (path, run_dir / SUMMARY, *run_dir.glob(f"*/{STAGE}"))):
        raise ConfigError(f"--resume: {run_dir} holds no run (no {CONFIG}); name it with --output-dir")
    summary = _read_summary(run_dir, notes)
    try:
        recipe = _read_config(path)
    except ValueError as error:
        problem = f"{path} {error}"
        if config is None and path.exists():
            raise ConfigError(
                f"--resume: {problem}; settings are changed as --resume key=value. To take them from {SUMMARY}, "
                f"delete {CONFIG}; to give them anew, add --config FILE"
            ) from None
        if "settings" in summary:
            recipe = validate(summary["settings"], SUMMARY)
        elif config is not None:
            recipe = load_recipe(config, [])
        else:
            missing = f"{SUMMARY} does not hold its settings; add --config FILE"
            raise ConfigError(f"--resume: {problem}, and {missing}") from None
        notes.append(f"{problem}; it is written anew")
    return Saved(run_dir, recipe, summary, notes)


def _read_config(path: Path) -> Recipe:
    """ValueError with what is wrong, to be put behind the path."""
    if not path.is_file():
        raise ValueError("is missing")
    header, _, text = path.read_bytes().partition(b"\n")
    found = _HEADER.fullmatch(header.decode(errors="replace"))
    if found is None or int(found[1], 16) != zlib.crc32(text):
        raise ValueError("was edited or damaged since the run wrote it")
    return load_recipe(str(path), [])


def _read_summary(run_dir: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return _read(run_dir / SUMMARY, _Summary)
    except ValueError as error:
        problem = str(error)
    records = []
    for folder in sorted(path for path in run_dir.iterdir() if path.is_dir()):
        if any((folder / name).exists() for name in _OF_A_STAGE):
            try:
                records.append(_read(folder / STAGE, _Stage))
            except ValueError as error:
                raise ConfigError(
                    f"--resume: {run_dir}: {problem}, and of what it could be made from, {folder.name}/{error}: nobody "
                    "knows which stages are finished. Put one of the two back, or start a new run"
                ) from None
    if not records:
        return {}
    stages = [record["entry"] for record in records]
    listed = ", ".join(f"{entry['name']} {entry['status']}" for entry in stages)
    notes.append(f"{run_dir}: {problem}; it is made again from the stages' own records: {listed}")
    newest = max(records, key=lambda record: len(record["evaluations"]))
    started = min(record["started"] for record in records)
    changed = max((record["changes"] for record in records), key=len)
    return newest | {"started": started, "stages": stages, "changes": changed}


def changes(saved: Saved, recipe: Recipe) -> list[Change]:
    """What `recipe` changes of the run's; ConfigError naming every key that cannot be changed any more."""
    raw = saved.summary.get("settings") or saved.recipe.model_dump(mode="json")
    # Of each stage what it began with, and the defaults of options that are newer.
    stages = [saved.entry(stage["name"]).get("settings", stage) for stage in raw["stages"]]
    began = validate({**raw, "stages": stages, "name": recipe.name}, str(saved.run_dir / SUMMARY))
    old, new = (side.model_dump(mode="json") for side in (began, recipe))
    for side in (old, new):
        side["stages"] = {stage["name"]: stage for stage in side["stages"]}
    found = list(_differences((), old, new))
    refused = [f"{change} ({why})" for path, change in found if (why := _why_not(path, saved, recipe))]
    if refused:
        raise ConfigError(f"--resume cannot change {'; '.join(refused)}; leave it, or start a new run")
    return [change for _, change in found]


def _why_not(path: tuple[str, ...], saved: Saved, recipe: Recipe) -> str:
    """Settings outside `stages` hold from now on; the model that a stage began with cannot."""
    for stage in recipe.stages if path in (("model", "path"), ("model", "revision")) else ():
        began = saved.is_done(stage.name) or _has_checkpoint(saved, stage.name)
        if began and stage.kind != "pretrain" and stage.model is None:
            return f"stage {stage.name} began with it"
    if path[0] != "stages":
        return ""
    name, key = path[1], path[2] if len(path) > 2 else None
    entry = saved.entry(name)
    has_sampled = entry.get("kind") == "distill" and "data.jsonl" in entry.get("files", {})
    if entry["status"] == "done":
        why = _why_no_longer(saved, recipe, name) if key in _LENGTHS and len(path) == 3 else ""
        return "" if why is None else f"stage {name} is finished{why}"
    if entry["status"] != "pending" and key is None:
        return f"stage {name} has begun"
    if key in _IN_THE_CHECKPOINT and _has_checkpoint(saved, name):
        return f"the checkpoint of stage {name} holds it"
    if entry.get("validations") and key in _IN_THE_VALIDATIONS and getattr(recipe.stage(name), "chooses", False):
        return f"the best step of stage {name} is chosen by it"
    return f"stage {name} has sampled with it" if has_sampled and key in _IN_THE_SAMPLES else ""


def _why_no_longer(saved: Saved, recipe: Recipe, name: str) -> str | None:
    """Why a finished stage cannot become what the recipe says; None where it can go on: it takes more steps."""
    entry, stage = saved.entry(name), recipe.stage(name)
    settings = entry.get("settings", {})
    lengths = [(settings.get(key), getattr(stage, key, None)) for key in _LENGTHS]
    given = [(old, new) for old, new in lengths if (old, new) != (None, None)]
    if any(old is None or new is None or new < old for old, new in given):
        return ", and can only take more steps"
    for user in recipe.stages:
        if saved.entry(user.name)["status"] != "pending" and any(x.stage == name for x in inputs_of(recipe, user)):
            return f", and {user.name} has begun with what it made"
    if isinstance(stage, ValidationOptions) and not stage.has_patience(entry.get("validations", [])):
        return f", and early_stopping_patience = {stage.early_stopping_patience} ended it"
    return None if _has_checkpoint(saved, name) else ", and its checkpoints are gone"


def _has_checkpoint(saved: Saved, name: str) -> bool:
    return any((saved.run_dir / name / "checkpoints").glob("step_*"))


def _differences(path: tuple[str, ...], old: Any, new: Any) -> Iterator[tuple[tuple[str, ...], Change]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for part in dict.fromkeys([*old, *new]):
            yield from _differences((*path, part), old.get(part), new.get(part))
    elif old != new:
        yield path, Change(".".join(path), old, new)


def changed_inputs(saved: Saved, recipe: Recipe, selected: list[str]) -> tuple[list[str], list[Change]]:
    """Inputs that are not what they were: of finished stages, as lines to print; of those still to be run, as changes.

    A stage that has begun is held to what it began with, one that has not to what the stages before it wrote.
    """
    reports: list[str] = []
    found: list[Change] = []
    for stage in recipe.stages:
        entry = saved.entry(stage.name)
        if "fingerprints" not in entry and stage.name not in selected:
            continue
        before = dict(entry.get("fingerprints", {}))
        for read in inputs_of(recipe, stage) if entry["status"] != "done" else ():
            if read.stage is not None and saved.is_done(read.stage):
                written = saved.entry(read.stage).get("files", {})
                before |= {f"{read.key}: {read.ref}": written[read.file]} if read.file in written else {}
        after = fingerprints(recipe, stage, saved.run_dir) if before else {}
        for key in before:
            if key in after and not _same(before[key], after[key]):
                change = Change(f"stages.{stage.name}.{key}", before[key], after[key])
                if entry["status"] == "done":
                    reports.append(f"{change.key} has changed since the finished stage read it")
                else:
                    found.append(change)
    return reports, found


def _same(before: str, after: str) -> bool:
    both_hub = before.startswith("Hub") and after.startswith("Hub")
    return before == after or (both_hub and "Hub, commit unknown" in (before, after))
