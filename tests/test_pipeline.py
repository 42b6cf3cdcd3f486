"""The graph of stages, and the record of what is done: order, selection, failure, resume. The stages are stubs."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r1fast import pipeline
from r1fast.artifacts import inputs_of
from r1fast.config import ConfigError
from r1fast.parallel.mesh import Dist
from r1fast.pipeline import Run, check_references
from r1fast.resume import read_run
from r1fast.run_folder import read_record
from r1fast.schema import Recipe
from r1fast_kernels.dispatch import in_use
from tests.tiny_checkpoint import GRPO, PROMPTS, write_jsonl, write_recipe

STAGES: list[dict[str, Any]] = [
    {"name": "base", "kind": "pretrain", "train_files": ["t"], "architecture": {}, "max_steps": 1},
    {"name": "zero", "kind": "grpo", "train_files": ["a", "b"], "max_steps": 2},
    {
        "name": "cold",
        "kind": "collect",
        "model": "@zero",
        "train_files": ["a"],
        "few_shot": {"model": "@base", "examples_files": ["e"]},
    },
    {"name": "dev", "kind": "sft", "train_files": ["@cold", "s"], "eval_files": ["a"]},
    {"name": "rm", "kind": "reward_model", "model": "@dev", "train_files": ["p"], "loss": "pairwise"},
    {
        "name": "r1",
        "kind": "grpo",
        "max_steps": 2,
        "model": "@dev",
        "train_files": ["@cold"],
        "reward_models": {"helpful": {"model": "@rm"}},
    },
    {
        "name": "other",
        "kind": "pretrain",
        "train_files": ["t"],
        "architecture": {},
        "tokenizer": "@base",
        "max_steps": 1,
    },
    {"name": "student", "kind": "distill", "model": "@other", "teacher": "@r1", "train_files": ["a"]},
    {"name": "again", "kind": "sft", "model": "@other", "train_files": ["@student"]},
    {"name": "test", "kind": "evaluate", "model": "@student", "eval_files": ["@cold", "a"]},
]
MODEL = {"path": "@base"}


def recipe_of(stages: list[dict[str, Any]], **sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "r", "model": MODEL, "stages": stages, **sections})


@pytest.fixture
def chain(tmp_path: Path) -> Callable[[], Run]:
    """A new Run of STAGES in the same directory each time."""
    dist = Dist(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)  # type: ignore[arg-type]
    return lambda: Run(recipe_of(STAGES), tmp_path / "run", dist)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stubs for stages: `names` of those that ran; `fails` names one that raises; `results` by name."""
    record = SimpleNamespace(names=[], fails=None, results={}, seen={}, impls=set())

    def run(ctx: Any) -> dict[str, Any]:
        record.names.append(ctx.stage.name)
        record.seen[ctx.stage.name] = dict(ctx.evaluations)
        record.impls.add(in_use())
        if record.fails == ctx.stage.name:
            raise RuntimeError("out of luck")
        ctx.evaluations[ctx.stage.name] = {"pass@1": 0.5}
        if "model" in ctx.stage.makes:
            (ctx.stage_dir / "model").mkdir(exist_ok=True)
        return record.results.get(ctx.stage.name, {})

    monkeypatch.setattr(pipeline, "import_module", lambda name: SimpleNamespace(run=run))
    return record


def resume(run: Run) -> None:
    run.resume(read_run(run.run_dir).summary, [])


def summary_on_disk(tmp_path: Path) -> dict[str, Any]:
    return read_record(tmp_path / "run" / "summary.json")


def statuses(summary: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in summary["stages"]}


# References


def test_references_of_every_kind() -> None:
    recipe = recipe_of(STAGES)
    found = {
        stage.name: {(found.key, found.stage, found.kind) for found in inputs_of(recipe, stage) if found.stage}
        for stage in recipe.stages
    }
    assert found == {
        "base": set(),
        "zero": {("model", "base", "model")},  # from the recipe's model.path
        "cold": {("model", "zero", "model"), ("few_shot.model", "base", "model")},
        "dev": {("model", "base", "model"), ("train_files", "cold", "data")},
        "rm": {("model", "dev", "model")},
        "r1": {
            ("model", "dev", "model"),
            ("train_files", "cold", "data"),
            ("reward_models.helpful.model", "rm", "reward model"),
        },
        "other": {("tokenizer", "base", "model")},
        "student": {("model", "other", "model"), ("teacher", "r1", "model")},
        "again": {("model", "other", "model"), ("train_files", "student", "data")},
        "test": {("model", "student", "model"), ("eval_files", "cold", "data")},
    }


def test_a_whole_chain_is_in_order(tmp_path: Path) -> None:
    check_references(recipe_of(STAGES), [stage["name"] for stage in STAGES], tmp_path)


