"""What is checked before any work: the output can be written, data and models can be read and fit, rewards exist.

A mistake found here costs seconds and changes nothing on disk.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from r1fast.artifacts import Artifact, inputs_of
from r1fast.config import ConfigError, shown
from r1fast.policy_loss import loss_problems
from r1fast.preflight_models import model_problems
from r1fast.preflight_rows import reward_problems, row_problems, text_problems
from r1fast.read_once import rows_of as rows_of_source
from r1fast.recipe_yaml import check_text
from r1fast.rewards.pool import RewardPool
from r1fast.rollout.vllm import INSTALL, LOWEST_TEMPERATURE, RolloutError
from r1fast.rollout.vllm_server import Client, server_problems
from r1fast.run_folder import holds_nothing
from r1fast.schema import GRPOStage, Recipe
from r1fast.schema_options import EvalOptions, SampleOptions, StageBase, TrainFilesOptions, reward_specs
from r1fast.stages.rollouts import unrewarded_problems
from r1fast.stages.scoring import pool_arguments
from r1fast.stages.train_rows import choose_rows, describe, nothing_left, tested_key


def check_output(run_dir: Path, *, resume: bool, stages: Sequence[str] = ()) -> None:
    """The run directory is new (or resumed), can be written, and has room for what the stages write, in a path too."""
    for problem in _output_problems(run_dir, resume, stages):
        raise ConfigError(f"--output-dir {problem}")


def _output_problems(run_dir: Path, resume: bool, stages: Sequence[str]) -> Iterator[str]:
    longest = max(stages, key=len, default="")
    try:
        check_text(str(run_dir))
        (run_dir / longest / "checkpoints" / "tmp_step_000000" / "manifest.json").lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        yield f"{shown(str(run_dir))}: {error.strerror}; choose another"
    except ValueError as error:
        yield str(error)
    # What a resumed run finds where it will write is of the same kind: a pipe, say, would be waited for.
    folders = [run_dir / stage / name for stage in stages for name in ("", "checkpoints", "samples")]
    files = [run_dir / stage / name for stage in stages for name in ("metrics.jsonl", "data.jsonl")]
    for path in (*folders, run_dir / "summary.json", run_dir / "report.html", *files):
        fits, kind = (path.is_dir(), "folder") if path in folders else (path.is_file(), "file")
        if not fits and os.path.lexists(path):
            yield f"{run_dir}: {path} is no {kind}; move it away"
    if run_dir.exists() and not run_dir.is_dir() and not resume:
        yield f"{run_dir}: is a file, expected a folder"
    elif run_dir.exists() and not resume and not holds_nothing(run_dir):
        yield f"{run_dir}: holds files already; choose another, or continue that run with --resume"
    parent = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        yield f"{run_dir}: cannot write in {parent} ({error.strerror}); choose another"


def check_inputs(recipe: Recipe, selected: list[str], run_dir: Path) -> list[str]:
    """Every file, model and reward that the recipe names from outside the run can be used; else ConfigError.

    Returns notes: what a user should know and that stops nothing. What was read is kept until read_once.forget.
    """
    notes: list[str] = []
    stages = [stage for stage in recipe.stages if stage.name in selected]
    for name in recipe.report_to:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin: a folder of that name, such as wandb leaves
            raise ConfigError(f"report_to: {name} is not installed; pip install {name}, or take it out of report_to")
    for problem in _offload_problems(recipe):
        raise ConfigError(problem)
    for problem in _vllm_problems(recipe, stages) if recipe.rollout.engine == "vllm" else ():
        raise ConfigError(problem)
    for stage in stages:
        found: list[str] = []
        for problem in _problems(recipe, stage, found):
            raise ConfigError(f"stages.{stage.name}.{' '.join(problem.splitlines())}")
        notes += [f"stages.{stage.name}.{' '.join(note.splitlines())}" for note in found]
    return notes


def _offload_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.trainer.offload and not torch.cuda.is_available():
        yield "trainer.offload: there is no CUDA device here, and what trains on a CPU is in host memory: drop it"


def _problems(recipe: Recipe, stage: StageBase, notes: list[str]) -> Iterator[str]:
    """What is wrong, the first thing first; a caller that goes on after one may see what follows from it."""
    yield from model_problems(recipe, stage)
    rows_of: dict[str, Sequence[dict]] = {}  # not of files that earlier stages write
    data = [found for found in inputs_of(recipe, stage) if found.rows is not None]
    for (key, kind), named in groupby(data, lambda found: (found.key, found.rows)):
        refs = [found.ref if found.stage is None else None for found in named]
        try:
            rows = [row for ref in refs if ref is not None for row in rows_of_source(ref, kind)]
        except (ValueError, OSError) as error:  # a name that no file system takes, a folder that may not be read
            yield f"{key}: {error}"
            continue
        if None not in refs:
            rows_of[key] = rows
        yield from text_problems(recipe, stage, key, kind, rows)
    if isinstance(stage, TrainFilesOptions):
        yield from _choose(stage, data, rows_of, notes)
    yield from row_problems(recipe, stage, rows_of, notes)
    if isinstance(stage, GRPOStage) and stage.is_own_loss:
        yield from loss_problems(stage.loss_type)
    rewards: dict[str, tuple[str, Mapping[str, Any]]] = {}
    if isinstance(stage, GRPOStage) or (isinstance(stage, SampleOptions) and stage.changed(["rewards"])):
        rewards["rewards"] = "train_files", stage.rewards
    if isinstance(stage, EvalOptions) and stage.eval_files:
        rewards["eval_rewards"] = "eval_files", stage.eval_rewards
    for key, (files, specs) in rewards.items():
        try:
            _check_rewards(specs, {name for row in rows_of[files] for name in row} if files in rows_of else None)
        except ValueError as error:
            yield f"{key}: {error}"
            continue
        if files in rows_of:
            yield from reward_problems(recipe, key, files, reward_specs(specs), rows_of[files], notes)
    if isinstance(stage, GRPOStage) and "train_files" in rows_of:
        yield from unrewarded_problems(stage, rows_of["train_files"])


def _choose(
    stage: TrainFilesOptions, data: Sequence[Artifact], rows_of: dict[str, Sequence[dict]], notes: list[str]
) -> Iterator[str]:
    """Take what the stage will leave out of train_files, and say so; where it compares with rows that exist."""
    if not stage.leaves_out:
        return
    rows, key = rows_of.get("train_files"), tested_key(stage)
    if rows is None or (key is not None and key not in rows_of):
        return
    kind = next(found.rows for found in data if found.key == "train_files")
    assert kind is not None, "train_files hold rows"
    chosen, left_out = choose_rows(stage, kind, rows, rows_of[key] if key else ())
    if not chosen:
        yield nothing_left(left_out, len(rows))
    elif left_out:
        notes.append(describe(left_out, len(rows)))
    rows_of["train_files"] = chosen


def _check_rewards(rewards: Mapping[str, Any], columns: set[str] | None) -> None:
    for arguments in pool_arguments(reward_specs(rewards)).values():
        with RewardPool(arguments) as pool:
            pool.check(columns)


def _vllm_problems(recipe: Recipe, stages: Sequence[StageBase]) -> Iterator[str]:
    options = recipe.rollout.vllm
    for stage in stages:
        for key in ("temperature", "eval_temperature"):
            if 0 < (value := getattr(stage, key, 0)) < LOWEST_TEMPERATURE:
                yield f"stages.{stage.name}.{key} = {value}: vLLM takes 0 or at least {LOWEST_TEMPERATURE}"
    replays = [stage.name for stage in stages if isinstance(stage, GRPOStage) and stage.router_replay]
    if options.server_base_url is None or options.weight_transfer == "nccl":
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
