"""State without pickles: torch.distributed.checkpoint with its table of contents as JSON, and values as JSON + npz.

DCP pickles its table of contents, and objects that are no tensors; unpickling runs what a file says. Here a checkpoint
is tensors, which DCP reads with torch.load(weights_only=True), and plain values: None, bool, int, float, str, lists,
dicts with keys of type str, and numpy arrays. Reading runs no code from the file, whoever wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from r1fast.run_folder import write_synced
from r1fast_kernels.torch_private import storage_info

CONTENTS = "contents.json"
_ARRAY = "__array__"


class Writer(dcp.FileSystemWriter):
    """Tensors as DCP writes them; one thread, as more swallow a failed write (pytorch#191391)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, thread_count=1)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for part in results for r in part}
        contents = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), name
            chunks = []
            for chunk in tensor.chunks:
                place = places[name, tuple(chunk.offsets)]
                where = {"file": place.relative_path, "offset": place.offset, "length": place.length}
                chunks.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), **where})
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            contents[name] = {"dtype": dtype, "size": list(tensor.size), "chunks": chunks}
        write_synced(Path(self.path) / CONTENTS, json.dumps(contents).encode())


class Reader(dcp.FileSystemReader):
    """Reads what Writer wrote. Raises ValueError for a table of contents that is none, or names a file elsewhere."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        contents = json.loads((Path(self.path) / CONTENTS).read_bytes())
        tensors, places = {}, {}
        try:
            for name, entry in contents.items():
                dtype, chunks = getattr(torch, entry["dtype"]), []
                for chunk in entry["chunks"]:
                    if Path(chunk["file"]).name != chunk["file"]:
                        raise ValueError(f"{name} lies in {chunk['file']!r}, outside the checkpoint")
                    offsets = torch.Size(chunk["offsets"])
                    chunks.append(dcp_metadata.ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
                    places[dcp_metadata.MetadataIndex(name, offsets)] = storage_info(
                        chunk["file"], chunk["offset"], chunk["length"]
                    )
                tensors[name] = TensorStorageMetadata(
                    dcp_metadata.TensorProperties(dtype), torch.Size(entry["size"]), chunks
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{CONTENTS} is not one of ours ({type(error).__name__}: {error})") from error
        loaded = dcp_metadata.StorageMeta(load_id=self.load_id)
        return Metadata(tensors, planner_data=None, storage_data=places, storage_meta=loaded)  # type: ignore[arg-type]


def check_fit(folder: Path, tensors: Mapping[str, torch.Tensor], *, whole: bool = True) -> None:
    """ValueError where names, shapes or dtypes of a checkpoint are not those of `tensors`. whole: it has no others."""
    saved = Reader(folder).read_metadata().state_dict_metadata
    lacks, more = sorted(tensors.keys() - saved.keys()), sorted(saved.keys() - tensors.keys()) if whole else []
    if wrong := [f"it lacks {name}" for name in lacks[:1]] + [f"it holds {name} too" for name in more[:1]]:
        raise ValueError("; ".join(wrong))
    for name, tensor in tensors.items():
        found = saved[name]
        assert isinstance(found, TensorStorageMetadata), name
        if (found.size, found.properties.dtype) != (tensor.shape, tensor.dtype):
            here = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} is {found.properties.dtype} {tuple(found.size)} in it, {here} here")


def write_plain(path: Path, value: Any) -> list[str]:
    """Write a plain value as path.json, and path.npz if it holds arrays; returns the names of the files."""
    _check_keys(value)
    arrays: dict[str, Any] = {}
    json_file, npz = path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.npz")

    def apart(array: Any) -> dict[str, int]:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"state with a {type(array).__name__}: it is no plain value")
        arrays[str(len(arrays))] = array
        return {_ARRAY: len(arrays) - 1}

    write_synced(json_file, json.dumps(value, default=apart).encode())
    if not arrays:
        return [json_file.name]
    with npz.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return [json_file.name, npz.name]


def read_plain(path: Path) -> Any:
    """What write_plain wrote."""
    content, npz = path.with_name(f"{path.name}.json").read_bytes(), path.with_name(f"{path.name}.npz")
    if not npz.exists():
        return json.loads(content)
    with np.load(npz, allow_pickle=False) as arrays:
        return json.loads(content, object_hook=lambda read: arrays[str(read[_ARRAY])] if _ARRAY in read else read)


def _check_keys(value: Any) -> None:
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str) or key == _ARRAY]:
            raise TypeError(f"state with the key {wrong[0]!r}: JSON has strings for keys, and {_ARRAY} is ours")
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else ():
        _check_keys(item)
