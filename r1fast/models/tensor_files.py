"""Tensors of checkpoint files, by rows: safetensors and PyTorch's own files, in floating point or in fp8 with scales.

A file is mapped, not read: what a process has touched of it counts as its memory until the file is closed. So a file is
opened anew after every CHUNK_BYTES, and never more than that is returned at a time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r1fast.models.folders import AGAIN, read_json, text_of

CHUNK_BYTES = 16 << 20
INDEX_NAME = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8, POWERS_OF_2, SCALE = "F8_E4M3", "F8_E8M0", "_scale_inv"  # the second: of scales alone
WORDS = {dtype: word for word, dtype in {**FLOATS, FP8: torch.float8_e4m3fn}.items()}
# As transformers: one file, or else what the index names; safetensors before pickles.
_LAYOUTS = (("model.safetensors", INDEX_NAME), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


class Stored(NamedTuple):
    """A tensor of a file, known from the file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it
    scale: "Stored | None" = None  # of fp8: one number for each block
    block: tuple[int, int] = (1, 1)  # rows and columns of one
    products: tuple[tuple[Tensor, Tensor], ...] = ()  # (left, right): left right is added, as of LoRA folders


def weight_files(folder: Path) -> list[Path]:
    for whole, index in _LAYOUTS:
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return _files_of_index(folder / index)
    expected = "expected model.safetensors, or pytorch_model.bin, or an index and its shards"
    raise ValueError(f"{folder}: no model.safetensors; {expected}")


def _files_of_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names: Any = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{index}: no weight_map of tensor names to files of this folder; {AGAIN}")
    files = [index.parent / name for name in sorted(set(names))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{index.parent}: no {file.name}; expected every file that {index.name} names")
    return files


class TensorFiles:
    """Reads rows of stored tensors; holds one file open at a time. Raises ValueError naming file and tensor."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._opened: Any = None
        self._touched = 0

    def list(self, file: Path) -> list[Stored]:
        opened = self._open(file)
        with _readable(file):
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return [Stored(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()]

    def rows(self, stored: Stored, start: int, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Rows start to start + num_rows as (place of the first, rows), in fp32 where they are stored in fp8."""
        step = max(1, CHUNK_BYTES // (4 * math.prod(stored.shape[1:])))
        for first in range(start, start + num_rows, step):
            rows = self._rows(stored, first, min(first + step, start + num_rows))
            if stored.scale is not None:
                rows = self._dequantized(rows, stored, first)
            for left, right in stored.products:
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                rows = rows.addmm(left[first : first + len(rows)].to(rows.dtype), right.to(rows.dtype))
            # A sum is one pass at the speed of memory, and finite only if every element is; that of large ones may not.
            if not rows.sum().isfinite() and not rows.isfinite().all():
                advice = f"take an earlier checkpoint, or {AGAIN}"
                raise ValueError(f"{stored.file}: {stored.name} holds NaN or Inf; {advice}")
            yield first - start, rows

    def close(self) -> None:
        self._file, self._opened, self._touched = None, None, 0

    def _rows(self, stored: Stored, start: int, stop: int) -> Tensor:
        opened = self._open(stored.file)
        with _readable(stored.file):
            rows = opened.get_slice(stored.name)[start:stop]
        self._touched += rows.nbytes
        return rows

    def _dequantized(self, rows: Tensor, stored: Stored, first: int) -> Tensor:
        assert stored.scale is not None
        height, width = stored.block
        last = first + len(rows) - 1
        scale = self._rows(stored.scale, first // height, last // height + 1).float()
        block_of_row = torch.arange(first, last + 1) // height - first // height
        scale = scale.repeat_interleave(width, dim=1)[:, : rows.shape[1]]
        return rows.float().mul_(scale[block_of_row])

    def _open(self, file: Path) -> Any:
        if self._file != file or self._touched > CHUNK_BYTES:
            self.close()
            with _readable(file):
                self._opened = _opened(file)
            self._file = file
        return self._opened


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """What libraries raise on a damaged file, as a ValueError that names it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({text_of(error)}); {AGAIN}") from error


class _Tensors(dict[str, Tensor]):
    """What safe_open returns, of tensors that are here."""

    def get_slice(self, name: str) -> "_Slice":
        return _Slice(self[name])


@dataclass
class _Slice:
    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return WORDS.get(self.tensor.dtype, str(self.tensor.dtype))

    def __getitem__(self, rows: Any) -> Tensor:
        return self.tensor[rows]


def _opened(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return safe_open(file, framework="pt")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of pickle, of zip files, or RuntimeError
        # torch's own words advise to run what the file holds.
        text = "it holds more" if "weights_only" in str(error) else text_of(error)
        advice = "convert it to safetensors where it was made: no code of a file is run"
        raise ValueError(f"{file}: not a readable file of tensors ({text}); {advice}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file}: is no mapping of names to tensors; expected a state dict")
    return _Tensors(tensors)
