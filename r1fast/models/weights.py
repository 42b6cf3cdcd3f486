"""Hugging Face checkpoints in: found and checked from headers, then read into a decoder, whole or a rank's part of it.

Which tensor is which: names.py. How files are read: tensor_files.py. The way out: export.py. Only tensors are read, and
no code that a folder brings along is run.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r1fast.models.decoder import Decoder
from r1fast.models.export import save_model

from r1fast.models.folders import (  # isort: skip
    ADAPTER_CONFIG, TOKENIZER_PATTERNS, Described, eos_ids, is_local, layers_of, load_tokenizer, read_config,
    read_generation_config, resolve, tokenizer_of,
)  # fmt: skip
from r1fast.models.lora_files import is_reward_adapter, with_adapter
from r1fast.models.model_config import ModelConfig
from r1fast.models.names import Blocks, StateDict, is_left_out, is_mtp, pieces_of, some, standard_name, to_hf_names
from r1fast.models.tensor_files import CHUNK_BYTES, FLOATS, FP8, POWERS_OF_2, SCALE, Stored, TensorFiles, weight_files

__all__ = ["Checkpoint", "StateDict", "check_checkpoint", "load_model", "load_tokenizer", "save_model", "to_hf_names"]
logger = logging.getLogger(__name__)

_EMBEDDING, _HEAD, _SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"


def load_model(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    *,
    scalar_head: bool | None = None,
    revision: str | None = None,
) -> tuple[Decoder, PreTrainedTokenizerBase | None]:
    """Any checkpoint of the supported families -> (decoder in eval mode, tokenizer or None if it has none).

    path: folder, Hub id or .gguf file; of a LoRA folder the adapter is added to the weights of its base.
    dtype: torch.dtype, its name, or "auto" (what the checkpoint says).
    scalar_head: None follows the checkpoint; True turns a language model into a reward model whose `score` starts at 0.
    revision: commit, branch or tag of a Hub id.
    Raises ValueError naming the path and the key for anything missing, unexpected or unsupported.
    """
    checkpoint = Checkpoint(path if revision is None else f"{path}@{revision}", scalar_head=scalar_head)
    for note in checkpoint.notes:
        logger.warning(note)
    decoder = checkpoint.decoder(dtype).to_empty(device=device or "cpu")
    checkpoint.fill((name, 0, tensor) for name, tensor in decoder.state_dict().items())
    return decoder.eval(), checkpoint.tokenizer()


def check_checkpoint(path: str | Path) -> tuple[ModelConfig, bool]:
    """The architecture, and whether it is a reward model, or an error of load_model; no weight is read.

    A Hub id is checked by its config.json (and adapter_config.json), and no other file is fetched.
    """
    layers = layers_of(path, partial(resolve, patterns=["config.json", ADAPTER_CONFIG]))
    if not all(is_local(layer.ref) for layer in layers):
        described = read_config(layers[-1].folder)
        of_adapters = [is_reward_adapter(layer.folder) for layer in layers[:-1]]  # of all: each is checked
        return described.config, described.is_reward_model or any(of_adapters)
    checkpoint = Checkpoint(path, headers_only=True)
    return checkpoint.config, checkpoint.scalar_head


def _files_of(path: str | Path) -> Path:
    folder = resolve(path, ["*.safetensors", *TOKENIZER_PATTERNS])
    if not is_local(path) and not any(folder.glob("*.safetensors")):
        folder = resolve(path, ["pytorch_model*.bin", "adapter_model.bin", *TOKENIZER_PATTERNS])
    return folder


class Checkpoint:
    """A checkpoint whose headers have been read and fit its config: `decoder` builds it on meta, `fill` reads weights.

    Raises ValueError naming the path and the key, as load_model.
    """

    def __init__(self, path: str | Path, *, scalar_head: bool | None = None, headers_only: bool = False) -> None:
        """scalar_head: as of load_model. headers_only: two stored heads that may be one are taken to be one."""
        self._layers = layers_of(path, _files_of)
        *adapters, (_, self.folder) = self._layers
        self.notes: list[str] = []  # what the user should know of what was left out
        self._files = TensorFiles()
        described = read_config(self.folder)
        self.config, self._dtype = described.config, described.dtype
        self._stored = self._listed(described)
        for _, adapter in reversed(adapters):
            self._stored = with_adapter(self._stored, adapter, self.config)
            eos = eos_ids(self.config.eos_token_id, read_generation_config(adapter).get("eos_token_id"))
            self.config = dataclasses.replace(self.config, eos_token_id=eos)
        is_reward_model = described.is_reward_model or _SCORE in self._stored
        if scalar_head is False and is_reward_model:
            raise ValueError(f"{self.folder}: is a reward model (`score`), expected a language model with an lm_head")
        self.scalar_head = is_reward_model or bool(scalar_head)
        self._starts_at_0: set[str] = set()
        if not is_reward_model:
            self._share_head(headers_only)
            if self.scalar_head:
                self._stored.pop(_HEAD, None)
                self._starts_at_0.add(_SCORE)
        with torch.device("meta"):
            self._decoder = Decoder(self.config, scalar_head=self.scalar_head)
        said = (read_generation_config(layer.folder) for layer in self._layers)
        self._decoder.generation_config = next(filter(None, said), {})
        self._check_fit()

    def decoder(self, dtype: torch.dtype | str = "auto") -> Decoder:
        """The decoder on meta, to be made empty and filled; a router's bias is fp32 whatever the dtype."""
        return self._decoder.to(self._resolve_dtype(dtype))

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return tokenizer_of(self._layers)

    @torch.no_grad()
    def fill(self, parts: Iterable[tuple[str, int, Tensor]]) -> None:
        """Read weights into parts of the decoder's state: (name, first row, rows), in any dtype and on any device.

        Of every tensor on disk only the rows that make up these parts are read, a few MB at a time.
        """
        for name, start, part in parts:
            if name in self._starts_at_0:
                part.zero_()
            for piece in pieces_of(name, self._shapes[name], self.config) if name in self._shapes else ():
                if (found := piece.within(start, start + len(part))) is not None:
                    index, first, num_rows = found
                    target = part[index]
                    for place, rows in self._files.rows(self._stored[piece.name], first, num_rows):
                        target[place : place + len(rows)].copy_(rows)
        self._files.close()

    def blocks(self, dtype: torch.dtype | str = "auto") -> Blocks:
        """For save_model: every weight once, a few MB at a time."""
        for name, tensor in self.decoder(dtype).state_dict().items():
            if name not in self._shapes and name not in self._starts_at_0:  # a tied head
                continue
            step = max(1, CHUNK_BYTES // (math.prod(tensor.shape[1:]) * tensor.itemsize))
            for start in range(0, len(tensor), step):
                rows = torch.empty((min(step, len(tensor) - start), *tensor.shape[1:]), dtype=tensor.dtype)
                self.fill([(name, start, rows)])
                yield name, start, rows

    def _listed(self, described: Described) -> dict[str, Stored]:
        """Every tensor of the decoder, by transformers' name."""
        found: dict[str, Stored] = {}
        skipped = 0
        for file in weight_files(self.folder):
            for stored in self._files.list(file):
                name = standard_name(stored.name)
                skipped += is_mtp(name, described.config)
                # transformers writes the shared experts of a model without them, empty.
                if is_left_out(name, described.config) or 0 in stored.shape:
                    continue
                if name in found:
                    again = f"{stored.name} is {found[name].name} of {found[name].file.name} once more"
                    raise ValueError(f"{file}: {again}; copy or download it again")
                found[name] = stored
        if skipped:
            text = f"left out {skipped} tensors of multi-token prediction, the layers past the last"
            self.notes.append(f"{self.folder}: {text}")
        self._check_reward_head(found)
        return _with_scales(found, described.fp8_block)

    def _check_reward_head(self, found: dict[str, Stored]) -> None:
        others = [name for name in found if name.startswith("score.") and name != _SCORE]
        if others:
            kind = "a bias" if others == ["score.bias"] else "several layers"
            stored = some(found[name].name for name in others)
            advice = "call it from a reward function of your own, or train one by kind: reward_model"
            text = f"the head of this reward model has {kind} ({stored}), expected one matrix without a bias"
            raise ValueError(f"{self.folder}: {text}; {advice}")
        if _SCORE in found and found[_SCORE].name.startswith("v_head.") and found.pop(_HEAD, None) is not None:
            self.notes.append(f"{self.folder}: left out lm_head.weight: with {found[_SCORE].name} it is a reward model")

    def _share_head(self, headers_only: bool) -> None:
        """As transformers: tied weights are one where one or two equal ones are stored, and two where those differ."""
        if not self.config.tie_word_embeddings or _HEAD not in self._stored:
            return
        if _EMBEDDING not in self._stored or headers_only or self._are_equal(_EMBEDDING, _HEAD):
            head = self._stored.pop(_HEAD)
            self._stored.setdefault(_EMBEDDING, head)
            return
        self.config = dataclasses.replace(self.config, tie_word_embeddings=False)
        text = "not tied, although tie_word_embeddings is true: lm_head.weight and model.embed_tokens.weight differ"
        self.notes.append(f"{self.folder}: {text}")

    def _are_equal(self, *names: str) -> bool:
        both = [self._stored[name] for name in names]
        if both[0].shape != both[1].shape or not both[0].shape:
            return False
        chunks = [TensorFiles().rows(stored, 0, stored.shape[0]) for stored in both]
        return all(torch.equal(a.float(), b.float()) for (_, a), (_, b) in zip(*chunks, strict=True))

    def _check_fit(self) -> None:
        """The names and shapes that config.json asks for; keys are reported as they stand on disk."""
        not_read = self._starts_at_0 | ({_HEAD} if self.config.tie_word_embeddings else set())
        state = self._decoder.state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in not_read}
        pieces = [piece for name, shape in self._shapes.items() for piece in pieces_of(name, shape, self.config)]
        expected = {piece.name: piece.shape for piece in pieces}
        differing = {
            "missing": expected.keys() - self._stored.keys(),
            "unexpected": {stored.name for name, stored in self._stored.items() if name not in expected},
        }
        if problems := [f"{word} {some(names)}" for word, names in differing.items() if names]:
            advice = "do the weights belong to this config.json?"
            if _SCORE in differing["missing"]:
                advice = "a reward model's head is read as score, value_head or v_head.summary: rename it"
            raise ValueError(f"{self.folder}: {'; '.join(problems)}; {advice}")
        for name, wanted in expected.items():
            found = self._stored[name]
            if found.shape != wanted:
                text = f"{found.name} has shape {found.shape}, expected {wanted}"
                said_by = "of a reward model, one number" if name == _SCORE else "from config.json"
                raise ValueError(f"{found.file}: {text} {said_by}")

    def _resolve_dtype(self, dtype: torch.dtype | str) -> torch.dtype:
        """ "auto": what config.json says, or else the dtype of the embeddings."""
        said_by = "dtype"
        if dtype == "auto":
            dtype = self._dtype or FLOATS.get(self._stored[_EMBEDDING].dtype, torch.bfloat16)
            said_by = f"{self.folder / 'config.json'}: dtype"
        by_name = {str(known).removeprefix("torch."): known for known in FLOATS.values()}
        if (name := str(dtype).removeprefix("torch.")) not in by_name:
            expected = "a torch.dtype, its name (bfloat16, float16, float32), or 'auto'"
            raise ValueError(f"{said_by}={str(dtype)!r}, expected {expected}")
        return by_name[name]


