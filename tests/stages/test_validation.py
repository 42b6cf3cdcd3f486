"""Evaluations: R1's protocol, each file by itself, every completion kept; under way the best step and an early end."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from r1fast.stages import evaluate as evaluation
from r1fast.stopping import Stopped
from tests.stages.conftest import QUESTIONS, SHORT
from tests.tiny_checkpoint import write_jsonl, write_recipe

pytestmark = pytest.mark.usefixtures("stage_files")
TRAINED: dict[str, Any] = {
    "name": "zero", "kind": "grpo", "train_files": ["questions.jsonl"], "eval_files": ["questions.jsonl"],
    "prompts_per_step": 2, "num_generations": 2, "max_steps": 6, "eval_steps": 2, "eval_greedy": False,
    "eval_before": False, "save_steps": 100, **SHORT,
}  # fmt: skip


def test_protocol_of_r1(train, taught_model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "first.jsonl", QUESTIONS[:3])
    write_jsonl(tmp_path / "second.jsonl", [{**row, "answer": int(row["answer"])} for row in QUESTIONS[3:]])
    how = {"eval_temperature": 0.6, "eval_top_p": 0.95, "eval_num_samples": 8}
    stage = {"name": "test", "kind": "evaluate", "eval_files": ["first.jsonl", "second.jsonl"], **SHORT, **how}
    found = train(taught_model, stage)["test"]["eval_after"]
    assert (found["temperature"], found["top_p"], found["k"], found["n"]) == (0.6, 0.95, 8, 8)
    assert found["pass@1"] <= found["pass@k"]
    table = pq.read_table(tmp_path / "run" / "test" / "evaluations" / "after.parquet").to_pylist()
    assert len(table) == 8 * (8 + 1)
    for name in ("first.jsonl", "second.jsonl"):
        rows = [row for row in table if row["file"] == name and row["kind"] == "sampled"]
        by_prompt = [[row["accuracy"] for row in rows if row["row"] == where] for where in {row["row"] for row in rows}]
        mine = found["files"][name]
        assert mine["n"] == len(by_prompt) and all(len(scores) == 8 for scores in by_prompt)
        assert mine["pass@1"] == pytest.approx(sum(map(sum, by_prompt)) / len(rows))
        assert mine["pass@k"] == pytest.approx(sum(map(max, by_prompt)) / len(by_prompt))
    parts = [(part["pass@1"], part["n"]) for part in found["files"].values()]
    assert found["pass@1"] == pytest.approx(sum(mean * n for mean, n in parts) / 8)
    assert all(row["gold"] in row["prompt"] or row["gold"].isdigit() for row in table)
    assert "What is 1 + 1 ?" in table[0]["prompt"] and table[0]["row"] == "first.jsonl:1"


def test_top_p_cuts_what_is_sampled(train, taught_model: Path, tmp_path: Path) -> None:
    """With the likeliest token alone, samples are greedy ones."""
    stage = {"name": "test", "kind": "evaluate", "eval_files": ["questions.jsonl"], **SHORT, "eval_top_p": 1e-6}
    sampling = {"name": "data", "kind": "reject", "train_files": ["questions.jsonl"], **SHORT, "num_samples": 3}
    sampling |= {"response_format": "think_answer", "top_p": 1e-6, "min_reward": -1.0}
    assert train(taught_model, stage, sampling)["data"]["numbers"]["sampled"] == 3 * len(QUESTIONS)
    table = pq.read_table(tmp_path / "run" / "test" / "evaluations" / "after.parquet").to_pylist()
    greedy = {row["row"]: row["completion"] for row in table if row["kind"] == "greedy"}
    assert all(row["completion"] == greedy[row["row"]] for row in table)
    texts = [json.loads(line) for line in (tmp_path / "run" / "data" / "data.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in texts}) == len(texts)  # of equal samples the first


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the evaluations of steps 2, 4, .. find, in order."""
    given: list[float] = []
    summarize = evaluation.summarize

    def summarized(*arguments: Any) -> dict[str, Any]:
        return summarize(*arguments) | ({"pass@1": given.pop(0)} if given else {})

    monkeypatch.setattr(evaluation, "summarize", summarized)
    return given


