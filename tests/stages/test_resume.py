"""A stage that is killed and resumed ends with the same bits as one that was not: weights, metrics, samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1fast import preflight
from r1fast.parallel.parallelize import local_tensor
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.vllm import RolloutError
from r1fast.stages import grpo, sft
from r1fast.stages.rollouts import Rollouts
from r1fast.stages.training import Trainer
from tests.stages.conftest import QUESTIONS
from tests.tiny_checkpoint import DEEPSEEK_V3, PROMPTS, tree, write_checkpoint, write_jsonl, write_recipe

CLOCK = ("time", "step_time", "tokens_per_second")  # the metrics that need not be the same
SFT = {
    "name": "tuned", "kind": "sft", "train_files": ["sft.jsonl"], "batch_size": 3, "num_train_epochs": 3,
    "optimizer": "muon", "learning_rate": 1e-3, "save_steps": 2, "router_bias_update_rate": 0.01,
}  # fmt: skip
GRPO = {
    "name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], "prompt_template": "chat", "max_prompt_length": 40,
    "max_completion_length": 6, "num_generations": 4, "prompts_per_step": 3, "steps_per_generation": 2, "max_steps": 7,
    "beta": 0.05, "ref_model_sync_steps": 3, "learning_rate": 5e-3, "lr_scheduler_type": "linear", "save_steps": 2,
    "rewards": {"mine": {"function": "rewards.py:count"}}, "router_bias_update_rate": 0.01,
    "log_completions_steps": 1,
}  # fmt: skip
REWARDS = """
def count(completions, completion_ids, **_):
    return [len(set(ids)) / len(ids) for ids in completion_ids]
"""


class Killed(BaseException):
    """Stands for SIGKILL where the process has to live on."""


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe"), **DEEPSEEK_V3)


@pytest.fixture
def start(command: Callable[..., int], moe_model: Path, tmp_path: Path) -> Callable[..., int]:
    """Starts a recipe of these stages in RUN."""
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    rows = [{"prompt": f"What is {i} ?", "completion": "red " * (1 + i % 4)} for i in range(8)]
    write_jsonl(tmp_path / "sft.jsonl", rows)
    (tmp_path / "rewards.py").write_text(REWARDS)

    def run(run_dir: str, *stages: dict[str, Any], **sections: Any) -> int:
        sections = {"name": "same", "model": {"path": str(moe_model)}} | sections
        config = write_recipe(tmp_path / f"{run_dir}.yaml", *stages, **sections)
        return command("--config", config, "--output-dir", run_dir)

    return run


def results(stage_dir: Path) -> dict[str, Any]:
    """What must not depend on having been killed."""
    files = tree(stage_dir)
    rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in [name for name in row if name in CLOCK or name.startswith("seconds/")]:
            row.pop(name, None)
    kept = {
        path: content
        for path, content in files.items()
        if path.startswith(("model", "samples", "data.jsonl", "dropped.jsonl"))
    }
    return {"metrics": rows, "checkpoints": sorted(path.name for path in (stage_dir / "checkpoints").iterdir()), **kept}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    assert got["metrics"] == expected["metrics"]
    assert [name for name in expected if got[name] != expected[name]] == []


def before_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    """The given call of owner.name raises Killed in place of running; later ones run."""
    calls = iter(range(1, 10**6))
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture
def kill_and_resume(start, whole, command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs a stage with kills at the given (owner, name, number of the call); compares the results to RUN/whole."""

    def run(stage: dict[str, Any], *kills: tuple[Any, str, int], **sections: Any) -> None:
        whole(stage, **sections)
        for i, kill in enumerate(kills):
            with monkeypatch.context() as patch:
                before_call(patch, *kill)
                with pytest.raises(Killed):
                    _ = command("--resume", "--output-dir", "killed") if i else start("killed", stage, **sections)
        assert command("--resume", "--output-dir", "killed") == 0
        assert_same(results(tmp_path / "killed" / stage["name"]), results(tmp_path / "whole" / stage["name"]))

    return run


# What is called in place of the next thing that is killed.
POINTS = {
    "before-the-first-step": ("update", 1),
    "between-checkpoints": ("update", 6),
    "while-a-checkpoint-is-written": ("publish", 2),
    "after-the-last-step": ("save", 1),
    "after-the-model-is-saved": ("end", 1),
}


