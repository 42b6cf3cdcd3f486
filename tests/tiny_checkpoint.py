"""What a recipe of a test is made of: checkpoint folders (zoo.py), rows, stages."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import zoo
from tests.zoo import TEXTS, write_checkpoint

__all__ = [
    "DEEPSEEK_V3", "GRPO", "PRETRAIN", "PROMPTS", "QWEN2", "SFT", "TEXTS", "ZERO", "message_of", "tree",
    "write_checkpoint", "write_jsonl", "write_recipe",
]  # fmt: skip
QWEN2 = zoo.fields("qwen2", initializer_range=0.1)
DEEPSEEK_V3 = zoo.fields("deepseek_v3", initializer_range=0.1)
PROMPTS = [{"prompt": f"What is {i} + {i} ?", "answer": str(2 * i)} for i in range(20)]
GRPO: dict[str, Any] = {
    "name": "zero",
    "kind": "grpo",
    "train_files": ["train.jsonl"],
    "num_generations": 2,
    "prompts_per_step": 2,
    "max_prompt_length": 40,
    "max_completion_length": 8,
    "max_steps": 1,
    "prompt_template": "chat",
}
SFT: dict[str, Any] = {"name": "tuned", "kind": "sft", "train_files": ["sft.jsonl"]}
PRETRAIN: dict[str, Any] = {
    "name": "base",
    "kind": "pretrain",
    "train_files": ["sft.jsonl"],
    "architecture": zoo.fields("qwen2"),
    "max_steps": 1,
    "max_length": 128,
}


ZERO = "{name: zero, kind: grpo, train_files: [a.jsonl], max_steps: 200}"


def message_of(config: str, *overrides: str) -> str:
    """With which a recipe is refused."""
    from r1fast.config import ConfigError, load_recipe

    with pytest.raises(ConfigError) as error:
        load_recipe(config, list(overrides))
    return str(error.value)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(path: Path, *stages: dict, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump({**sections, "stages": list(stages)}, sort_keys=False), encoding="utf-8")
    return path


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below root, with the bytes of files."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