def _with_scales(found: dict[str, Stored], block: tuple[int, int] | None) -> dict[str, Stored]:
    """Weights in fp8 with their scales, which are no tensors of the decoder; ValueError for any other dtype."""
    for name, stored in list(found.items()):
        scale = found.get(name + SCALE)
        if block is None or stored.dtype != FP8 or len(stored.shape) != 2 or scale is None:
            continue
        if scale.dtype not in (*FLOATS, POWERS_OF_2):
            raise ValueError(f"{scale.file}: {scale.name} has dtype {scale.dtype}, expected one of {', '.join(FLOATS)}")
        wanted = tuple(-(-size // part) for size, part in zip(stored.shape, block, strict=True))
        if scale.shape != wanted:
            text = f"{scale.name} has shape {scale.shape}, expected {wanted} for blocks of {block}"
            raise ValueError(f"{scale.file}: {text}")
        found[name] = stored._replace(scale=found.pop(name + SCALE), block=block)
    for stored in found.values():
        if stored.dtype not in FLOATS and stored.scale is None:
            expected = f"expected one of {', '.join(FLOATS)}, or {FP8} with its {SCALE[1:]} and weight_block_size"
            raise ValueError(f"{stored.file}: {stored.name} has dtype {stored.dtype}, {expected}")
    return found
