"""The memory estimate: activations against sums by hand, terms against the recipe, and what cannot fit."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from r1fast import host_memory, load_model, memory
from r1fast.activations import layer_activations
from r1fast.config import ConfigError, load_recipe
from r1fast.lengths import Lengths
from r1fast.models.lora import LoraConfig
from r1fast.models.model_config import ModelConfig
from r1fast.preflight_models import checkpoint_of
from r1fast.read_once import forget
from r1fast.rollout import engine as engine_module
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams
from r1fast.schema import GRPOStage
from tests.tiny_checkpoint import GRPO, PROMPTS, write_checkpoint, write_jsonl, write_recipe
from tests.zoo import fields

FIELDS = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 4096,
}  # fmt: skip
STAGE = {
    "name": "base", "kind": "pretrain", "train_files": ["rows.jsonl"], "architecture": FIELDS, "vocab_size": 300,
    "batch_size": 8, "max_length": 512, "max_steps": 3,
}  # fmt: skip


WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven"]
ROWS = [{"text": " ".join(WORDS[i * i % 10] for i in range(120))}] * 16  # of one length


def estimate(folder: Path, *stages: dict[str, Any], num_ranks: int = 1, **sections: Any) -> memory.Estimate:
    """Of the last stage."""
    recipe = load_recipe(str(write_recipe(folder / "mine.yaml", *stages, **sections)), [])
    forget()  # files of another test have the same names
    found = memory.Estimator(recipe, num_ranks, "cpu", Lengths(recipe)).of_stage(recipe.stages[-1])
    assert found is not None
    return found


def phases(found: memory.Estimate) -> dict[str, memory.Phase]:
    return {phase.name: phase for phase in found.phases}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_keeps_what_can_be_counted_by_hand(dtype: torch.dtype) -> None:
    """D 64, q and out of 64, k and v of 32 each, F 192; lse of 4 heads and two rstd in fp32."""
    config, item = ModelConfig.from_dict(FIELDS), dtype.itemsize
    kept = {
        kind: layer_activations(config, 0, 1000, 0, dtype, "cpu", kind).kept for kind in ("none", "selective", "full")
    }
    #  normed, q k v, out, residual, normed, gate up silu product, the layer's output
    assert kept["none"] == 1000 * ((64 + 128 + 64 + 64 + 64 + 4 * 192 + 64) * item + 4 * 4 + 2 * 4)
    # products: q k v, out and lse, o_proj, gate up, down; the layer's output
    assert kept["selective"] == 1000 * ((128 + 64 + 64 + 2 * 192 + 64 + 64) * item + 4 * 4)
    assert kept["full"] == 1000 * 64 * item


def test_what_adapters_keep_can_be_counted_by_hand() -> None:
    """Of q alone, r 2: the base keeps no input for a gradient of its weight, A its input, B what A gave."""
    config = ModelConfig.from_dict(FIELDS)
    lora = [LoraConfig(r=2, target_modules=targets) for targets in (["q_proj"], ["q_proj", "down_proj"])]
    one, two = (layer_activations(config, 0, 1000, 0, torch.float32, "cpu", "none", x).kept for x in lora)
    assert (
        two - one == 1000 * (192 + 2) * 4
        and one < layer_activations(config, 0, 1000, 0, torch.float32, "cpu", "none").kept
    )


def test_the_terms_follow_the_recipe(files: Path) -> None:
    found = estimate(files, STAGE)
    length = found.tokens_per_step // 8
    one, two = phases(found), phases(estimate(files, STAGE, num_ranks=2))
    numel = memory._Model(ModelConfig.from_dict(FIELDS)).numel
    # Each rank of pretrain makes the whole model.
    assert one["load"].bytes == two["load"].bytes == {"weights": 4 * numel}
    assert one["update"].bytes["optimizer"] == 8 * numel == 2 * two["update"].bytes["optimizer"]
    assert two["update"].bytes["activations"] < 0.6 * one["update"].bytes["activations"]
    small = phases(estimate(files, STAGE | {"max_tokens_per_microbatch": length}))
    assert small["update"].bytes["activations"] < 0.2 * one["update"].bytes["activations"]
    totals = [
        phases(estimate(files, STAGE, trainer={"activation_checkpointing": kind}))["update"].total
        for kind in ("none", "selective", "full")
    ]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 3
    away = phases(estimate(files, STAGE, trainer={"offload": ["optimizer"]}))
    assert away["update"].total == one["update"].total - 8 * numel


def test_tokens_are_those_of_the_run(files: Path, command) -> None:
    """Of rows that differ, encoded by a tokenizer that the stage trains."""
    write_jsonl(files / "rows.jsonl", [{"text": " ".join(WORDS[: i % 10 + 1])} for i in range(40)])
    stage = STAGE | {"max_steps": 9}
    found = estimate(files, stage, name="mine")
    assert command("--config", "mine.yaml", "--output-dir", "run") == 0
    lines = (files / "run" / "base" / "metrics.jsonl").read_text().splitlines()
    assert found.tokens_per_step == max(json.loads(line)["num_tokens"] for line in lines)


def test_rows_that_are_still_to_be_made_are_bounded_by_what_makes_them(files: Path) -> None:
    model = {"path": str(write_checkpoint(files / "model"))}
    cold = {"name": "cold", "kind": "collect", "train_files": ["train.jsonl"], "max_completion_length": 30}
    tuned = {"name": "tuned", "kind": "sft", "train_files": ["@cold"], "batch_size": 4}
    found = estimate(files, cold | {"prompt_template": "plain"}, tuned, model=model)
    assert 4 * 30 < found.tokens_per_step < 4 * (30 + 60)  # and not 4 * max_length
    # Beside rows that are there the longest counts.
    write_jsonl(files / "rows.jsonl", [{"text": "a"}, {"text": "b " * 200}])
    both = estimate(
        files, cold | {"prompt_template": "plain"}, tuned | {"train_files": ["@cold", "rows.jsonl"]}, model=model
    )
    assert 4 * 200 <= both.tokens_per_step <= 4 * 402


def test_what_else_is_there(files: Path) -> None:
    """A teacher, which may be larger; the copy that a thread samples from; reward models, whose head is one row."""
    small, large = (str(write_checkpoint(files / str(size), **fields("qwen2", hidden_size=size))) for size in (32, 128))
    zero, model = dict(GRPO, beta=0.0), {"path": small}
    numel, whole = (memory._Model(checkpoint_of(path)[0]).numel for path in (small, large))
    student = {"name": "student", "kind": "distill", "train_files": ["train.jsonl"], "teacher": large}
    found = phases(estimate(files, student | {"max_completion_length": 8}, model=model))
    assert found["teacher"].bytes["gathered"] == 4 * whole > 2 * found["load"].bytes["weights"]
    assert "generate" not in found
    plain = phases(estimate(files, zero, model=model))
    ahead = phases(estimate(files, zero, model=model, rollout={"async_steps": 1}))
    assert "score" not in plain
    assert ahead["update"].bytes["weights"] == plain["update"].bytes["weights"] + 4 * numel
    assert ahead["update"].bytes["cache"] == plain["generate"].bytes["cache"]
    judged = zero | {"reward_models": {"helpful": {"model": small}}}
    with_model = phases(estimate(files, judged, model=model))
    config = checkpoint_of(small)[0]
    head = 0 if config.tie_word_embeddings else (config.vocab_size - 1) * config.hidden_size
    more = with_model["update"].bytes["weights"] - plain["update"].bytes["weights"]
    assert 0 < more <= 4 * (numel - head) + 4 * config.hidden_size
    # An offloaded reference is away, the reward models beside it are not.
    both = phases(estimate(files, judged | {"beta": 0.1}, model=model, trainer={"offload": ["reference"]}))
    assert both["update"].bytes["gathered"] == with_model["update"].bytes["gathered"]


def test_what_does_not_fit_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(str(write_recipe(files / "mine.yaml", STAGE)), [])
    assert memory.estimate(recipe, ["base"], 1, 1, Lengths(recipe))
    monkeypatch.setattr(host_memory, "available", lambda num_processes: (5 << 20) // num_processes)
    text = r"stages.base: update needs 0\.\S+ GiB {}activations most of it; cpu has {} GiB free: "
    advice = "lower max_tokens_per_microbatch, or set trainer.activation_check"
    with pytest.raises(ConfigError, match=text.format("", r"0\.00488") + advice):
        memory.estimate(recipe, ["base"], 1, 1, Lengths(recipe))
    with pytest.raises(ConfigError, match=text.format("on each of 2 ranks, ", r"0\.00244")):
        memory.estimate(recipe, ["base"], 2, 2, Lengths(recipe))


def test_a_smaller_cache_does_too(files: Path) -> None:
    """What the rest leaves, but for a twentieth of it, as long as one completion fits. A budget is kept to."""
    for room, left, needed in ((2000, 1000, 1153), (1000, 855, 1000), (400, 285, 400), (300, 200, 311)):
        phase = memory.Phase("generate", {"weights": 100, "cache": 1000}, memory.Sampling(1000, spare=800, beside=100))
        phase.fit(room)
        assert phase.bytes == {"weights": 100, "cache": left} and phase.needed == needed
    zero, model = dict(GRPO, beta=0.0), {"path": str(write_checkpoint(files / "model"))}
    found = phases(estimate(files, zero, model=model))["generate"]
    assert found.sampling and 0 < found.sampling.spare < found.bytes["cache"]
    size = found.bytes["cache"] // 2
    small = phases(estimate(files, zero, model=model, rollout={"kv_cache_memory_bytes": size}))["generate"]
    assert small.sampling and small.sampling.spare == 0 and small.bytes["cache"] == size
    one = r"stages.zero: rollout.kv_cache_memory_bytes is 99; one completion takes .*: raise it"
    with pytest.raises(ConfigError, match=one):
        estimate(files, zero, model=model, rollout={"kv_cache_memory_bytes": 99})


@pytest.mark.parametrize("async_steps", [0, 1])
def test_generation_is_refused_where_the_engine_does(
    files: Path, async_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same numbers: with what is there before, and beside training with half of what is left."""
    path = str(write_checkpoint(files / "model"))
    sections: dict[str, Any] = {"model": {"path": path}, "rollout": {"async_steps": async_steps}}
    write_jsonl(files / "one.jsonl", PROMPTS[:1])
    stage = dict(GRPO, train_files=["one.jsonl"], beta=0.0, prompts_per_step=1, steps_per_generation=1)
    recipe = load_recipe(str(write_recipe(files / "mine.yaml", stage, **sections)), [])
    (zero,), lengths = recipe.stages, Lengths(recipe)
    assert isinstance(zero, GRPOStage)
    generate = phases(estimate(files, stage, **sections))["generate"]
    sampling = generate.sampling
    assert sampling is not None and sampling.share == (0.5 if async_steps else 1)
    least = math.ceil((sampling.taken - sampling.spare) / (sampling.share * 0.95))
    engine = RolloutEngine(load_model(path)[0], None, max_num_seqs=512, memory_share=sampling.share)
    params = SamplingParams(n=zero.num_generations, max_tokens=zero.max_completion_length)
    prompts = [[5] * lengths.prompt(zero, ["train_files"])]
    for free in (least - 1, least):
        monkeypatch.setattr(engine_module, "free_memory", lambda device, free=free: free)
        monkeypatch.setattr(host_memory, "available", lambda _, free=free: sampling.beside + free)
        monkeypatch.setattr(memory.Estimator, "_update", lambda *args: {})
        if free == least:
            engine.generate(prompts, params)
            memory.estimate(recipe, ["zero"], 1, 1, lengths)
            continue
        text = "lower max_num_seqs, max_num_batched_tokens or max_tokens"
        with pytest.raises(ValueError, match=(", 50% of it beside training, .*: " if async_steps else ".*") + text):
            engine.generate(prompts, params)
        with pytest.raises(ConfigError, match=r"stages.zero: (generate|update) needs"):
            memory.estimate(recipe, ["zero"], 1, 1, lengths)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """Its own group is mounted as the root, or a group above it has the limit; pages of files can be given back."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    monkeypatch.setattr(host_memory, "_PROC", proc)
    monkeypatch.setattr(host_memory, "_CGROUPS", groups)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert host_memory.available() is None  # no such system
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     800 kB\nHugePages_Total: 0\n")
    assert host_memory.available() == 800 << 10 and host_memory.available(2) == 400 << 10
    controllers, root, names = ("", groups, host_memory._NAMES)
    if version == 1:
        controllers, root, names = "memory", groups / "memory", host_memory._OLD_NAMES
    (proc / "self" / "cgroup").write_text(f"3:cpu:/elsewhere\n7:{controllers}:/outer/inner\n")
    for folder, limit in ((root, "9000000"), (root / "outer", "300000"), (root / "outer" / "inner", "max")):
        folder.mkdir(parents=True)
        for name, value in zip(names, (limit, "100000", None)):
            if value is not None:
                (folder / name).write_text(value)
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} 20000\n")
    assert host_memory.available() == 220_000 and host_memory.available(2) == 110_000
    assert host_memory.total() == 300_000


def test_memory_under_ulimit() -> None:
    """Of each process, however many there are."""
    code = "from r1fast import host_memory as m; print(m.available(), m.available(1000))"
    shell = f"ulimit -v 600000; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["bash", "-c", shell], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    alone, of_many = map(int, done.stdout.split())
    assert 0 < of_many <= alone < 600_000 << 10, done.stderr
