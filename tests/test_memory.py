"""The memory estimate: activations against sums by hand, terms against the recipe, and what cannot fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from r1fast import memory
from r1fast.activations import layer_activations
from r1fast.config import ConfigError, load_recipe
from r1fast.models.model_config import ModelConfig
from tests.tiny_checkpoint import write_recipe

FIELDS = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 4096,
}  # fmt: skip
STAGE = {
    "name": "base", "kind": "pretrain", "train_files": ["rows.jsonl"], "architecture": FIELDS, "vocab_size": 300,
    "batch_size": 8, "max_length": 512, "max_steps": 3,
}  # fmt: skip


def estimate(tmp_path: Path, num_ranks: int = 1, **sections: Any) -> dict[str, memory.Phase]:
    stage = STAGE | sections.pop("stage", {})
    recipe = load_recipe(str(write_recipe(tmp_path / "mine.yaml", stage, **sections)), [])
    found = memory.Estimator(recipe, num_ranks, "cpu").of_stage(recipe.stages[0])
    assert found is not None and found.tokens_per_step == 8 * 512
    return {phase.name: phase for phase in found.phases}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_keeps_what_can_be_counted_by_hand(dtype: torch.dtype) -> None:
    """D 64, q and out of 64, k and v of 32 each, F 192; lse of 4 heads and two rstd in fp32."""
    config, item = ModelConfig.from_dict(FIELDS), dtype.itemsize
    kept = {kind: layer_activations(config, 0, 1000, dtype, "cpu", kind).kept for kind in ("none", "selective", "full")}
    #  normed, q k v, out, residual, normed, gate up silu product, the layer's output
    assert kept["none"] == 1000 * ((64 + 128 + 64 + 64 + 64 + 4 * 192 + 64) * item + 4 * 4 + 2 * 4)
    # products: q k v, out and lse, o_proj, gate up, down; the layer's output
    assert kept["selective"] == 1000 * ((128 + 64 + 64 + 2 * 192 + 64 + 64) * item + 4 * 4)
    assert kept["full"] == 1000 * 64 * item


def test_the_terms_follow_the_recipe(tmp_path: Path) -> None:
    one, two = estimate(tmp_path), estimate(tmp_path, num_ranks=2)
    config = ModelConfig.from_dict(FIELDS)
    numel = memory._Model(config).numel
    assert one["load"].bytes == {"weights": 4 * numel} and two["load"].total == 2 * numel
    assert one["update"].bytes["optimizer"] == 8 * numel
    assert two["update"].bytes["activations"] < 0.6 * one["update"].bytes["activations"]
    small = estimate(tmp_path, stage={"max_tokens_per_microbatch": 512})
    assert small["update"].bytes["activations"] < 0.2 * one["update"].bytes["activations"]
    totals = [
        estimate(tmp_path, trainer={"activation_checkpointing": kind})["update"].total
        for kind in ("none", "selective", "full")
    ]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 3
    away = estimate(tmp_path, trainer={"offload": ["optimizer"]})
    assert away["update"].total == one["update"].total - 8 * numel


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path / "mine.yaml", STAGE)), [])
    assert memory.estimate(recipe, ["base"], 1, 1)
    monkeypatch.setattr(memory, "free_memory", lambda device: 20 << 20)
    text = (
        r"stages.base: update needs 0\.\S+ GiB on each of 1 ranks, activations most of it; cpu has 0\.0195 GiB free: "
    )
    with pytest.raises(ConfigError, match=text + "lower max_tokens_per_microbatch, or set trainer.activation_check"):
        memory.estimate(recipe, ["base"], 1, 1)
