"""What is checked before any work: the output can be written, data and models can be read, rewards exist.

A mistake found here costs seconds and changes nothing on disk.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1fast.config import ConfigError, Recipe

DATA_KIND = {
    "pretrain": "sft",
    "sft": "sft",
    "distill": "sft",
    "grpo": "prompts",
    "collect": "prompts",
    "reject": "prompts",
}


def check_output(run_dir: Path, *, resume: bool) -> None:
    """The run directory is new (or resumed), and can be written."""
    if run_dir.exists() and not resume:
        if not run_dir.is_dir():
            raise ConfigError(f"--output-dir {run_dir}: is a file, expected a folder")
        if any(run_dir.iterdir()):
            raise ConfigError(
                f"--output-dir {run_dir}: holds files already; choose another, or continue that run with --resume"
            )
    parent = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"--output-dir {run_dir}: cannot write in {parent} ({error.strerror}); choose another"
        ) from None


def check_inputs(recipe: Recipe, selected: list[str], run_dir: Path) -> None:
    """Every file, model and reward that the recipe names from outside the run can be used."""
    for stage in recipe.stages:
        if stage.name not in selected:
            continue
        for problem in _problems(recipe, stage):
            raise ConfigError(f"stages.{stage.name}.{problem}")


def _problems(recipe: Recipe, stage: Any) -> Iterator[str]:
    for key, ref in _model_refs(recipe, stage):
        try:
            _check_model(ref)
        except ValueError as error:
            yield f"{key}: {error}"
    columns: set[str] = set()
    for key, kind in _file_keys(stage):
        sources = [source for source in getattr(stage, key) if not source.startswith("@")]
        try:
            rows = _rows(sources, kind)
        except ValueError as error:
            yield f"{key}: {error}"
            return
        columns |= set(rows[0]) if rows else set()
        if kind == "prompts" and rows and hasattr(stage, "max_prompt_length"):
            yield from _long_prompts(recipe, stage, key, rows)
    for key in ("rewards", "eval_rewards"):
        rewards = getattr(stage, key, None)
        if rewards and (key == "rewards" or stage.eval_files):
            try:
                _check_rewards(rewards, columns)
            except ValueError as error:
                yield f"{key}: {error}"


def _file_keys(stage: Any) -> Iterator[tuple[str, str]]:
    kind = DATA_KIND.get(stage.kind)
    if stage.kind == "reward_model":
        kind = "pairs" if stage.loss == "pairwise" else "labels"
    if stage.kind == "distill" and stage.teacher:
        kind = "prompts"
    if kind:
        yield "train_files", kind
    if getattr(stage, "eval_files", None):
        yield "eval_files", "prompts"


_cache: dict[tuple[tuple[str, ...], str], list[dict]] = {}


def _rows(sources: list[str], kind: str) -> list[dict]:
    from r1fast.data.sources import load_rows

    key = (tuple(sources), kind)
    if key not in _cache:
        _cache[key] = load_rows(sources, kind) if sources else []  # type: ignore[arg-type]
    return _cache[key]


def _model_refs(recipe: Recipe, stage: Any) -> Iterator[tuple[str, Any]]:
    if stage.kind != "pretrain":
        yield "model", stage.model or recipe.model.path
    if getattr(stage, "teacher", None):
        yield "teacher", stage.teacher
    for name, spec in getattr(stage, "reward_models", {}).items():
        yield f"reward_models.{name}.model", spec.model


def _check_model(ref: str) -> None:
    if not ref.startswith("@"):
        from r1fast.models.weights import check_checkpoint

        check_checkpoint(ref)


def _check_rewards(rewards: dict[str, Any], columns: set[str]) -> None:
    from r1fast.rewards.pool import RewardPool
    from r1fast.stages.sampling import pool_arguments, reward_specs

    with RewardPool(pool_arguments(reward_specs(rewards))) as pool:
        pool.check(columns or None)


def _long_prompts(recipe: Recipe, stage: Any, key: str, rows: list[dict]) -> Iterator[str]:
    """Prompts longer than the limit, where the tokenizer is there before the run."""
    ref = stage.model or recipe.model.path
    if ref is None or ref.startswith("@"):
        return
    from r1fast.models.weights import load_tokenizer
    from r1fast.stages.batch import encode_prompts

    tokenizer = load_tokenizer(ref)
    for i, ids in enumerate(encode_prompts([row["prompt"] for row in rows], tokenizer, stage)):
        if len(ids) > stage.max_prompt_length:
            text = str(rows[i]["prompt"])[:60]
            more = f"more than max_prompt_length = {stage.max_prompt_length}; raise it or drop the row"
            yield f"{key}: row {i + 1} ({text!r}) has {len(ids)} prompt tokens, {more}"
            return
