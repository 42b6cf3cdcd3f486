"""How a model was taught to answer, kept beside its weights; and what stages that sample a model take from there.

A stage that trains leaves `r1fast.json` in its model folder: prompt template, response format, and whether prompts open
the reasoning. `collect`, `reject`, `distill`, `reward_model` and `evaluate` take what their recipe does not say from
the model that they sample: an earlier stage of the recipe, or a folder with such a file. Stages that learn from rows
take the response format that those have.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from r1fast.artifacts import start_model
from r1fast.data.rows import prompt_and_target
from r1fast.data.sources import load_rows
from r1fast.data.templates import RESPONSE_FORMATS, target_text
from r1fast.read_once import rows_of
from r1fast.schema import (
    CollectStage,
    DistillStage,
    EvaluateStage,
    PretrainStage,
    Recipe,
    RejectStage,
    RewardModelStage,
    SFTStage,
)
from r1fast.schema_options import GenerateOptions, PromptTemplate, StageBase

FILE = "r1fast.json"
KEYS = ("prompt_template", "response_format", "prefill_think")
Layout = dict[str, Any]  # of KEYS those that are known
MOST_ROWS = 1_000  # that are looked at


def layout_of(stage: GenerateOptions, response_format: str | None) -> Layout:
    """What is kept beside the model of a stage that trained on answers in this format."""
    known = {"prompt_template": stage.prompt_template, "prefill_think": stage.prefill_think}
    if stage.prompt_template == "few_shot":  # a page of examples, which no other stage has
        del known["prompt_template"]
    return known | ({"response_format": response_format} if response_format else {})


def write_layout(folder: Path, layout: Layout) -> None:
    (folder / FILE).write_text(json.dumps(layout, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_layout(folder: str | Path) -> Layout:
    """What a model folder holds of it; nothing where it was not trained here. ValueError for what is no such record."""
    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        known = {"prompt_template": get_args(PromptTemplate), "response_format": tuple(RESPONSE_FORMATS)}
        known["prefill_think"] = (True, False)
        if isinstance(found, dict) and all(value in known[key] for key, value in found.items()):
            return found
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise ValueError(f"{path} is no record of how a model answers ({', '.join(KEYS)}); delete it, or put it back")


def format_of(rows: Sequence[dict], stage: GenerateOptions) -> str | None:
    """The response format that most completions of these SFT rows have; None where that is none."""
    written = RESPONSE_FORMATS[stage.response_format]
    texts = [target_text(prompt_and_target(row)[1], written) for row in rows[:: -(-len(rows) // MOST_ROWS)]]
    found: Counter[str] = Counter()
    for text in texts:  # the first that fits: an answer in tags would also do as a summary
        found.update([name for name, form in RESPONSE_FORMATS.items() if form.parse(text).well_formed][:1])
    name, count = (found.most_common(1) or [("", 0)])[0]
    return name if 2 * count > len(texts) else None


def _read(source: str) -> list[dict]:
    return load_rows([source], "sft")


def taught_format(recipe: Recipe, stage: StageBase, read: Callable[[str], list[dict]] = _read) -> str | None:
    """The response format of a stage's model: what was rewarded, sampled, or what its rows have; None: it is not known.

    Reads files that are not the run's own; of those that cannot be read nothing is known.
    """
    if not isinstance(stage, SFTStage) or (isinstance(stage, DistillStage) and stage.teacher is not None):
        return None if isinstance(stage, PretrainStage) else getattr(stage, "response_format", None)
    found: set[str | None] = set()
    for source in stage.train_files:
        if source.startswith("@"):
            maker = next((one for one in recipe.stages if one.name == source[1:]), None)
            key = "output_format" if isinstance(maker, CollectStage) else "response_format"
            found.add(getattr(maker, key, None))
            continue
        try:
            found.add(format_of(read(source), stage))
        except (ValueError, OSError):
            return None
    found.discard(None)  # chats beside the reasoning
    return found.pop() if len(found) == 1 else None


def with_layouts(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with what its stages take from the models that they sample, and notes on that.

    What the recipe says itself stays; where it is not what the model was trained with, a note tells. ValueError for a
    damaged record.
    """
    notes: list[str] = []
    for place, stage in enumerate(recipe.stages):
        taken: dict[str, Any] = {}
        for key, known, whence in _offers(recipe, stage):
            given = getattr(stage, key)
            if key not in stage.model_fields_set:
                taken[key] = known
                if known != given:
                    notes.append(f"stages.{stage.name}.{key}: {known}, {whence}")
            elif given != known:
                notes.append(f"stages.{stage.name}.{key} = {given}, and not {known}, {whence}")
        stages = [*recipe.stages[:place], stage.model_copy(update=taken), *recipe.stages[place + 1 :]]
        recipe = recipe.model_copy(update={"stages": stages})
    return recipe, notes


def _offers(recipe: Recipe, stage: StageBase) -> Iterator[tuple[str, Any, str]]:
    """Options that a stage may take: key, value, and where that comes from."""
    keys: tuple[str, ...] = KEYS
    if isinstance(stage, SFTStage) and getattr(stage, "teacher", None) is None:
        if "response_format" not in stage.model_fields_set and (known := taught_format(recipe, stage, _read_once)):
            yield "response_format", known, "which its rows have"
        return
    if isinstance(stage, DistillStage):
        ref = stage.teacher
    elif isinstance(stage, CollectStage | RejectStage | RewardModelStage | EvaluateStage):
        ref = start_model(recipe, stage)
        keys = KEYS[:2] if isinstance(stage, RewardModelStage) else KEYS  # it reads prompts that open nothing
    else:
        return
    if ref is None:
        return
    if ref.startswith("@"):
        maker = next((one for one in recipe.stages if one.name == ref[1:]), None)
        layout = {}
        if isinstance(maker, GenerateOptions):
            layout = layout_of(maker, taught_format(recipe, maker, _read_once))
    else:
        layout = read_layout(ref)
    yield from ((key, layout[key], f"with which {ref} was trained") for key in keys if key in layout)


def _read_once(source: str) -> list[dict]:
    return rows_of(source, "sft")
