"""The loss equals TRL's own code on the same tensors: value, gradient and metrics."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r1fast_kernels import grpo_loss
from tests.kernels.backends import needs_cpp

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the oracle: pip install -e .[dev]")

LENGTHS = torch.tensor([7, 3, 11, 5])
WIDTH = 11
EPSILON, EPSILON_HIGH = 0.2, 0.28
CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo"]
LOSSES = [*((loss_type, delta) for loss_type in CLIPPED for delta in (None, 1.2)), ("cispo", None)]


def padded_batch() -> dict[str, torch.Tensor]:
    """What TRL holds: [N, longest] with a right-padded completion mask; log-probs far enough apart to clip."""
    generator = torch.Generator().manual_seed(0)

    def near(center: torch.Tensor | float, spread: float) -> torch.Tensor:
        return center + spread * torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)

    logprobs = near(-1.5, 0.4)
    return {
        "logprobs": logprobs,
        "old": near(logprobs, 0.4),
        "ref": near(logprobs, 0.3),
        "sampler": near(logprobs, 0.5),
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=torch.float64),
        "mask": (torch.arange(WIDTH) < LENGTHS[:, None]).to(torch.float64),
    }


def trl_loss(
    batch: dict[str, torch.Tensor], settings: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """GRPOTrainer._compute_loss on a stand-in for the trainer: everything it reads from self, and no model."""
    logprobs = batch["logprobs"].clone().requires_grad_()
    is_cap = settings["is_cap"]
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=settings["delta"], steps_per_generation=1),
        model=SimpleNamespace(training=True),
        _metrics=metrics,
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        importance_sampling_level=settings["importance_level"],
        beta=settings["beta"],
        loss_type=settings["loss_type"],
        epsilon_low=EPSILON,
        epsilon_high=settings["epsilon_high"],
        max_completion_length=WIDTH + 5,
        use_vllm=is_cap is not None,
        vllm_importance_sampling_correction=True,
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, WIDTH, dtype=torch.long),
        "completion_mask": batch["mask"],
        "advantages": batch["advantages"],
        "num_items_in_batch": batch["mask"].sum(),
        "ref_per_token_logps": batch["ref"],
    }
    if settings["off_policy"]:
        inputs["old_per_token_logps"] = batch["old"]
    if is_cap is not None:  # mode token_truncate
        old = batch["old"] if settings["off_policy"] else batch["logprobs"]
        inputs["importance_sampling_ratio"] = ((old - batch["sampler"]) * batch["mask"]).exp().clamp(max=is_cap)
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach(), logprobs.grad, {name: values[0] for name, values in metrics["train"].items()}


def our_loss(
    batch: dict[str, torch.Tensor], settings: dict[str, Any], impl: str = "reference"
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """The same batch packed; the gradient back in TRL's padded shape."""
    kept = batch["mask"].bool()
    leaf = batch["logprobs"].clone().requires_grad_()
    options = {key: value for key, value in settings.items() if key != "off_policy"}
    loss, metrics = grpo_loss(
        leaf[kept],
        torch.cat([torch.zeros(1), LENGTHS.cumsum(0)]).int(),
        advantages_N=batch["advantages"],
        old_logprobs_T=batch["old"][kept] if settings["off_policy"] else None,
        ref_logprobs_T=batch["ref"][kept] if settings["beta"] else None,
        sampler_logprobs_T=batch["sampler"][kept],
        epsilon=EPSILON,
        max_completion_length=WIDTH + 5,
        impl=impl,
        **options,
    )
    loss.backward()
    return loss.detach(), leaf.grad, {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("off_policy", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("is_cap", [None, 1.3], ids=["", "truncated-is"])
@pytest.mark.parametrize("epsilon_high", [EPSILON, EPSILON_HIGH, 1.5], ids=["sym", "asym", "wide"])
@pytest.mark.parametrize("beta", [0.0, 0.05], ids=["", "beta"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "delta"), LOSSES, ids=str)
def test_equals_trl(
    loss_type: str,
    level: str,
    beta: float,
    epsilon_high: float,
    delta: float | None,
    is_cap: float | None,
    off_policy: bool,
    impl: str,
) -> None:
    settings = {
        "loss_type": loss_type, "importance_level": level, "beta": beta, "epsilon_high": epsilon_high, "delta": delta,
        "is_cap": is_cap, "off_policy": off_policy,
    }  # fmt: skip
    batch = padded_batch()
    want_loss, want_gradient, want_metrics = trl_loss(batch, settings)
    got_loss, got_gradient, got_metrics = our_loss(batch, settings, impl)
    torch.testing.assert_close(got_loss, want_loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-10, atol=1e-12)
    shared = set(got_metrics) & set(want_metrics)
    clipping = (
        {"cispo_clip_ratio"} if loss_type == "cispo" else {f"clip_ratio/{x}_mean" for x in ("low", "high", "region")}
    )
    assert shared >= clipping
    assert ("kl" in shared) == bool(beta)
    for name in shared:
        assert got_metrics[name] == pytest.approx(want_metrics[name], rel=1e-6, abs=1e-9), name


def test_the_batch_clips_on_both_sides() -> None:
    """Else the comparison above would prove little."""
    settings = {
        "loss_type": "grpo", "importance_level": "token", "beta": 0.0, "epsilon_high": EPSILON_HIGH, "delta": None,
        "is_cap": None, "off_policy": True,
    }  # fmt: skip
    metrics = our_loss(padded_batch(), settings)[2]
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    sequence = our_loss(padded_batch(), {**settings, "importance_level": "sequence", "epsilon_high": 0.02})[2]
    assert sequence["importance_ratio/max"] > 1.02
