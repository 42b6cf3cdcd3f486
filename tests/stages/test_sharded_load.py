"""Each of two ranks reads its part of a checkpoint and writes its part of an export: the same tensors, less memory."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1fast.models.weights import load_model, save_model
from r1fast.parallel.mesh import init_distributed
from r1fast.stages import context as context_module
from tests import zoo
from tests.forks import Forks
from tests.stages.conftest import SHORT
from tests.stages.gradient_cases import SFT, context
from tests.stages.load_cases import embedding_gradient
from tests.zoo import write_checkpoint

LOAD_CASES = "tests.stages.load_cases"
# Experts and vocabulary divide by no two ranks; one expert leaves rank 1 none.
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": zoo.fields("deepseek_v3", n_routed_experts=5),
    "qwen3_moe": zoo.fields("qwen3_moe", num_experts=1, num_experts_per_tok=1),
    "qwen2-tied": zoo.fields("qwen2"),
    "llama": zoo.fields("llama"),
}


@pytest.fixture(scope="module")
def folder(made_once: Callable[..., Path]) -> Path:
    return made_once("sharded_load", write_models)


def write_models(folder: Path) -> None:
    for name, fields in MODELS.items():
        write_checkpoint(folder / "sound" / name, **fields)
    write_checkpoint(folder / "damaged", **MODELS["llama"])
    edit(folder / "sound" / "llama", lambda name, tensor: tensor.bfloat16())
    edit(folder / "damaged", lambda name, t: with_nan_at_the_end(t) if "embed" in name else t)


def edit(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    file = folder / "model.safetensors"
    stored = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})


def with_nan_at_the_end(tensor: Tensor) -> Tensor:
    tensor[-1, 3] = float("nan")
    return tensor


@pytest.fixture(scope="module")
def two_ranks(folder: Path, made_once: Callable[..., Path], forks: Forks) -> dict[str, Any]:
    made_once("load_cases", lambda _: forks.run(LOAD_CASES, "cases", folder / "output", folder, ranks=2))
    return torch.load(folder / "output")


@pytest.mark.dist
@pytest.mark.parametrize("one_unit_numel", [10**9, 0], ids=["one-unit", "units"])
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_read_and_write_what_one_does(folder: Path, two_ranks, name: str, one_unit_numel: int) -> None:
    expected = load_model(folder / "sound" / name, dtype="float32")[0].state_dict()
    state, gradient = two_ranks["same"][f"{name}-{one_unit_numel}"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    plain = load_model(folder / "sound" / name, dtype="float32")[0]
    torch.testing.assert_close(gradient, 2 * embedding_gradient(plain))  # summed over two ranks
    saved = folder / f"{name}-{one_unit_numel}" / "sft" / "model"
    assert len(list(saved.glob("model-*.safetensors"))) > 2
    again = load_model(saved)[0].state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())


@pytest.mark.dist
def test_what_one_rank_finds_every_rank_refuses(folder: Path, two_ranks) -> None:
    """The last row is rank 1's."""
    first, second = two_ranks["refused"]
    assert first == second
    assert f"stages.sft: {folder}/damaged/model.safetensors: model.embed_tokens.weight holds NaN or Inf" in first


@pytest.mark.dist
def test_a_full_disk_on_one_rank_stops_every_rank(two_ranks) -> None:
    first, second = two_ranks["disk_full"]
    assert first == second
    error, left, not_gathered = first
    assert "No space left on device" in error and left == [] and not_gathered == 0


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2-tied", "llama"])
def test_a_frozen_model_is_kept_in_the_dtype_of_its_forward_pass(folder: Path, name: str) -> None:
    """And computes, to the bit, what it would from weights in float32."""
    dist = init_distributed("cpu")
    path = str(folder / "sound" / name)
    ctx = context(SFT, dist, path)
    ctx.recipe.model.dtype = "bfloat16"
    frozen, _ = ctx.load(path, trainable=False)
    trained, _ = ctx.load(path, trainable=True)
    dtypes = {name: tensor.dtype for name, tensor in frozen.state_dict().items() if "correction_bias" not in name}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert {tensor.dtype for tensor in trained.parameters()} == {torch.float32}
    ids, cu_seqlens = torch.tensor([5, 6, 7, 60, 3, 9, 11]), torch.tensor([0, 4, 7], dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(frozen(ids, cu_seqlens), trained(ids, cu_seqlens))
    dist.close()


@pytest.mark.slow
@pytest.mark.dist
def test_memory_of_two_ranks(tmp_path: Path, forks: Forks) -> None:
    """427 MB, most of it stacked experts: what a rank needs to load it, above what it keeps, and to save it."""
    decoder = zoo.decoder(
        "qwen3_moe", vocab_size=16_000, hidden_size=1024, num_hidden_layers=3, num_attention_heads=8, head_dim=64,
        num_experts=32, moe_intermediate_size=256, intermediate_size=1024,
    )  # fmt: skip
    write_checkpoint(tmp_path / "model", **zoo.fields("qwen2"))  # for its tokenizer
    save_model(decoder.config, decoder.state_dict(), tmp_path / "model", overwrite=True)
    del decoder
    for name, ranks in (("alone", 1), ("both", 2)):
        forks.run(LOAD_CASES, "memory", tmp_path / name, tmp_path / "model", ranks=ranks)
    (alone,), both = torch.load(tmp_path / "alone"), torch.load(tmp_path / "both")
    assert alone["held"] > 400
    for rank in both:
        assert rank["load"] < 0.65 * alone["load"]
        assert rank["load"] < rank["held"] + 100
        assert rank["save"] < 150
    assert alone["load"] < alone["held"] + 100 and alone["save"] < 150


@pytest.mark.usefixtures("stage_files")
def test_a_model_is_gone_before_the_next_is_read(train, taught_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier stage's with its optimizer, and a teacher's; whenever Python would collect them."""
    read, load = context_module.Checkpoint, context_module.StageContext.load
    loaded: list[weakref.ref] = []
    alive: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(parameter() is not None for parameter in loaded))
        return read(*arguments, **options)

    def noted(ctx: Any, *arguments: Any, **options: Any) -> Any:
        model, tokenizer = load(ctx, *arguments, **options)
        loaded.extend(map(weakref.ref, model.parameters()))
        return model, tokenizer

    monkeypatch.setattr(context_module, "Checkpoint", counted)
    monkeypatch.setattr(context_module.StageContext, "load", noted)
    tuned = {"name": "tuned", "kind": "sft", "train_files": ["sft.jsonl"], "max_steps": 1}
    small = {"name": "small", "kind": "distill", "train_files": ["questions.jsonl"], "teacher": "@tuned", **SHORT}
    gc.disable()
    try:
        train(taught_model, tuned, {**small, "response_format": "think_answer", "max_steps": 1, "min_reward": -1.0})
    finally:
        gc.enable()
    assert alive == [0, 0, 0] and loaded