@pytest.mark.parametrize("later", ["zero", "cold", "dev", "rm", "r1", "other", "student"])
def test_a_stage_put_after_its_users_is_an_error(tmp_path: Path, later: str) -> None:
    stages = [stage for stage in STAGES if stage["name"] != later]
    stages.append(next(stage for stage in STAGES if stage["name"] == later))
    with pytest.raises(ConfigError, match=f"@{later}"):
        check_references(recipe_of(stages), [], tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_files": ["@dev"]}, "@dev makes model .kind sft., expected a stage that makes data"),
        ({"train_files": ["@test"]}, "@test makes nothing .kind evaluate., expected a stage that makes data"),
        ({"model": "@cold"}, "@cold makes data .kind collect., expected a stage that makes model"),
        ({"model": "@rm"}, "@rm makes reward model .kind reward_model., expected a stage that makes model"),
    ],
    ids=["model-for-data", "evaluation-for-data", "data-for-model", "reward-model-for-model"],
)
def test_an_artifact_of_the_wrong_sort_is_an_error(tmp_path: Path, changes: dict, message: str) -> None:
    last = {"name": "last", "kind": "sft", "train_files": ["s"], **changes}
    with pytest.raises(ConfigError, match=f"stages.last.*: {message}"):
        check_references(recipe_of([*STAGES, last]), [], tmp_path)


def test_a_distillation_on_given_samples_makes_no_data(tmp_path: Path) -> None:
    stages = [{**stage, "teacher": None} if stage["name"] == "student" else stage for stage in STAGES]
    with pytest.raises(ConfigError, match=r"stages.again.train_files: @student makes model \(kind distill\)"):
        check_references(recipe_of(stages), [], tmp_path)


def test_selected_stages_need_what_is_on_disk(tmp_path: Path) -> None:
    recipe = recipe_of(STAGES)
    for path in ("base/model", "zero/model", "dev/model"):
        (tmp_path / path).mkdir(parents=True)
    check_references(recipe, ["cold", "rm"], tmp_path)
    with pytest.raises(ConfigError, match=r"stages.r1.train_files: @cold: .*cold/data.jsonl does not exist"):
        check_references(recipe, ["rm", "r1"], tmp_path)
    (tmp_path / "cold").mkdir()
    (tmp_path / "cold" / "data.jsonl").touch()
    with pytest.raises(ConfigError, match=r"stages.r1.reward_models.helpful.model: @rm: .*rm/model does not exist"):
        check_references(recipe, ["r1"], tmp_path)
    check_references(recipe, ["rm", "r1"], tmp_path)


# The record


def test_stages_run_in_the_order_of_the_recipe(chain, ran, tmp_path: Path) -> None:
    run = chain()
    run.start()
    run.execute(["dev", "base", "zero"])
    assert ran.names == ["base", "zero", "dev"]
    found = statuses(summary_on_disk(tmp_path))
    assert {name for name, status in found.items() if status == "done"} == set(ran.names)
    assert {found[stage["name"]] for stage in STAGES if stage["name"] not in ran.names} == {"pending"}


@pytest.mark.parametrize("impl", [None, "reference"])
def test_stages_run_the_kernels_of_the_recipe(chain, ran, impl: str | None) -> None:
    run = chain()
    run.recipe.kernels.impl = impl
    run.start()
    run.execute(["base", "zero"])
    assert ran.impls == {impl} and in_use() is None


def test_summary_says_where_each_stage_comes_from(chain, ran, tmp_path: Path) -> None:
    run = chain()
    run.start()
    run.execute([stage["name"] for stage in STAGES])
    entries = {entry["name"]: entry for entry in summary_on_disk(tmp_path)["stages"]}
    assert entries["cold"]["inputs"] == ["zero", "base"] and entries["cold"]["model"] == "zero"
    assert entries["zero"]["model"] == "base" and entries["zero"]["kind"] == "grpo"
    assert entries["other"]["model"] == "" and entries["other"]["inputs"] == ["base"]  # only its tokenizer


def test_summary_holds_what_a_stage_returns(chain, ran, tmp_path: Path) -> None:
    ran.results["base"] = {"eval_before": None, "eval_after": {"pass@1": 0.25}, "numbers": {"rows": 3}}
    run = chain()
    run.start()
    run.execute(["base"])
    entry = summary_on_disk(tmp_path)["stages"][0]
    assert entry["eval_after"] == {"pass@1": 0.25} and entry["numbers"] == {"rows": 3}
    assert "eval_before" not in entry and entry["seconds"] >= 0


