"""A folder in which the blocks of a page can be run: the files that it shows, data under every name, a tiny model."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.docs.pages import ROOT, Block, blocks

# Any stage learns from such a row, and any reward reads it.
ROW = {
    "prompt": [{"role": "user", "content": "What is 1 + 1 ?"}], "answer": "2", "solution": "2",
    "completion": "<think> one and one </think><answer> 2 </answer>", "chosen": "two", "rejected": "red",
    "response": "two", "label": 1, "domain": "math", "language": "en",
}  # fmt: skip
VERL = {
    "data_source": "gsm8k", "prompt": [{"role": "user", "content": "What is 1 + 1 ?"}], "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": 0},
}  # fmt: skip
HUB_MODEL = re.compile(r"(?:Qwen|meta-llama)/[\w.-]+")
HUB_DATA = re.compile(r"(?:trl-lib|org)/[\w.-]+(?::\w+)?")
DATA = re.compile(r"(?<![\w/-])(?<!--output )[\w/-]+\.(?:jsonl|parquet)\b")
# What makes a stage of a documented size one of seconds: the most that it has.
SMALL = {
    "max_steps": 2, "num_generations": 2, "prompts_per_step": 2, "steps_per_generation": 1, "max_completion_length": 48,
    "save_steps": 1, "eval_steps": 1, "num_samples": 2, "max_per_prompt": 1, "batch_size": 2, "warmup_steps": 1,
    "num_train_epochs": 1,
}  # fmt: skip


def substituted(text: str, model: Path) -> str:
    """Names of the Hub as what is here."""
    return HUB_DATA.sub("hub.jsonl", HUB_MODEL.sub(str(model), text))


def made_small(config: str, **sizes: int) -> list[str]:
    """Overrides that make every stage of a recipe small. sizes: other ones than SMALL's."""
    from r1fast.config import load_recipe

    overrides = []
    for stage in load_recipe(config, []).stages:
        samples = stage.samples() if hasattr(stage, "samples") else stage.kind not in ("pretrain", "reward_model")
        for name, most in {**SMALL, **sizes}.items():
            value = getattr(stage, name, None)
            if value is not None and value > most and (samples or name != "max_completion_length"):
                overrides.append(f"stages.{stage.name}.{name}={most}")
        if getattr(stage, "eval_files", None):
            overrides.append(f"stages.{stage.name}.eval_limit=2")
        if "num_prompts" in type(stage).model_fields:
            overrides.append(f"stages.{stage.name}.num_prompts=4")
    return overrides


def fill(folder: Path, page: Path, model: Path) -> None:
    """The named files of a page and of the first one, and the data that they read, rows enough for any step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for block in [*blocks(ROOT / "docs" / "index.md"), *blocks(page)]:
        if block.name is not None and block.limit != "not run":
            (folder / block.name).write_text(substituted(block.text, model), encoding="utf-8")
        for name in DATA.findall(substituted(block.text, model)):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".jsonl":
                path.write_text("\n".join([json.dumps(ROW)] * 64), encoding="utf-8")
            else:
                pq.write_table(pa.Table.from_pylist([VERL] * 1024), path)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block of shell, in words; what sets variables is left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if not re.match(r"\w+=\$\(", line) else []
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        if "|" in words:  # what writes into the last one is not looked at
            words = words[len(words) - words[::-1].index("|") :]
        if words:
            yield words[1:] if words[0] == "srun" else words


def inline_commands(text: str) -> Iterator[list[str]]:
    """Those in running text; brackets stand around what may be left out."""
    for span in re.findall(r"`((?:make|torchrun|python -m) [^`]+)`", text):
        if "<" not in span and ".." not in span:
            yield shlex.split(re.sub(r"[\[\]]", "", span).replace("RUN", "runs/mine"))


def recipe_text(block: Block) -> str:
    """A whole recipe around a block of YAML: sections get a stage, stages a recipe."""
    from r1fast.recipe_yaml import load_yaml

    raw = load_yaml(block.text)
    if isinstance(raw, list):
        return f"stages:\n{block.text}"
    stage = "{name: a, kind: grpo, train_files: a.jsonl, max_steps: 1}"
    return block.text if "stages" in raw else f"{block.text}\nstages: [{stage}]"
