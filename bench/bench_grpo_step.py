"""A whole GRPO step of a small DeepSeek-V3-style model, or of a dense one in the shapes of a released model, against
TRL's GRPOTrainer: the same checkpoint, in turns.

Rollout of N completions of L tokens, G for each prompt of 20 tokens, a rule reward, group advantages, log-probs of a
reference model (beta 0.001; the dense models have none), one update by AdamW. No completion ends early: the
end-of-sequence token is beyond the model's vocabulary. Ours is what the grpo stage runs for a step, theirs what TRL's
loop does, its experts in grouped_mm (faster than eager here), without gradient checkpointing; neither logs nor saves.
TRL keeps its weights in the dtype of the case; "TRL mixed", its default, in fp32 with bf16 in the update alone. Floor:
FLOPs of the active parameters for each new token and token of a distinct prompt: 2 in the rollout, 2 in the reference,
6 in the update. At full size (large.py) ours alone, whose log-probs the same model finds again.
"""

import importlib.util
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from bench import harness, large
from bench.bench_generate import QWEN25, SMOLLM2
from bench.bench_train_step import CONFIG, active_parameters
from bench.cases import Case
from bench.head import can_multiply
from r1fast.data.tokenizer import train_tokenizer
from r1fast.models.export import save_model
from r1fast.parallel.mesh import Dist, init_distributed
from r1fast.rewards.registry import resolve
from r1fast.schema import Recipe
from r1fast.stages.context import StageContext
from r1fast.stages.grpo import Learner
from r1fast.stages.scoring import Scorer
from r1fast_kernels import group_advantages

LEARNING_RATE, MAX_STEPS = 1e-6, 10_000
CONFIGS: dict[str, tuple[PretrainedConfig, float]] = {  # and beta
    "step": (CONFIG, 0.001), "smollm2-135m": (SMOLLM2, 0.0), "qwen2.5-0.5b": (QWEN25, 0.0),
    **{name: (config, 0.0) for name, config in large.MODELS.items()},
}  # fmt: skip
PROMPT_TOKENS = 20
RULE = """
def even(completions, completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
"""


def sums(count: int) -> list[str]:
    """Prompts of PROMPT_TOKENS tokens with the one of the beginning, all different."""
    draw = random.Random(0)
    return [f"What is {' + '.join(str(draw.randrange(10)) for _ in range(8))} ?" for _ in range(count)]


def tokenizer_of(given: PretrainedConfig, prompts: list[str]) -> PreTrainedTokenizerFast:
    """Knows a text for each token of the model, and ends with none of them."""
    tokenizer = train_tokenizer(prompts, 300)
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), given.vocab_size)])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert tokenizer.eos_token_id == given.vocab_size
    return tokenizer


def write_checkpoint(folder: Path, given: PretrainedConfig, prompts: list[str]) -> None:
    """With random weights."""
    tokenizer = tokenizer_of(given, prompts)
    torch.manual_seed(0)
    config = type(given).from_dict(given.to_dict() | {"eos_token_id": None, "bos_token_id": None})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def learner(folder: Path, case: Case, prompts: list[str], dtype: str, dist: Dist) -> Learner:
    stage = {
        "name": "zero", "kind": "grpo", "train_files": ["-"], "prompt_template": "plain",
        "rewards": {"even": {"function": f"{folder}/rule.py:even"}},
        "num_generations": case.sizes["G"], "prompts_per_step": case.sizes["N"] // case.sizes["G"],
        "max_prompt_length": PROMPT_TOKENS, "max_completion_length": case.sizes["L"],
        "beta": CONFIGS[case.mode][1], "learning_rate": LEARNING_RATE, "max_steps": MAX_STEPS,
    }  # fmt: skip
    recipe = Recipe.model_validate({"model": {"path": str(folder), "dtype": dtype}, "stages": [stage]})
    ctx = StageContext(recipe, recipe.stages[0], dist, folder / "run")
    policy, tokenizer = ctx.load(str(folder), trainable=True)
    scorer = Scorer(ctx, ctx.stage.rewards, ctx.stage.response_format)
    return Learner(ctx, policy, tokenizer, scorer, [{"prompt": prompt} for prompt in prompts])


