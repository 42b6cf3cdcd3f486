"""Checkpoints that are either complete or not there.

    checkpoints/tmp_step_12/   written by all ranks        checkpoints/step_12/   the same folder, after one rename
        __0_0.distcp ... .metadata   model and optimizer (torch.distributed.checkpoint), sharded
        shared.pt                    `extra`: what is the same on every rank
        rank_00000.pt ...            `rank_state` and random-number states, one file per rank
        manifest.json                step, world size, and of every other file its size and crc32

Commit: all ranks write, errors are exchanged, rank 0 writes the manifest, fsyncs, and renames; only then are older
checkpoints deleted. A reader believes a folder only if every file has the size and checksum of the manifest: DCP alone
loads a flipped bit, and an interrupted overwrite, without a word. All ranks must see the same file system.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from r1fast.dist.mesh import Dist
from r1fast.dist.parallelize import reshard, tied_names

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d+)")


def save(
    directory: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    rank_state: dict[str, Any],
    dist: Dist,
    keep: int = 2,
) -> Path:
    """Write directory/step_N and keep the newest `keep` checkpoints. Collective.

    extra: the same on all ranks (taken from rank 0). rank_state: this rank's own; random-number states are added here.
    To save a frozen reference model too, pass nn.ModuleDict({"policy": ..., "reference": ...}) as the model, and the
    same to load. If any rank cannot write, every rank raises OSError and the older checkpoints stay.
    """
    if keep < 1:
        raise ValueError(f"checkpoint.save got keep={keep}; expected at least 1")
    directory = Path(directory)
    tmp, final = directory / f"tmp_step_{step}", directory / f"step_{step}"
    _raise_together(dist, final, _prepare(tmp) if dist.is_main else "")
    reshard(model)
    own_files: dict[str, Any] = {_rank_file(dist.rank): {"rng": rng_state(), "rank_state": rank_state}}
    if dist.is_main:
        own_files["shared.pt"] = extra
    reports = dist.all_gather_objects(_write_payload(tmp, _distributed_state(model, optimizer), own_files, dist.rank))
    problem = "; ".join(report[0] for report in reports if report[0])
    if dist.is_main:
        if not problem:
            files = {name: entry for _, entries in reports for name, entry in entries.items()}
            problem = _commit(tmp, final, {"step": step, "world_size": dist.world_size, "files": files}, keep)
        if problem:
            shutil.rmtree(tmp, ignore_errors=True)
    _raise_together(dist, final, problem)
    return final


def latest(directory: Path, dist: Dist | None = None) -> Path | None:
    """The newest checkpoint that is complete, every byte verified; torn ones are named in the log and passed over.

    With dist: collective, the reading is shared out over the ranks.
    """
    for path in _steps(Path(directory)):
        problem = verify(path, dist)
        if problem is None:
            return path
        logger.warning("checkpoint %s is not usable (%s); trying the one before", path, problem)
    return None


def load(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, dist: Dist
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a checkpoint in place, on any number of ranks; returns (extra, rank_state). Collective.

    Random-number states come last and only on the number of ranks that wrote them; on another number of ranks
    rank_state is {} (it belongs to a layout that is gone). A torn checkpoint: ValueError, before anything changes.
    """
    path = Path(path)
    problem = verify(path, dist)
    if problem is not None:
        raise ValueError(f"checkpoint {path} is not usable: {problem}; resume from latest({path.parent}) instead")
    reshard(model)
    state = _distributed_state(model, optimizer)
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(path))  # fills the tensors in place
    except CheckpointException as error:  # no subclass of Exception: it would pass through every handler above
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"checkpoint {path} does not fit this model and optimizer: {cause}") from error
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    extra = torch.load(path / "shared.pt", map_location="cpu", weights_only=False)
    saved_world_size = _manifest(path)["world_size"]
    if saved_world_size != dist.world_size:
        logger.warning(
            "%s was written by %d ranks and is read by %d: random-number states of the ranks are not restored",
            path,
            saved_world_size,
            dist.world_size,
        )
        return extra, {}
    rank_file = torch.load(path / _rank_file(dist.rank), map_location="cpu", weights_only=False)
    set_rng_state(rank_file["rng"])
    return extra, rank_file["rank_state"]


