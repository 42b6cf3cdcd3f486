"""Stages that train adapters: what they hand on, the reference, the sampler, resume, two ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from r1fast.models.lora import LoraConfig, add_adapters, init_adapters
from r1fast.models.weights import load_model
from tests.stages import lora_cases
from tests.stages.conftest import SHORT, metrics
from tests.tiny_checkpoint import DEEPSEEK_V3, GRPO, SFT, write_checkpoint

LORA = {"r": 4, "alpha": 16}
TUNED = {**SFT, "lora": LORA, "learning_rate": 2e-2, "batch_size": 2, "num_train_epochs": 4}
ZERO = {
    **GRPO, **SHORT, "train_files": ["questions.jsonl"], "rewards": {"even.py:even": 1.0}, "learning_rate": 2e-2,
    "beta": 0.1, "max_steps": 3, "num_generations": 4, "lora": LORA,
}  # fmt: skip
EVEN = (
    "def even(completion_ids, **_):\n    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]\n"
)
IDS_T, CU_SEQLENS = torch.arange(5, 45), torch.tensor([0, 40], dtype=torch.int32)


@pytest.fixture(autouse=True)
def files(stage_files: None, tmp_path: Path) -> None:
    (tmp_path / "even.py").write_text(EVEN)


@pytest.fixture(scope="module", params=["dense-tied", "moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    if request.param == "dense-tied":
        return base_model
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "base", **DEEPSEEK_V3)


def logits(folder: Path) -> torch.Tensor:
    return load_model(folder)[0](IDS_T, CU_SEQLENS)


def peft_logits(folder: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = json.loads((folder / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, folder)(IDS_T[None]).logits[0]


def test_a_chain_of_adapters(base: Path, train: Callable[..., Any], tmp_path: Path) -> None:
    whole = {**ZERO, "name": "whole", "model": "@zero", "lora": {**LORA, "merge_and_unload": True}, "max_steps": 2}
    judged = {"name": "judged", "kind": "evaluate", "model": "@zero", "eval_files": ["test.jsonl"], **SHORT}
    found = train(base, TUNED, {**ZERO, "model": "@tuned"}, whole, judged, dtype="float32")
    run = tmp_path / "run"
    assert "pass@1" in found["judged"]["eval_after"]

    tuned, zero = (run / name / "model" for name in ("tuned", "zero"))
    for folder, on in ((tuned, base), (zero, tuned)):
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(on)
        assert not (folder / "model.safetensors").exists()
        assert (logits(folder) - logits(on)).abs().max() > 0.01
    torch.testing.assert_close(logits(tuned), peft_logits(tuned), rtol=1e-4, atol=1e-5)
    # The whole one is loaded by transformers alone.
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(run / "whole" / "model")(IDS_T[None]).logits[0]
    torch.testing.assert_close(logits(run / "whole" / "model"), merged, rtol=1e-4, atol=1e-5)
    assert not (run / "whole" / "model" / "adapter_config.json").exists()

    losses = metrics(run / "tuned", "loss")
    assert losses[-1] < losses[0]
    for name in ("zero", "whole"):
        # The reference is what the stage began with; what samples has the adapter of every step.
        kl = metrics(run / name, "kl")
        assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4
        assert max(metrics(run / name, "sampling/sampling_logp_difference/max")) < 1e-4


@pytest.mark.dist
@pytest.mark.parametrize("one_unit_numel", [10**9, 0], ids=["one-unit", "units"])
@pytest.mark.parametrize("name", lora_cases.MODELS)
def test_two_ranks(two_ranks: dict[str, Any], lora_models: Path, name: str, one_unit_numel: int) -> None:
    found, case = two_ranks["lora"][0], f"{name}-{one_unit_numel}"
    plain, _ = load_model(lora_models / name)
    add_adapters(plain, LoraConfig(**lora_cases.LORA))
    parts = [(key, 0, tensor) for key, tensor in plain.state_dict().items()]
    init_adapters(plain, parts, seed=0)
    lora_cases.fill_b(plain, parts)
    logits, expected = lora_cases.gradients(plain)
    torch.testing.assert_close(found[case][0], logits, rtol=1e-4, atol=1e-5)
    assert found[case][1].keys() == expected.keys() and len(expected) > 20
    for key, gradient in found[case][1].items():
        torch.testing.assert_close(gradient, 2 * expected[key], rtol=1e-3, atol=1e-4)  # summed over two ranks
        assert expected[key].abs().max() > 1e-4, key

    ids, cu_seqlens = torch.tensor([5, 6, 7, 60, 3, 9, 11]), torch.tensor([0, 4, 7], dtype=torch.int32)
    for kind in ("adapter", "merged"):
        saved = lora_models / f"{case}-{kind}" / "sft" / "model"
        torch.testing.assert_close(load_model(saved)[0](ids, cu_seqlens), logits, rtol=1e-4, atol=1e-5)
    assert not (saved / "adapter_config.json").exists()
