"""What each stage reads, found by the types of its options (schema_types.Reads), and a fingerprint of it.

An artifact is what stages hand on: RUN/<stage>/model, a Hugging Face checkpoint, or RUN/<stage>/data.jsonl. A recipe
names one as @stage, or something from outside the run.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from r1fast.schema import PretrainStage, Recipe
from r1fast.schema_options import StageBase, reward_specs
from r1fast.schema_types import Reads, RowKind

WHOLE_BYTES = 64 << 20
NUM_BLOCKS, BLOCK_BYTES = 64, 1 << 20


@dataclass(frozen=True)
class Artifact:
    """One reference: where the recipe has it, what it says, and what it stands for."""

    key: str  # in the stage's settings: "few_shot.examples_files"
    ref: str
    kind: str
    rows: RowKind | None = None  # what data hold

    @property
    def stage(self) -> str | None:
        """The stage that it comes from; None: from outside the run."""
        return self.ref[1:] if self.ref.startswith("@") else None

    @property
    def file(self) -> str:
        """Its name in the folder of the stage that makes it."""
        return "data.jsonl" if self.kind == "data" else "model"

    def place(self, run_dir: Path) -> str:
        """A path, or what the recipe names from outside the run."""
        return self.ref if self.stage is None else str(run_dir / self.stage / self.file)

    def fingerprint(self, run_dir: Path) -> str:
        """Raises OSError."""
        if self.ref.startswith("task:"):
            return "of this version of r1fast"
        if self.ref.startswith("reasoning_gym:"):
            return f"reasoning-gym {metadata.version('reasoning-gym')}"
        if self.ref.startswith("package:"):
            from r1fast.models.folders import in_package  # with it comes transformers

            try:
                return fingerprint(in_package(self.ref))
            except ValueError:
                return "missing"
        path = Path(self.place(run_dir)).expanduser()
        if self.stage is not None or path.exists() or self.kind == "code":
            return fingerprint(path)
        folder, _, split = self.ref.rpartition(":")  # of data: the split of a folder
        if self.kind == "data" and folder and Path(folder).is_dir():
            return f"{fingerprint(Path(folder))}, split {split}"
        repo_id, _, _ = self.ref.partition(":")
        return f"Hub, commit {hub_commit(repo_id, 'dataset' if self.kind == 'data' else 'model')}"


def start_model(recipe: Recipe, stage: StageBase) -> str | None:
    """The model that a stage starts from, as the recipe names it; a pretrain stage starts from none."""
    return None if isinstance(stage, PretrainStage) else stage.model or recipe.model.ref


def inputs_of(recipe: Recipe, stage: StageBase) -> list[Artifact]:
    """All that a stage's settings name: models first, and of data what is trained on."""
    stage = stage.model_copy(update={"model": start_model(recipe, stage)})
    order = {kind: place for place, kind in enumerate(("model", "reward model", "data", "code"))}
    return sorted(_named_in(stage, stage), key=lambda found: (order[found.kind], found.key != "train_files"))


def _named_in(options: BaseModel, stage: StageBase, prefix: str = "") -> Iterator[Artifact]:
    for name, field in type(options).model_fields.items():
        key, value = prefix + name, getattr(options, name)
        nested = {f"{key}.{part}": entry for part, entry in value.items()} if isinstance(value, dict) else {key: value}
        reads = _marker((*field.metadata, field.annotation))
        if reads is None:
            for place, part in nested.items():
                if isinstance(part, BaseModel):
                    yield from _named_in(part, stage, f"{place}.")
        elif reads.kind == "code":  # functions that are named as path/to/file.py:name: one, or those of rewards
            specs = reward_specs(value) if isinstance(value, dict) else {}
            functions = {f"{key}.{name}": str(spec.function) for name, spec in specs.items()} or {key: str(value)}
            for place, function in functions.items():
                file, separator, _ = function.rpartition(".py:")
                if separator:
                    yield Artifact(place, f"{file}.py", "code")
        elif value:
            rows = reads.rows(stage) if callable(reads.rows) else reads.rows
            for ref in value if isinstance(value, list) else [value]:
                yield Artifact(key, ref, reads.kind, rows)


def _marker(types: tuple[Any, ...]) -> Reads | None:
    """The one in these types, however deep."""
    for part in types:
        found = part if isinstance(part, Reads) else _marker(get_args(part))
        if found is not None:
            return found
    return None


def fingerprints(recipe: Recipe, stage: StageBase, run_dir: Path) -> dict[str, str]:
    """ "key: reference" -> fingerprint of all that a stage reads. Raises OSError."""
    return {f"{found.key}: {found.ref}": found.fingerprint(run_dir) for found in inputs_of(recipe, stage)}


def fingerprint(path: Path) -> str:
    """Of a file, or of all files in a folder with their names; "missing" where nothing is. Raises OSError.

    A file of up to 64 MiB counts whole. Of a larger one count its size and 64 blocks of 1 MiB, evenly spread from the
    first to the last: a file that was exchanged, cut short or trained on shows, single bits between the blocks need
    not. Times of change count for nothing: a copy is the same file.
    """
    if not path.exists():
        return "missing"
    if not path.is_dir():
        return _of_file(path)
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")):
        if file.is_file():
            total.update(f"{file.relative_to(path)}\0{_of_file(file)}\0".encode(errors="surrogateescape"))
    return total.hexdigest()


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    total = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            total.update(file.read())
        else:
            for block in range(NUM_BLOCKS):
                file.seek((size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1))
                total.update(file.read(BLOCK_BYTES))
    return total.hexdigest()


def hub_commit(repo_id: str, kind: str) -> str:
    """The commit of a Hub repository ("model" or "dataset") that the local cache holds, or "unknown"."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repo_id, _, revision = repo_id.partition("@")
    ref = Path(HF_HUB_CACHE) / f"{kind}s--{repo_id.replace('/', '--')}" / "refs" / (revision or "main")
    is_commit = re.fullmatch("[0-9a-f]{40}", revision) is not None
    return ref.read_text().strip() if ref.is_file() else revision if is_commit else "unknown"
