"""The loss equals TRL's own code on the same tensors: value, gradients, metrics; and verl's formulas, written out."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast.losses import gspo_token, sapo
from r1fast.policy_loss import own_loss
from r1fast_kernels import grpo_loss
from tests.kernels.backends import needs_cpp

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the oracle: pip install -e .[dev]")

LENGTHS = torch.tensor([7, 3, 11, 5])
WIDTH = 11
EPSILON, EPSILON_HIGH = 0.2, 0.28
CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo"]
LOSSES = [*((loss_type, delta) for loss_type in CLIPPED for delta in (None, 1.2)), ("cispo", None)]
IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp)]
Batch = dict[str, Tensor]


def padded_batch() -> Batch:
    """What TRL holds: [N, longest] with a right-padded completion mask; log-probs far enough apart to clip."""
    generator = torch.Generator().manual_seed(0)

    def near(center: Tensor | float, spread: float) -> Tensor:
        return center + spread * torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)

    logprobs = near(-1.5, 0.4)
    return {
        "logprobs": logprobs,
        "old": near(logprobs, 0.4),
        "ref": near(logprobs, 0.3),
        "sampler": near(logprobs, 0.5),
        "entropy": near(1.5, 0.4).float().double(),  # as TRL takes the quantile in fp32
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=torch.float64),
        "mask": (torch.arange(WIDTH) < LENGTHS[:, None]).to(torch.float64),
    }


class Trainer(SimpleNamespace):
    """Everything that GRPOTrainer._compute_loss reads from self, and no model."""

    get_off_policy_mask = staticmethod(grpo_trainer.GRPOTrainer.get_off_policy_mask)
    get_high_entropy_mask = grpo_trainer.GRPOTrainer.get_high_entropy_mask

    def __init__(self, outputs: tuple[Tensor, Tensor], o: dict[str, Any]) -> None:
        gather = {"gather": lambda x: x, "pad_across_processes": lambda x, dim, pad_index: x}
        super().__init__(
            _get_per_token_logps_and_entropies=lambda *args, **kwargs: (*outputs, None),
            accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, sync_gradients=True, **gather),
            args=SimpleNamespace(
                use_bias_correction_kl=o["kl_estimator"] == "k3_unbiased", delta=o["delta"], steps_per_generation=1,
                sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            ),
            model=SimpleNamespace(training=True),
            _metrics={"train": defaultdict(list)},
            _entropy_bonus_enabled=o["entropy_coef"] != 0,
            use_adaptive_entropy=False,
            entropy_coef=o["entropy_coef"],
            aux_loss_enabled=False,
            top_entropy_quantile=o["top_entropy_quantile"],
            off_policy_mask_threshold=o["off_policy_mask_threshold"],
            current_gradient_accumulation_steps=1,
            importance_sampling_level=o["importance_level"],
            beta=o["beta"],
            loss_type=o["loss_type"],
            epsilon_low=EPSILON,
            epsilon_high=o["epsilon_high"],
            max_completion_length=WIDTH + 5,
            use_vllm=o["is_cap"] is not None,
            vllm_importance_sampling_correction=True,
        )  # fmt: skip


DEFAULTS: dict[str, Any] = {
    "loss_type": "grpo", "importance_level": "token", "beta": 0.0, "epsilon_high": EPSILON_HIGH, "delta": None,
    "is_cap": None, "is_min": None, "is_mode": "token_truncate", "off_policy": True, "kl_estimator": "k3",
    "off_policy_mask_threshold": None, "entropy_coef": 0.0, "top_entropy_quantile": 1.0,
}  # fmt: skip


def trl_weights(batch: Batch, o: dict[str, Any]) -> Tensor:
    """As _generate_and_score_completions has them."""
    old = batch["old"] if o["off_policy"] else batch["logprobs"]
    log_weights = (old - batch["sampler"]) * batch["mask"]
    weights = (log_weights.sum(-1, keepdim=True) if o["is_mode"].startswith("sequence") else log_weights).exp()
    if o["is_mode"].endswith("truncate"):
        return weights.clamp(o["is_min"], o["is_cap"])
    return weights.masked_fill((weights < (o["is_min"] or -torch.inf)) | (weights > o["is_cap"]), 0.0)


def trl_loss(batch: Batch, o: dict[str, Any]) -> tuple[list[Tensor], dict[str, float]]:
    """[loss, gradient of the log-probs, of the entropies], and metrics."""
    leaves = batch["logprobs"].clone().requires_grad_(), batch["entropy"].clone().requires_grad_()
    trainer = Trainer(leaves, o)
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, WIDTH, dtype=torch.long),
        "completion_mask": batch["mask"],
        "advantages": batch["advantages"],
        "num_items_in_batch": batch["mask"].sum(),
        "ref_per_token_logps": batch["ref"],
        "sampling_per_token_logps": batch["sampler"],
    }
    if o["off_policy"]:
        inputs["old_per_token_logps"] = batch["old"]
    if o["is_cap"] is not None:
        inputs["importance_sampling_ratio"] = trl_weights(batch, o)
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients], {name: values[0] for name, values in trainer._metrics["train"].items()}


def our_loss(
    batch: Batch, o: dict[str, Any], impl: str = "reference", function: Any = None
) -> tuple[list[Tensor], Any]:
    """The same batch packed; gradients back in TRL's padded shape. function: a loss of one's own, for o's loss_type."""
    kept = batch["mask"].bool()
    leaves = batch["logprobs"].clone().requires_grad_(), batch["entropy"].clone().requires_grad_()
    arguments = {key: value for key, value in o.items() if key != "off_policy"} | {
        "entropy_T": leaves[1][kept],
        "advantages_N": batch["advantages"],
        "old_logprobs_T": batch["old"][kept] if o["off_policy"] else None,
        "ref_logprobs_T": batch["ref"][kept] if o["beta"] else None,
        "sampler_logprobs_T": batch["sampler"][kept],
        "epsilon": EPSILON,
        "max_completion_length": WIDTH + 5,
    }
    cu_seqlens = torch.cat([torch.zeros(1), LENGTHS.cumsum(0)]).int()
    if function is None:
        loss, metrics = grpo_loss(leaves[0][kept], cu_seqlens, **arguments, impl=impl)
    else:
        loss, metrics, _ = own_loss(function, leaves[0][kept], cu_seqlens, **arguments)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients], {name: value.item() for name, value in metrics.items()}


