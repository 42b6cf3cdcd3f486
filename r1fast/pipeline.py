"""The chain: stages turn artifacts on disk (artifacts.py) into others; what is done, and what a resume goes on with."""

import os
import platform
import re
from contextlib import suppress
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from r1fast.artifacts import fingerprints, inputs_of, start_model
from r1fast.config import ConfigError
from r1fast.doctor import cpu_name
from r1fast.observe.progress import ChainProgress
from r1fast.observe.trackers import TrackedRun, Trackers, open_trackers
from r1fast.parallel.mesh import Dist
from r1fast.resume import STAGE, SUMMARY, Change, Saved, config_text
from r1fast.run_folder import PARTIAL, remove_leftovers, replace_file, write_record
from r1fast.schema import Recipe
from r1fast.schema_options import StageBase
from r1fast.stages.context import StageContext
from r1fast.stopping import Stop, Stopped
from r1fast_kernels import use


def check_references(recipe: Recipe, selected: list[str], run_dir: Path, saved: Saved | None = None) -> None:
    """Every @stage names an earlier stage that makes what is wanted, and that runs or has run (saved: in which run)."""
    earlier: dict[str, StageBase] = {}
    for stage in recipe.stages:
        for found in inputs_of(recipe, stage):
            if (name := found.stage) is None:
                continue
            where = f"stages.{stage.name}.{found.key}: @{name}"
            if name not in earlier:
                raise ConfigError(f"{where} names no earlier stage; earlier stages: {', '.join(earlier) or 'none'}")
            if found.kind not in earlier[name].makes:
                made = f"{' and '.join(earlier[name].makes) or 'nothing'} (kind {earlier[name].kind})"
                raise ConfigError(f"{where} makes {made}, expected a stage that makes {found.kind}")
            path = Path(found.place(run_dir))
            if stage.name not in selected or name in selected:
                continue
            if not path.exists():
                problem = f"{path} does not exist, and {name} is not among the stages to run"
                raise ConfigError(f"{where}: {problem}; put it back, or run that stage first")
            if saved is not None and saved.is_outdated(found):
                raise ConfigError(f"{where}: {name} is still to go on, and will make {path} anew; run that stage first")
        if stage.kind != "pretrain" and start_model(recipe, stage) is None:
            raise ConfigError(f"stages.{stage.name}.model: missing, and the recipe has no model.path; name one")
        earlier[stage.name] = stage