def point(name: str, module: Any) -> tuple[Any, str, int]:
    from r1fast.parallel import checkpoint
    from r1fast.stages.context import StageContext

    where, number = POINTS[name]
    owners = {
        "update": (Trainer, "update"),
        "publish": (checkpoint, "_commit"),
        "save": (StageContext, "save"),
        "end": (module, "evaluate_end"),
    }
    return *owners[where], number


@pytest.mark.parametrize("name", POINTS)
def test_sft_killed(kill_and_resume, name: str) -> None:
    kill_and_resume(SFT, point(name, sft))


@pytest.mark.parametrize("name", POINTS)
def test_grpo_killed(kill_and_resume, name: str) -> None:
    kill_and_resume(GRPO, point(name, grpo))


@pytest.mark.parametrize("stage", [GRPO, SFT], ids=["grpo", "sft"])
def test_offload_changes_no_bit(
    start, command, stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a reference that moves, of Muon and AdamW, killed and resumed; and outside updates all of it is away."""
    # On a CPU it is refused, as there is no other memory; what it does can still be seen.
    monkeypatch.setattr(preflight, "_offload_problems", lambda recipe: iter(()))
    trainer = {"offload": ["optimizer", "reference"] if stage is GRPO else ["optimizer"]}
    left: list[int] = []
    rollout = grpo.Learner.rollout

    def look(learner: grpo.Learner, step: int) -> Any:
        assert learner.reference is not None
        states = [x for of_one in learner.trainer.optimizer.state.values() for x in of_one.values() if x.ndim]
        tensors = [local_tensor(x) for x in (*states, *learner.reference.parameters())]
        left.append(sum(x.untyped_storage().nbytes() for x in tensors))
        return rollout(learner, step)

    monkeypatch.setattr(grpo.Learner, "rollout", look)
    assert start("whole", stage) == 0
    assert all(left)
    left.clear()
    with monkeypatch.context() as patch:
        before_call(patch, Trainer, "update", 8)
        with pytest.raises(Killed):
            _ = start("killed", stage, trainer=trainer)
    assert command("--resume", "--output-dir", "killed") == 0
    assert_same(results(tmp_path / "killed" / stage["name"]), results(tmp_path / "whole" / stage["name"]))
    assert not any(left) and len(left) == (9 if stage is GRPO else 0)  # 4 steps, and 5 from the checkpoint of the 2nd


@pytest.mark.parametrize(
    ("stage", "key", "few"),
    [({**GRPO, "lr_scheduler_type": "constant"}, "max_steps", 4),
     ({**SFT, "lr_scheduler_type": "constant", "num_train_epochs": 3}, "num_train_epochs", 2)],
    ids=["grpo", "sft"],
)  # fmt: skip
def test_a_finished_stage_made_longer(
    start, whole, command, stage: dict[str, Any], key: str, few: int, tmp_path: Path
) -> None:
    """Ends as the longer one does; 4 steps of GRPO end on a checkpoint, 2 epochs of SFT between two."""
    whole(stage)
    assert start("longer", {**stage, key: few}) == 0
    assert command("--resume", "--output-dir", "longer", f"{stage['name']}.{key}={stage[key]}") == 0
    got, expected = (results(tmp_path / run / stage["name"]) for run in ("longer", "whole"))
    # Of its last step more is said and saved, and the shorter one had a last step of its own.
    got["checkpoints"] = expected["checkpoints"]
    for row in (*got["metrics"], *expected["metrics"]):
        row.pop("moe/load", None)
    assert_same(got, expected)


def test_grpo_killed_between_the_updates_of_a_rollout(kill_and_resume) -> None:
    """Step 4 begins at update 7 and has two: the rollout is sampled again from the checkpoint of step 2."""
    kill_and_resume(GRPO, (Trainer, "update", 8))


def test_grpo_killed_three_times(kill_and_resume) -> None:
    kill_and_resume(GRPO, (Trainer, "update", 6), (Trainer, "update", 5), (Trainer, "update", 3))


def test_grpo_with_a_frozen_reference_and_repeated_rollouts(kill_and_resume) -> None:
    stage = {**GRPO, "ref_model_sync_steps": None, "num_iterations": 2, "save_steps": 1, "max_steps": 4}
    kill_and_resume(stage, (Trainer, "update", 11))


@pytest.mark.parametrize("name", ["between-checkpoints", "while-a-checkpoint-is-written"])
def test_adapters_killed(kill_and_resume, tmp_path: Path, name: str) -> None:
    """Masks of dropout go by seed and step. Of the base a checkpoint has nothing but a router's bias."""
    attention = ["q_proj", "o_proj", "kv_b_proj"]
    frozen = {"router_bias_update_rate": 0.0, "optimizer": "adamw"}
    kill_and_resume({**SFT, **frozen, "lora": {"dropout": 0.2, "target_modules": attention}}, point(name, sft))
    contents = json.loads((tmp_path / "whole" / "tuned" / "checkpoints" / "step_9" / "contents.json").read_text())
    assert {".".join(key.split(".")[-2:]) for key in contents if key.startswith("model.")} == {
        "weight_lora.A", "weight_lora.B", "gate.e_score_correction_bias"
    }  # fmt: skip


def test_grpo_with_adapters_killed(kill_and_resume) -> None:
    stage = {**GRPO, "ref_model_sync_steps": None, "router_bias_update_rate": 0.0, "lora": {"r": 2, "alpha": 8}}
    kill_and_resume(stage, (Trainer, "update", 8))


AHEAD = {"rollout": {"async_steps": 1}}
PARTIAL = {"max_prompt_length": 100, "max_completion_length": 32, "partial_rollout_length": 8}
REFILLED = {"dynamic_sampling_refills": 2, "num_generations": 2}


@pytest.mark.parametrize("name", ["between-checkpoints", "while-a-checkpoint-is-written"])
@pytest.mark.parametrize(
    ("options", "sections"),
    [({}, AHEAD), (PARTIAL, {}), (REFILLED, {}), (PARTIAL | REFILLED, AHEAD)],
    ids=["ahead", "partial", "refilled", "all"],
)
def test_grpo_with_pending_rollouts_killed(
    kill_and_resume, taught_model: Path, tmp_path: Path, name: str, options: dict[str, Any], sections: dict[str, Any]
) -> None:
    """A checkpoint holds what was sampled and not yet trained on: no weights are left that would sample it again."""
    # A model that ends its answers, and says the same twice; it has no router.
    stage = {**GRPO, "router_bias_update_rate": 0.0, "learning_rate": 1e-3, **options}
    kill_and_resume(stage, point(name, grpo), model={"path": str(taught_model)}, **sections)
    rows = results(tmp_path / "whole" / "zero")["metrics"]
    if sections:
        assert max(row["sampling/sampling_logp_difference/mean"] for row in rows[1:]) > 1e-4
    if "partial_rollout_length" in options:
        assert max(row["partial_rollouts/carried_groups"] for row in rows) > 0
    if "dynamic_sampling_refills" in options:
        assert max(row["dynamic_sampling/discarded_groups"] for row in rows) > 0


def test_reward_model_killed(kill_and_resume, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i} ?", "chosen": "good " * (1 + i % 3), "rejected": "bad"} for i in range(12)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    stage = {"name": "rm", "kind": "reward_model", "train_files": ["pairs.jsonl"], "loss": "pairwise", "batch_size": 3}
    kill_and_resume({**stage, "num_train_epochs": 2, "learning_rate": 1e-3, "save_steps": 2}, (Trainer, "update", 6))


def test_pretrain_killed(kill_and_resume) -> None:
    stage = {"name": "base", "kind": "pretrain", "train_files": ["sft.jsonl"], "architecture": dict(DEEPSEEK_V3)}
    stage |= {"max_length": 128, "max_steps": 6, "batch_size": 3, "save_steps": 2}
    kill_and_resume(stage, (Trainer, "update", 4))


@pytest.mark.parametrize("number", [1, 4], ids=["after-sampling", "between-checkpoints"])
def test_distill_killed(kill_and_resume, taught_model: Path, tmp_path: Path, number: int) -> None:
    """The teacher's samples are those of before, and so is the record of what was dropped."""
    write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    stage = {
        "name": "small", "kind": "distill", "teacher": str(taught_model), "train_files": ["questions.jsonl"],
        "response_format": "think_answer", "max_prompt_length": 100, "max_completion_length": 32, "num_samples": 4,
        "batch_size": 3, "num_train_epochs": 2, "save_steps": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    kill_and_resume(stage, (Trainer, "update", number))
    runs = [json.loads((tmp_path / run / "summary.json").read_text())["stages"][0] for run in ("killed", "whole")]
    assert runs[0]["numbers"] == runs[1]["numbers"] and runs[0]["numbers"]["dropped"]


def test_torn_checkpoint_is_passed_over(start, whole, command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole(SFT)
    with monkeypatch.context() as patch:
        before_call(patch, Trainer, "update", 6)
        with pytest.raises(Killed):
            start("killed", SFT)
    payload = next((tmp_path / "killed" / "tuned" / "checkpoints" / "step_4").glob("*.distcp"))
    content = bytearray(payload.read_bytes())
    content[len(content) // 2] ^= 1
    payload.write_bytes(content)
    assert command("--resume", "--output-dir", "killed") == 0
    assert_same(results(tmp_path / "killed" / "tuned"), results(tmp_path / "whole" / "tuned"))


def test_finished_stages_are_not_touched(start, command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    second = {**GRPO, "model": "@tuned"}
    assert start("whole", SFT, second) == 0
    with monkeypatch.context() as patch:
        before_call(patch, Trainer, "update", 9 + 5)  # sft takes nine
        with pytest.raises(Killed):
            start("killed", SFT, second)
    tuned = tmp_path / "killed" / "tuned"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tuned.rglob("*")}
    assert command("--resume", "--output-dir", "killed") == 0
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tuned.rglob("*")} == before
    assert_same(results(tmp_path / "killed" / "zero"), results(tmp_path / "whole" / "zero"))
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert [entry["status"] for entry in summary["stages"]] == ["done", "done"]


def test_resume_of_a_finished_run_changes_no_result(start, command, tmp_path: Path) -> None:
    assert start("whole", SFT) == 0
    before = tree(tmp_path / "whole" / "tuned")
    assert command("--resume", "--output-dir", "whole") == 0
    assert tree(tmp_path / "whole" / "tuned") == before


def test_seeds_matter(start, whole, tmp_path: Path) -> None:
    """The comparisons above could not fail if nothing in a run depended on its history."""
    whole(GRPO)
    assert start("other", {**GRPO, "seed": 1}) == 0
    one, other = results(tmp_path / "whole" / "zero"), results(tmp_path / "other" / "zero")
    assert one["metrics"] != other["metrics"] and one["model/model.safetensors"] != other["model/model.safetensors"]


@pytest.mark.parametrize("refills", [0, 1])
def test_grpo_without_its_server_loses_no_step(
    start, command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refills: int
) -> None:
    """When vLLM is gone for good the run ends with one line; what was done is kept, between checkpoints too."""
    stage = {
        **GRPO,
        "save_steps": 100,
        "dynamic_sampling_refills": refills,
        "rewards": {"mine": {"function": "rewards.py:odd"}},
    }
    with (tmp_path / "rewards.py").open("a") as file:
        file.write("\n\ndef odd(completion_ids, **_):\n    return [float(ids[0] % 4 == 0) for ids in completion_ids]\n")
    assert start("whole", stage) == 0
    # The generation that fails: of a rollout, or of what replaces groups of equal reward.
    name = "replacements" if refills else "next_groups"
    method, generate, calls = getattr(Rollouts, name), RolloutEngine.generate, []

    def counted(rollouts: Rollouts, *args: Any) -> Any:
        calls.append(name)
        try:
            return method(rollouts, *args)
        finally:
            calls.append("end")

    def gone_the_fourth_time(*args: Any, **kwargs: Any) -> Any:
        if calls.count(name) == 4 and calls[-1] == name:
            raise RolloutError("vLLM server http://x: gone")
        return generate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Rollouts, name, counted)
        patch.setattr(RolloutEngine, "generate", gone_the_fourth_time)
        assert start("killed", stage) == 1
    zero = tmp_path / "killed" / "zero"
    (saved,) = [path.name for path in (zero / "checkpoints").iterdir()]
    assert saved in ("step_3", "step_4", "step_5")
    assert command("--resume", "--output-dir", "killed") == 0
    got, expected = results(zero), results(tmp_path / "whole" / "zero")
    assert (got.pop("checkpoints"), expected.pop("checkpoints")) == ([saved, "step_7"], ["step_7"])
    assert_same(got, expected)
