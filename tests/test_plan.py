"""What --dry-run says a run will do, against what a run does, and against sums by hand."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1fast.config import load_recipe
from r1fast.lengths import Lengths
from r1fast.plan import plan_lines
from r1fast.read_once import forget
from tests.tiny_checkpoint import GRPO, PROMPTS, SFT, write_jsonl, write_recipe

EVAL: dict[str, Any] = {"eval_files": "train.jsonl", "eval_num_samples": 3, "eval_limit": 6}


@pytest.fixture
def plan(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Of the last stage, by what it is of."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    write_jsonl(tmp_path / "more.jsonl", PROMPTS[:1])
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "one ?", "completion": "two"}] * 10)

    def of(*stages: dict[str, Any]) -> dict[str, str]:
        recipe = load_recipe(str(write_recipe(tmp_path / "mine.yaml", *stages, model={"path": str(base_model)})), [])
        lines = plan_lines(recipe, [recipe.stages[-1].name], Lengths(recipe), 1)
        forget()
        assert lines[0] == f"{recipe.stages[-1].name} ({recipe.stages[-1].kind})"
        return dict(line.split(maxsplit=1) for line in lines[1:])

    return of


def test_grpo_by_hand(plan: Callable[..., dict[str, str]]) -> None:
    stage = {**GRPO, **EVAL, "train_files": ["train.jsonl", "more.jsonl"], "max_steps": None, "num_train_epochs": 1.5}
    stage |= {"prompts_per_step": 4, "num_generations": 2, "steps_per_generation": 2, "num_iterations": 2}
    stage |= {"save_steps": 3, "eval_steps": 3, "eval_steps_limit": 2, "dynamic_sampling_refills": 1}
    found = plan(stage)
    assert found["train_files"] == "train.jsonl 20 rows, more.jsonl 1 row"
    assert found["steps"] == "8 steps of 4 prompts x 2 samples = 32 optimizer steps; 1.52 passes of 21 prompts"
    longest = int(re.search(r"prompts of up to (\d+)", found["tokens"])[1])  # type: ignore[index]
    assert 5 < longest <= 40
    sampled = 8 * 2 * 8 * 8  # steps, rounds, samples, tokens
    assert found["tokens"].startswith(f"at most {8 * (longest + 8)} a step; at most {sampled:,} are sampled")
    tokens = (2 * 6 + 2 * 2) * 4 * 8  # before and after, and twice under way; three samples and a greedy one
    expected = f"2 of 6 prompts and 2 under way of 2 prompts, 4 completions each, at most {tokens} tokens"
    assert found["evaluations"] == expected
    assert found["checkpoints"] == "3, of which 2 stay (every 3 steps, and the last)"


def test_rows_that_are_left_out_make_no_steps(plan: Callable[..., dict[str, str]]) -> None:
    found = plan({**SFT, "batch_size": 1, "num_train_epochs": 3, "deduplicate": {}})  # ten rows, all the same
    assert found["train_files"] == "sft.jsonl 10 rows"
    assert found["left_out"] == "9 rows of train_files (decontaminate, deduplicate)"
    assert found["steps"] == "3 steps of 1 row; 3.00 passes of 1 row"


def test_sft_and_what_is_still_to_be_made(plan: Callable[..., dict[str, str]]) -> None:
    found = plan({**SFT, "batch_size": 4, "num_train_epochs": 3})
    assert found["steps"] == "9 steps of 4 rows; 3.00 passes of 10 rows"  # of 4, 4 and 2 rows in each pass
    found = plan({**SFT, "batch_size": 4, "num_train_epochs": 3, "max_steps": 5})
    assert found["steps"] == "5 steps of 4 rows; 1.80 passes of 10 rows"
    assert plan(SFT)["steps"] == "2 steps of 128 rows; 2.00 passes of 10 rows"
    kept = {"name": "kept", "kind": "reject", "train_files": "train.jsonl", "prompt_template": "chat"}
    kept |= {"max_prompt_length": 40, "max_completion_length": 8, "num_samples": 5, "num_prompts": 7}
    assert plan(kept)["samples"] == "35 of 7 prompts, at most 280 tokens"
    few_shot = {"examples_files": "train.jsonl", "num_samples": 2}
    both = {**kept, "kind": "collect", "few_shot": few_shot}
    said = "35 of 7 prompts and, after worked examples, 40 of 20 prompts, at most 600 tokens"
    assert plan(both)["samples"] == said
    found = plan(kept, {**SFT, "train_files": ["@kept", "sft.jsonl"], "batch_size": 4})
    assert found["train_files"] == "@kept rows still to be made, sft.jsonl 10 rows"
    assert found["steps"] == "steps of 4 rows; 2 passes, over rows that are still to be made"
    assert "checkpoints" not in found


def test_a_run_does_what_the_plan_says(
    plan: Callable[..., dict[str, str]], command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {**SFT, "batch_size": 4, "save_steps": 2, "eval_steps": 2, **EVAL, "prompt_template": "plain"}
    found = plan({**stage, "max_completion_length": 4})
    argv = [tmp_path / "mine.yaml", "--output-dir", "run"]
    assert command(*argv, "--dry-run") == 0
    out, err = capsys.readouterr()
    assert err.endswith("\nOK\n") and f"steps        {found['steps']}" in err and "OK" not in out
    assert not (tmp_path / "run").exists()
    assert command(*argv) == 0
    steps = len((tmp_path / "run" / "tuned" / "metrics.jsonl").read_text().splitlines())
    assert found["steps"].startswith(f"{steps} steps") and found["checkpoints"].startswith(f"{steps // 2},")
    evaluations = sorted(path.stem for path in (tmp_path / "run" / "tuned" / "evaluations").iterdir())
    assert evaluations == ["after", "before", "step_00002", "step_00004", "step_00006"]
    assert found["evaluations"].startswith("2 of 6 prompts and 3 under way of 6 prompts")


def test_what_is_read_is_kept_no_longer_than_the_checks(
    plan: Callable[..., dict[str, str]], command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan({**SFT, "batch_size": 1})
    for count in (10, 3):
        write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "one ?", "completion": "two"}] * count)
        assert command(tmp_path / "mine.yaml", "--output-dir", "run", "--dry-run") == 0
        assert f"sft.jsonl {count} rows" in capsys.readouterr().err
