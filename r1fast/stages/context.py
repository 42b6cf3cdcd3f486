"""What every stage is given: its settings, the run it belongs to, the ranks, and the clock."""

import copy
import gc
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase as Tokenizer

from r1fast.artifacts import Artifact, fingerprint, inputs_of, start_model
from r1fast.config import ConfigError
from r1fast.data.chat_templates import chat_template
from r1fast.data.sources import load_rows
from r1fast.layouts import layout_of, taught_format, write_layout
from r1fast.models.decoder import Decoder
from r1fast.models.lora import LoraConfig, add_adapters, init_adapters, is_adapter, merged_blocks, summary
from r1fast.models.lora_files import export_of, save_adapter
from r1fast.models.names import Blocks, StateDict
from r1fast.models.structure import unwrapped
from r1fast.models.weights import Checkpoint, save_model
from r1fast.observe.metrics import StageLog
from r1fast.observe.progress import active_progress
from r1fast.observe.trackers import Trackers
from r1fast.parallel.mesh import Dist
from r1fast.parallel.parallelize import gathered_blocks, local_parts, parallelize, reshard, whole_tensor
from r1fast.rollout.tokenization import leading_ids
from r1fast.run_folder import replace_file, replace_folder
from r1fast.schema import Recipe
from r1fast.schema_options import (
    GenerateOptions,
    LoraOptions,
    LossOptions,
    StageBase,
    TrainFilesOptions,
    TrainOptions,
)
from r1fast.stages.peak_memory import begin_peak, peak_bytes
from r1fast.stages.train_rows import LEFT_OUT, choose_rows, counts_of, describe, nothing_left, tested_key
from r1fast.stopping import Stop

S = TypeVar("S", bound=StageBase, covariant=True)