class Run:
    """A run directory: the resolved recipe, the summary, and what is finished."""

    def __init__(self, recipe: Recipe, run_dir: Path, dist: Dist, stop: Stop | None = None) -> None:
        self.recipe, self.run_dir, self.dist, self.stop = recipe, run_dir, dist, stop or Stop()
        self.summary: dict[str, Any] = {
            "recipe": recipe.name, "started": now(), "machine": machine(dist), "seed": recipe.seed, "seconds": 0.0,
            "stages": [self._new_entry(stage) for stage in recipe.stages], "changes": [],
            "settings": recipe.model_dump(mode="json"),
        }  # fmt: skip
        self.evaluations: dict[str, dict] = {}

    def _new_entry(self, stage: StageBase) -> dict[str, Any]:
        read = [found.stage for found in inputs_of(self.recipe, stage) if found.stage is not None]
        return {"name": stage.name, "kind": stage.kind, "status": "pending", "inputs": list(dict.fromkeys(read))}

    def start(self) -> None:
        """Make the folder, or take up the one there is: files that say the same are left alone."""

        def begin() -> None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.run_dir)
            if self.run_dir.parent.name == "runs":
                point_latest(self.run_dir)
            path, text = self.run_dir / "config.yaml", config_text(self.recipe).encode()
            if not path.is_file() or path.read_bytes() != text:
                replace_file(path, text)
            self.write()

        self.dist.on_main(begin)

    def resume(self, saved: dict[str, Any], changes: list[Change]) -> None:
        """Take up the record of the run that was stopped (resume.py), and note what is changed from here on."""
        self.summary |= {key: saved[key] for key in ("started", "seconds", "changes") if key in saved}
        by_name = {entry["name"]: entry for entry in saved.get("stages", [])}
        for entry in self.summary["stages"]:
            found = by_name.get(entry["name"], {})
            entry |= found if found.get("status") == "done" else {**found, "inputs": entry["inputs"]}
        self.summary["changes"] += [{"time": now(), **change.record()} for change in changes]
        self.evaluations = saved.get("evaluations", {})

    def entry(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.summary["stages"] if entry["name"] == name)

    def write(self) -> None:
        """summary.json. Rank 0 alone; OSError."""
        self.summary["seconds"] = round(sum(entry.get("seconds", 0.0) for entry in self.summary["stages"]), 2)
        write_record(self.run_dir / SUMMARY, self.summary | {"evaluations": self.evaluations})

    def write_entry(self, entry: dict[str, Any]) -> None:
        """A stage's entry: in its folder, from where a damaged summary.json is made again, and in summary.json."""
        folder = self.run_dir / entry["name"]
        folder.mkdir(exist_ok=True)
        common = {key: self.summary[key] for key in ("started", "machine", "changes")}
        write_record(folder / STAGE, {"entry": entry, **common, "evaluations": self.evaluations})
        self.write()

    def execute(self, selected: list[str]) -> None:
        """Run the selected stages that are not done, in the recipe's order."""
        names = [stage.name for stage in self.recipe.stages if stage.name in selected]
        display = ChainProgress(names, title=self.recipe.name, is_main=self.dist.is_main)
        with display as progress, self._trackers() as trackers:
            for stage in self.recipe.stages:
                entry = self.entry(stage.name)
                if stage.name not in selected:
                    continue
                if entry["status"] == "done":
                    seconds, evaluation = entry.get("seconds", 0.0), entry.get("eval_after")
                    progress.finish_stage(stage.name, status="done", seconds=seconds, evaluation=evaluation)
                    continue
                self.stop.check(self.dist)
                with use(self.recipe.kernels.impl):
                    self._stage(stage, entry, progress, trackers)

    def _trackers(self) -> Trackers:
        """On the main rank those that the recipe names; ConfigError, on every rank, where one cannot start."""
        tracking, started = self.recipe.tracking, re.sub(r"[^\d]", "", self.summary["started"][:19])
        name = tracking.name or f"{self.recipe.name}-seed{self.recipe.seed}-{started[:8]}-{started[8:]}"
        run = TrackedRun(
            self.run_dir, name, self.recipe.model_dump(mode="json"), tracking.project, tracking.group,
            is_named=tracking.name is not None,
        )  # fmt: skip
        try:
            return self.dist.on_all(lambda: open_trackers(self.recipe.report_to if self.dist.is_main else [], run))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _stage(self, stage: StageBase, entry: dict[str, Any], progress: ChainProgress, trackers: Trackers) -> None:
        def write_entry() -> None:
            self.dist.on_main(lambda: self.write_entry(entry))

        ctx = StageContext(
            self.recipe, stage, self.dist, self.run_dir, trackers, self.evaluations,
            stop=self.stop, entry=entry, write_entry=write_entry,
        )  # fmt: skip
        progress.start_stage(stage.name, stage.kind)
        entry |= {"status": "running", "model": (start_model(self.recipe, stage) or "").removeprefix("@")}
        entry["settings"] = stage.model_dump(mode="json")
        entry["fingerprints"] = self.dist.on_main(lambda: fingerprints(self.recipe, stage, self.run_dir))
        write_entry()
        try:
            result = import_module(f"r1fast.stages.{stage.kind}").run(ctx)
        except BaseException as error:
            status = "stopped" if isinstance(error, Stopped) else "failed"
            entry |= {"status": status, **ctx.clock()}
            if self.dist.is_main:
                with suppress(OSError):  # a disk that is full or gone: the error that ends the stage tells so
                    self.write_entry(entry)
            progress.finish_stage(stage.name, status=status, seconds=entry["seconds"])
            raise
        if (left_out := entry.pop("left_out", None)) is not None:  # of train_files; noted there for a resume
            result["numbers"] = {**result.get("numbers", {}), "left_out": left_out}
        entry |= {"status": "done", **ctx.clock()}
        entry |= {key: value for key, value in result.items() if value is not None}
        write_entry()
        progress.finish_stage(stage.name, seconds=entry["seconds"], evaluation=entry.get("eval_after"))


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def point_latest(run_dir: Path) -> None:
    """runs/latest -> this run, which a --resume without --output-dir takes up."""
    link, new = run_dir.parent / "latest", run_dir.parent / f"latest{PARTIAL}"
    if link.is_symlink() or not link.exists():
        new.unlink(missing_ok=True)
        new.symlink_to(run_dir.name)
        os.replace(new, link)


def machine(dist: Dist) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if dist.device.type == "cuda" else cpu_name()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": device, "processes": dist.world_size, "threads": torch.get_num_threads(), **versions}
