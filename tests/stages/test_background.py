"""One step ahead: what a step learns from was sampled with the weights of the step before, and nothing else changes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from r1fast.schema import Recipe
from r1fast.stages.grpo import importance_cap
from tests.tiny_checkpoint import DEEPSEEK_V3, PROMPTS, write_checkpoint, write_jsonl, write_recipe

GRPO = {
    "name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], "prompt_template": "chat", "max_prompt_length": 40,
    "max_completion_length": 8, "num_generations": 4, "prompts_per_step": 3, "max_steps": 4, "learning_rate": 1e-2,
    "rewards": {"mine": {"function": "rewards.py:count"}}, "beta": 0.0, "log_completions": 12,
    "log_completions_steps": 1,
}  # fmt: skip
REWARDS = (
    "def count(completions, completion_ids, **_):\n    return [len(set(ids)) + ids[0] % 7 for ids in completion_ids]"
)


@pytest.fixture
def run(command: Callable[..., int], tmp_path: Path) -> Callable[..., tuple[list[list[str]], list[dict[str, Any]]]]:
    """Trains; returns the completions of every step, and its metrics."""
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    (tmp_path / "rewards.py").write_text(REWARDS)
    model = write_checkpoint(tmp_path / "moe", **DEEPSEEK_V3)

    def train(name: str, async_steps: int, **options: Any) -> tuple[list[list[str]], list[dict[str, Any]]]:
        sections = {"model": {"path": str(model)}, "rollout": {"async_steps": async_steps}}
        config = write_recipe(tmp_path / f"{name}.yaml", {**GRPO, **options}, **sections)
        assert command("--config", config, "--output-dir", name) == 0
        files = sorted((tmp_path / name / "zero" / "samples").glob("*.parquet"))
        rows = [json.loads(line) for line in (tmp_path / name / "zero" / "metrics.jsonl").read_text().splitlines()]
        return [[row["completion"] for row in pq.read_table(file).to_pylist()] for file in files], rows

    return train


def gaps(rows: list[dict[str, Any]]) -> list[float]:
    return [row["sampling/sampling_logp_difference/mean"] for row in rows]


def test_weights_are_those_of_the_step_before(run) -> None:
    frozen, frozen_rows = run("frozen", 0, learning_rate=1e-12)
    now, now_rows = run("now", 0)
    ahead, ahead_rows = run("ahead", 1)
    assert now[0] == frozen[0] and now[1] != frozen[1]  # one update later other completions
    assert ahead[:2] == frozen[:2] and ahead[2] != frozen[2]
    assert max(gaps(frozen_rows)) < 1e-4 and max(gaps(now_rows)) < 1e-4
    assert gaps(ahead_rows)[0] < 1e-4 and min(gaps(ahead_rows)[1:]) > 1e-2


def test_the_same_run_twice(run) -> None:
    first, second = run("first", 1), run("second", 1)
    assert first[0] == second[0]
    assert gaps(first[1]) == gaps(second[1])
    assert [row["loss"] for row in first[1]] == [row["loss"] for row in second[1]]


def test_the_cap_is_on_by_default_and_can_be_taken_off(run) -> None:
    """auto is 2.0 here, and None leaves a stale rollout as it is."""
    losses = {}
    for name, options in {
        "auto": {},
        "two": {"sampling_importance_cap": 2.0},
        "none": {"sampling_importance_cap": None},
    }.items():
        losses[name] = [row["loss"] for row in run(name, 1, max_steps=2, **options)[1]]
    assert losses["auto"] == losses["two"] and losses["auto"][0] == pytest.approx(losses["none"][0], abs=1e-5)
    assert abs(losses["auto"][1] - losses["none"][1]) > 1e-4


@pytest.mark.parametrize("async_steps", [0, 1])
def test_a_cache_that_has_no_room_is_one_line(
    async_steps: int, run, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the main thread, and on every rank; with what to change."""
    rollout = {"async_steps": async_steps, "kv_cache_memory_bytes": 999}
    config = write_recipe(tmp_path / "mine.yaml", GRPO, model={"path": str(tmp_path / "moe")}, rollout=rollout)
    assert command("--config", config, "--output-dir", "run") == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "kv_cache" in line]
    assert said.startswith("r1fast: stages.zero: kv_cache_memory_bytes is 999; one completion of 8 tokens")
    assert "raise it, or lower max_tokens (in a recipe max_completion_length); go on with: " in said


@pytest.mark.parametrize(
    ("options", "rollout", "dtype", "expected"),
    [
        ({}, {}, torch.float32, None),
        ({}, {}, torch.bfloat16, 2.0),
        ({}, {"async_steps": 1}, torch.float32, 2.0),
        ({}, {"engine": "vllm"}, torch.float32, 2.0),
        ({"partial_rollout_length": 4}, {}, torch.float32, 2.0),
        ({"sampling_importance_cap": None}, {"async_steps": 1}, torch.bfloat16, None),
        ({"sampling_importance_cap": 5.0}, {}, torch.float32, 5.0),
    ],
    ids=["exact", "bf16", "ahead", "vllm", "partial", "off", "given"],
)
def test_importance_weights_where_the_sampler_is_not_the_policy(
    options: dict[str, Any], rollout: dict[str, Any], dtype: torch.dtype, expected: float | None
) -> None:
    recipe = Recipe.model_validate({"rollout": rollout, "stages": [{**GRPO, **options}]})
    ctx: Any = SimpleNamespace(recipe=recipe, stage=recipe.stages[0], param_dtype=dtype)
    assert importance_cap(ctx) == expected
