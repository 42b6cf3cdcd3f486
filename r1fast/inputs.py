"""What a stage reads: every model, file and function that its settings name, and a fingerprint of each."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from r1fast.fingerprints import fingerprint, hub_commit
from r1fast.schema import Recipe


def start_model(recipe: Recipe, stage: Any) -> str | None:
    """The model that a stage starts from, as the recipe names it; a pretrain stage starts from none."""
    return None if stage.kind == "pretrain" else stage.model or recipe.model.path


def named_inputs(recipe: Recipe, stage: Any) -> Iterator[tuple[str, str, str]]:
    """(key, reference, "model", "reward model", "data" or "code") for all that a stage's settings name."""
    settings = stage.model_dump()
    few_shot = settings.get("few_shot") or {}
    models = {
        "model": start_model(recipe, stage),
        "teacher": settings.get("teacher"),
        "tokenizer": settings.get("tokenizer"),
        "few_shot.model": few_shot.get("model"),
    }
    for key, ref in models.items():
        if ref:
            yield key, ref, "model"
    for name, spec in (settings.get("reward_models") or {}).items():
        yield f"reward_models.{name}.model", spec["model"], "reward model"
    files = {key: settings.get(key) or [] for key in ("train_files", "eval_files")}
    files["few_shot.examples_files"] = few_shot.get("examples_files") or []
    for key, refs in files.items():
        for ref in refs:
            yield key, ref, "data"
    for key in ("rewards", "eval_rewards"):
        for name, spec in (settings.get(key) or {}).items():
            function = (spec.get("function") if isinstance(spec, dict) else None) or name
            file, separator, _ = function.rpartition(".py:")
            if separator:
                yield f"{key}.{name}", f"{file}.py", "code"


def stage_inputs(recipe: Recipe, stage: Any, run_dir: Path) -> dict[str, str]:
    """ "key: reference" -> fingerprint of all that a stage reads. Raises OSError."""
    return {f"{key}: {ref}": _fingerprint(ref, wanted, run_dir) for key, ref, wanted in named_inputs(recipe, stage)}


def artifact(ref: str, wanted: str) -> tuple[str, str]:
    """(stage, file in its folder) of an @reference."""
    return ref[1:], "data.jsonl" if wanted == "data" else "model"


def _fingerprint(ref: str, wanted: str, run_dir: Path) -> str:
    if ref.startswith("@"):
        stage, name = artifact(ref, wanted)
        return fingerprint(run_dir / stage / name)
    if ref.startswith("task:"):
        return "of this version of r1fast"
    if ref.startswith("reasoning_gym:"):
        return f"reasoning-gym {metadata.version('reasoning-gym')}"
    path = Path(ref).expanduser()
    if path.exists() or wanted == "code":
        return fingerprint(path)
    repo_id, _, _ = ref.partition(":")
    return f"Hub, commit {hub_commit(repo_id, 'dataset' if wanted == 'data' else 'model')}"
