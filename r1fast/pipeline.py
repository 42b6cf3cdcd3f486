"""The chain: which stage hands what to which, what is done, and what a resumed run does next.

A stage turns artifacts on disk into artifacts on disk: RUN/<stage>/model (a Hugging Face checkpoint) or
RUN/<stage>/data.jsonl. A recipe names an earlier stage's artifact as @stage.
"""

import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from r1fast.config import ConfigError, dump_recipe
from r1fast.dist.mesh import Dist
from r1fast.observe.progress import ChainProgress
from r1fast.observe.trackers import open_trackers
from r1fast.schema import Recipe
from r1fast.stages.context import StageContext

MAKES_MODEL = {"pretrain", "sft", "grpo", "distill"}
MAKES_DATA = {"collect", "reject"}


def start_model(recipe: Recipe, stage: Any) -> str | None:
    """The model that a stage starts from, as the recipe names it; a pretrain stage starts from none."""
    return None if stage.kind == "pretrain" else stage.model or recipe.model.path


def references(recipe: Recipe, stage: Any) -> Iterator[tuple[str, str, str]]:
    """(key, stage referred to, "model", "reward model" or "data") for every @stage in a stage's settings."""
    settings = stage.model_dump()
    few_shot = settings.get("few_shot") or {}
    models = {
        "model": start_model(recipe, stage),
        "teacher": settings.get("teacher"),
        "tokenizer": settings.get("tokenizer"),
        "few_shot.model": few_shot.get("model"),
    }
    for key, ref in models.items():
        if ref and ref.startswith("@"):
            yield key, ref[1:], "model"
    for name, spec in (settings.get("reward_models") or {}).items():
        if spec["model"].startswith("@"):
            yield f"reward_models.{name}.model", spec["model"][1:], "reward model"
    files = {key: settings.get(key) or [] for key in ("train_files", "eval_files")}
    files["few_shot.examples_files"] = few_shot.get("examples_files") or []
    for key, refs in files.items():
        for ref in refs:
            if ref.startswith("@"):
                yield key, ref[1:], "data"


def check_references(recipe: Recipe, selected: list[str], run_dir: Path) -> None:
    """Every @stage names an earlier stage that makes what is wanted, and that runs or has run."""
    earlier: dict[str, Any] = {}
    for stage in recipe.stages:
        for key, name, wanted in references(recipe, stage):
            where = f"stages.{stage.name}.{key}: @{name}"
            if name not in earlier:
                raise ConfigError(f"{where} names no earlier stage; earlier stages: {', '.join(earlier) or 'none'}")
            if wanted not in makes(earlier[name]):
                made = " and ".join(makes(earlier[name])) or "nothing"
                raise ConfigError(
                    f"{where} makes {made} (kind {earlier[name].kind}), expected a stage that makes {wanted}"
                )
            artifact = run_dir / name / ("data.jsonl" if wanted == "data" else "model")
            if stage.name in selected and name not in selected and not artifact.exists():
                raise ConfigError(
                    f"{where}: {artifact} does not exist, and {name} is not among the stages to run; run it first"
                )
        if stage.kind != "pretrain" and start_model(recipe, stage) is None:
            raise ConfigError(f"stages.{stage.name}.model: missing, and the recipe has no model.path; name one")
        earlier[stage.name] = stage


def makes(stage: Any) -> list[str]:
    """What others may name of a stage."""
    if stage.kind == "reward_model":
        return ["reward model"]
    if stage.kind == "distill" and stage.teacher is not None:
        return ["model", "data"]
    return ["model"] * (stage.kind in MAKES_MODEL) + ["data"] * (stage.kind in MAKES_DATA)


def inputs(recipe: Recipe, stage: Any) -> list[str]:
    return list(dict.fromkeys(name for _, name, _ in references(recipe, stage)))