@dataclass
class StageContext(Generic[S]):
    """S: the options of the stage that the reader of a context needs, such as GRPOStage or TrainOptions."""

    recipe: Recipe
    stage: S
    dist: Dist
    run_dir: Path
    trackers: Trackers = field(default_factory=Trackers)
    evaluations: dict[str, dict] = field(default_factory=dict)  # by model and settings: nothing is measured twice
    phases: dict[str, float] = field(default_factory=dict)  # seconds by phase, of this process
    peaks: dict[str, int] = field(default_factory=dict)  # bytes at most by phase, of this process
    started: float = field(default_factory=time.monotonic)
    stop: Stop = field(default_factory=Stop)
    entry: dict[str, Any] = field(default_factory=dict)  # what summary.json says of this stage
    write_entry: Callable[[], None] = lambda: None
    stage_log: StageLog | None = None
    _in_phase: bool = False

    def __post_init__(self) -> None:
        self.earlier = dict(self.entry)  # `clock` when this process took the stage up

    @property
    def stage_dir(self) -> Path:
        return self.run_dir / self.stage.name

    @property
    def seed(self) -> int:
        return self.recipe.seed if self.stage.seed is None else self.stage.seed

    @property
    def model_ref(self) -> str:
        """The model that this stage starts from, as the recipe names it."""
        ref = start_model(self.recipe, self.stage)
        assert ref is not None, "check_references has asked for one"
        return ref

    @property
    def param_dtype(self) -> torch.dtype:
        name = self.recipe.model.dtype
        if name == "auto":
            return torch.bfloat16 if self.dist.device.type == "cuda" else torch.float32
        return getattr(torch, name)

    def model_path(self, ref: str) -> str:
        return Artifact("model", ref, "model").place(self.run_dir)

    def rows(self, key: str = "train_files") -> list[dict]:
        """What the files of an option hold; of train_files what is trained on."""
        rows = [row for _, rows in self.rows_by_file(key) for row in rows]
        return self._chosen(rows) if key == "train_files" else rows

    def _chosen(self, rows: list[dict]) -> list[dict]:
        """Rank 0 writes which are left out, while the stage runs: an export reads its rows again."""
        stage = self.stage
        if not isinstance(stage, TrainFilesOptions) or not stage.leaves_out:
            return rows
        kind = next(found.rows for found in inputs_of(self.recipe, stage) if found.key == "train_files")
        assert kind is not None, "train_files hold rows"
        key = tested_key(stage)
        chosen, left_out = choose_rows(stage, kind, rows, self.rows(key) if key else ())
        if not chosen:
            raise self.error(nothing_left(left_out, len(rows)))
        if self.entry:
            self.entry["left_out"] = counts_of(left_out)
            self.write_rows(LEFT_OUT, left_out)
            if left_out:
                self.message(f"{stage.name}: {describe(left_out, len(rows))}")
        return chosen

    def rows_by_file(self, key: str) -> list[tuple[str, list[dict]]]:
        """The same, each file by itself, as the recipe names it."""
        files = [found for found in inputs_of(self.recipe, self.stage) if found.key == key]
        assert files and files[0].rows is not None, f"{key} names no files"
        return [(found.ref, load_rows([found.place(self.run_dir)], files[0].rows)) for found in files]

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"stages.{self.stage.name}: {problem}")

    def refuse(self, problems: Iterable[str]) -> None:
        """ConfigError with the first of these problems, which begin with a key."""
        for problem in problems:
            raise ConfigError(f"stages.{self.stage.name}.{problem}")

    def load(self, ref: str, *, trainable: bool, scalar_head: bool = False) -> tuple[Decoder, Tokenizer]:
        """The model `ref`, of which every rank reads its shard, and its tokenizer. scalar_head: as a reward model.

        A model that is trained is kept in float32, a frozen one in the dtype of the forward pass; with `lora` one that
        is trained is frozen, beside adapters in float32.
        """
        # A model that nobody holds any more, an earlier stage's or a teacher, is still there, as FSDP's units and hooks
        # refer to each other. With its optimizer it would take room beside this one until a collection happens to run.
        gc.collect()
        lora = self.lora if trainable else None
        dtype = torch.float32 if trainable and lora is None else self.param_dtype
        path = self.model_path(ref)

        def read() -> tuple[Decoder, Tokenizer | None]:
            checkpoint = Checkpoint(path, scalar_head=scalar_head)
            for note in checkpoint.notes:
                self.message(note)
            model = checkpoint.decoder(dtype).requires_grad_(trainable)
            if lora is not None:
                add_adapters(model, lora)
                self.message(f"{self.stage.name}: {summary(model)}")
            model = self.shard(model).to_empty(device=self.dist.device)
            checkpoint.fill(local_parts(model, self.dist))
            init_adapters(model, local_parts(model, self.dist), self.seed)
            return model.eval(), checkpoint.tokenizer()

        try:
            model, tokenizer = self.dist.on_all(read)
        except ValueError as error:  # of a model that an earlier stage has made: preflight could not see it
            raise self.error(str(error)) from error
        assert tokenizer is not None, f"{path} has no tokenizer"  # preflight reads those from outside the run
        # Where the model is in float32 it says nothing, and a head as it was built is what the fast decode knows.
        if isinstance(self.stage, LossOptions) and self.stage.lm_head_fp32 and not scalar_head:
            model.head.in_fp32 = self.param_dtype != torch.float32
        return model, tokenizer

    @property
    def lora_options(self) -> LoraOptions | None:
        return self.stage.lora if isinstance(self.stage, TrainOptions) else None

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters that the stage trains; None: it trains every weight."""
        options = self.lora_options
        return None if options is None else LoraConfig(**options.model_dump(exclude={"merge_and_unload"}))

    def shard(self, model: Decoder) -> Decoder:
        trainer = self.recipe.trainer
        return parallelize(  # type: ignore[return-value]
            model, self.dist, param_dtype=self.param_dtype, reduce_dtype=getattr(torch, trainer.reduce_dtype),
            activation_checkpointing=trainer.activation_checkpointing, compile=trainer.compile,
        )  # fmt: skip

    def save(self: "StageContext[GenerateOptions]", model: Decoder, tokenizer: Tokenizer) -> None:
        """Write <stage>/model as a Hugging Face checkpoint, complete or not at all; no rank gathers it whole."""
        with self.phase("save"):
            blocks, write_to = self.export(model, tokenizer)

            def write(target: Path) -> None:
                with replace_folder(target) as folder, _as_os_error(target):
                    write_to(folder)

            self._write_artifact("model", write, blocks)

    def export(
        self: "StageContext[GenerateOptions]", model: Decoder, tokenizer: Tokenizer, *,
        dtype: torch.dtype | None = None, merge: bool = False,
    ) -> tuple[Blocks, Callable[[Path], None]]:  # fmt: skip
        """What writes a model of this stage into a folder; the blocks are what all ranks go through with it.

        dtype: of the weights; None: as they are held, of a merged model float32. With `lora` it is a LoRA folder, or
        where `merge` or the recipe asks for it, a whole model.
        """
        reshard(model)
        state: StateDict = model.state_dict()
        blocks: Blocks = gathered_blocks(model, self.dist)
        adapter = None if self.lora is None else export_of(model, self.lora, whole_tensor)
        if adapter is not None and (merge or (self.lora_options is not None and self.lora_options.merge_and_unload)):
            blocks, adapter, dtype = merged_blocks(blocks, adapter.factors), None, dtype or torch.float32
        elif adapter is not None:
            blocks = ()
        if dtype is not None:  # the router's bias, a buffer, stays in float32
            buffers = {unwrapped(name) for name, _ in model.named_buffers()}
            state = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype if name in buffers else dtype, device="meta")
                for name, tensor in state.items()
                if not is_adapter(name)
            }

        def write(folder: Path) -> None:
            exported, source = exported_tokenizer(self, tokenizer), None
            if self.stage.kind != "pretrain":
                source = self.model_path(self.model_ref)
            if adapter is not None:
                assert source is not None, "pretrain trains no adapter"
                save_adapter(folder, adapter, model.config, source, exported)
            else:
                save_model(model.config, state, folder, exported, model.scalar_head, source=source, blocks=blocks)
            write_layout(folder, layout_of(self.stage, taught_format(self.recipe, self.stage)))

        return blocks, write

    def write_rows(self, name: str, rows: list[dict]) -> None:
        """Write <stage>/<name> as JSON lines, complete or not at all."""

        def write(target: Path) -> None:
            replace_file(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

        self._write_artifact(name, write)

    def _write_artifact(self, name: str, write: Callable[[Path], None], blocks: Iterable[object] = ()) -> None:
        """Rank 0 writes; what it wrote is noted in summary.json, so that a later reader can tell damage.

        blocks: what all ranks go through together, whatever happens to rank 0 on the way.
        """

        def rest() -> None:
            deque(blocks, maxlen=0)

        def write_and_note() -> str:
            try:
                if self.stop.problem is not None:
                    raise self.stop.problem
                self.stage_dir.mkdir(exist_ok=True)  # without parents: a run folder that is gone is not made again
                write(self.stage_dir / name)
            finally:
                rest()
            return fingerprint(self.stage_dir / name)

        self.entry.setdefault("files", {})[name] = self.dist.on_main(write_and_note, rest)
        self.write_entry()

    def is_intact(self, name: str) -> bool:
        """Whether <stage>/<name> is there as this stage wrote it, in this process or before it was stopped."""
        noted = self.entry.get("files", {}).get(name)
        path = self.stage_dir / name
        intact = noted is not None and path.exists() and fingerprint(path) == noted
        if not intact and noted is not None and path.exists():
            self.message(f"{path} is damaged, and made again")
        return intact

    def log(self, total_steps: int, resume_step: int = 0) -> StageLog:
        self.stage_log = StageLog(
            self.stage_dir, total_steps=total_steps, trackers=self.trackers, is_main=self.dist.is_main,
            resume_step=resume_step, phases=self.phases, logging_steps=getattr(self.stage, "logging_steps", 1),
            on_failure=lambda error: setattr(self.stop, "problem", error),
        )  # fmt: skip
        return self.stage_log

    def clock(self) -> dict[str, Any]:
        """Seconds that the stage took, in all and by phase, with those of the processes before this one; peak bytes."""
        seconds = self.earlier.get("seconds", 0.0) + time.monotonic() - self.started
        before, here = self.earlier.get("phases", {}), self.phases
        phases = {name: round(before.get(name, 0.0) + here.get(name, 0.0), 2) for name in {**before, **here}}
        peaks: dict[str, int] = self.earlier.get("memory", {})
        memory = {name: max(peaks.get(name, 0), self.peaks.get(name, 0)) for name in {**peaks, **self.peaks}}
        return {"seconds": round(seconds, 2), "phases": phases, "memory": memory}

    def resume_clock(self, saved: dict[str, Any]) -> None:
        """A checkpoint's clock counts where it is ahead of summary.json's, which a kill left behind."""
        if saved["seconds"] > self.earlier.get("seconds", 0.0):
            self.earlier = saved

    def message(self, text: str) -> None:
        if (progress := active_progress()) is not None:
            progress.message(text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards a phase of the stage; of nested phases the outermost counts."""
        if self._in_phase:
            yield
            return
        start, self._in_phase = time.perf_counter(), True
        begin_peak(self.dist.device)
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
            if (peak := peak_bytes(self.dist.device)) is not None:
                self.peaks[name] = max(peak, self.peaks.get(name, 0))
            self._in_phase = False


def exported_tokenizer(ctx: StageContext[GenerateOptions], tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the chat template that renders the stage's prompts."""
    stage = ctx.stage
    if stage.prompt_template == "few_shot":
        ctx.message(f"{stage.name}: few_shot prompts are no chat: the saved model keeps the tokenizer's chat template")
    template = chat_template(
        stage.prompt_template, tokenizer=tokenizer, response_format=stage.response_format,
        prefill_think=stage.prefill_think, variables=stage.chat_template_kwargs,
        leading=str(tokenizer.decode(leading_ids(tokenizer), skip_special_tokens=False)),
    )  # fmt: skip
    if template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


@contextmanager
def _as_os_error(target: Path) -> Iterator[None]:
    """What the libraries raise on a full disk that is no OSError: safetensors its own, tokenizers a bare Exception."""
    try:
        yield
    except Exception as error:
        if type(error) not in (Exception, SafetensorError):
            raise
        raise OSError(f"{target}: {error}") from error
