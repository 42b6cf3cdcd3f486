"""Models with adapters on any number of ranks: logits, gradients, what is saved. Run on two by rank_cases.py."""

from pathlib import Path
from typing import Any

import torch

from r1fast.models.lora import adapted, init_adapters
from r1fast.parallel import parallelize
from r1fast.parallel.mesh import Dist
from r1fast.parallel.parallelize import local_parts
from tests import zoo
from tests.parallel.tiny_model import full
from tests.stages.gradient_cases import context

MODELS = {
    "deepseek_v3": zoo.fields("deepseek_v3", n_routed_experts=5),
    "phi3-tied": zoo.fields("phi3", tie_word_embeddings=True),  # with projections that share an A
}
LORA = {"r": 3, "alpha": 12}
STAGE = {"name": "sft", "kind": "sft", "train_files": ["-"], "lora": LORA}


def fill_b(model: Any, parts: Any) -> None:
    """Adapters that do something: B as init_adapters fills A."""
    as_a = ((name.replace("_lora.B", "_lora.A"), first, rows) for name, first, rows in parts if "_lora.B" in name)
    shapes = {name.replace("_lora.B", "_lora.A"): p for name, p in model.named_parameters() if "_lora.B" in name}

    class OfB(torch.nn.Module):
        def named_parameters(self, **_: Any) -> Any:  # type: ignore[override]
            return shapes.items()

    init_adapters(OfB(), as_a, seed=7)


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every adapter, of the same tokens on every rank."""
    ids, cu_seqlens = torch.tensor([5, 6, 7, 60, 3, 9, 11]), torch.tensor([0, 4, 7], dtype=torch.int32)
    logits = model.train()(ids, cu_seqlens)
    logits.square().sum().backward()
    found = {f"{name} {part}": full(getattr(lora, part).grad) for name, _, _, lora in adapted(model) for part in "AB"}
    assert all(param.grad is None for name, param in model.named_parameters() if "_lora." not in name)
    return logits.detach(), found


def run_case(dist: Dist, path: Path, one_unit_numel: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer = {"activation_checkpointing": one_unit_numel == 0}
    for kind in ("merged", "adapter"):
        stage = {**STAGE, "lora": {**LORA, "merge_and_unload": kind == "merged"}}
        ctx = context(stage, dist, str(path), trainer=trainer)
        ctx.run_dir = path.with_name(f"{path.name}-{one_unit_numel}-{kind}")
        ctx.run_dir.mkdir(exist_ok=True)
        model, tokenizer = ctx.load(str(path), trainable=True)
        fill_b(model, local_parts(model, dist))
        ctx.save(model, tokenizer)
    return gradients(model)


def run_cases(dist: Dist, folder: Path) -> dict[str, Any]:
    """FOLDER holds MODELS; each as one FSDP unit and as several."""
    found = {}
    defaults = parallelize.parallelize.__kwdefaults__
    block_bytes, parallelize.BLOCK_BYTES = parallelize.BLOCK_BYTES, 1_500  # blocks end inside of weights
    before = defaults["one_unit_numel"]
    for name in MODELS:
        for defaults["one_unit_numel"] in (10**9, 0):
            numel = defaults["one_unit_numel"]
            found[f"{name}-{numel}"] = run_case(dist, folder / name, numel)
    parallelize.BLOCK_BYTES, defaults["one_unit_numel"] = block_bytes, before
    return found
