"""A user's mistakes on the command line: one error that says what and where, exit status 2, nothing on disk changed."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.tiny_checkpoint import GRPO, PRETRAIN, PROMPTS, SFT, tree, write_checkpoint, write_jsonl, write_recipe

ROOT = Path(__file__).parents[1]
COLLECT: dict[str, Any] = {
    "name": "cold",
    "kind": "collect",
    "train_files": ["train.jsonl"],
    "prompt_template": "chat",
    "max_completion_length": 8,
    "few_shot": {"examples_files": ["examples.jsonl"]},
}


def test_the_recipe_of_these_tests_is_accepted(command, base_model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    config = write_recipe(tmp_path / "mine.yaml", GRPO, model={"path": str(base_model)})
    before = tree(tmp_path)
    assert command("--config", config, "--output-dir", tmp_path / "run", "--dry-run") == 0
    assert tree(tmp_path) == before


def test_as_a_process(base_model: Path, tmp_path: Path) -> None:
    """The whole of stderr and the exit status, with nothing captured or patched in between."""
    rows = [*PROMPTS[:4], {"promt": "What is 1 + 1 ?", "answer": "2"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_recipe(tmp_path / "mine.yaml", GRPO, model={"path": str(base_model)})
    before = tree(tmp_path)
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    result = subprocess.run(
        [sys.executable, "-m", "r1fast.train", "--config", "mine.yaml", "--output-dir", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "stages.zero.train_files: train.jsonl:5: no column 'prompt'" in result.stderr
    assert "did you mean 'promt'?" in result.stderr
    assert tree(tmp_path) == before


# Data


def test_wrong_json_names_the_line(refuse_recipe, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in PROMPTS]
    lines[16] = lines[16][:-1]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    message = refuse_recipe(GRPO)
    assert "stages.zero.train_files" in message and "train.jsonl:17" in message and "wrong JSON" in message


@pytest.mark.parametrize("key", ["train_files", "eval_files"])
def test_long_prompt_names_the_row_and_the_limit(refuse_recipe, tmp_path: Path, key: str) -> None:
    long = {"prompt": "red " * 50, "answer": "1"}
    write_jsonl(tmp_path / "long.jsonl", [*PROMPTS[:6], long])
    message = refuse_recipe({**GRPO, key: ["long.jsonl"]})
    assert (
        f"stages.zero.{key}: long.jsonl:7" in message and "max_prompt_length = 40" in message and "red red" in message
    )


def test_completion_beyond_the_positions_of_the_model(refuse_recipe) -> None:
    message = refuse_recipe({**GRPO, "max_completion_length": 128})
    assert "max_completion_length = 128" in message and "128 positions" in message


def test_prompt_that_the_template_cannot_render(refuse_recipe, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    write_jsonl(tmp_path / "train.jsonl", [*PROMPTS[:2], {"prompt": chat, "answer": "1"}])
    message = refuse_recipe({**GRPO, "prompt_template": "r1_zero"})
    assert "stages.zero.train_files: train.jsonl:3" in message and "'r1_zero' takes one user message" in message


def test_fewer_prompts_than_a_step_takes(refuse_recipe) -> None:
    message = refuse_recipe({**GRPO, "prompts_per_step": 32})
    assert "20 prompts" in message and "prompts_per_step = 32" in message


def test_domain_that_no_prompt_has(refuse_recipe) -> None:
    message = refuse_recipe({**GRPO, "domain_weights": {"math": 1}})
    assert "stages.zero.domain_weights" in message and "'math'" in message


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("trian.jsonl", ["trian.jsonl", "did you mean", "train.jsonl"]),
        ("no/such/train.jsonl", ["no/such/train.jsonl", "no/such"]),
        ("task:arithmetik/train", ["'arithmetik'", "'arithmetic'"]),
        ("train.csv", ["train.csv"]),
    ],
    ids=["misspelt", "no-folder", "no-task", "unknown-kind"],
)
def test_missing_data_names_the_nearest(refuse_recipe, tmp_path: Path, file: str, parts: list[str]) -> None:
    (tmp_path / "train.csv").write_text("prompt,answer\n")
    message = refuse_recipe({**GRPO, "train_files": [file]})
    for part in ["stages.zero.train_files", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "one ?"}, ["sft.jsonl:5", "'completion'"]),
        ({"messages": [{"role": "user", "content": "one ?"}]}, ["sft.jsonl:5", "'user'", "assistant"]),
        (
            {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]},
            ["sft.jsonl:5", "shows no tools"],
        ),
        ({"prompt": "one ?", "completion": "red " * 40}, ["max_length = 30", "one ?"]),
    ],
    ids=["no-completion", "ends-with-the-user", "tool-turn", "too-long"],
)
def test_wrong_sft_row(refuse_recipe, tmp_path: Path, row: dict, parts: list[str]) -> None:
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "one ?", "completion": "two"}] * 4 + [row])
    message = refuse_recipe({**SFT, "max_length": 30})
    for part in ["stages.tuned.train_files", *parts]:
        assert part in message


def test_sft_row_that_no_microbatch_holds(refuse_recipe, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "one ?", "completion": "red " * 40}])
    assert "max_tokens_per_microbatch = 30" in refuse_recipe({**SFT, "max_tokens_per_microbatch": 30})


@pytest.mark.parametrize(
    ("example", "parts"),
    [
        ({"prompt": "a", "answer": "b"}, ["examples.jsonl:1 lacks reasoning"]),
        ({"prompt": "a", "reasoning": "r", "answer": "b", "language": "zh"}, ["0 examples in language None"]),
    ],
    ids=["no-reasoning", "other-language"],
)
def test_wrong_few_shot_examples(refuse_recipe, tmp_path: Path, example: dict, parts: list[str]) -> None:
    write_jsonl(tmp_path / "examples.jsonl", [example] * 2)
    message = refuse_recipe(COLLECT)
    for part in ["stages.cold.few_shot.examples_files", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ({**GRPO, "train_files": []}, ["stages.zero.train_files: List should have at least 1 item"]),
        (
            {"name": "e", "kind": "evaluate", "eval_files": []},
            ["stages.e.eval_files: List should have at least"],
        ),
        ({**SFT, "warmup_steps": 3}, ["stages.tuned.warmup_steps: 3", "2 steps that 4 rows make"]),
        (
            {**GRPO, "rewards": {"accuracy": {"domains": ["chat"]}}},
            ["stages.zero.rewards.accuracy.domains: no row of train_files has domain 'chat'"],
        ),
        ({**GRPO, "rewards": {"language": 1.0}}, ["stages.zero.rewards.language: no row", "has a language"]),
    ],
    ids=["no-train-files", "no-eval-files", "warm-up", "domain", "language"],
)
def test_settings_that_no_row_serves(refuse_recipe, stage: dict, parts: list[str]) -> None:
    message = refuse_recipe(stage)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("fields", "rewards", "part"),
    [
        ({"language": "Klingon"}, {"language": 1.0}, "unknown language 'Klingon'"),
        ({"language": 3}, {"language": 1.0}, "column 'language' is int 3"),
        ({"domain": ["a"]}, {"accuracy": {"domains": ["a"]}}, "column 'domain' is list ['a']"),
        ({"prompt": "a \ud83d"}, {"format": 1.0}, "half of a surrogate pair"),
    ],
    ids=["unknown-language", "language-of-a-number", "domain-of-a-list", "surrogate"],
)
def test_wrong_value_names_the_row(refuse_recipe, tmp_path: Path, fields: dict, rewards: dict, part: str) -> None:
    rows = [*PROMPTS, {**PROMPTS[0], **fields}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refuse_recipe({**GRPO, "rewards": rewards})
    assert "train.jsonl:21: " in message and part in message


def test_tokenizer_beyond_the_models_vocabulary(refuse_recipe, base_model: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(base_model, tmp_path / "checkpoint")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([f"red{i}" for i in range(20)])
    tokenizer.save_pretrained(folder)
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "one ?", "completion": word} for word in ("red", "red19")])
    message = refuse_recipe(SFT, model=folder)
    assert "sft.jsonl:2: token 3" in message and "'red19'" in message and "entries of the model's vocabulary" in message


def test_template_that_raises(refuse_recipe, base_model: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(base_model, tmp_path / "checkpoint")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn\nonly') }}{% endif %}"
        + "{{ messages[0]['content'] }}"
    )
    tokenizer.save_pretrained(folder)
    chat = [{"role": "system", "content": "red"}, {"role": "user", "content": "one ?"}]
    write_jsonl(tmp_path / "train.jsonl", [*PROMPTS, {"prompt": chat, "answer": "1"}])
    message = refuse_recipe({**GRPO, "prompt_template": "tokenizer"}, model=folder)
    assert "train.jsonl:21: the tokenizer's chat template fails on it: TemplateError: one turn only" in message


def test_golds_that_accuracy_cannot_read(refuse_recipe, command, tmp_path: Path, capsys) -> None:
    """None of them: nothing to learn from. Some: a note."""
    without = [{"prompt": row["prompt"], "answer": None} for row in PROMPTS]
    write_jsonl(tmp_path / "train.jsonl", without)
    message = refuse_recipe({**GRPO, "rewards": {"accuracy": 1.0}})
    assert "stages.zero.rewards.accuracy: accuracy can read the answer of no row" in message
    assert "train.jsonl:1" in message
    write_jsonl(
        tmp_path / "train.jsonl", [*PROMPTS[:5], {**PROMPTS[5], "answer": r"\frac{1}{"}, *without[6:8], *PROMPTS]
    )
    assert command("--config", tmp_path / "mine.yaml", "--output-dir", tmp_path / "run", "--dry-run") == 0
    note, *table = capsys.readouterr().err.splitlines()
    assert table[0].startswith("GiB on the rank")
    assert note.startswith(
        "r1fast: note: stages.zero.rewards.accuracy: accuracy cannot read the answer of 3 of 28 rows"
    )
    assert "train.jsonl:6" in note


def test_tests_that_code_cannot_read(refuse_recipe, command, tmp_path: Path, capsys) -> None:
    """None of them, or no row has any: nothing to learn from. Some: a note."""
    assert "train.jsonl:1: answer: it is int 0, expected an object" in refuse_recipe({**GRPO, "rewards": {"code": 1.0}})
    rows: list[dict] = [{**row, "verification_info": {"language": "java"}} for row in PROMPTS]
    write_jsonl(tmp_path / "train.jsonl", rows)
    message = refuse_recipe({**GRPO, "rewards": {"code": 1.0}})
    assert "stages.zero.rewards.code: code can read the tests of no row" in message
    assert "train.jsonl:1: verification_info: language is str 'java'" in message
    rows[0]["verification_info"] = {"test_cases": [{"input": "1", "output": "1"}]}
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert command("--config", tmp_path / "mine.yaml", "--output-dir", tmp_path / "run", "--dry-run") == 0
    note = capsys.readouterr().err.splitlines()[0]
    assert note.startswith("r1fast: note: stages.zero.rewards.code: code cannot read the tests of 19 of 20 rows")
    assert "train.jsonl:2: verification_info: language is" in note
    assert "timeout_s is -1" in refuse_recipe({**GRPO, "rewards": {"code": {"timeout_s": -1}}})


def test_chat_rows_need_no_gold(refuse_recipe, command, tmp_path: Path, capsys) -> None:
    rows = [*PROMPTS, *({"prompt": row["prompt"], "domain": "chat"} for row in PROMPTS)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    config = tmp_path / "mine.yaml"
    refuse_recipe({**GRPO, "rewards": {"accuracy": 1.0}, "prompts_per_step": 41})  # writes the recipe
    assert command("--config", config, "--output-dir", "run", "--dry-run", "stages.zero.prompts_per_step=2") == 0
    assert capsys.readouterr().err.startswith("GiB on the rank")


def test_missing_few_shot_examples(refuse_recipe) -> None:
    assert "stages.cold.few_shot.examples_files: examples.jsonl" in refuse_recipe(COLLECT)


# Rewards


@pytest.mark.parametrize(
    ("key", "rewards", "parts"),
    [
        ("rewards", {"acuracy": 1.0}, ["'acuracy'", "'accuracy'"]),
        ("rewards", {"accuracy": {"weight": 1.0, "stirct": True}}, ["'stirct'", "'strict'"]),
        ("rewards", {"no.such.module.reward": 1.0}, ["'no.such.module.reward'", "cannot be imported"]),
        ("rewards", {"mine": {"function": "rewards.py:needs_gould"}}, ["rewards.py", "'needs_gold'"]),
        ("rewards", {"mine": {"function": "rewards.py:needs_gold"}}, ["['gold']", "'answer'", "'prompt'"]),
        ("rewards", {"a": {"function": "accuracy"}, "b": {"function": "accuracy"}}, ["reward b", "accuracy"]),
        ("eval_rewards", {"acuracy": {}}, ["'acuracy'", "'accuracy'"]),
        ("eval_rewards", {"mine": {"function": "rewards.py:needs_gold"}}, ["['gold']"]),
    ],
    ids=["name", "keyword", "module", "function", "column", "twice", "eval-name", "eval-column"],
)
def test_unknown_reward(refuse_recipe, tmp_path: Path, key: str, rewards: dict, parts: list[str]) -> None:
    # The column that the reward lacks is in the other file: each is checked against its own.
    write_jsonl(tmp_path / "gold.jsonl", [{**row, "gold": 1} for row in PROMPTS])
    files = {"train_files": ["gold.jsonl"], "eval_files": ["gold.jsonl"]}
    files["train_files" if key == "rewards" else "eval_files"] = ["train.jsonl"]
    message = refuse_recipe({**GRPO, **files, key: rewards})
    for part in [f"stages.zero.{key}", *parts]:
        assert part in message


def test_tracker_that_is_not_installed(refuse_recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "report_to: wandb" in refuse_recipe(GRPO, report_to=["wandb"])


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)


IN_PROCESS = {"engine": "vllm"}


def test_vllm_that_is_not_installed(refuse_recipe, without_vllm: None) -> None:
    message = refuse_recipe(GRPO, rollout=IN_PROCESS)
    assert "rollout.engine: vllm is not installed; pip install 'r1fast[vllm]'" in message


def test_a_temperature_that_vllm_would_raise(refuse_recipe) -> None:
    stage = {**GRPO, "eval_files": ["train.jsonl"], "eval_temperature": 0.001}
    message = refuse_recipe(stage, rollout=IN_PROCESS)
    assert "stages.zero.eval_temperature = 0.001: vLLM takes 0 or at least 0.01" in message


def test_router_replay_with_vllm_on_a_cpu(refuse_recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    sys.modules["vllm"].__spec__ = ModuleSpec("vllm", None)
    message = refuse_recipe({**GRPO, "router_replay": True}, rollout=IN_PROCESS)
    assert "stages.zero.router_replay: vLLM returns no routed experts on a CPU" in message


def test_vllm_server_that_is_not_there(refuse_recipe) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        message = refuse_recipe(GRPO, rollout={"engine": "vllm", "vllm": {"server_base_url": url}})
    assert f"rollout.vllm.server_base_url: vLLM server {url}: GET /server_info" in message
    assert "Start it as docs/rollout.md says" in message


def test_weights_by_nccl_without_a_gpu(refuse_recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    sys.modules["vllm"].__spec__ = ModuleSpec("vllm", None)
    options = {"server_base_url": "http://127.0.0.1:1", "weight_transfer": "nccl"}
    message = refuse_recipe(GRPO, rollout={"engine": "vllm", "vllm": options})
    assert "rollout.vllm.weight_transfer: nccl needs a CUDA device on both sides" in message


# Checkpoints


def no_folder(folder: Path) -> list[str]:
    shutil.rmtree(folder)
    return ["no such folder"]


def no_config(folder: Path) -> list[str]:
    (folder / "config.json").unlink()
    return ["no config.json"]


def no_weights(folder: Path) -> list[str]:
    (folder / "model.safetensors").unlink()
    return ["no model.safetensors"]


def no_tokenizer(folder: Path) -> list[str]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return ["no tokenizer", "tokenizer.json"]


def broken_config(folder: Path) -> list[str]:
    path = folder / "config.json"
    path.write_text(path.read_text()[:-10])
    return ["config.json", "not valid JSON"]


def broken_tokenizer(folder: Path) -> list[str]:
    (folder / "tokenizer.json").write_text("{")
    return ["the tokenizer of", "cannot be read"]


def unsupported_family(folder: Path) -> list[str]:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "gpt2"}))
    return ["'gpt2'", "qwen2"]


def other_width(folder: Path) -> list[str]:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    return ["mlp.gate_proj.weight", "(48, 32)", "(64, 32)"]


def truncated_weights(folder: Path) -> list[str]:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return ["model.safetensors", "not a readable safetensors file"]


def missing_key(folder: Path) -> list[str]:
    """The header without one tensor; the bytes stay."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header["model.norm.wight"] = header.pop("model.norm.weight")
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + size :])
    return ["missing model.norm.weight", "unexpected model.norm.wight"]


def reward_model(folder: Path) -> list[str]:
    from r1fast.models.weights import load_model, save_model

    decoder, _ = load_model(folder, scalar_head=True)
    save_model(decoder.config, decoder.state_dict(), folder, scalar_head=True, overwrite=True)
    return ["reward model", "expected a language model"]


@pytest.mark.parametrize(
    "damage",
    [
        no_folder, no_config, no_weights, no_tokenizer, broken_config, broken_tokenizer,
        unsupported_family, other_width, truncated_weights, missing_key, reward_model,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_unloadable_checkpoint(refuse_recipe, base_model: Path, tmp_path: Path, damage: Callable) -> None:
    folder = shutil.copytree(base_model, tmp_path / "checkpoint")
    parts = damage(folder)
    message = refuse_recipe(GRPO, model=folder)
    for part in ["stages.zero.model", str(folder), *parts]:
        assert part in message


def test_model_that_is_neither_a_folder_nor_on_the_hub(refuse_recipe) -> None:
    message = refuse_recipe(GRPO, model="no-such-owner/no-such-model")
    assert "stages.zero.model: no-such-owner/no-such-model" in message and "Hub" in message


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ({**SFT, "kind": "distill", "teacher": "no-such-folder/x/y"}, "teacher"),
        ({**COLLECT, "few_shot": {"examples_files": ["train.jsonl"], "model": "no-such-folder/x/y"}}, "few_shot.model"),
        ({**GRPO, "reward_models": {"rm": {"model": "no-such-folder/x/y"}}}, "reward_models.rm.model"),
        ({**PRETRAIN, "tokenizer": "no-such-folder/x/y"}, "tokenizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_models_are_checked_too(refuse_recipe, stage: dict, key: str) -> None:
    message = refuse_recipe(stage)
    assert f"stages.{stage['name']}.{key}: " in message and "no-such-folder/x/y: no such folder" in message


def test_language_model_as_reward_model(refuse_recipe, base_model: Path) -> None:
    message = refuse_recipe({**GRPO, "reward_models": {"rm": {"model": str(base_model)}}})
    assert "stages.zero.reward_models.rm.model" in message and "expected a reward model" in message


def test_unknown_key_of_an_architecture(refuse_recipe) -> None:
    message = refuse_recipe({**PRETRAIN, "architecture": {**PRETRAIN["architecture"], "hiden_act": "silu"}})
    assert "stages.base.architecture" in message and "'hiden_act'" in message


# The graph of stages


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": "@bsae"}, ["stages.zero.model: @bsae", "base, data, rm"]),
        ({"model": "@zero"}, ["stages.zero.model: @zero", "no earlier stage"]),
        ({"model": "@data"}, ["stages.zero.model: @data", "makes data", "expected a stage that makes model"]),
        ({"model": "@rm"}, ["stages.zero.model: @rm", "makes reward model"]),
        ({"train_files": ["train.jsonl", "@base"]}, ["stages.zero.train_files: @base", "makes model"]),
        ({"reward_models": {"h": {"model": "@base"}}}, ["stages.zero.reward_models.h.model: @base", "reward model"]),
    ],
    ids=["misspelt", "itself", "data-for-model", "reward-model-for-model", "model-for-data", "model-for-reward-model"],
)
def test_missing_artifact(refuse_recipe, changes: dict, parts: list[str]) -> None:
    reject = {"name": "data", "kind": "reject", "train_files": ["train.jsonl"]}
    rewarder = {"name": "rm", "kind": "reward_model", "train_files": ["pairs.jsonl"], "loss": "pairwise"}
    message = refuse_recipe(PRETRAIN, reject, rewarder, {**GRPO, **changes})
    for part in parts:
        assert part in message


def test_missing_artifact_as_the_model_of_the_recipe(refuse_recipe) -> None:
    assert "stages.zero.model: @bsae names no earlier stage" in refuse_recipe(PRETRAIN, GRPO, model="@bsae")


def test_no_model_at_all(refuse, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    config = write_recipe(tmp_path / "mine.yaml", GRPO)
    assert "stages.zero.model: missing" in refuse("--config", config, "--output-dir", tmp_path / "run")


@pytest.mark.parametrize("model", ["@base", None], ids=["of-the-stage", "of-the-recipe"])
def test_stage_whose_input_is_neither_there_nor_to_be_run(refuse_recipe, model: str | None) -> None:
    sections = {} if model else {"model": "@base"}
    message = refuse_recipe(PRETRAIN, {**GRPO, "model": model}, argv=("--stages", "zero"), **sections)
    assert "stages.zero.model: @base" in message and "base/model does not exist" in message


def test_unknown_stage_on_the_command_line(refuse_recipe) -> None:
    message = refuse_recipe(PRETRAIN, GRPO, argv=("--stages", "base,zeor"))
    assert "--stages" in message and "'zeor'" in message and "base, zero" in message


# The run directory


def test_output_where_a_file_is(refuse_recipe, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert "--output-dir" in (message := refuse_recipe(GRPO)) and "is a file" in message


def test_output_under_a_file(refuse, base_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    config = write_recipe(tmp_path / "mine.yaml", GRPO, model={"path": str(base_model)})
    message = refuse("--config", config, "--output-dir", tmp_path / "file" / "run")
    assert f"--output-dir {tmp_path / 'file' / 'run'}: cannot write" in message


def test_output_that_holds_files(refuse_recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    assert "holds files already" in (message := refuse_recipe(GRPO)) and "--resume" in message


def test_resume_of_nothing(refuse, refuse_recipe, tmp_path: Path) -> None:
    assert f"{tmp_path / 'run'} holds no run" in refuse("--resume", "--output-dir", tmp_path / "run")
    assert "runs/latest holds no run" in refuse("--resume")
    assert "holds no run" in refuse_recipe(GRPO, argv=("--resume",))


def test_resume_with_a_recipe_that_the_run_did_not_write(refuse, base_model: Path, tmp_path: Path) -> None:
    from r1fast.config import dump_recipe, load_recipe

    config = write_recipe(tmp_path / "mine.yaml", GRPO, model={"path": str(base_model)})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_recipe(load_recipe(str(config), [])))
    message = refuse("--resume", "--output-dir", tmp_path / "run", "stages.zero.max_steps=7")
    assert "config.yaml was edited or damaged since the run wrote it" in message


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--config", "tinny"], "'tiny'"),
        (["stages.zero.max_stepz=3"], "'max_steps'"),
        (["stages.zero.train_files=[a"], "not valid YAML"),
        (["--outptu-dir", "x"], "outptu-dir: unknown key; did you mean '--output-dir'?"),
        (["zero"], "'zero'"),
    ],
    ids=["recipe", "key", "yaml", "option", "word"],
)
def test_wrong_command_line(refuse, argv: list[str], part: str) -> None:
    assert part in refuse(*argv)


def test_deepseek_checkpoint_with_a_missing_expert(refuse_recipe, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.tiny_checkpoint import DEEPSEEK_V3

    folder = write_checkpoint(tmp_path / "checkpoint", **DEEPSEEK_V3)
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in refuse_recipe(GRPO, model=folder)


def test_offload_without_a_gpu(refuse_recipe) -> None:
    message = refuse_recipe({**GRPO, "beta": 0.1}, trainer={"offload": ["reference"]})
    assert "trainer.offload: there is no CUDA device here" in message
