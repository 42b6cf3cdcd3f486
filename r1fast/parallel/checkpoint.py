"""Checkpoints that are either complete or not there.

    checkpoints/tmp_step_12/   written by all ranks        checkpoints/step_12/   the same folder, after one rename
        __0_0.distcp ... contents.json   model and optimizer (torch.distributed.checkpoint), sharded
        shared.json [shared.npz]         `extra`: what is the same on every rank
        rank_00000.json ...              random-number states, one file per rank
        manifest.json                    step, world size, of every other file its size and crc32; a crc32 of its own

Commit: all ranks write, errors are exchanged, rank 0 writes the manifest, fsyncs, and renames; only then are older
checkpoints deleted. A reader believes a folder only if it holds just the files of the manifest (hidden ones aside),
each with its size and checksum: DCP alone loads a flipped bit, and an interrupted overwrite, without a word. No file is
unpickled (plain_state.py). Learning rate, betas and the like are the recipe's: of the optimizer only tensors are kept.
All ranks must see the same file system.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import stat
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer

from r1fast.parallel.mesh import Dist
from r1fast.parallel.parallelize import reshard, tied_names
from r1fast.parallel.plain_state import CONTENTS, Reader, Writer, check_fit, read_plain, write_plain
from r1fast.run_folder import read_record, remove, sealed, sync, write_synced
from r1fast.wording import one_line

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
SHARED = "shared"
_PAYLOAD = re.compile(r"__\d+_\d+\.distcp|shared\.npz|rank_\d{5}\.npz")  # beside the files that must be there


def save(
    directory: Path, step: int, *, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any], dist: Dist,
    keep: int = 2, best: int | None = None,
) -> Path:  # fmt: skip
    """Write directory/step_N; kept are the newest `keep` checkpoints and that of step `best`. Collective.

    extra: plain values (plain_state.py), the same on all ranks (taken from rank 0); every rank's random-number states
    are added. Frozen weights of a model are not saved. To save a frozen reference model too, pass
    nn.ModuleDict({"policy": ..., "reference": ...}) as the model, and the same to load. If any rank cannot write, every
    rank raises OSError and the older checkpoints stay.
    """
    tmp, final = directory / f"tmp_step_{step}", directory / f"step_{step}"
    own_values: dict[str, Any] = {_rank_name(dist.rank): {"rng": rng_state()}}
    if dist.is_main:
        own_values[SHARED] = extra
    try:
        dist.on_main(lambda: _prepare(tmp))
        reshard(model)
        written = _write_payload(tmp, _distributed_state(model, optimizer), own_values, dist.rank)
        reports = dist.all_gather_objects(written)
        files = {name: entry for _, entries in reports for name, entry in entries.items()}
        manifest = {"step": step, "world_size": dist.world_size, "files": files}
        dist.on_main(lambda: _commit(tmp, final, manifest, [text for problems, _ in reports for text in problems]))
        dist.on_main(lambda: _retain(directory, keep, best))
    except OSError as error:
        raise OSError(f"checkpoint {final} was not written, earlier ones are untouched: {error}") from error
    return final


def latest(directory: Path, dist: Dist) -> Path | None:
    """The newest checkpoint that is complete, every byte verified; torn ones are named in the log and passed over.

    Collective: the reading is shared out over the ranks.
    """
    found = _steps(directory)
    for path, before in zip(found, [*found[1:], None]):
        problem = verify(path, dist)
        if problem is None:
            return path
        if dist.is_main:
            then = f"trying {before.name}" if before else "none is before it, so the stage begins again"
            logger.warning("checkpoint %s is not usable (%s); %s", path, problem, then)
    return None


def tidy(directory: Path, verified: Path | None, keep: int = 2, best: int | None = None) -> None:
    """Delete what a kill left of a save or of a deletion. For rank 0, where nobody saves.

    verified: what `latest` found. While a newer one is torn, another may be, so that the oldest is the one to resume.
    """
    if [verified] == _steps(directory)[:1]:
        _retain(directory, keep, best)
    else:
        _remove_leftovers(directory)


def load(path: Path, *, model: nn.Module, optimizer: Optimizer, dist: Dist) -> dict[str, Any]:
    """Load a checkpoint in place, on any number of ranks; returns `extra`. Collective.

    Random-number states: only on the number of ranks that wrote them. A torn checkpoint: ValueError before any change.
    """
    if problem := verify(path, dist):
        raise ValueError(f"checkpoint {path} is not usable: {problem}; resume from latest({path.parent}) instead")
    reshard(model)
    state = _distributed_state(model, optimizer)
    try:
        check_fit(path, {f"{part}.{name}": tensor for part, named in state.items() for name, tensor in named.items()})
    except ValueError as error:
        raise ValueError(f"checkpoint {path} does not fit this model and optimizer: {error}") from error
    try:
        dcp.load(state, storage_reader=Reader(path))  # fills the tensors in place
        extra = read_plain(path / SHARED)
        saved_world_size = read_record(path / MANIFEST)["world_size"]
        own = read_plain(path / _rank_name(dist.rank)) if saved_world_size == dist.world_size else None
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise ValueError(f"checkpoint {path} cannot be loaded: {_cause(error)}") from error
    if own is not None:
        set_rng_state(own["rng"])
    elif dist.is_main:
        text = "%s was written by %d ranks and is read by %d: random-number states of the ranks are not restored"
        logger.warning(text, path, saved_world_size, dist.world_size)
    return extra


def load_weights(path: Path, *, model: nn.Module, dist: Dist) -> None:
    """The model of a checkpoint alone, in place: of one that holds a reference too, the policy. Errors as of `load`."""
    if problem := verify(path, dist):
        raise ValueError(f"checkpoint {path} is not usable: {problem}")
    reshard(model)
    saved = Reader(path).read_metadata().state_dict_metadata
    prefix = "model.policy." if any(name.startswith("model.policy.") for name in saved) else "model."
    state = {prefix + name: tensor for name, tensor in _weights(model, trained_only=True).items()}
    try:
        check_fit(path, state, whole=False)
        dcp.load(state, storage_reader=Reader(path))
    except (ValueError, CheckpointException) as error:
        raise ValueError(f"checkpoint {path} cannot be loaded: {_cause(error)}") from error


def verify(path: Path, dist: Dist) -> str | None:
    """Why this checkpoint must not be loaded, or None if every file is there with its size and crc32. Collective."""
    problems = dist.all_gather_objects(_problem(path, dist.rank, dist.world_size))
    return next((problem for problem in problems if problem), None)


def rng_state() -> dict[str, Any]:
    """The state of every global random-number generator of this process, as plain values."""
    numpy_state: Any = np.random.get_state(legacy=False)  # a dict, with an array in it
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state().numpy()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what rng_state returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.from_numpy(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(state["cuda"]))


def _distributed_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The tensors of model and optimizer by name, themselves and no copies; a tied weight under its first name."""
    # What is frozen in a model that is trained can be read from where it came from; not so a reference beside it.
    weights = _weights(model, trained_only=not isinstance(model, nn.ModuleDict))
    values = get_optimizer_state_dict(model, optimizer)["state"]
    moments = {f"{name}.{key}": tensor for name, of_one in values.items() for key, tensor in of_one.items()}  # type: ignore[union-attr]
    return {"model": weights, "optimizer": moments}


