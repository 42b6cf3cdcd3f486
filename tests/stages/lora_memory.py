"""python -m tests.stages.lora_memory FOLDER {full,lora} {float32,bfloat16}: MB of host memory that two SFT steps take.

Of a Llama of 97M parameters, which FOLDER gets, and 256 tokens a step, activations recomputed: the peak above what the
process held before, and what is held between steps.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from r1fast.parallel.mesh import init_distributed
from r1fast.stages.packed import Example
from r1fast.stages.sft import cross_entropy
from r1fast.stages.training import Trainer
from tests import zoo
from tests.stages.gradient_cases import context
from tests.stages.load_cases import Peak, status

MODEL = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "max_position_embeddings": 1024,
}  # fmt: skip


def measure(folder: Path, kind: str, dtype: str) -> dict[str, float]:
    if not folder.exists():
        zoo.write_checkpoint(folder, **zoo.fields("llama", **MODEL))
    dist = init_distributed("cpu")
    options: dict[str, Any] = {"lora": {"r": 16, "alpha": 32}} if kind == "lora" else {}
    trainer = {"activation_checkpointing": True}
    ctx = context({"name": "sft", "kind": "sft", "train_files": ["-"], **options}, dist, str(folder), trainer=trainer)
    ctx.recipe.model.dtype = dtype  # type: ignore[assignment]
    examples = [Example([5], list(range(6, 134))) for _ in range(2)]
    torch.ones(1).requires_grad_().sum().backward()  # what the first backward pass loads
    with Peak() as peak:
        model, _ = ctx.load(str(folder), trainable=True)
        learner = Trainer(ctx, model, 2)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            learner.update(examples, cross_entropy(examples, ctx))
            seconds.append(time.perf_counter() - start)
        held = status("VmRSS") - peak.before
    dist.close()
    return {"peak": peak.megabytes, "held": held, "seconds": min(seconds)}


if __name__ == "__main__":
    path, *how = sys.argv[1:]
    torch.set_num_threads(1)
    found = measure(Path(path), *how)
    print(*how, *(f"{name} {value:.1f}" for name, value in found.items()))