def verify(path: Path, dist: Dist | None = None) -> str | None:
    """Why this checkpoint must not be loaded, or None if every file is there with its size and crc32."""
    rank, world_size = (dist.rank, dist.world_size) if dist is not None else (0, 1)
    problem = _problem(path, rank, world_size)
    if dist is None:
        return problem
    return next((found for found in dist.all_gather_objects(problem) if found), None)


def rng_state() -> dict[str, Any]:
    """The state of every global random-number generator of this process."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what rng_state returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _distributed_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Model and optimizer as DCP wants them; a tied weight once, under its first name."""
    weights = get_model_state_dict(model)
    for _, *aliases in tied_names(model):
        for alias in aliases:
            del weights[alias]
    return {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}


def _write_payload(tmp: Path, state: dict[str, Any], own_files: dict[str, Any], rank: int) -> tuple[str, dict]:
    """(what went wrong or "", manifest entries of this rank's files). Never raises: the other ranks would wait."""
    problems: list[str] = []
    try:
        for name, content in own_files.items():
            _torch_save(content, tmp / name)
    except OSError as error:
        problems.append(f"rank {rank}: {type(error).__name__}: {error}")
    try:
        # In any case, as it is collective. More writer threads swallow a failed write (pytorch#191391).
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp, thread_count=1))
        entries = {name: _entry(tmp / name) for name in (*own_files, *_dcp_files(tmp, rank))}
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        return "; ".join([*problems, f"rank {rank}: {type(error).__name__}: {error}"]), {}
    return "; ".join(problems), entries


def _dcp_files(tmp: Path, rank: int) -> list[str]:
    names = sorted(path.name for path in tmp.glob(f"__{rank}_*.distcp"))
    return [*names, ".metadata"] if rank == 0 else names


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _torch_save(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _entry(path: Path) -> dict[str, int]:
    """Size and crc32 of a file, read back from where it was written."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"size": size, "crc32": crc}


def _raise_together(dist: Dist, final: Path, problem: str) -> None:
    """Every rank raises what rank 0 reports: one that raised alone would leave the others waiting."""
    problem = dist.all_gather_objects(problem)[0]
    if problem:
        raise OSError(f"checkpoint {final} was not written, earlier ones are untouched: {problem}")


def _prepare(tmp: Path) -> str:
    """An empty folder to write into; returns what went wrong or ""."""
    try:
        _remove_leftovers(tmp.parent)
        tmp.mkdir(parents=True)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _commit(tmp: Path, final: Path, manifest: dict[str, Any], keep: int) -> str:
    """Make the folder a checkpoint, then delete old ones; returns what went wrong or ""."""
    try:
        _publish(tmp, final, manifest)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    _retain(final.parent, keep)
    _remove_leftovers(final.parent)
    return ""


def _publish(tmp: Path, final: Path, manifest: dict[str, Any]) -> None:
    with (tmp / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    _fsync_directory(tmp)
    if final.exists():  # torn, or the same step saved again: step aside, so that the rename stays the only commit
        os.rename(final, final.with_name(f"tmp_replaced_{final.name}"))
    os.rename(tmp, final)
    _fsync_directory(final.parent)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(directory: Path) -> None:
    """Delete what an interrupted save left; nothing in it was ever committed, or it has been replaced."""
    for path in directory.glob("tmp_*"):
        shutil.rmtree(path, ignore_errors=True)


def _retain(directory: Path, keep: int) -> None:
    """Delete all that is older than the newest `keep` usable checkpoints (by size: checksums would read them all)."""
    usable = [path for path in _steps(directory) if _problem(path, rank=0, world_size=1, checksums=False) is None]
    if len(usable) >= keep:
        for path in _steps(directory):
            if _step_of(path) < _step_of(usable[keep - 1]):
                shutil.rmtree(path, ignore_errors=True)  # too many are no reason to fail a save that succeeded


def _steps(directory: Path) -> list[Path]:
    """All step_N folders, newest first, whatever their state."""
    found = [path for path in directory.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def _problem(path: Path, rank: int, world_size: int, *, checksums: bool = True) -> str | None:
    """The first thing wrong with this rank's share of the files."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        files = _manifest(path)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} is missing or unreadable ({type(error).__name__})"
    for name in sorted(files)[rank::world_size]:
        file, expected = path / name, files[name]
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != expected["size"]:
            return f"{name} has {size} bytes, expected {expected['size']}"
        if checksums and _entry(file)["crc32"] != expected["crc32"]:
            return f"{name} has another crc32 than when it was written"
    return None