def _weights(model: nn.Module, *, trained_only: bool) -> dict[str, Any]:
    weights = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=trained_only))
    for _, *aliases in tied_names(model):
        for alias in aliases:
            weights.pop(alias, None)
    return weights


def _write_payload(tmp: Path, state: dict[str, Any], own_values: dict[str, Any], rank: int) -> tuple[list[str], dict]:
    """(what went wrong, manifest entries of this rank's files). Never raises: the other ranks would wait."""
    problems: list[str] = []
    names = [CONTENTS] if rank == 0 else []
    try:
        for name, value in own_values.items():
            names += write_plain(tmp / name, value)
    except Exception as error:
        problems.append(f"rank {rank}: {_cause(error)}")
    try:
        # In any case, as it is collective. On a full disk torch.save raises RuntimeError, not OSError.
        dcp.save(state, storage_writer=Writer(tmp))
        names += [path.name for path in tmp.glob(f"__{rank}_*.distcp")]
        return problems, {name: _entry(tmp / name) for name in names}
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        return [*problems, f"rank {rank}: {_cause(error)}"], {}


def _cause(error: BaseException) -> str:
    """In one line: DCP puts the tracebacks of all ranks into its message."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return one_line(error)[:300]


def _rank_name(rank: int) -> str:
    return f"rank_{rank:05d}"


def _entry(path: Path) -> dict[str, int]:
    """Size and crc32 of a file, read back from where it was written."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return {"size": path.stat().st_size, "crc32": crc}