def stop_before(patch: pytest.MonkeyPatch, evaluation_name: str) -> None:
    evaluate = evaluation.evaluate

    def stopped(ctx: Any, model: Any, tokenizer: Any, name: str, **options: Any) -> Any:
        if name == evaluation_name:
            raise Stopped(15)
        return evaluate(ctx, model, tokenizer, name, **options)

    patch.setattr(evaluation, "evaluate", stopped)


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_best_step_is_handed_on(train, taught_model: Path, tmp_path: Path, scores: list[float], kind: str) -> None:
    stage = dict(TRAINED, load_best_model_at_end=True, save_total_limit=1, learning_rate=1e-3)
    if kind == "sft":
        stage = {name: stage[name] for name in stage if name not in ("prompts_per_step", "num_generations")}
        stage |= {
            "kind": "sft",
            "train_files": ["sft.jsonl"],
            "batch_size": 1,
            "num_train_epochs": 2,
            "lr_scheduler_type": "constant",
        }
    scores += [0.2, 0.9, 0.3]
    best = train(taught_model, stage)["zero"]
    assert [(one["step"], one["pass@1"]) for one in best["validations"]] == [(2, 0.2), (4, 0.9), (6, 0.3)]
    assert best["best_step"] == 4
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "zero" / "checkpoints").iterdir()) == ["step_4", "step_6"]
    assert sorted(path.name for path in (run / "zero" / "evaluations").iterdir()) == [
        "after.parquet", "step_00002.parquet", "step_00004.parquet", "step_00006.parquet",
    ]  # fmt: skip
    run.rename(tmp_path / "best")
    train(taught_model, {**stage, "max_steps": 4, "load_best_model_at_end": False})
    assert weights_of(tmp_path / "best" / "zero" / "model") == weights_of(run / "zero" / "model")
    assert "eval/pass@1" in (tmp_path / "best" / "report.html").read_text()


