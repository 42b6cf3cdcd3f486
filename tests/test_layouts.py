"""What a model was trained with goes with it, and stages that sample it take that where the recipe does not say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1fast.config import load_recipe
from r1fast.export import main as export
from r1fast.layouts import FILE, format_of, read_layout, with_layouts, write_layout
from r1fast.run_folder import read_record
from r1fast.schema import Recipe, SFTStage
from tests.tiny_checkpoint import GRPO, PROMPTS, SFT, write_jsonl, write_recipe

ANSWERS = {
    "think_answer": "<think>one and two</think><answer>3</answer>",
    "special_token": "|special_token|one and two|special_token|3",
    "think_summary": "<think>\none and two\n</think>\n\n3",
}
ZERO: dict[str, Any] = {**GRPO, "prompt_template": "r1_zero", "response_format": "think_answer", "prefill_think": True}
COLD: dict[str, Any] = {"name": "cold", "kind": "collect", "model": "@zero", "train_files": "train.jsonl"}
DEV: dict[str, Any] = {**SFT, "name": "dev", "train_files": ["@cold"], "prompt_template": "plain"}
KEPT: dict[str, Any] = {"name": "kept", "kind": "reject", "model": "@dev", "train_files": "train.jsonl"}
PAIRS: dict[str, Any] = {"name": "rm", "kind": "reward_model", "model": "@zero", "train_files": "p", "loss": "pairwise"}
STUDENT: dict[str, Any] = {"name": "student", "kind": "distill", "teacher": "@zero", "train_files": "train.jsonl"}
TEST: dict[str, Any] = {"name": "test", "kind": "evaluate", "model": "@zero", "eval_files": "train.jsonl"}


def taken(*stages: dict[str, Any], model: str = "m") -> tuple[list[tuple[Any, ...]], list[str]]:
    """Of the last stage: template, format, prefill; and the notes."""
    recipe, notes = with_layouts(Recipe.model_validate({"model": {"path": model}, "stages": list(stages)}))
    found = [(s.prompt_template, s.response_format, s.prefill_think) for s in recipe.stages]  # type: ignore[attr-defined]
    return found[-1:], notes


@pytest.mark.parametrize("stage", [COLD, {**KEPT, "model": "@zero"}, STUDENT, TEST], ids=lambda stage: stage["kind"])
def test_a_sampled_model_says_how_it_answers(stage: dict[str, Any]) -> None:
    found, notes = taken(ZERO, stage)
    assert found == [("r1_zero", "think_answer", True)]
    assert f"stages.{stage['name']}.prefill_think: True, with which @zero was trained" in notes


def test_a_reward_model_takes_no_prefill() -> None:
    assert taken(ZERO, PAIRS)[0] == [("r1_zero", "think_answer", False)]


def test_what_the_recipe_says_stays_and_is_told(write: Callable[..., str]) -> None:
    found, notes = taken(
        ZERO, {**KEPT, "model": "@zero", "response_format": "special_token", "prompt_template": "chat"}
    )
    assert found == [("chat", "special_token", True)]
    whence = "with which @zero was trained"
    assert f"stages.kept.response_format = special_token, and not think_answer, {whence}" in notes
    assert f"stages.kept.prompt_template = chat, and not r1_zero, {whence}" in notes


def test_rows_of_an_earlier_stage_say_what_was_learned() -> None:
    assert taken(ZERO, COLD, DEV, KEPT)[0] == [("plain", "special_token", False)]
    other = {**COLD, "output_format": "think_summary"}
    assert taken(ZERO, other, DEV, KEPT)[0] == [("plain", "think_summary", False)]


@pytest.mark.parametrize("name", ANSWERS)
def test_rows_of_a_file_say_it_too(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} ?", "completion": ANSWERS[name]} for i in range(5)]
    write_jsonl(tmp_path / "sft.jsonl", [*rows, {"prompt": "hello", "completion": "hi"}])
    dev = {**DEV, "train_files": [str(tmp_path / "sft.jsonl")]}
    assert taken(dev, KEPT)[0] == [("plain", name, False)]
    found, notes = taken(dev)
    assert found == [("plain", name, False)]
    assert notes == [f"stages.dev.response_format: {name}, which its rows have"] * (name != "think_answer")
    assert taken({**dev, "response_format": "think_summary"})[0] == [("plain", "think_summary", False)]
    assert taken({**dev, "train_files": [str(tmp_path / "none.jsonl")]}, KEPT)[0] == [("plain", "special_token", False)]


def test_the_format_of_rows_is_that_of_most() -> None:
    stage = SFTStage.model_validate({**DEV, "response_format": "think_summary"})
    chat = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "3"}]}]
    assert format_of(chat * 3, stage) is None
    chat[0]["messages"][1]["reasoning_content"] = "one and two"
    assert format_of(chat * 3, stage) == "think_summary"  # in which the stage writes it
    halves = [{"prompt": "?", "completion": ANSWERS[name]} for name in ("think_answer", "special_token")]
    assert format_of(halves, stage) is None and format_of([*halves, halves[0]], stage) == "think_answer"


def test_folders_without_a_record_change_nothing_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    kept = {**KEPT, "model": str(tmp_path)}
    assert taken(kept) == ([("chat", "special_token", False)], [])
    write_layout(tmp_path, {"response_format": "think_answer"})
    assert taken(kept)[0] == taken({**KEPT, "model": None}, model=str(tmp_path))[0] == [("chat", "think_answer", False)]
    for text in ("{", "[]", '{"response_format": "xml"}', '{"colour": 1}', '{"prefill_think": "yes"}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ValueError, match=r"r1fast\.json is no record of how a model answers"):
            with_layouts(Recipe.model_validate({"stages": [kept]}))


def test_shipped_recipes_say_what_their_models_were_trained_with() -> None:
    for name in ("tiny", "smollm2", "r1"):
        assert not [note for note in with_layouts(load_recipe(name, []))[1] if "and not" in note]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """A run of a GRPO stage, an adapter's, and an evaluation that says nothing of formats."""
    from r1fast.train import main

    folder = tmp_path_factory.mktemp("layouts")
    write_jsonl(folder / "train.jsonl", PROMPTS)
    write_jsonl(folder / "sft.jsonl", [{"prompt": "one ?", "completion": ANSWERS["special_token"]}] * 4)
    (folder / "even.py").write_text("def even(completion_ids, **_):\n    return [i[0] % 2 for i in completion_ids]\n")
    zero = {**GRPO, "prompt_template": "plain", "prefill_think": True, "rewards": {"even.py:even": 1.0}}
    lora = {**SFT, "name": "dev", "lora": {"r": 2, "alpha": 4}, "batch_size": 4, "num_train_epochs": 1}
    test = {**TEST, "eval_num_samples": 1, "eval_greedy": False, "max_completion_length": 4, "eval_limit": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = write_recipe(folder / "recipe.yaml", zero, lora, test, model={"path": str(base_model)})
        assert main([str(config), "--output-dir", "run"]) == 0
    return folder / "run"


def test_a_run_keeps_it_beside_its_models_and_in_its_settings(trained: Path) -> None:
    zero = {"prompt_template": "plain", "response_format": "think_answer", "prefill_think": True}
    assert read_layout(trained / "zero" / "model") == zero
    dev = {"prompt_template": "chat", "response_format": "special_token", "prefill_think": False}
    assert read_layout(trained / "dev" / "model") == dev
    summary = read_record(trained / "summary.json")
    (settings,) = [stage["settings"] for stage in summary["stages"] if stage["name"] == "test"]
    assert {key: settings[key] for key in zero} == zero
    assert load_recipe(str(trained / "config.yaml"), []).stage("test").model_dump()["prompt_template"] == "plain"


def test_it_goes_with_exports_and_a_resume_changes_nothing(
    trained: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for source, options in ((trained / "zero", []), (trained / "zero" / "1", []), (trained / "dev", ["--merge"])):
        target = tmp_path / f"{source.parent.name}-{source.name}"
        given = [option.replace("--merge", "--merge-and-unload") for option in options]
        assert export([str(source), str(target), *given]) == 0
        stage = trained / ("dev" if options else "zero")
        assert read_layout(target) == read_layout(stage / "model")
    assert command("--resume", "--output-dir", trained) == 0
    assert "->" not in capsys.readouterr().err
