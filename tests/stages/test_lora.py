"""Stages that train adapters: what they hand on, the reference, the sampler, resume, two ranks."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from r1fast.models.lora import LoraConfig, add_adapters, init_adapters, merged
from r1fast.models.weights import load_model, save_model
from r1fast.parallel.mesh import init_distributed
from r1fast.parallel.parallelize import generation_phase, local_parts
from r1fast.rollout.vllm import whole_state
from r1fast.stages.context import StageContext
from r1fast.stages.sampler import BackgroundSampler
from tests.parallel.tiny_model import full
from tests.stages import lora_cases
from tests.stages.conftest import SHORT, metrics
from tests.stages.gradient_cases import context
from tests.tiny_checkpoint import DEEPSEEK_V3, GRPO, PRETRAIN, SFT, write_checkpoint, write_jsonl

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


@pytest.fixture
def policy(base: Path) -> Iterator[tuple[StageContext, Any, Any, torch.Tensor]]:
    """A sharded model whose adapter does something, and its logits."""
    dist = init_distributed("cpu")
    options = {"rewards": {"length": 1.0}, "prompt_template": "plain", "max_completion_length": 6}
    ctx = context({**GRPO, **options, "lora": LORA}, dist, str(base), rollout={"async_steps": 1})
    model, tokenizer = ctx.load(str(base), trainable=True)
    lora_cases.fill_b(model, local_parts(model, dist))
    with torch.no_grad():
        logits_TV = model(IDS_T, CU_SEQLENS)
    assert (logits_TV - logits(base)).abs().max() > 0.01
    yield ctx, model, tokenizer, logits_TV
    dist.close()


def test_a_sampler_ahead_has_the_adapter(policy) -> None:
    ctx, model, tokenizer, logits_TV = policy
    sampler = BackgroundSampler(ctx, model, tokenizer)
    sampler.generate([{"prompt": "one ?"}], n=1, temperature=1.0, seed=0)
    torch.testing.assert_close(sampler.model(IDS_T, CU_SEQLENS), logits_TV, rtol=1e-4, atol=1e-5)


def test_what_samples_gets_merged_weights_and_the_base_stays(policy, base: Path, tmp_path: Path) -> None:
    """What vLLM is given has the names of the base, and the adapter inside; the shards keep every bit."""
    _, model, _, logits_TV = policy
    before = {name: full(tensor) for name, tensor in model.state_dict().items()}
    for _ in range(3):
        with generation_phase(model), merged(model):
            pushed = {name: tensor.clone() for name, tensor in whole_state(model).items()}
    save_model(model.config, pushed, tmp_path / "pushed")
    torch.testing.assert_close(logits(tmp_path / "pushed"), logits_TV, rtol=1e-4, atol=1e-5)
    names = [set(load_file(folder / "model.safetensors")) for folder in (tmp_path / "pushed", base)]
    assert names[0] == names[1]
    assert all(torch.equal(full(tensor), before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():  # the adapter is live again
        torch.testing.assert_close(model(IDS_T, CU_SEQLENS), logits_TV, rtol=0, atol=0)


def test_other_stages_in_bfloat16(base_model: Path, train: Callable[..., Any], tmp_path: Path) -> None:
    """A reward model whose head is trained and saved beside; a student; the base in bf16, adapters in fp32."""
    pairs = [{"prompt": f"{i} ?", "chosen": "red red", "rejected": "blue"} for i in range(6)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    judge = {"name": "judge", "kind": "reward_model", "train_files": ["pairs.jsonl"], "loss": "pairwise"}
    judge |= {"batch_size": 2, "learning_rate": 1e-2, "num_train_epochs": 5, "lora": LORA, "eval_fraction": 0.0}
    student = {**TUNED, "name": "student", "kind": "distill"}
    zero = {**ZERO, "reward_models": {"judge": {"model": "@judge"}}, "model": "@student"}
    train(base_model, judge, student, zero, dtype="bfloat16")
    run = tmp_path / "run"
    head = load_file(run / "judge" / "model" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert head.dtype == torch.float32 and head.abs().max() > 0
    assert metrics(run / "judge", "accuracy")[-1] == 1
    assert load_model(run / "judge" / "model")[0].scalar_head
    adapter = load_file(run / "zero" / "model" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())
    contents = json.loads(next((run / "zero" / "checkpoints").glob("*/contents.json")).read_text())
    assert {entry["dtype"] for entry in contents.values()} == {"float32"}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**SFT, "lora": {"r": 0}}, "stages.tuned.lora.r: Input should be greater than 0; got 0"),
        ({**SFT, "lora": {"dropout": 1.0}}, "stages.tuned.lora.dropout: Input should be less than 1"),
        ({**SFT, "lora": {"alhpa": 3}}, "stages.tuned.lora.alhpa: unknown key; did you mean 'alpha'?"),
        ({**SFT, "lora": {"target_modules": ["q_prj"]}}, "lora.target_modules: 'q_prj' is no linear layer of this"),
        ({**SFT, "lora": {"target_modules": ["lm_head"]}}, "'lm_head' is no linear layer of this model; expected"),
        ({**SFT, "lora": {"target_modules": []}}, "stages.tuned.lora.target_modules"),
        ({**PRETRAIN, "lora": {}}, "lora does not apply: pretrain starts from scratch"),
        ({**GRPO, "lora": {}, "beta": 0.1, "ref_model_sync_steps": 2}, "ref_model_sync_steps does not apply with lora"),
        ({**SFT, "lora": {}, "router_bias_update_rate": 0.1}, "router_bias_update_rate does not apply with lora"),
        ({"name": "e", "kind": "evaluate", "eval_files": ["train.jsonl"], "lora": {}}, "stages.e.lora: unknown key"),
    ],
)  # fmt: skip
def test_refused(refuse_recipe: Callable[..., str], stage: dict[str, Any], message: str) -> None:
    assert message in refuse_recipe(stage)


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    """Gradients, moments and fp32 weights of the base are not there."""
    peaks = {}
    for kind in ("full", "lora"):
        command = [sys.executable, "-m", "tests.stages.lora_memory", str(tmp_path / "model"), kind, "float32"]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        peaks[kind] = float(result.stdout.split()[3])
    assert peaks["lora"] < 0.6 * peaks["full"], peaks