def test_early_end_and_its_resume(
    train, command, taught_model: Path, tmp_path: Path, scores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = dict(TRAINED, max_steps=40, early_stopping_patience=2, load_best_model_at_end=True)
    scores += [0.5, 0.5, 0.4]  # an equal one is not better
    entry = train(taught_model, stage)["zero"]
    assert [one["step"] for one in entry["validations"]] == [2, 4, 6]
    whole = weights_of(tmp_path / "run" / "zero" / "model")

    # Stopped when the second evaluation is about to begin: that and the third come with the resume.
    (tmp_path / "run").rename(tmp_path / "whole")
    scores += [0.5]
    config = write_recipe(tmp_path / "mine.yaml", stage, model={"path": str(taught_model)})
    with monkeypatch.context() as patch:
        stop_before(patch, "step_00004")
        assert command("--config", config, "--output-dir", "run") == 143
    assert (tmp_path / "run" / "zero" / "checkpoints" / "step_4").is_dir()
    scores += [0.5, 0.4]
    assert command("--output-dir", "run", "--resume") == 0
    assert weights_of(tmp_path / "run" / "zero" / "model") == whole


UNLABELLED = [{"prompt": row["prompt"]} for row in QUESTIONS[:3]]


def test_a_file_without_golds_beside_one(train, taught_model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", UNLABELLED)
    stage = {"name": "test", "kind": "evaluate", "eval_files": ["questions.jsonl", "chat.jsonl"], **SHORT}
    found = train(taught_model, stage)["test"]["eval_after"]
    chat, questions = found["files"]["chat.jsonl"], found["files"]["questions.jsonl"]
    assert (found["n"], questions["n"], found["unscorable"]) == (8, 8, 0)
    assert found["pass@1"] == questions["pass@1"] and "pass@1" not in chat and "format" in chat
    table = pq.read_table(tmp_path / "run" / "test" / "evaluations" / "after.parquet").to_pylist()
    assert {row["gold"] for row in table if row["file"] == "chat.jsonl"} == {None}
    assert {row["accuracy"] for row in table if row["file"] == "chat.jsonl"} == {None}


def test_a_metric_that_no_row_gives_ends_the_stage(
    command, taught_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a reward that gives None, or a limit under which no row has a gold. Another metric goes on from there."""
    write_jsonl(tmp_path / "chat.jsonl", [{**row, "hint": None} for row in QUESTIONS[:3]])
    stage = dict(TRAINED, eval_files=["chat.jsonl"], early_stopping_patience=1, metric_for_best_model="hinted")
    stage["eval_rewards"] = {"format": {}, "hinted": {"function": "my_rewards.py:hinted"}}
    config = write_recipe(tmp_path / "mine.yaml", stage, model={"path": str(taught_model)})
    assert command("--config", config, "--output-dir", "run") == 1
    problem = "stages.zero: metric_for_best_model = 'hinted' was not measured after step 2: no row of eval_files"
    assert problem in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run" / "zero" / "checkpoints" / "step_2").is_dir()
    assert command("--output-dir", "run", "--resume", "stages.zero.metric_for_best_model=format") == 0


def test_a_model_that_cannot_be_evaluated_is_not_kept(
    command, taught_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of it would be what a resume goes on with."""
    check, calls = evaluation.check_weights, []

    def damaged(ctx: Any, model: Any) -> None:
        calls.append(model)
        if len(calls) == 2:
            next(model.parameters()).data.fill_(float("nan"))
        check(ctx, model)

    monkeypatch.setattr(evaluation, "check_weights", damaged)
    config = write_recipe(tmp_path / "mine.yaml", dict(TRAINED, save_steps=3), model={"path": str(taught_model)})
    assert command("--config", config, "--output-dir", "run") == 1
    assert [path.name for path in (tmp_path / "run" / "zero" / "checkpoints").iterdir()] == ["step_3"]


def test_what_the_best_step_is_chosen_by_cannot_change(
    command, taught_model: Path, tmp_path: Path, scores: list[float], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Evaluations that are not alike would be compared, and of other steps there is no checkpoint."""
    scores += [0.5]
    config = write_recipe(tmp_path / "mine.yaml", TRAINED, model={"path": str(taught_model)})
    with monkeypatch.context() as patch:
        stop_before(patch, "step_00004")
        assert command("--config", config, "--output-dir", "run") == 143
    capsys.readouterr()
    best = "stages.zero.load_best_model_at_end=true"
    for changes in ([best], ["stages.zero.early_stopping_patience=1", "stages.zero.eval_num_samples=2"]):
        assert command("--output-dir", "run", "--resume", *changes) == 2
        assert "the best step of stage zero is chosen by it" in " ".join(capsys.readouterr().err.split())
    assert command("--output-dir", "run", "--resume", "stages.zero.eval_num_samples=2") == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"eval_files": [], "eval_greedy": True, "eval_before": True}, "eval_steps applies to eval_files"),
        ({"eval_steps": None, "early_stopping_patience": 2}, "early_stopping_patience needs eval_steps"),
        ({"metric_for_best_model": "cons@k"}, "metric_for_best_model needs load_best_model_at_end"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "helpful"}, "'helpful' is not measured"),
        ({"load_best_model_at_end": True, "eval_rewards": {"format": {}}}, "'pass@1' is not measured; expected one of"),
        ({"early_stopping_patience": 1, "metric_for_best_model": "greedy"}, "'greedy' is not measured"),
        ({"eval_steps": 7}, "eval_steps = 7 is more than max_steps = 6"),
        ({"eval_steps_limit": 5, "eval_limit": 4}, "eval_steps_limit = 5 is more than eval_limit = 4"),
        ({"eval_rewards": {"length": {"function": "format"}}}, "'length' is what an evaluation calls something of its"),
        ({"eval_rewards": {"mine_ci": {"function": "format"}}}, "'mine_ci' is what an evaluation calls something"),
        ({"eval_rewards": {"greedy/x": {"function": "format"}}}, "'greedy/x' is what an evaluation calls something"),
        ({"rewards": {"advantage": {"function": "format"}}}, "'advantage', as a column of samples/*.parquet is"),
        ({"eval_top_p": 0.0}, "eval_top_p"),
        ({"eval_top_p": 1.5}, "eval_top_p"),
        ({"eval_temperature": 0.0, "eval_num_samples": 1, "eval_top_p": 0.9}, "eval_top_p = 0.9 does not apply"),
    ],
    ids=[
        "files", "steps", "metric", "unknown", "no-accuracy", "no-greedy", "late", "limits", "name",
        "interval", "greedy-name", "column", "top_p", "above-1",
        "greedy",
    ],
)  # fmt: skip
def test_settings_without_effect(
    command, taught_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict, problem: str
) -> None:
    config = write_recipe(tmp_path / "mine.yaml", {**TRAINED, **options}, model={"path": str(taught_model)})
    assert command("--config", config, "--output-dir", "run") == 2
    assert problem in " ".join(capsys.readouterr().err.split())
