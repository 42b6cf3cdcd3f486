"""The policy loss as a recipe names it: options from the table, a loss of one's own, another reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from r1fast import loss_fields
from r1fast.schema import GRPOStage
from r1fast_kernels.loss_options import OPTIONS
from tests.stages.conftest import SHORT, metrics
from tests.tiny_checkpoint import QWEN2, write_checkpoint, write_recipe

pytestmark = pytest.mark.usefixtures("stage_files")

LOSS_FILE = """
import torch

def as_grpo(inputs):
    ratio_T, o = inputs.importance_ratio_T, inputs.options
    clipped_T = ratio_T.clamp(1 - o.epsilon, 1 + o.epsilon)
    loss_T = -torch.minimum(ratio_T * inputs.advantages_T, clipped_T * inputs.advantages_T)
    return loss_T, {"tokens/ratio": ratio_T, "samples/advantage": inputs.advantages_T[inputs.cu_seqlens[:-1].long()]}

def a_mean(inputs):
    return inputs.logprobs_T.mean(), {}

def no_metrics(inputs):
    return -inputs.logprobs_T

def one_number(inputs):
    return -inputs.logprobs_T, {"ratio": inputs.importance_ratio_T.mean()}

def detached(inputs):
    return -inputs.logprobs_T.detach(), {}

def broken(inputs):
    return inputs.logits_TV, {}
"""
STAGE: dict[str, Any] = {
    "name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], **SHORT, "num_generations": 4,
    "prompts_per_step": 2, "max_completion_length": 8, "max_steps": 3, "steps_per_generation": 2,
    "learning_rate": 1.0e-3, "rewards": {"red": {"function": "my_rewards.py:say_red"}}, "beta": 0.01,
}  # fmt: skip


@pytest.fixture(autouse=True)
def losses(tmp_path: Path) -> None:
    (tmp_path / "my_losses.py").write_text(LOSS_FILE)


def test_every_option_of_the_table_is_a_key() -> None:
    fields = GRPOStage.model_fields
    assert {option.key for option in OPTIONS if not option.about.derived} <= fields.keys()
    stage = GRPOStage(
        name="a", kind="grpo", train_files=["-"], max_steps=1, delta=3.0, sampling_importance_mode="sequence_mask",
        sampling_importance_cap=3.0, sampling_importance_min=0.5,
    )  # fmt: skip
    for option in OPTIONS:
        if not option.about.derived and option.key not in loss_fields.DEFAULTS:
            assert fields[option.key].default == option.default, option.name
    assert (stage.loss.delta, stage.loss.is_mode, stage.loss.is_cap, stage.loss.is_min) == (
        3.0,
        "sequence_mask",
        3.0,
        0.5,
    )
    assert stage.loss._fields == tuple(option.name for option in OPTIONS)


def test_a_loss_of_ones_own_trains_as_the_built_in_one(train: Callable, base_model: Path, tmp_path: Path) -> None:
    train(base_model, STAGE)
    want = metrics(tmp_path / "run" / "zero", "loss"), metrics(tmp_path / "run" / "zero", "kl")
    (tmp_path / "run").rename(tmp_path / "built-in")
    train(base_model, STAGE | {"loss_type": "my_losses.py:as_grpo"})
    zero = tmp_path / "run" / "zero"
    assert metrics(zero, "loss") == pytest.approx(want[0], rel=1e-4, abs=1e-6)
    assert metrics(zero, "kl") == pytest.approx(want[1], rel=1e-3, abs=1e-7)
    assert metrics(zero, "tokens/ratio") == pytest.approx(metrics(zero, "importance_ratio/mean"), rel=1e-5)
    assert metrics(zero, "samples/advantage") == pytest.approx([0.0] * 3, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_losses.py:a_mean", "returned () for 5 tokens, expected a value each"),
        ("my_losses.py:no_metrics", "expected (loss_T, metrics: dict)"),
        ("my_losses.py:one_number", "metric 'ratio' is (), expected a value for each of 5 tokens or 2 samples"),
        ("my_losses.py:detached", "without a gradient"),
        ("my_losses.py:broken", "AttributeError"),
        ("my_losses.py:as_grpoo", "did you mean 'as_grpo'"),
        ("absent.py:loss", "no file 'absent.py'"),
        ("no.such.module", "cannot be imported"),
        ("grop", "loss_type"),
    ],
)
def test_a_wrong_loss_is_one_error_before_any_work(
    refuse: Callable[..., str], tmp_path: Path, base_model: Path, name: str, message: str
) -> None:
    config = write_recipe(tmp_path / "mine.yaml", STAGE | {"loss_type": name}, model={"path": str(base_model)})
    assert message in refuse("--config", config, "--output-dir", "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_aggregation": "token"}, "loss_aggregation is of a loss of one's own"),
        ({"kl_estimator": "k2", "beta": 0.0}, "kl_estimator needs beta above 0"),
        ({"ref_model": "somewhere", "beta": 0.0}, "ref_model needs beta above 0"),
        ({"sampling_importance_mode": "token_mask"}, "sampling_importance_mode needs bounds"),
        ({"old_logprobs": "sampler", "sampling_importance_min": 0.5}, "every such weight is 1"),
        ({"old_logprobs": "sampler", "sampling_importance_cap": 2.0}, "every such weight is 1"),
        ({"loss_type": "my_losses.py:as_grpo", "beta": 0.0, "skip_zero_variance_groups": True}, "a built-in loss"),
        ({"top_entropy_quantile": 0.0}, "greater than 0"),
    ],
)
def test_options_that_do_nothing_are_refused(
    refuse: Callable[..., str], tmp_path: Path, base_model: Path, options: dict[str, Any], message: str
) -> None:
    config = write_recipe(tmp_path / "mine.yaml", STAGE | options, model={"path": str(base_model)})
    assert message in refuse("--config", config, "--output-dir", "run")


def test_another_reference(train: Callable, base_model: Path, tmp_path: Path) -> None:
    """The KL to it is not 0 in the first step; nothing else differs there."""
    other = write_checkpoint(tmp_path / "other", **{**QWEN2, "initializer_range": 0.3})
    train(base_model, STAGE | {"ref_model": str(other), "max_steps": 1})
    zero = tmp_path / "run" / "zero"
    assert metrics(zero, "kl")[0] > 1e-3


def test_the_sampler_s_logprobs_as_old_ones(train: Callable, base_model: Path, tmp_path: Path) -> None:
    """In float32 they are the policy's: the same losses, without the forward pass for them."""
    train(base_model, STAGE)
    want = metrics(tmp_path / "run" / "zero", "loss")
    (tmp_path / "run").rename(tmp_path / "policy")
    train(base_model, STAGE | {"old_logprobs": "sampler"})
    zero = tmp_path / "run" / "zero"
    assert metrics(zero, "loss") == pytest.approx(want, rel=1e-3, abs=1e-5)
    assert metrics(zero, "sampling/sampling_logp_difference/max") == [0.0] * 3


def test_a_head_in_float32(train: Callable, base_model: Path, tmp_path: Path) -> None:
    """A model in bfloat16: sampler and trainer agree better on what the head computes."""
    gaps = {}
    for fp32 in (False, True):
        train(base_model, STAGE | {"lm_head_fp32": fp32}, dtype="bfloat16")
        zero = tmp_path / "run" / "zero"
        gaps[fp32] = metrics(zero, "sampling/sampling_logp_difference/mean")[0]
        assert all(torch.isfinite(torch.tensor(metrics(zero, "loss"))))
        (tmp_path / "run").rename(tmp_path / f"run-{fp32}")
    assert 0 < gaps[True] < gaps[False]
