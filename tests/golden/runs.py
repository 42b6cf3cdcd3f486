"""Twenty seeded steps of SFT and of GRPO, whose curves tests/golden/curves.json keeps; test_golden_curve.py compares.

Nothing here depends on a library's idea of a random number: weights come from numpy's frozen RandomState, texts from
Python's random, tokens are characters. So the numbers are those of any CPU, up to rounding.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from r1fast.models.decoder import Decoder
from r1fast.parallel.mesh import Dist
from r1fast.schema import Recipe
from r1fast.stages.context import StageContext
from r1fast.stages.grpo import Learner
from r1fast.stages.packed import encode_examples
from r1fast.stages.sampler import Sample
from r1fast.stages.sft import train
from r1fast.stages.training import Trainer
from r1fast_kernels import use
from tests import zoo

CURVES = Path(__file__).with_name("curves.json")
STEPS = 20
BOS, EOS, VOCAB = 0, 1, 48
LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789"
MODELS = {"moe": "deepseek_v3", "dense": "qwen2"}
SFT = {
    "name": "sft", "kind": "sft", "train_files": ["-"], "learning_rate": 3e-3, "batch_size": 6, "warmup_steps": 4,
    "max_tokens_per_microbatch": 64, "prompt_template": "plain",
}  # fmt: skip
# Off-policy in its second minibatch, with every term of the loss: ratios, KL, importance weights.
GRPO = {
    "name": "grpo", "kind": "grpo", "train_files": ["-"], "rewards": {"even": 1.0}, "num_generations": 4,
    "prompts_per_step": 4, "steps_per_generation": 2, "max_prompt_length": 16, "max_completion_length": 8,
    "max_steps": STEPS, "learning_rate": 3e-3, "lr_scheduler_type": "linear", "warmup_steps": 4, "beta": 0.1,
    "epsilon_high": 0.28, "sampling_importance_cap": 2.0, "max_tokens_per_microbatch": 64, "prompt_template": "plain",
    "log_completions": 0,
}  # fmt: skip
RUNS = [f"{stage}-{model}" for stage in ("sft", "grpo") for model in MODELS]
# What a number is compared to at least: the loss of a policy is a sum of terms around 1 of both signs, of which fp32
# knows no more; KL is a difference of numbers around 1.
SCALES = {"loss": 0.1, "kl": 0.1, "grad_norm": 1e-3, "reward": 1e-3}


class Characters:
    """A tokenizer: what the stages ask of one."""

    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, None
    eos_token = "<end>"

    def __call__(self, texts: str | Sequence[str], add_special_tokens: bool) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": self([texts], add_special_tokens)["input_ids"][0]}
        leading = [BOS] if add_special_tokens else []
        return {"input_ids": [leading + [2 + LETTERS.index(letter) for letter in text] for text in texts]}

    def batch_decode(self, ids: Sequence[Sequence[int]], **options: Any) -> list[str]:
        return ["".join(LETTERS[(i - 2) % len(LETTERS)] for i in row) for row in ids]


class EvenScorer:
    """Share of even tokens: a number that is exact, and differs within a group."""

    weights = {"even": 1.0}  # noqa: RUF012

    def score(self, samples: Sequence[Sample]) -> int:
        for sample in samples:
            sample.rewards = {"even": float(np.mean([token % 2 == 0 for token in sample.completion_ids]))}
        return 0


def build(family: str) -> Decoder:
    decoder = zoo.decoder(MODELS[family], vocab_size=VOCAB, eos_token_id=EOS)
    generator = np.random.RandomState(0)
    with torch.no_grad():
        for _, parameter in sorted(decoder.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.from_numpy(0.2 * generator.standard_normal(parameter.shape)))
    return decoder


def stage_context(stage: dict[str, Any], family: str, dist: Dist, folder: Path) -> StageContext:
    recipe = Recipe.model_validate({"model": {"path": "-", "dtype": "float32"}, "stages": [stage]})
    folder.mkdir(exist_ok=True)
    ctx = StageContext(recipe, recipe.stages[0], dist, folder)

    def load(ref: str, *, trainable: bool, scalar_head: bool = False) -> tuple[Decoder, Any]:
        return ctx.shard(build(family).requires_grad_(trainable)), Characters()

    ctx.load = load  # type: ignore[method-assign]
    return ctx


def texts(count: int, shortest: int, longest: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(LETTERS, k=generator.randint(shortest, longest))) for _ in range(count)]


def curve(run: str, impl: str | None, dist: Dist, folder: Path, steps: int = STEPS) -> dict[str, list[float]]:
    """loss, grad_norm, kl and reward of each step; of GRPO the first `steps`."""
    with use(impl):
        return _curve(run, dist, folder, steps)


def _curve(run: str, dist: Dist, folder: Path, steps: int) -> dict[str, list[float]]:
    stage, _, family = run.partition("-")
    ctx = stage_context(SFT if stage == "sft" else GRPO, family, dist, folder)
    policy, tokenizer = ctx.load("-", trainable=True)
    if stage == "sft":
        rows = [{"prompt": a, "completion": b} for a, b in zip(texts(20, 2, 12, 1), texts(20, 1, 20, 2))]
        with patch.object(Trainer, "_save"):
            train(ctx, policy, tokenizer, encode_examples(rows, tokenizer, ctx.stage), STEPS)
        found = [json.loads(line) for line in (ctx.stage_dir / "metrics.jsonl").read_text().splitlines()]
    else:
        rows = [{"prompt": text} for text in texts(20, 2, 12, 3)]
        learner = Learner(ctx, policy, tokenizer, EvenScorer(), rows)  # type: ignore[arg-type]
        found = [learner.train_step(step)[1] for step in range(steps)]
    return {name: [metrics[name] for metrics in found] for name in SCALES if name in found[0]}


def distance(got: dict[str, list[float]], want: dict[str, list[float]]) -> float:
    """The largest difference of any number of the curves, relative to it, or to what it was computed from."""
    assert got.keys() == want.keys()
    return max(abs(x - y) / max(abs(y), SCALES[name]) for name in want for x, y in zip(got[name], want[name]))