class Run:
    """A run directory: the resolved recipe, the summary, and what is finished."""

    def __init__(self, recipe: Recipe, run_dir: Path, dist: Dist) -> None:
        self.recipe, self.run_dir, self.dist = recipe, run_dir, dist
        self.summary: dict[str, Any] = {
            "recipe": recipe.name,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": machine(dist),
            "seed": recipe.seed,
            "seconds": 0.0,
            "stages": [
                {"name": s.name, "kind": s.kind, "status": "pending", "inputs": inputs(recipe, s)}
                for s in recipe.stages
            ],
        }
        self.evaluations: dict[str, dict] = {}

    def start(self) -> None:
        if self.dist.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if self.run_dir.parent.name == "runs":
                point_latest(self.run_dir)
            (self.run_dir / "config.yaml").write_text(dump_recipe(self.recipe), encoding="utf-8")
            self.write()
        self.dist.barrier()

    def resume(self) -> None:
        """Take up the record of the run that was stopped."""
        path = self.run_dir / "summary.json"
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            self.summary |= {key: saved[key] for key in ("started", "seconds")}
            by_name = {entry["name"]: entry for entry in saved["stages"]}
            self.summary["stages"] = [by_name.get(entry["name"], entry) for entry in self.summary["stages"]]
            self.evaluations = saved.get("evaluations", {})

    def entry(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.summary["stages"] if entry["name"] == name)

    def write(self) -> None:
        if not self.dist.is_main:
            return
        partial = self.run_dir / "summary.json.partial"
        record = self.summary | {"evaluations": self.evaluations}
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, self.run_dir / "summary.json")

    def execute(self, selected: list[str]) -> None:
        """Run the selected stages that are not done, in the recipe's order."""
        trackers = open_trackers(
            self.recipe.report_to,
            run_dir=self.run_dir,
            run_name=self.recipe.name,
            config=self.recipe.model_dump(mode="json"),
            is_main=self.dist.is_main,
        )
        names = [stage.name for stage in self.recipe.stages if stage.name in selected]
        before = self.summary["seconds"]
        start = time.monotonic()
        with ChainProgress(names, title=self.recipe.name, is_main=self.dist.is_main) as progress:
            for stage in self.recipe.stages:
                entry = self.entry(stage.name)
                if stage.name not in selected:
                    continue
                if entry["status"] == "done":
                    progress.finish_stage(
                        stage.name, status="done", seconds=entry["seconds"], evaluation=entry.get("eval_after")
                    )
                    continue
                self._stage(stage, entry, progress, trackers)
                self.summary["seconds"] = round(before + time.monotonic() - start, 2)
                self.write()
        for tracker in trackers:
            tracker.close()

    def _stage(self, stage: Any, entry: dict[str, Any], progress: ChainProgress, trackers: Any) -> None:
        ctx = StageContext(self.recipe, stage, self.dist, self.run_dir, trackers, self.evaluations)
        progress.start_stage(stage.name, stage.kind)
        entry |= {"status": "running", "model": (start_model(self.recipe, stage) or "").removeprefix("@")}
        self.write()
        try:
            result = import_module(f"r1fast.stages.{stage.kind}").run(ctx)
        except BaseException:
            seconds = entry.get("seconds", 0.0) + time.monotonic() - ctx.started
            entry |= {"status": "failed", "seconds": round(seconds, 2), "phases": _rounded(ctx.phases)}
            self.write()
            progress.finish_stage(stage.name, status="failed", seconds=seconds)
            raise
        seconds = entry.get("seconds", 0.0) + time.monotonic() - ctx.started
        entry |= {"status": "done", "seconds": round(seconds, 2), "phases": _rounded(ctx.phases)}
        entry |= {key: value for key, value in result.items() if value is not None}
        progress.finish_stage(stage.name, seconds=seconds, evaluation=entry.get("eval_after"))


def point_latest(run_dir: Path) -> None:
    """runs/latest -> this run, which a --resume without --output-dir takes up."""
    link, new = run_dir.parent / "latest", run_dir.parent / "latest.partial"
    if link.is_symlink() or not link.exists():
        new.unlink(missing_ok=True)
        new.symlink_to(run_dir.name)
        os.replace(new, link)


def _rounded(phases: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds, 2) for name, seconds in phases.items()}


def machine(dist: Dist) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if dist.device.type == "cuda" else cpu_name()
    return {
        "device": device,
        "processes": dist.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