def assert_equals_trl(o: dict[str, Any], impl: str, function: Any = None) -> dict[str, float]:
    want, want_metrics = trl_loss(padded_batch(), o)
    got, metrics = our_loss(padded_batch(), o, impl, function)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)
    shared = set(metrics) & set(want_metrics)
    assert ("kl" in shared) == bool(o["beta"])
    for name in shared:
        assert metrics[name] == pytest.approx(want_metrics[name], rel=1e-6, abs=1e-9), name
    return metrics


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("off_policy", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("is_cap", [None, 1.3], ids=["", "truncated-is"])
@pytest.mark.parametrize("epsilon_high", [EPSILON, EPSILON_HIGH, 1.5], ids=["sym", "asym", "wide"])
@pytest.mark.parametrize("beta", [0.0, 0.05], ids=["", "beta"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "delta"), LOSSES, ids=str)
def test_equals_trl(
    loss_type: str, level: str, beta: float, epsilon_high: float, delta: float | None, is_cap: float | None,
    off_policy: bool, impl: str,
) -> None:  # fmt: skip
    given = {
        "loss_type": loss_type, "importance_level": level, "beta": beta, "epsilon_high": epsilon_high, "delta": delta,
        "is_cap": is_cap, "off_policy": off_policy,
    }  # fmt: skip
    metrics = assert_equals_trl(DEFAULTS | given, impl)
    clipping = (
        {"cispo_clip_ratio"} if loss_type == "cispo" else {f"clip_ratio/{x}_mean" for x in ("low", "high", "region")}
    )
    assert set(metrics) >= clipping


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
CORRECTIONS: dict[str, dict[str, Any]] = {
    **{mode: {"is_mode": mode, "is_cap": 1.3} for mode in MODES},
    **{f"{mode}-least": {"is_mode": mode, "is_cap": 1.6, "is_min": 0.7} for mode in MODES},
    "off-policy-mask": {"off_policy_mask_threshold": 0.05},
    "unbiased-kl": {"kl_estimator": "k3_unbiased", "beta": 0.1},
    "top-entropy": {"top_entropy_quantile": 0.3},
    "all": {
        "is_mode": "token_mask", "is_cap": 1.6, "is_min": 0.7, "off_policy_mask_threshold": 0.05, "beta": 0.1,
        "kl_estimator": "k3_unbiased", "top_entropy_quantile": 0.6,
    },
    "all-of-samples": {
        "is_mode": "sequence_truncate", "is_cap": 1.6, "off_policy_mask_threshold": 0.0, "beta": 0.1,
        "kl_estimator": "k3_unbiased", "top_entropy_quantile": 0.6,
    },
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("off_policy", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo"])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_equal_trl(name: str, loss_type: str, level: str, off_policy: bool, impl: str) -> None:
    given = {"loss_type": loss_type, "importance_level": level, "off_policy": off_policy}
    assert_equals_trl(DEFAULTS | CORRECTIONS[name] | given, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "cispo"])
def test_entropy_bonus_equals_trl(loss_type: str, impl: str) -> None:
    """Where the loss is a mean over tokens, TRL's mean entropy is that of verl, which takes the loss's own mean."""
    assert_equals_trl(DEFAULTS | {"loss_type": loss_type, "entropy_coef": 0.03}, impl)


@pytest.mark.parametrize("off_policy", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("name", ["plain", *CORRECTIONS])
def test_sapo_as_a_loss_of_ones_own_equals_trl(name: str, off_policy: bool) -> None:
    given = {"loss_type": "sapo", "off_policy": off_policy}
    assert_equals_trl(DEFAULTS | CORRECTIONS.get(name, {}) | given, "reference", sapo)


# verl's formulas (verl/trainer/ppo/core_algos.py), of tensors [N, longest]. Its clamps of log-ratios at 20 do not bite.


def mean_of_samples(values: Tensor, mask: Tensor) -> Tensor:
    """agg_loss of seq-mean-token-mean."""
    return ((values * mask).sum(-1) / mask.sum(-1)).mean()


def mean_of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def verl_gradients(batch: Batch, loss_of: Any) -> list[Tensor]:
    leaves = batch["logprobs"].clone().requires_grad_(), batch["entropy"].clone().requires_grad_()
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def verl_policy_loss(batch: Batch, logprobs: Tensor, clip_ratio_c: float) -> Tensor:
    ratio, advantages = (logprobs - batch["old"]).exp(), batch["advantages"][:, None]
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH))
    lower = torch.minimum(-advantages * clip_ratio_c, clipped)
    return torch.where(advantages < 0, lower, clipped)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("loss_type", "mean"), [("grpo", mean_of_samples), ("dapo", mean_of_tokens)], ids=["grpo", "dapo"]
)
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("delta", [1.3, 3.0])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.03])
def test_equals_verl(
    loss_type: str, mean: Any, kl_estimator: str, delta: float, entropy_coef: float, impl: str
) -> None:
    batch = padded_batch()
    mask = batch["mask"]

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        d = batch["ref"] - logprobs
        kl = {"k1": -d, "k2": 0.5 * d.square(), "k3": d.exp() - d - 1}[kl_estimator]
        policy = mean(verl_policy_loss(batch, logprobs, delta), mask)
        return policy - entropy_coef * mean(entropy, mask) + 0.1 * mean(kl, mask)

    given = {
        "loss_type": loss_type, "delta": delta, "beta": 0.1, "kl_estimator": kl_estimator, "entropy_coef": entropy_coef,
    }  # fmt: skip
    for g, w in zip(our_loss(batch, DEFAULTS | given, impl)[0], verl_gradients(batch, loss), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


def test_gspo_token_equals_verl() -> None:
    """compute_policy_loss_gspo; TRL had the same trainer among its experimental ones."""
    batch = padded_batch()
    mask, advantages = batch["mask"], batch["advantages"][:, None]

    def loss(logprobs: Tensor, _: Tensor) -> Tensor:
        log_ratio = ((logprobs - batch["old"]) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        ratio = (logprobs - logprobs.detach() + log_ratio.detach()).exp()
        clipped = -advantages * ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH)
        return mean_of_samples(torch.maximum(-advantages * ratio, clipped), mask)

    for g, w in zip(our_loss(batch, DEFAULTS, function=gspo_token)[0], verl_gradients(batch, loss), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


def test_the_batch_clips_on_both_sides() -> None:
    """Else the comparisons above would prove little."""
    metrics = our_loss(padded_batch(), DEFAULTS)[1]
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    sequence = our_loss(padded_batch(), DEFAULTS | {"importance_level": "sequence", "epsilon_high": 0.02})[1]
    assert sequence["importance_ratio/max"] > 1.02
    masked = our_loss(padded_batch(), DEFAULTS | CORRECTIONS["all-of-samples"])[1]
    assert 0 < masked["off_policy_mask_ratio"] < 1