def our_step(learner: Learner) -> harness.Run:
    """-> prompts and completions, advantages, KL to the reference, norm of the gradient, the sampler's log-probs."""
    steps = itertools.count()

    def run() -> harness.Outputs:
        samples, metrics = learner.train_step(next(steps))
        return [
            torch.tensor([sample.prompt_ids + sample.completion_ids for sample in samples]),
            torch.tensor([sample.advantage for sample in samples]),
            torch.tensor(metrics.get("kl", 0.0)),
            torch.tensor(metrics["grad_norm"]),
            torch.tensor([sample.sampler_logprobs for sample in samples]),
        ]

    return run


def trl_step(folder: Path, case: Case, prompts: list[str], dtype: str, *, autocast: bool = False) -> harness.Run:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    experts = {"experts_implementation": "grouped_mm"} if case.mode == "step" else {}
    trainer = GRPOTrainer(
        str(folder),
        reward_funcs=resolve(f"{folder}/rule.py:even"),
        args=GRPOConfig(
            output_dir=str(folder / "trl"), use_cpu=harness.DEVICE == "cpu", bf16=autocast,
            model_init_kwargs={"dtype": dtype} | experts, gradient_checkpointing=False,
            per_device_train_batch_size=case.sizes["N"], num_generations=case.sizes["G"],
            max_completion_length=case.sizes["L"], beta=CONFIGS[case.mode][1], loss_type="grpo",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", max_steps=MAX_STEPS, report_to="none", logging_strategy="no",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )  # fmt: skip
    # What its train() does: this, and in its loop what `run` does.
    model, loader = trainer._prepare_for_training(MAX_STEPS, trainer.get_train_dataloader(), None)
    trainer.current_gradient_accumulation_steps = 1
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def run() -> harness.Outputs:
        trainer.training_step(model, next(batches), None)
        grad_norm = trainer._clip_grad_norm(model)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        batch: dict[str, Tensor] = trainer._buffered_inputs[0]
        sequences_NS = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        return [
            sequences_NS,
            batch["advantages"],
            torch.tensor(trainer._metrics["train"].get("kl", [0.0])[-1]),
            grad_norm,
            None,
        ]

    return run


def exact(sequences_NS: Tensor, oracle: Any, G: int) -> list[Tensor]:
    """Advantages, KL, norm of the gradient and log-probs that a step at the oracle's weights must find.

    Reference, sampler and policy are equal there: a ratio is 1, the KL term 0 and without a gradient.
    """
    prompts_NP, completions_NL = sequences_NS[:, :PROMPT_TOKENS], sequences_NS[:, PROMPT_TOKENS:]
    groups_N = prompts_NP.unique(dim=0, return_inverse=True)[1]
    assert groups_N.bincount().tolist() == [G] * (len(groups_N) // G), groups_N
    rewards_N = (completions_NL % 2 == 0).float().mean(1)
    advantages_N = group_advantages(rewards_N, groups_N, impl="reference")
    logits_NLV = oracle(sequences_NS).logits[:, PROMPT_TOKENS - 1 : -1]
    logprobs_NL = logits_NLV.log_softmax(-1).gather(-1, completions_NL[..., None]).squeeze(-1)
    ratio_NL = (logprobs_NL - logprobs_NL.detach()).exp()
    grads = torch.autograd.grad(-(advantages_N[:, None] * ratio_NL).mean(), list(oracle.parameters()))
    return [advantages_N, torch.zeros(()), torch.nn.utils.get_total_norm(grads), logprobs_NL.detach()]


def step_at_full_size(case: Case, compare: Callable[[harness.Problem], None], folder: Path) -> None:
    """Ours alone: its samples have the log-probs that the first weights give them."""
    N, G, L = (case.sizes[letter] for letter in "NGL")
    config, prompts, dtype = CONFIGS[case.mode][0], sums(64 * N // G), harness.DTYPES[case.dtype]
    oracle = large.random_decoder(config, dtype)
    save_model(oracle.config, oracle.state_dict(), folder, tokenizer_of(config, prompts))
    (folder / "rule.py").write_text(RULE)
    dist = init_distributed(harness.DEVICE)
    ours = learner(folder, case, prompts, str(dtype).removeprefix("torch."), dist)

    def check(_: str, outputs: harness.Outputs) -> None:
        sequences_NS, _, _, grad_norm, logprobs_NL = outputs
        assert sequences_NS is not None and grad_norm is not None and logprobs_NL is not None
        assert sequences_NS.shape == (N, PROMPT_TOKENS + L) and 0 < float(grad_norm) < math.inf
        large.assert_sampled(oracle, sequences_NS[:2], logprobs_NL[:2])

    num_inputs = N * L + N // G * PROMPT_TOKENS
    floor = large.of_products(8.0 * sum(param.numel() for param in oracle.parameters()) * num_inputs, dtype)

    def numbers(median_ms: dict[str, float]) -> dict[str, float]:
        return {"completion tokens/s": N * L / median_ms[harness.OURS] * 1e3}

    contenders = {harness.OURS: our_step(ours)}
    try:
        compare(harness.Problem(case, contenders, floor=floor, check=check, repeated=True, numbers=numbers))
    finally:
        ours.scorer.__exit__()
        dist.close()


def test_grpo_step(case: Case, compare: Callable[[harness.Problem], None], tmp_path: Path) -> None:
    if case.mode in large.MODELS:
        step_at_full_size(case, compare, tmp_path)
        return
    N, G, L = (case.sizes[letter] for letter in "NGL")
    dtype = harness.DTYPES[case.dtype]
    if not can_multiply(torch.empty(0, dtype=dtype, device=harness.DEVICE)):
        pytest.skip(f"torch has no fast {case.dtype} product on this CPU")
    prompts = sums(64 * N // G)
    config, beta = CONFIGS[case.mode]
    write_checkpoint(tmp_path, config, prompts)
    (tmp_path / "rule.py").write_text(RULE)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(harness.DEVICE)
    dist, name_of_dtype = init_distributed(harness.DEVICE), str(dtype).removeprefix("torch.")
    ours = learner(tmp_path, case, prompts, name_of_dtype, dist)
    contenders = {harness.OURS: our_step(ours)}
    if all(importlib.util.find_spec(name) is not None for name in ("trl", "datasets", "accelerate")):
        contenders["TRL"] = trl_step(tmp_path, case, prompts, name_of_dtype)
        if dtype != torch.float32:
            contenders["TRL mixed"] = trl_step(tmp_path, case, prompts, "float32", autocast=True)
            contenders["TRL fp32"] = trl_step(tmp_path, case, prompts, "float32")

    def check(name: str, outputs: harness.Outputs) -> None:
        sequences_NS, *found = outputs
        assert sequences_NS is not None and sequences_NS.shape == (N, PROMPT_TOKENS + L), f"{name}: {sequences_NS}"
        want = exact(sequences_NS.to(harness.DEVICE), oracle, G)
        harness.agrees_with([x.cpu() for x in want], 1e-4 if case.dtype == "fp32" else 2e-2)(
            name, [x if x is None else x.cpu() for x in found]
        )

    active = active_parameters(oracle)
    num_inputs = N * L + N // G * PROMPT_TOKENS
    flops = 2.0 * active * num_inputs * (2 if beta else 1) + 6.0 * active * num_inputs
    floor = harness.products_floor(flops, num_inputs, dtype)
    try:
        compare(harness.Problem(case, contenders, floor=floor, check=check, repeated=True))
    finally:
        ours.scorer.__exit__()
        dist.close()
