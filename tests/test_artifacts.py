"""What stages read and make, as the types of their options say it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from r1fast.artifacts import inputs_of
from r1fast.schema import KINDS, Recipe
from tests.test_pipeline import STAGES

ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"
NEEDED: dict[str, Any] = {
    "pretrain": {"architecture": {}, "max_steps": 1}, "grpo": {"max_steps": 1}, "evaluate": {"eval_files": ["e"]},
}  # fmt: skip
VARIANTS = [*((kind, "") for kind in KINDS if kind != "reward_model"), ("distill", "teacher: t")]
VARIANTS += [("reward_model", "loss: pairwise"), ("reward_model", "loss: pointwise")]


def recipe_of(*stages: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "stages": list(stages)})


@pytest.mark.parametrize(("kind", "setting"), VARIANTS, ids=[" ".join(variant) for variant in VARIANTS])
def test_the_table_of_stages_in_the_docs(kind: str, setting: str) -> None:
    """docs/architecture.md, section 3."""
    files = {} if kind == "evaluate" else {"train_files": ["t"]}
    options = NEEDED.get(kind, {}) | (yaml.safe_load(setting) if setting else {})
    recipe = recipe_of({"name": "it", "kind": kind, **files, **options})
    (stage,) = recipe.stages
    rows = {found.rows for found in inputs_of(recipe, stage) if found.key == "train_files"}
    named = f"`{kind}`" + (f", `{setting}`" if setting else "")
    line = f"| {named} | {', '.join(map(str, rows)) or '-'} | {', '.join(stage.makes) or '-'} |"
    assert line in ARCHITECTURE.read_text(encoding="utf-8")


def test_files_of_reward_functions_are_inputs() -> None:
    rewards = {"mine": {"function": "a/b.py:f"}, "c.py:g": 1.0, "accuracy": 1.0}
    recipe = recipe_of({"name": "zero", "kind": "grpo", "train_files": ["t"], "rewards": rewards, "max_steps": 2})
    found = {(found.key, found.ref) for found in inputs_of(recipe, recipe.stages[0]) if found.kind == "code"}
    assert found == {("rewards.mine", "a/b.py"), ("rewards.c.py:g", "c.py")}


def test_models_come_first_and_what_is_trained_on_before_what_is_measured() -> None:
    recipe = Recipe.model_validate({"model": {"path": "@base"}, "stages": STAGES})
    dev = recipe.stage("dev")
    assert [(found.key, found.ref) for found in inputs_of(recipe, dev)] == [
        ("model", "@base"), ("train_files", "@cold"), ("train_files", "s"), ("eval_files", "a"),
    ]  # fmt: skip
