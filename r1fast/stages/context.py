"""What every stage is given: its settings, the run it belongs to, the ranks, and the clock."""

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r1fast.config import ConfigError
from r1fast.data.chat_templates import chat_template
from r1fast.dist.mesh import Dist
from r1fast.dist.parallelize import full_state_dict, parallelize
from r1fast.models.decoder import Decoder
from r1fast.models.weights import load_model, save_model
from r1fast.observe.metrics import StageLog
from r1fast.observe.progress import active_progress
from r1fast.rollout.prompts import leading_ids
from r1fast.schema import Recipe


@dataclass
class StageContext:
    recipe: Recipe
    stage: Any  # the configuration of this stage: one of r1fast.config's *Stage classes
    dist: Dist
    run_dir: Path
    trackers: tuple = ()
    evaluations: dict[str, dict] = field(default_factory=dict)  # by model and settings: nothing is measured twice
    phases: dict[str, float] = field(default_factory=dict)  # seconds by phase
    started: float = field(default_factory=time.monotonic)
    _in_phase: bool = False

    @property
    def stage_dir(self) -> Path:
        return self.run_dir / self.stage.name

    @property
    def checkpoints(self) -> Path:
        return self.stage_dir / "checkpoints"

    @property
    def seed(self) -> int:
        return self.recipe.seed if self.stage.seed is None else self.stage.seed

    @property
    def model_ref(self) -> str:
        """The model that this stage starts from, as the recipe names it."""
        ref = self.stage.model or self.recipe.model.path
        if ref is None:
            raise ConfigError(f"stages.{self.stage.name}.model: missing, and the recipe has no model.path; name one")
        return ref

    @property
    def param_dtype(self) -> torch.dtype:
        name = self.recipe.model.dtype
        if name == "auto":
            return torch.bfloat16 if self.dist.device.type == "cuda" else torch.float32
        return getattr(torch, name)

    def model_path(self, ref: str) -> str:
        return str(self.run_dir / ref[1:] / "model") if ref.startswith("@") else ref

    def sources(self, refs: list[str]) -> list[str]:
        """Data sources with @stage replaced by the file that the stage wrote."""
        return [str(self.run_dir / ref[1:] / "data.jsonl") if ref.startswith("@") else ref for ref in refs]

    def load(self, ref: str, *, trainable: bool, scalar_head: bool = False) -> tuple[Decoder, Any]:
        """The model `ref`, sharded over the ranks, and its tokenizer. scalar_head: as a reward model."""
        dtype = torch.float32 if trainable else self.param_dtype
        path = self.model_path(ref)
        model, tokenizer = load_model(path, dtype=dtype, device=self.dist.device, scalar_head=scalar_head)
        if tokenizer is None:
            raise ConfigError(
                f"stages.{self.stage.name}: {path} has no tokenizer; expected tokenizer.json beside the weights"
            )
        model.requires_grad_(trainable)
        return self.shard(model), tokenizer

    def shard(self, model: Decoder) -> Decoder:
        trainer = self.recipe.trainer
        model.use_kernels(self.recipe.kernels.impl)
        return parallelize(  # type: ignore[return-value]
            model,
            self.dist,
            param_dtype=self.param_dtype,
            reduce_dtype=getattr(torch, trainer.reduce_dtype),
            activation_checkpointing=trainer.activation_checkpointing,
            compile=trainer.compile,
        )

    def save(self, model: nn.Module, tokenizer: Any, name: str = "model") -> Path:
        """Write <stage>/<name> as a Hugging Face checkpoint, complete or not at all."""
        with self.phase("save"):
            state = full_state_dict(model, self.dist)
            target = self.stage_dir / name
            if self.dist.is_main:
                partial = target.with_name(target.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                config = model.config  # type: ignore[union-attr]
                save_model(
                    config,  # type: ignore[arg-type]
                    state,
                    partial,
                    tokenizer=exported_tokenizer(self, tokenizer),
                    scalar_head=model.scalar_head,  # type: ignore[arg-type]
                    source=None if self.stage.kind == "pretrain" else self.model_path(self.model_ref),
                )
                shutil.rmtree(target, ignore_errors=True)
                os.replace(partial, target)
            self.dist.barrier()
        return target

    def write_rows(self, name: str, rows: list[dict]) -> Path:
        """Write <stage>/<name> as JSON lines, complete or not at all."""
        target = self.stage_dir / name
        if self.dist.is_main:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            os.replace(partial, target)
        self.dist.barrier()
        return target

    def log(self, total_steps: int, resume_step: int = 0) -> StageLog:
        return StageLog(
            self.stage_dir,
            total_steps=total_steps,
            trackers=self.trackers,
            is_main=self.dist.is_main,
            resume_step=resume_step,
        )

    def message(self, text: str) -> None:
        progress = active_progress()
        if progress is not None:
            progress.message(text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards a phase of the stage; of nested phases the outermost counts."""
        if self._in_phase:
            yield
            return
        start, self._in_phase = time.perf_counter(), True
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
            self._in_phase = False


def exported_tokenizer(ctx: StageContext, tokenizer: Any) -> Any:
    """The tokenizer with the chat template that renders the stage's prompts."""
    stage = ctx.stage
    if stage.prompt_template == "few_shot":
        ctx.message(f"{stage.name}: few_shot prompts are no chat: the saved model keeps the tokenizer's chat template")
    template = chat_template(
        stage.prompt_template,
        tokenizer=tokenizer,
        response_format=stage.response_format,
        prefill_think=stage.prefill_think,
        leading=tokenizer.decode(leading_ids(tokenizer), skip_special_tokens=False),
    )
    if template is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer
