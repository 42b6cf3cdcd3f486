"""python -m r1fast.export: the step's weights as transformers loads them, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from r1fast import train
from r1fast.export import main
from r1fast.models.weights import load_model
from tests.tiny_checkpoint import DEEPSEEK_V3, GRPO, PRETRAIN, PROMPTS, SFT, write_checkpoint, write_jsonl, write_recipe

IDS_T, CU_SEQLENS = torch.arange(5, 45), torch.tensor([0, 40], dtype=torch.int32)
LORA = {"r": 4, "target_modules": ["kv_b_proj", "experts.down_proj"]}
EVERY_STEP = {"save_steps": 1, "save_total_limit": 9, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages that train each kind of model for two steps and keep both."""
    folder = tmp_path_factory.mktemp("export")
    model = write_checkpoint(folder / "start", **DEEPSEEK_V3)
    write_jsonl(folder / "train.jsonl", PROMPTS)
    (folder / "even.py").write_text(
        "def even(completion_ids, **_):\n    return [ids[0] % 2 for ids in completion_ids]\n"
    )
    write_jsonl(folder / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["answer"]} for row in PROMPTS])
    stages: list[dict[str, Any]] = [
        {**PRETRAIN, **EVERY_STEP, "train_files": [str(folder / "sft.jsonl")], "max_steps": 2},
        {**GRPO, **EVERY_STEP, "max_steps": 2, "num_generations": 8, "beta": 0.1, "rewards": {"even.py:even": 1.0}},
        {**SFT, **EVERY_STEP, "batch_size": 10, "num_train_epochs": 1, "lora": LORA},
    ]
    recipe = write_recipe(folder / "recipe.yaml", *stages, model={"path": str(model)})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(["--config", str(recipe), "--output-dir", str(folder / "run")]) == 0
    return folder / "run"


def logits(folder: Path) -> torch.Tensor:
    return load_model(folder, dtype="float32")[0](IDS_T, CU_SEQLENS)


@pytest.mark.parametrize("stage", ["base", "zero"])
def test_the_last_step_is_the_model_and_the_one_before_another(run: Path, stage: str, tmp_path: Path) -> None:
    for step in ("1", "step_2"):
        assert main([str(run / stage / step), str(tmp_path / step), "--dtype", "float32"]) == 0
    model = run / stage / "model"
    assert torch.equal(logits(tmp_path / "step_2"), logits(model))
    assert not torch.equal(logits(tmp_path / "1"), logits(model))
    assert {file.name for file in (tmp_path / "1").iterdir()} == {file.name for file in model.iterdir()}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "1")(IDS_T[None]).logits[0]
    torch.testing.assert_close(theirs, logits(tmp_path / "1"), rtol=1e-4, atol=1e-5)


def test_folders_above_the_output_are_made(run: Path, tmp_path: Path) -> None:
    for source, output in (("zero", "a/b/whole"), ("zero/1", "c/step")):
        assert main([str(run / source), str(tmp_path / output)]) == 0
        assert (tmp_path / output / "config.json").is_file()


def test_dtype_is_that_of_every_weight_but_the_routers_bias(run: Path, tmp_path: Path) -> None:
    for source, output in (("zero/2", "checkpoint"), ("zero", "model")):
        assert main([str(run / source), str(tmp_path / output)]) == 0
        assert json.loads((tmp_path / output / "config.json").read_text())["dtype"] == "bfloat16"
        model, _ = load_model(tmp_path / output)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert {b.dtype for name, b in model.named_buffers() if "bias" in name} == {torch.float32}
    assert torch.equal(logits(tmp_path / "checkpoint"), logits(tmp_path / "model"))
    torch.testing.assert_close(logits(tmp_path / "model"), logits(run / "zero" / "model"), rtol=0.1, atol=0.05)


def test_an_adapter_alone_or_in_its_base(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = run / "tuned"
    assert main([str(tuned / "checkpoints" / "step_2"), str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    merged = {"model": str(tuned), "step": str(tuned / "2")}
    for name, source in merged.items():
        arguments = [source, str(tmp_path / name), "--merge-and-unload", "--dtype", "float32"]
        assert main(arguments) == 0
    for name in ("adapter", *merged):
        torch.testing.assert_close(logits(tmp_path / name), logits(tuned / "model"), rtol=1e-4, atol=1e-5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "step")
    capsys.readouterr()
    assert main([str(tuned), str(tmp_path / "again")]) == 2
    assert "is a LoRA folder as it is; for a whole model add --merge-and-unload" in capsys.readouterr().err
    assert main([str(tuned / "2"), str(tmp_path / "again"), "--dtype", "float32"]) == 2
    assert "--dtype is that of a whole model, and tuned trains an adapter: add" in capsys.readouterr().err


def test_a_stage_that_has_no_model_yet_gives_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "zero" / "model")
    assert main([str(tmp_path / "run" / "zero"), str(tmp_path / "newest"), "--dtype", "float32"]) == 0
    assert torch.equal(logits(tmp_path / "newest"), logits(run / "zero" / "model"))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("zero/7", "no checkpoint of step 7; kept are those of steps 1, 2"),
        ("none/2", "no stage of this run that trains; expected one of base, zero, tuned"),
        ("../zero", "holds no run (no config.yaml); expected RUN/STAGE or RUN/STAGE/STEP"),
    ],
)
def test_refusals(run: Path, source: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run / source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_and_a_folder_that_is_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = next((tmp_path / "run" / "zero" / "checkpoints" / "step_1").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert main([str(tmp_path / "run" / "zero" / "1"), str(tmp_path / "out")]) == 2
    assert "is not usable" in capsys.readouterr().err
    assert main([str(run / "zero"), str(tmp_path)]) == 2
    assert f"{tmp_path} is there already" in capsys.readouterr().err
