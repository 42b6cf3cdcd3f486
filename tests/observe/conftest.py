"""A made-up run directory of the whole chain: every file the report reads, none of the work."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1fast.observe.metrics import StageLog
from r1fast.observe.progress import ChainProgress

# name, kind, model it continues, inputs, steps, seconds, pass@1, language
CHAIN = [
    ("base", "pretrain", None, [], 600, 61.0, 0.081, 0.53),
    ("zero", "grpo", "base", ["base"], 60, 66.4, 0.791, 0.55),
    ("cold", "collect", "zero", ["zero"], 0, 2.9, None, None),
    ("dev1", "sft", "base", ["cold"], 80, 3.4, 0.648, 0.72),
    ("dev2", "grpo", "dev1", ["dev1"], 40, 41.2, 0.742, 0.985),
    ("dev2_no_language", "grpo", "dev1", ["dev1"], 40, 39.0, 0.777, 0.644),
    ("reject", "reject", "dev2", ["dev2"], 0, 11.0, None, None),
    ("helpful_rm", "reward_model", "dev1", ["dev1"], 50, 4.0, None, None),
    ("dev3", "sft", "base", ["reject"], 150, 6.9, 0.758, 0.996),
    ("r1", "grpo", "dev3", ["dev3", "helpful_rm"], 30, 32.0, 0.776, 0.991),
    ("student", "distill", "Qwen/Qwen2.5-0.5B", ["reject"], 120, 7.5, 0.506, 0.99),
]


LONG = "rewards_of_a_package_with_a_long_name.and_a_module.is_answered_politely_and_in_full"


@pytest.fixture
def write_run() -> Callable[..., Path]:
    return make_run


def make_run(directory: Path, *, stop_in: str | None = None, chain: Sequence[tuple[Any, ...]] = CHAIN) -> Path:
    """Write the run; with `stop_in`, that stage stops half way and the later ones are pending."""
    noise = random.Random(0)
    entries: list[dict[str, Any]] = []
    scores: dict[str | None, dict[str, Any]] = {"Qwen/Qwen2.5-0.5B": _evaluation(0.049, 0.52)}
    stopped = False
    settings = {stage["name"]: stage for stage in _config(chain)["stages"]}
    with ChainProgress([row[0] for row in chain], is_main=False):
        for name, kind, model, inputs, steps, seconds, accuracy, language in chain:
            entry: dict[str, Any] = {"name": name, "kind": kind, "model": model, "inputs": inputs, "status": "done"}
            entry["eval_before"] = scores.get(model, {}) if accuracy is not None and not stopped else {}
            if stopped or name == stop_in:
                entry["status"] = "pending" if stopped else "running"
            else:
                after = _evaluation(accuracy, language) if accuracy is not None and language is not None else {}
                scores[name] = after
                entry |= {"eval_after": after, "seconds": seconds, "phases": _phases(kind, seconds)}
                entry["memory"] = {name: int((1 + noise.random()) * 4e8) for name in entry["phases"]}
                entry["numbers"] = _numbers(kind)
            if not stopped:
                done = steps // 2 if name == stop_in else steps
                _write_steps(directory / name, kind, steps, done, noise, accuracy or 0.5, language or 0.5)
                entry["settings"] = settings[name]
                (directory / name / "stage.json").write_text(json.dumps({"entry": entry}))
            stopped = stopped or name == stop_in
            entries.append(entry)
    seconds_done = sum(entry.get("seconds") or 0.0 for entry in entries) + 14
    summary = {
        "recipe": "tiny",
        "started": "2026-03-02T10:14:07",
        "machine": {
            "cpu": "AMD EPYC 9B45, 2 cores",
            "gpu": None,
            "torch": "2.13.0",
            "world_size": 1,
            "commit": "5b73788",
        },
        "seed": 0,
        "seconds": seconds_done,
        "stages": entries,
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "config.yaml").write_text(yaml.safe_dump(_config(chain), sort_keys=False))
    return directory


def make_long_run(directory: Path) -> Path:
    """Sixteen stages, of which the fourteenth is at work, with long names of stages, files and metrics."""
    names = [f"another_student_whose_name_goes_on_and_on_and_has_no_end_{i}" for i in range(5)]
    make_run(directory, chain=[*CHAIN, *((name, *CHAIN[-1][1:]) for name in names)], stop_in=names[2])
    path = directory / "summary.json"
    summary = json.loads(path.read_text())
    for entry in summary["stages"]:
        for evaluation in (entry.get("eval_before"), entry.get("eval_after")):
            if evaluation:
                evaluation |= {LONG: evaluation["pass@1"] / 2, f"{LONG}_ci": 0.02, "turns": 3.25}
                evaluation["split"] = "/data/sets/of/many/people/with-a-long-name-that-has-no-end/report-2026-03.jsonl"
    path.write_text(json.dumps(summary))
    lines = [json.loads(line) for line in (directory / "zero" / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {f"rewards/{LONG}/mean": 0.5}) + "\n" for line in lines)
    (directory / "zero" / "metrics.jsonl").write_text(text)
    return directory


def _evaluation(accuracy: float, language: float) -> dict[str, Any]:
    scores = {
        "pass@1": accuracy, "cons@k": min(1.0, accuracy + 0.08), "greedy": min(1.0, accuracy + 0.11),
        "format": 0.6 + 0.39 * accuracy, "language": language, "greedy/format": 0.7 + 0.29 * accuracy,
    }  # fmt: skip
    halves = {f"{name}_ci": 1.96 * math.sqrt(value * (1 - value) / 400) for name, value in scores.items()}
    settings = {"split": "report.jsonl", "temperature": 1.0, "top_p": 1.0, "prompt_template": "chat"}
    return {**scores, **halves, **settings, "n": 400, "k": 4, "length": 9.7 + 14 * accuracy}


def _phases(kind: str, seconds: float) -> dict[str, float]:
    shares = {
        "grpo": {"generate": 0.24, "reward": 0.01, "logprobs": 0.16, "update": 0.5, "evaluate": 0.05, "save": 0.02},
        "collect": {"generate": 0.8, "reward": 0.15},
        "reject": {"generate": 0.85, "reward": 0.1},
    }.get(kind, {"update": 0.85, "evaluate": 0.1, "save": 0.04})
    return {name: share * seconds for name, share in shares.items()}


def _numbers(kind: str) -> dict[str, Any]:
    if kind == "reject":
        dropped = {"incorrect": 1904, "mixed_language": 1311, "duplicate": 622, "too_long": 88, "repetition": 38}
        return {"sampled": 5600, "kept": 1637, "dropped": dropped}
    if kind == "collect":
        return {"sampled": 420, "kept": 300, "kept_from": {"zero": 180, "few_shot": 120}, "dropped": {"incorrect": 120}}
    if kind == "reward_model":
        return {"rows": 900, "held_out_accuracy": 0.912, "held_out_accuracy_ci": 0.055, "held_out_rows": 100}
    return {"parameters": 228_416, "tokens": 2_310_144}


def _write_steps(
    folder: Path, kind: str, total: int, done: int, noise: random.Random, accuracy: float, language: float
) -> None:
    with StageLog(folder, total_steps=total) as log:
        for step in range(1, done + 1):
            load = (
                {"moe/load": [[2 ** noise.gauss(0, 0.9) for _ in range(8)] for _ in range(2)]} if kind == "grpo" else {}
            )
            log.log(step, _metrics(kind, step / total, step, noise, accuracy, language) | load)
            if kind == "grpo" and step in (1, total // 2, total):
                log.samples(step, [_sample(i, noise) for i in range(8)])


def _metrics(
    kind: str, x: float, step: int, noise: random.Random, accuracy: float, language: float
) -> dict[str, float]:
    rise = 1 - math.exp(-4 * x)
    common = {
        "learning_rate": 5e-4 * (1 - 0.9 * x),
        "grad_norm": 0.4 + 0.3 * noise.random(),
        "num_tokens": 15_872.0 * step,
    }
    common |= {"step_time": 1.1 + 0.1 * noise.random(), "tokens_per_second": 15_000 + 3_000 * noise.random()}
    if kind != "grpo":
        return common | {
            "loss": 0.4 + 5 * math.exp(-5 * x) + 0.08 * noise.random(),
            "entropy": 0.5 + 2 * math.exp(-3 * x),
        }
    right = accuracy * rise + 0.04 * (noise.random() - 0.5)
    rewards = {"accuracy": right, "format": 0.3 + 0.68 * rise, "language": 0.5 + (language - 0.5) * rise}
    return (
        {"reward": right + 0.3 * rewards["format"] + rewards["language"]}
        | {f"rewards/{name}/mean": value + 0.02 * (noise.random() - 0.5) for name, value in rewards.items()}
        | {"reward_std": 0.5 - 0.3 * x, "frac_reward_zero_std": 0.1 + 0.5 * x, "loss": 0.02 * (noise.random() - 0.5)}
        | {"kl": 0.004 * rise + 0.001 * noise.random(), "entropy": 1.6 - 1.1 * rise + 0.05 * noise.random()}
        | {"completions/mean_length": 9.7 + 12 * rise + noise.random(), "completions/clipped_ratio": 0.02 * (1 - x)}
        | {"sampling/sampling_logp_difference/mean": 3e-7, "clip_ratio/region_mean": 0.01 * noise.random()}
        | common
    )


def _sample(i: int, noise: random.Random) -> dict[str, Any]:
    right = i % 3 != 0
    reasoning = "先算 7 * 6 = 42。然后 42 + 5 = 47。" if i % 2 else "first 7 * 6 = 42 . then 42 + 5 = 47 . <b>so</b>"
    return {
        "prompt": "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "User: what is 7 * 6 + 5 ? Assistant:",
        "completion": f"<think> {reasoning} </think> <answer> {47 if right else 42 + i} </answer>",
        "finish_reason": "stop" if i != 6 else "length",
        "accuracy": float(right),
        "format": 1.0,
        "language": None if i == 5 else round(noise.random(), 3),
        "reward": float(right) + 0.3 + noise.random(),
        "advantage": (1.0 if right else -1.4) + 0.2 * noise.random(),
        "gold": "47",
    }


def _config(chain: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    grpo = {"num_generations": 16, "prompts_per_step": 32, "rewards": {"accuracy": 1.0, "format": 0.3}, "beta": 0.01}
    stages = []
    for name, kind, model, inputs, steps, *_ in chain:
        stage: dict[str, Any] = {"name": name, "kind": kind, "model": model, "inputs": inputs, "max_steps": steps}
        stages.append(stage | {"learning_rate": 5e-4, "lr_scheduler_type": "wsd"} | (grpo if kind == "grpo" else {}))
    return {"name": "tiny", "seed": 0, "model": {"model_type": "deepseek_v3", "hidden_size": 64}, "stages": stages}
