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
HUB_DATA = re.compile(r"trl-lib/[\w.-]+")
# What makes a step of a documented size one of seconds.
SMALL = {
    "max_steps": 2, "num_generations": 2, "prompts_per_step": 2, "steps_per_generation": 1, "max_completion_length": 8,
    "save_steps": 1, "eval_steps": 1, "num_samples": 2, "max_per_prompt": 1, "batch_size": 2,
}  # fmt: skip


def substituted(text: str, model: Path, *, small: bool = False) -> str:
    """Names of the Hub as what is here; small: with sizes for a test."""
    text = HUB_DATA.sub("hub.jsonl", HUB_MODEL.sub(str(model), text))
    for name, value in SMALL.items() if small else ():
        text = re.sub(rf"\b{name}: \d+", f"{name}: {value}", text)
    return text


def fill(folder: Path, page: Path, model: Path, *, small: bool = False) -> None:
    """The named files of a page and of the first one, and the data that they read, rows enough for any step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, many = (8, 8) if small else (64, 1024)
    for block in [*blocks(ROOT / "docs" / "index.md"), *blocks(page)]:
        if block.name is not None and block.limit != "not run":
            (folder / block.name).write_text(substituted(block.text, model, small=small), encoding="utf-8")
        for name in re.findall(r"[\w/-]+\.(?:jsonl|parquet)", substituted(block.text, model)):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".jsonl":
                path.write_text("\n".join([json.dumps(ROW)] * count), encoding="utf-8")
            else:
                pq.write_table(pa.Table.from_pylist([VERL] * many), path)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block of shell, in words; what sets variables is left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if not re.match(r"\w+=\$\(", line) else []
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
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