def _prepare(tmp: Path) -> None:
    tmp.parent.mkdir(exist_ok=True)  # without parents: a run folder that is gone is not made again
    _remove_leftovers(tmp.parent)
    tmp.mkdir()


def _commit(tmp: Path, final: Path, manifest: dict[str, Any], problems: list[str]) -> None:
    """Make the folder a checkpoint, then delete old ones."""
    try:
        if problems:
            raise OSError("; ".join(problems))
        write_synced(tmp / MANIFEST, sealed(manifest))
        sync(tmp)
        if final.exists():  # torn, or the same step saved again: step aside, so that the rename stays the only commit
            os.rename(final, final.with_name(f"tmp_replaced_{final.name}"))
        os.rename(tmp, final)
        sync(final.parent)
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)
        with suppress(OSError):  # torch.save does not say that the disk is full
            free = shutil.disk_usage(final.parent).free >> 20
            error = OSError(f"{error} ({free} MiB are left on that disk)")
        raise error


def _remove_leftovers(directory: Path) -> None:
    """Delete what an interrupted save left; nothing in it was ever committed, or it has been replaced."""
    for path in directory.glob("tmp_*"):
        with suppress(OSError):
            remove(path)


def _retain(directory: Path, keep: int, best: int | None) -> None:
    """Delete all that is older than the newest `keep` usable checkpoints (by size: checksums would read them all)."""
    found = _steps(directory)
    usable = [path for path in found if _problem(path, rank=0, world_size=1, checksums=False) is None]
    for path in found[found.index(usable[keep - 1]) + 1 :] if len(usable) >= keep else ():
        if _step_of(path) != best:
            with suppress(OSError):  # too many are no reason to fail a save that succeeded
                remove(path)
    _remove_leftovers(directory)


def _steps(directory: Path) -> list[Path]:
    """All step_N folders, newest first, whatever their state."""
    return sorted((path for path in directory.glob("step_*") if path.name[5:].isdecimal()), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _problem(path: Path, rank: int, world_size: int, *, checksums: bool = True) -> str | None:
    """The first thing wrong with the folder, or with this rank's share of the files."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        manifest = read_record(path / MANIFEST)
        files = _files_of(manifest, _step_of(path))
        # Hidden files are what file systems and browsers leave: .nfs..., .DS_Store.
        found = {file.name: file.lstat() for file in path.glob("[!.]*") if file.name != MANIFEST}
        for name, status in found.items():
            if name not in files:
                return f"{name} is not in {MANIFEST}"
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is no file"
        for name in sorted(files)[rank::world_size]:
            if name not in found:
                return f"{name} is missing"
            if (size := found[name].st_size) != files[name]["size"]:
                return f"{name} has {size} bytes, expected {files[name]['size']}"
            if checksums and _entry(path / name)["crc32"] != files[name]["crc32"]:
                return f"{name} has another crc32 than when it was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _files_of(manifest: dict[str, Any], step: int) -> dict[str, dict[str, int]]:
    """The files that a manifest lists; ValueError unless they are just those that a save of this step writes."""
    files, ranks = manifest.get("files"), manifest.get("world_size")
    if manifest.get("step") != step or type(ranks) is not int or not 0 < ranks <= 1 << 20 or type(files) is not dict:
        raise ValueError(f"{MANIFEST} is of step {manifest.get('step')!r} and {ranks!r} ranks")
    needed = {f"{name}.json" for name in (SHARED, *map(_rank_name, range(ranks)))} | {CONTENTS}
    if lacking := sorted(needed - files.keys()):
        raise ValueError(f"{MANIFEST} lacks {lacking[0]}")
    for name, entry in files.items():
        if name not in needed and not _PAYLOAD.fullmatch(name):
            raise ValueError(f"{MANIFEST} lists {name!r}, which is no file of a checkpoint")
        if type(entry) is not dict or [type(entry.get(key)) for key in ("size", "crc32")] != [int, int]:
            raise ValueError(f"{MANIFEST} does not say size and crc32 of {name}")
    return files
