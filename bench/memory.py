"""The estimate of r1fast/memory.py beside what stages take: peaks of resident memory by phase, above what the process
has before it loads a model. On the CPU, a process for each recipe, with freed memory given back to the system at once.

    OMP_NUM_THREADS=1 python bench/memory.py [dense] [moe] [pretrain] [key=value ..]
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEXT = " ".join(WORDS[i * i % len(WORDS)] for i in range(60))
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
DENSE = {
    "model_type": "llama", "hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 14,
    "num_attention_heads": 10, "num_key_value_heads": 5, "vocab_size": 16000, "max_position_embeddings": 1024,
}  # fmt: skip
MOE = {
    "model_type": "qwen3_moe", "hidden_size": 384, "intermediate_size": 768, "moe_intermediate_size": 192,
    "num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 8, "num_attention_heads": 6, "head_dim": 64,
    "num_key_value_heads": 2, "vocab_size": 8000, "max_position_embeddings": 1024,
}  # fmt: skip


def recipe_of(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(recipe, the fields of a model to be written, with random weights)."""
    rows = [{"text": TEXT}] * 64
    prompts = [{"prompt": "one " * 40, "answer": "1"} for _ in range(64)]
    for file, content in (("rows.jsonl", rows), ("prompts.jsonl", prompts)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in content))
    train = {"max_steps": 2, "learning_rate": 1e-5}
    stages = {
        "pretrain": {"kind": "pretrain", "train_files": ["rows.jsonl"], "architecture": {**MOE, "vocab_size": 300},
                     "vocab_size": 300, "batch_size": 32, **train},
        "moe": {"kind": "sft", "train_files": ["rows.jsonl"], "batch_size": 16, **train},
        "dense": {"kind": "grpo", "train_files": ["prompts.jsonl"], "prompts_per_step": 4, "num_generations": 8,
                  "max_prompt_length": 64, "max_completion_length": 32, "beta": 0.01,
                  "max_tokens_per_microbatch": 2048, "rewards": {"format": 1.0}, "prompt_template": "plain", **train},
    }  # fmt: skip
    fields = {"dense": DENSE, "moe": MOE}.get(name)
    model = {"path": str(folder / "model")} if fields else {}
    return {"name": name, "model": model, "stages": [{"name": name, **stages[name]}]}, fields


def tokenizer() -> Any:
    from r1fast.data.tokenizer import train_tokenizer

    return train_tokenizer([TEXT] * 64, vocab_size=300)


def write_model(folder: Path, fields: dict[str, Any]) -> None:
    import torch

    from r1fast.models.decoder import Decoder
    from r1fast.models.model_config import ModelConfig
    from r1fast.models.weights import save_model

    decoder = Decoder(ModelConfig.from_dict({**fields, "eos_token_id": tokenizer().eos_token_id}))
    decoder.init_weights(torch.Generator().manual_seed(0))
    folder.mkdir()
    save_model(decoder.config, decoder.state_dict(), folder, tokenizer())


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(name: str, overrides: list[str]) -> None:
    """In a process of its own: run the stage, and print the peaks."""
    import yaml

    from r1fast.config import load_recipe
    from r1fast.stages.context import StageContext
    from r1fast.train import main

    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        recipe, fields = recipe_of(name, Path())
        recipe["model"] = recipe["model"] and {"path": "model"}
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        if fields:
            subprocess.run([sys.executable, __file__, "--write", name], check=True)
        peaks: dict[str, int] = {}
        baseline: list[int] = []

        @contextmanager
        def watched(inner: Any, label: str) -> Any:
            if not baseline:
                baseline.append(resident("VmRSS"))
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
            with inner:
                yield
            peaks[label] = max(peaks.get(label, 0), resident("VmHWM") - baseline[0])

        phase, load = StageContext.phase, StageContext.load
        labels = {"logprobs": "score", "evaluate": "generate"}

        def watched_phase(ctx: Any, label: str) -> Any:
            return phase(ctx, label) if ctx._in_phase else watched(phase(ctx, label), labels.get(label, label))

        StageContext.phase = watched_phase
        StageContext.load = lambda ctx, *a, **k: _inside(watched(phase(ctx, "load"), "load"), load, ctx, *a, **k)
        if not fields:
            from r1fast.stages import pretrain

            build = pretrain.run
            pretrain.run = lambda ctx: (baseline.append(resident("VmRSS")), build(ctx))[1]
        assert main(["--config", "recipe.yaml", "--output-dir", "run", *overrides]) == 0
        loaded = load_recipe("recipe.yaml", overrides)
        from r1fast.memory import Estimator

        (estimate,) = [Estimator(loaded, 1, "cpu").of_stage(stage) for stage in loaded.stages]
        print(
            json.dumps(
                {"baseline": baseline[0], "peaks": peaks, "estimate": {x.name: x.bytes for x in estimate.phases}}
            )
        )


def _inside(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    with context:
        return function(*args, **kwargs)


def main() -> None:
    names = [x for x in sys.argv[1:] if "=" not in x] or ["pretrain", "moe", "dense"]
    overrides = [x for x in sys.argv[1:] if "=" in x]
    print("| recipe | phase | estimate MB | measured MB | ratio | terms |\n|---|---|---|---|---|---|")
    for name in names:
        command = [sys.executable, __file__, "--measure", name, *overrides]
        done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found = json.loads(done.stdout.splitlines()[-1])
        for phase, terms in found["estimate"].items():
            estimated, measured = sum(terms.values()) / 1e6, found["peaks"].get(phase, 0) / 1e6
            shown = ", ".join(f"{term} {size / 1e6:.0f}" for term, size in terms.items() if size > 5e5)
            ratio = estimated / measured if measured else float("nan")
            print(f"| {name} | {phase} | {estimated:.0f} | {measured:.0f} | {ratio:.2f} | {shown} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3:])
    elif sys.argv[1:2] == ["--write"]:
        write_model(Path("model"), recipe_of(sys.argv[2], Path())[1] or {})
    else:
        main()
