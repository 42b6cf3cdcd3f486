"""Hugging Face checkpoints out: each block of rows goes to its place in its file as it comes, so that nothing is held.

A safetensors file is 8 bytes (length of the header), the header as JSON (dtype, shape and place of each tensor), then
the tensors: all of it is known from names and shapes, before the first weight.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from r1fast.models.folders import ADAPTER_CONFIG, GENERATION_NAME, eos_ids, layers_of, read_generation_config, resolve
from r1fast.models.model_config import ModelConfig
from r1fast.models.names import Blocks, StateDict, pieces_of
from r1fast.models.tensor_files import INDEX_NAME, WORDS

MAX_SHARD_BYTES = 5 * 10**9


def save_model(
    decoder_config: ModelConfig,
    state_dict: StateDict,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scalar_head: bool = False,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
    blocks: Blocks | None = None,
) -> None:
    """Write a checkpoint that AutoModelForCausalLM (or ...ForSequenceClassification) and AutoTokenizer load.

    But AutoTokenizer gives every qwen2 checkpoint the splitting of Qwen2's tokenizer (transformers 5.23): another one,
    such as that of recipe `tiny`, is read right by load_tokenizer and PreTrainedTokenizerFast alone.

    state_dict: our names, whole tensors on any device. source: the checkpoint that training started from, whose
    generation_config is kept (temperature, ..), but for the ids: the model's, and the tokenizer's end of sequence.
    blocks: where the weights come from instead, every row once; then only names, shapes and dtypes of state_dict count.
    Raises ValueError if the directory holds weights or an adapter already and overwrite is False.
    """
    directory = Path(directory)
    stale = sorted(file for name in ("*.safetensors", INDEX_NAME, ADAPTER_CONFIG) for file in directory.glob(name))
    if stale and not overwrite:
        raise ValueError(f"{directory}: already holds {stale[0].name}; choose another directory or pass overwrite=True")
    directory.mkdir(parents=True, exist_ok=True)
    for file in stale:
        file.unlink()
    if decoder_config.tie_word_embeddings and not scalar_head:
        state_dict = {name: tensor for name, tensor in state_dict.items() if name != "lm_head.weight"}
    _write_tensors(
        decoder_config, state_dict, directory, blocks or ((name, 0, tensor) for name, tensor in state_dict.items())
    )

    eos = eos_ids(decoder_config.eos_token_id, getattr(tokenizer, "eos_token_id", None))
    decoder_config = dataclasses.replace(decoder_config, eos_token_id=eos)
    decoder_config.to_hf(state_dict["embed_tokens.weight"].dtype, scalar_head=scalar_head).save_pretrained(directory)
    if not scalar_head:
        write_generation_config(directory, source, decoder_config)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


@dataclasses.dataclass
class _Place:
    """Of a tensor on disk: its file, and where its bytes begin in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path = Path()
    start: int = 0

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes


def _write_tensors(config: ModelConfig, state: StateDict, directory: Path, blocks: Blocks) -> None:
    places = {
        piece.name: _Place(tensor.dtype, piece.shape)
        for name, tensor in state.items()
        for piece in pieces_of(name, tuple(tensor.shape), config)
    }
    total = sum(place.num_bytes for place in places.values())
    shards = list(_shards(places))
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        _begin(directory / name, {name: places[name] for name in shard})
    if len(shards) > 1:
        weight_map = {name: place.file.name for name, place in places.items()}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
        (directory / INDEX_NAME).write_text(f"{index}\n", encoding="utf-8")
    with ExitStack() as opened:
        file: IO[bytes] | None = None
        for place, first, rows in _pieces(config, state, places, blocks):
            if file is None or file.name != str(place.file):
                opened.close()
                file = opened.enter_context(place.file.open("r+b"))
            file.seek(place.start + first * place.row_bytes)
            total -= file.write(rows.to(place.dtype).contiguous().view(torch.uint8).numpy().data)
    assert total == 0, f"{total} bytes of weights were not given"


def _pieces(
    config: ModelConfig, state: StateDict, places: dict[str, _Place], blocks: Blocks
) -> Iterator[tuple[_Place, int, Tensor]]:
    """(place of a tensor on disk, row of it, rows) of all that comes."""
    for name, start, rows in blocks:
        for piece in pieces_of(name, tuple(state[name].shape), config) if name in state else ():
            if (found := piece.within(start, start + len(rows))) is not None:
                index, first, _ = found
                yield places[piece.name], first, rows[index].detach().cpu()


def _shards(places: dict[str, _Place]) -> Iterator[list[str]]:
    """Names by file, in order."""
    shard: list[str] = []
    room = MAX_SHARD_BYTES
    for name, place in places.items():
        if shard and place.num_bytes > room:
            yield shard
            shard, room = [], MAX_SHARD_BYTES
        shard.append(name)
        room -= place.num_bytes
    yield shard


def _begin(file: Path, places: dict[str, _Place]) -> None:
    """A file with its header and room for tensors, whose places are set: wide types first, so that all are aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: -item[1].dtype.itemsize):
        place.file, place.start = file, end
        end += place.num_bytes
        header[name] = {"dtype": WORDS[place.dtype], "shape": place.shape, "data_offsets": [place.start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    for place in places.values():
        place.start += 8 + len(text)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def write_generation_config(directory: Path, source: str | Path | None, config: ModelConfig) -> None:
    layers = [] if source is None else layers_of(source, partial(resolve, patterns=[GENERATION_NAME, ADAPTER_CONFIG]))
    found = [layer.folder for layer in layers if (layer.folder / GENERATION_NAME).is_file()]
    values = read_generation_config(found[0]) if found else {}
    values.pop("_from_model_config", None)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values |= {name: value for name, value in ids.items() if value is not None}
    values["transformers_version"] = transformers_version
    (directory / GENERATION_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
