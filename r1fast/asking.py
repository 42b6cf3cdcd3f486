"""The model that `r1fast.chat` and `r1fast.generate` ask: where it is, how it samples, and what they both take."""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from r1fast.data.templates import PROMPT_TEMPLATES
from r1fast.export import DTYPES, export, stage_and_step
from r1fast.models.weights import load_model
from r1fast.prompts import render_prompt
from r1fast.resume import CONFIG, read_run
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams

_MODEL = "model"  # folder of a stage
SOURCE = "RUN for its last trained model, RUN/STAGE, RUN/STAGE/STEP, a checkpoint folder, a .gguf file or a Hub id"


@dataclass(frozen=True)
class Source:
    """Where a model is read from; `is_step`: a stage's folder or a step of it, of which a model is written first."""

    path: str
    description: str
    is_step: bool = False


def find_model(reference: str) -> Source:
    """What SOURCE allows. Raises ValueError or ConfigError for a run without a model that answers."""
    path = Path(reference).expanduser()
    if (path / CONFIG).is_file():
        stages = read_run(path.resolve()).recipe.stages
        answering = [
            stage.name for stage in stages if stage.kind != "reward_model" and (path / stage.name / _MODEL).is_dir()
        ]
        if not answering:
            of_steps = ", ".join(str(one.parent.parent) for one in sorted(path.glob("*/checkpoints/step_*")))
            hint = f"; there are checkpoints of {of_steps}: name one of these" if of_steps else ""
            raise ValueError(f"{reference}: no stage of this run has made a model that answers{hint}")
        folder = path / answering[-1] / _MODEL
        return Source(str(folder), f"{folder}, the last of the run")
    stage_dir, step = stage_and_step(path)
    if (stage_dir.parent / CONFIG).is_file():
        if step is None and (stage_dir / _MODEL).is_dir():
            return Source(str(stage_dir / _MODEL), str(stage_dir / _MODEL))
        if stage_dir.is_dir():
            return Source(
                reference, f"{stage_dir}, {'its newest checkpoint' if step is None else f'step {step}'}", True
            )
    return Source(reference, reference)


def load(source: Source, dtype: str, device: torch.device) -> RolloutEngine:
    """The engine of a language model with a tokenizer; ValueError or OSError for what is none."""
    if not source.is_step:
        return _engine(*load_model(source.path, dtype, device))
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / _MODEL
        export(Path(source.path), written, torch.float32, merge_and_unload=True)
        return _engine(*load_model(written, dtype, device))


def _engine(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> RolloutEngine:
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; copy one into its folder")
    return RolloutEngine(model, tokenizer)


def prompt_ids(
    prompt: str | Sequence[Mapping[str, Any]] | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    given: argparse.Namespace,
) -> list[int]:
    """By --prompt-template, or else the model's own, which training has saved with it. ValueError where it has none."""
    template = given.prompt_template or "tokenizer"
    if template == "tokenizer" and not tokenizer.chat_template:
        others = ", ".join(name for name in PROMPT_TEMPLATES if name != "tokenizer")
        raise ValueError(f"the model has no chat template; say how to ask it: --prompt-template {others}")
    variables = given.chat_template_kwargs
    return render_prompt(prompt, tokenizer, prompt_template=template, chat_template_kwargs=variables, tokenize=True)


def _variables(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of both commands; what is left out is None."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help="a system turn for conversations that begin without one")
    add("--temperature", type=float, help="0 is greedy (default, as of the others: the model's generation_config.json)")
    add("--top-p", type=float, help="sample from the likeliest tokens of this probability in all")
    add("--top-k", type=int, help="sample from so many of the likeliest tokens; 0: from all")
    add(
        "--max-tokens",
        type=int,
        help="of a completion (default: generation_config.json, or 1024; what there is room for)",
    )
    add("--stop", action="append", metavar="TEXT", help="end a completion before this text; may be given several times")
    add("--seed", type=int, default=0, help="the same seed gives the same completions (default: 0)")
    add("--prompt-template", choices=tuple(PROMPT_TEMPLATES), help="how to ask (default: as the model was trained)")
    variables = 'of the model\'s chat template, as JSON: {"enable_thinking": false}'
    add("--chat-template-kwargs", type=_variables, metavar="JSON", help=variables)
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of the weights (default: that of the checkpoint)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def check_device(name: str | None) -> None:
    """ValueError for a --device that is not here."""
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(f"--device {name}: torch sees {count} such devices; python -m r1fast.doctor says why")


def params_of(given: argparse.Namespace, engine: RolloutEngine) -> SamplingParams:
    """What is given, over the model's own defaults."""
    named = {name: getattr(given, name) for name in ("temperature", "top_p", "top_k", "max_tokens", "stop", "seed")}
    defaults = engine.default_sampling_params()
    return replace(defaults, **{name: value for name, value in named.items() if value is not None})