def test_a_failed_stage_is_recorded_and_stops_the_chain(chain, ran, tmp_path: Path) -> None:
    ran.fails = "zero"
    run = chain()
    run.start()
    with pytest.raises(RuntimeError, match="out of luck"):
        run.execute(["base", "zero", "cold"])
    assert ran.names == ["base", "zero"]
    found = statuses(summary_on_disk(tmp_path))
    assert (found["base"], found["zero"], found["cold"]) == ("done", "failed", "pending")


def test_resume_goes_on_where_the_run_stopped(chain, ran, tmp_path: Path) -> None:
    ran.fails, ran.results["base"] = "zero", {"eval_after": {"pass@1": 0.25}}
    first = chain()
    first.start()
    with pytest.raises(RuntimeError):
        first.execute(["base", "zero", "cold"])
    stopped = summary_on_disk(tmp_path)
    ran.names.clear()
    ran.fails = None
    second = chain()
    resume(second)
    second.start()
    second.execute(["base", "zero", "cold"])
    assert ran.names == ["zero", "cold"]
    assert ran.seen["zero"] == {"base": {"pass@1": 0.5}}  # measured before the stop, not again
    resumed = summary_on_disk(tmp_path)
    assert resumed["stages"][0] == stopped["stages"][0]
    assert resumed["started"] == stopped["started"] and resumed["seconds"] >= stopped["seconds"]
    assert {statuses(resumed)[name] for name in ("base", "zero", "cold")} == {"done"}


def test_resume_of_other_stages_keeps_the_first_ones(chain, ran, tmp_path: Path) -> None:
    first = chain()
    first.start()
    first.execute(["base"])
    second = chain()
    resume(second)
    second.start()
    second.execute(["zero"])
    third = chain()
    resume(third)
    third.start()
    third.execute(["base", "zero"])
    assert ran.names == ["base", "zero"]


def test_a_run_killed_before_its_first_stage_resumes(chain, ran, tmp_path: Path) -> None:
    chain().start()
    (tmp_path / "run" / "summary.json").unlink()
    run = chain()
    resume(run)
    run.start()
    run.execute(["base"])
    assert ran.names == ["base"]


def test_a_run_killed_while_a_stage_ran_resumes_that_stage(chain, ran, tmp_path: Path) -> None:
    run = chain()
    run.start()
    run.execute(["base", "zero"])
    run.entry("zero")["status"] = "running"  # what SIGKILL leaves
    run.write()
    run = chain()
    resume(run)
    run.start()
    run.execute(["base", "zero"])
    assert ran.names == ["base", "zero", "zero"]


# The command line on top of it


@pytest.fixture
def recipe_file(base_model: Path, tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    second = {"name": "second", "kind": "sft", "model": "@zero", "train_files": ["sft.jsonl"]}
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "one ?", "completion": "two"}])
    return write_recipe(tmp_path / "mine.yaml", GRPO, second, model={"path": str(base_model)})


def test_command_runs_then_skips_what_is_done(command, ran, recipe_file: Path, tmp_path: Path) -> None:
    assert command("--config", recipe_file, "--output-dir", tmp_path / "run", "--stages", "zero") == 0
    assert ran.names == ["zero"]
    assert command("--output-dir", tmp_path / "run", "--resume") == 0
    assert ran.names == ["zero", "second"]
    assert command("--output-dir", tmp_path / "run", "--resume") == 0
    assert ran.names == ["zero", "second"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_resume_without_a_folder_takes_the_latest_run(command, ran, recipe_file: Path, tmp_path: Path) -> None:
    ran.fails = "second"
    with pytest.raises(RuntimeError):
        command("--config", recipe_file)
    assert not list((tmp_path / "runs").glob("*/run.lock"))
    (first,) = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert first.name.startswith("mine-") and (tmp_path / "runs" / "latest").resolve() == first
    ran.fails = None
    assert command("--resume") == 0
    assert ran.names == ["zero", "second", "second"]
    assert set(statuses(json.loads((first / "summary.json").read_text())).values()) == {"done"}


def test_latest_is_the_last_run_and_never_replaces_a_folder(command, ran, recipe_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert command("--config", recipe_file, "--output-dir", f"runs/{name}") == 0
    assert (tmp_path / "runs" / "latest").resolve().name == "b"
    (tmp_path / "runs" / "latest").unlink()
    (tmp_path / "runs" / "latest").mkdir()
    assert command("--config", recipe_file, "--output-dir", "runs/c") == 0
    assert (tmp_path / "runs" / "latest").is_dir() and not (tmp_path / "runs" / "latest").is_symlink()


def test_a_failed_stage_still_gets_its_report(command, ran, recipe_file: Path, tmp_path: Path) -> None:
    ran.fails = "second"
    with pytest.raises(RuntimeError, match="out of luck"):
        command("--config", recipe_file, "--output-dir", tmp_path / "run")
    assert "second" in (tmp_path / "run" / "report.html").read_text()
    assert not torch.distributed.is_initialized()
