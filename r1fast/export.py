"""python -m r1fast.export RUN/STAGE[/STEP] OUTPUT: a stage's model, or one of its checkpoints, for transformers."""

import argparse
import re
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from r1fast.config import ConfigError
from r1fast.layouts import read_layout, write_layout
from r1fast.models.decoder import Decoder
from r1fast.models.folders import ADAPTER_CONFIG
from r1fast.models.weights import Checkpoint, save_model
from r1fast.parallel import checkpoint
from r1fast.parallel.mesh import Dist, init_distributed
from r1fast.resume import CONFIG, STAGE, read_run
from r1fast.run_folder import replace_folder
from r1fast.schema import PretrainStage, RewardModelStage
from r1fast.schema_options import GenerateOptions, TrainOptions
from r1fast.stages.context import StageContext, Tokenizer
from r1fast.stages.pretrain import build_model, make_tokenizer

DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT = torch.bfloat16
_STEP = re.compile(r"(?:step_)?(\d+)")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m r1fast.export", description="Write a Hugging Face checkpoint of what a stage has trained."
    )
    parser.add_argument("source", type=Path, help="RUN/STAGE, or RUN/STAGE/STEP for one of its checkpoints")
    parser.add_argument("output", type=Path, help="a folder that is not there yet; those above it are made")
    parser.add_argument("--dtype", choices=DTYPES, help="of a whole model (default: bfloat16); adapters are float32")
    parser.add_argument("--merge-and-unload", action="store_true", help="of a stage with lora, write a whole model")
    given = parser.parse_args(arguments)
    dtype = None if given.dtype is None else getattr(torch, given.dtype)
    try:
        export(given.source, given.output, dtype, merge_and_unload=given.merge_and_unload)
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.output)
    return 0


def export(source: Path, output: Path, dtype: torch.dtype | None = None, *, merge_and_unload: bool = False) -> None:
    """source: RUN/STAGE, its model, or while there is none its newest checkpoint; RUN/STAGE/STEP, that checkpoint.

    dtype: of a whole model, None: bfloat16; an adapter is float32. Raises ValueError, OSError or ConfigError, which
    name what is missing.
    """
    if output.exists():
        raise ValueError(f"{output} is there already; choose another folder")
    stage_dir, step = stage_and_step(source)
    if not (stage_dir.parent / CONFIG).is_file():
        raise ValueError(
            f"{source}: {stage_dir.parent} holds no run (no {CONFIG}); expected RUN/STAGE or RUN/STAGE/STEP"
        )
    finished = stage_dir / "model"
    if step is None and finished.is_dir():
        if (finished / ADAPTER_CONFIG).is_file() and not merge_and_unload:
            raise ValueError(f"{finished} is a LoRA folder as it is; for a whole model add --merge-and-unload")
        found = Checkpoint(finished)
        model, blocks = found.decoder(dtype or _DEFAULT), found.blocks(dtype or _DEFAULT)
        output.parent.mkdir(parents=True, exist_ok=True)
        with replace_folder(output) as folder:
            save_model(
                model.config, model.state_dict(), folder, found.tokenizer(), model.scalar_head,
                source=finished, blocks=blocks,
            )  # fmt: skip
            write_layout(folder, read_layout(finished))
        return
    dist = init_distributed("cpu")
    try:
        ctx, path = _context(stage_dir, dist), _checkpoint(stage_dir, step, dist)
        lora = ctx.lora_options
        if dtype is not None and lora is not None and not (merge_and_unload or lora.merge_and_unload):
            text = f"--dtype is that of a whole model, and {stage_dir.name} trains an adapter"
            raise ValueError(f"{text}: add --merge-and-unload, or drop it")
        model, tokenizer = _start(ctx)
        checkpoint.load_weights(path, model=model, dist=dist)
        blocks, write = ctx.export(model, tokenizer, dtype=dtype or _DEFAULT, merge=merge_and_unload)
        output.parent.mkdir(parents=True, exist_ok=True)
        with replace_folder(output) as folder:
            write(folder)
        deque(blocks, maxlen=0)
    finally:
        dist.close()


def stage_and_step(source: Path) -> tuple[Path, int | None]:
    """RUN/STAGE and the step: `20`, `step_20` or `checkpoints/step_20`."""
    step = _STEP.fullmatch(source.name)
    if step is None or (source / STAGE).is_file():
        return source, None
    return (source.parent.parent if source.parent.name == "checkpoints" else source.parent), int(step[1])


def _checkpoint(stage_dir: Path, step: int | None, dist: Dist) -> Path:
    folder = stage_dir / "checkpoints"
    path = checkpoint.latest(folder, dist) if step is None else folder / f"step_{step}"
    if path is None or not path.is_dir():
        there = sorted((one.name.removeprefix("step_") for one in folder.glob("step_*")), key=int)
        kept = f"kept are those of steps {', '.join(there)}" if there else "it has none"
        raise ValueError(f"{stage_dir}: no {'model and no ' if step is None else ''}checkpoint"
                         f"{'' if step is None else f' of step {step}'}; {kept}")  # fmt: skip
    return path


def _context(stage_dir: Path, dist: Dist) -> StageContext[GenerateOptions]:
    recipe = read_run(stage_dir.parent).recipe
    stages = {stage.name: stage for stage in recipe.stages if isinstance(stage, TrainOptions)}
    if (stage := stages.get(stage_dir.name)) is None:
        raise ValueError(f"{stage_dir}: no stage of this run that trains; expected one of {', '.join(stages)}")
    return StageContext(recipe, stage, dist, stage_dir.parent)  # type: ignore[arg-type]


def _start(ctx: StageContext[GenerateOptions]) -> tuple[Decoder, Tokenizer]:
    """A model of the stage's architecture, and its tokenizer, as the stage makes them."""
    if isinstance(ctx.stage, PretrainStage):
        tokenizer = make_tokenizer(ctx, ctx.rows())  # type: ignore[arg-type]
        return build_model(ctx, tokenizer), tokenizer  # type: ignore[arg-type]
    return ctx.load(ctx.model_ref, trainable=True, scalar_head=isinstance(ctx.stage, RewardModelStage))


if __name__ == "__main__":
    sys.exit(main())
