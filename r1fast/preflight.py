"""What is checked before any work: the output can be written, data and models can be read and fit, rewards exist.

A mistake found here costs seconds and changes nothing on disk.
"""

import importlib.util
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from r1fast.artifacts import Artifact, inputs_of
from r1fast.config import ConfigError, shown
from r1fast.models.checks import router_problems
from r1fast.preflight_architecture import architecture_of, architecture_problems, checkpoint_of, vocabulary_of
from r1fast.preflight_rows import reward_problems, row_problems, text_problems, tokenizer_of, unrewarded_problems
from r1fast.recipe_yaml import check_text
from r1fast.run_folder import holds_nothing
from r1fast.schema import Recipe, reward_specs


def check_output(run_dir: Path, *, resume: bool, stages: Sequence[str] = ()) -> None:
    """The run directory is new (or resumed), can be written, and has room for what the stages write, in a path too."""
    _check_path(run_dir, stages)
    _check_places(run_dir, stages)
    if run_dir.exists() and not resume:
        if not run_dir.is_dir():
            raise ConfigError(f"--output-dir {run_dir}: is a file, expected a folder")
        if not holds_nothing(run_dir):
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


def _check_places(run_dir: Path, stages: Sequence[str]) -> None:
    """What a resumed run finds where it will write is of the same kind: a pipe, say, would be waited for."""
    folders = [run_dir / stage / name for stage in stages for name in ("", "checkpoints", "samples")]
    files = [run_dir / stage / name for stage in stages for name in ("metrics.jsonl", "data.jsonl")]
    for path in (*folders, run_dir / "summary.json", run_dir / "report.html", *files):
        fits, kind = (path.is_dir(), "folder") if path in folders else (path.is_file(), "file")
        if not fits and os.path.lexists(path):
            raise ConfigError(f"--output-dir {run_dir}: {path} is no {kind}; move it away")


def _check_path(run_dir: Path, stages: Sequence[str]) -> None:
    name = shown(str(run_dir))
    longest = max(stages, key=len, default="")
    try:
        check_text(str(run_dir))
        (run_dir / longest / "checkpoints" / "tmp_step_000000" / "manifest.json").lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError(f"--output-dir {name}: {error.strerror}; choose another") from None
    except ValueError as error:
        raise ConfigError(f"--output-dir {error}") from None


def check_inputs(recipe: Recipe, selected: list[str], run_dir: Path) -> list[str]:
    """Every file, model and reward that the recipe names from outside the run can be used; else ConfigError.

    Returns notes: what a user should know and that stops nothing.
    """
    notes: list[str] = []
    for name in recipe.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: {name} is not installed; pip install {name}, or take it out of report_to")
    if recipe.rollout.engine == "vllm":
        for problem in _vllm_problems(recipe, selected):
            raise ConfigError(problem)
    try:
        for stage in recipe.stages:
            if stage.name in selected:
                found: list[str] = []
                for problem in _problems(recipe, stage, found):
                    raise ConfigError(f"stages.{stage.name}.{' '.join(problem.splitlines())}")
                notes += [f"stages.{stage.name}.{' '.join(note.splitlines())}" for note in found]
    finally:
        _cache.clear()
        checkpoint_of.cache_clear()
        tokenizer_of.cache_clear()
    return notes


def _problems(recipe: Recipe, stage: Any, notes: list[str]) -> Iterator[str]:
    """What is wrong, the first thing first; a caller that goes on after one may see what follows from it."""
    yield from _model_problems(recipe, stage)
    rows_of: dict[str, Sequence[dict]] = {}  # not of files that earlier stages write
    data: dict[str, list[Artifact]] = {}
    for found in inputs_of(recipe, stage):
        if found.kind == "data":
            data.setdefault(found.key, []).append(found)
    for key, sources in data.items():
        assert sources[0].rows is not None
        kind = sources[0].rows
        outside = [found.ref for found in sources if found.stage is None]
        try:
            rows = _rows(outside, kind)
        except (ValueError, OSError) as error:  # a name that no file system takes, a folder that may not be read
            yield f"{key}: {error}"
            continue
        if len(outside) == len(sources):
            rows_of[key] = rows
        yield from text_problems(recipe, stage, key, kind, rows)
    yield from row_problems(recipe, stage, rows_of, notes)
    for key, files in (("rewards", "train_files"), ("eval_rewards", "eval_files")):
        rewards = getattr(stage, key, None)
        if rewards and (key == "rewards" or stage.eval_files):
            columns = {name for row in rows_of[files] for name in row} if files in rows_of else None
            try:
                _check_rewards(rewards, columns)
            except ValueError as error:
                yield f"{key}: {error}"
                continue
            if files in rows_of:
                specs = reward_specs(rewards)
                yield from reward_problems(recipe, key, files, specs, rows_of[files], notes)
    if stage.kind == "grpo" and "train_files" in rows_of:
        yield from unrewarded_problems(stage, rows_of["train_files"])


def _vllm_problems(recipe: Recipe, selected: list[str]) -> Iterator[str]:
    from r1fast.rollout.vllm import INSTALL, LOWEST_TEMPERATURE, RolloutError
    from r1fast.rollout.vllm_server import Client, server_problems

    options = recipe.rollout.vllm
    stages = [stage for stage in recipe.stages if stage.name in selected]
    for stage, key in itertools.product(stages, ("temperature", "eval_temperature")):
        if 0 < (value := getattr(stage, key, 0)) < LOWEST_TEMPERATURE:
            yield f"stages.{stage.name}.{key} = {value}: vLLM takes 0 or at least {LOWEST_TEMPERATURE}"
    replays = [stage.name for stage in stages if getattr(stage, "router_replay", False)]
    if options.server_base_url is None or options.weight_transfer == "nccl":
        import torch

        if importlib.util.find_spec("vllm") is None:
            yield f"rollout.engine: vllm is not installed; {INSTALL}, or name a server in rollout.vllm.server_base_url"
        if not torch.cuda.is_available():
            if options.weight_transfer == "nccl":
                yield "rollout.vllm.weight_transfer: nccl needs a CUDA device on both sides; use folder"
            if replays:
                yield f"stages.{replays[0]}.router_replay: vLLM returns no routed experts on a CPU; set it to false"
    if options.server_base_url is not None:
        try:
            client = Client(options.server_base_url, timeout_s=0.0, request_timeout_s=options.server_timeout)
            for problem in server_problems(client, routed_experts=bool(replays)):
                yield f"rollout.vllm.server_base_url: {problem}"
        except RolloutError as error:
            yield f"rollout.vllm.server_base_url: {error}"


_cache: dict[tuple[tuple[str, ...], str], list[dict]] = {}


def _rows(sources: list[str], kind: str) -> list[dict]:
    from r1fast.data.sources import load_rows

    key = (tuple(sources), kind)
    if key not in _cache:
        _cache[key] = load_rows(sources, kind) if sources else []  # type: ignore[arg-type]
    return _cache[key]


def _model_problems(recipe: Recipe, stage: Any) -> Iterator[str]:
    for found in inputs_of(recipe, stage):
        key, ref, wanted = found.key, found.ref, found.kind
        if found.stage is not None or not wanted.endswith("model") or key == "tokenizer":
            continue
        try:
            _, is_reward_model = checkpoint_of(ref)
        except (ValueError, OSError) as error:
            yield f"{key}: {error}"
            continue
        yield from _tokenizer_problems(key, ref)
        if is_reward_model != (wanted == "reward model") and stage.kind != "reward_model":
            kinds = ("a language model", "a reward model (a `score` head)")
            yield f"{key}: {ref} is {kinds[is_reward_model]}, expected {kinds[not is_reward_model]}"
    if stage.kind == "pretrain":
        vocabulary = vocabulary_of(recipe, stage)
        if isinstance(vocabulary, str):
            if problems := list(_tokenizer_problems("tokenizer", vocabulary)):
                yield from problems
                return
            vocabulary = len(tokenizer_of(vocabulary))
        yield from architecture_problems(stage, vocabulary)
    if (config := architecture_of(recipe, stage)) is not None:  # through @stages too
        yield from router_problems(stage, config)


def _tokenizer_problems(key: str, ref: str) -> Iterator[str]:
    try:
        if tokenizer_of(ref) is None:
            yield f"{key}: {ref} has no tokenizer; expected tokenizer.json in it"
    except ValueError as error:
        yield f"{key}: {error}"


def _check_rewards(rewards: dict[str, Any], columns: set[str] | None) -> None:
    from r1fast.rewards.pool import RewardPool
    from r1fast.stages.scoring import pool_arguments

    for arguments in pool_arguments(reward_specs(rewards)).values():
        with RewardPool(arguments) as pool:
            pool.check(columns)
