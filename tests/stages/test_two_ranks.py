"""Same numbers, however it is cut (docs/architecture.md, section 5): one step on two gloo processes, and in
micro-batches, is the step of one process in one batch: loss, metrics and the whole gradient in fp32 to 1e-5."""

from typing import Any

import numpy as np
import pytest
import torch

from r1fast.parallel.mesh import Dist
from tests.stages.gradient_cases import CASES, run_cases

STEPS = [name for name in CASES if name not in ("rollout", "ahead", "sft-local-denominator")]
MICRO = [name for name in STEPS if name.removesuffix("-micro") in STEPS and name.endswith("-micro")]


@pytest.fixture(scope="module")
def one_rank(dist: Dist, cut_models: dict[str, str]) -> dict[str, Any]:
    return run_cases(dist, cut_models["moe"])


def difference(got: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative error of the loss and of any parameter's gradient (in norm), over all updates."""
    assert len(got["gradients"]) == len(expected["gradients"]) > 0
    loss = expected["metrics"]["loss"]
    # On-policy, a loss is a sum of terms around 1 of both signs: fp32 knows it to 1e-7 of these, not of what is left.
    errors = [abs(got["metrics"]["loss"] - loss) / max(abs(loss), 0.1)]
    for ours, theirs in zip(got["gradients"], expected["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        whole = torch.cat([grad.flatten() for grad in theirs.values()]).norm()
        # A tensor whose gradient is all but zero is compared to the whole.
        errors += [float((ours[name] - grad).norm() / max(grad.norm(), 1e-3 * whole)) for name, grad in theirs.items()]
    return max(errors)


def assert_same_metrics(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        assert np.asarray(got[name]) == pytest.approx(np.asarray(expected[name]), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_a_gradient(one_rank, name: str) -> None:
    """Else all comparisons would be of zeros."""
    for gradients in one_rank[name]["gradients"]:
        assert all(torch.isfinite(grad).all() for grad in gradients.values())
    first = one_rank[name]["gradients"][0]
    assert min(float(grad.norm()) for key, grad in first.items() if "layers.0" in key or "embed" in key) > 0


@pytest.mark.parametrize("name", MICRO)
def test_micro_batches_change_nothing(one_rank, name: str) -> None:
    got, expected = one_rank[name], one_rank[name.removesuffix("-micro")]
    assert difference(got, expected) < 1e-5
    assert_same_metrics(got["metrics"], expected["metrics"])


@pytest.mark.dist
@pytest.mark.parametrize("name", STEPS)
def test_two_ranks_are_one(one_rank, two_ranks, name: str) -> None:
    assert difference(two_ranks["gradients"][name], one_rank[name]) < 1e-5
    assert_same_metrics(two_ranks["gradients"][name]["metrics"], one_rank[name]["metrics"])


@pytest.mark.dist
def test_a_local_denominator_would_be_seen(one_rank, two_ranks) -> None:
    assert difference(one_rank["sft-local-denominator"], one_rank["sft"]) == 0.0  # one rank: the same thing
    assert difference(two_ranks["gradients"]["sft-local-denominator"], one_rank["sft"]) > 0.1


@pytest.mark.dist
def test_two_ranks_sample_what_one_does(one_rank, two_ranks) -> None:
    got, expected = two_ranks["gradients"]["rollout"], one_rank["rollout"]
    assert got["ids"] == expected["ids"] and got["groups"] == expected["groups"] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({tuple(ids) for ids in expected["ids"]}) > 9  # samples differ
    for ours, theirs in zip(got["logprobs"], expected["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.dist
def test_two_ranks_sample_ahead_what_one_does(one_rank, two_ranks) -> None:
    """While a thread samples, the update of both ranks goes through its collectives."""
    ours, theirs = two_ranks["gradients"]["ahead"]["rollouts"], one_rank["ahead"]["rollouts"]
    for step, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert [sample[0] for sample in got] == [3 * step + i // 4 for i in range(12)]
        assert [sample[:2] for sample in got] == [sample[:2] for sample in expected]
        for (*_, found), (*_, logprobs) in zip(got, expected, strict=True):
            assert found == pytest.approx(logprobs, abs=1e-5)
    assert one_rank["ahead"]["gap"] > 0.01  # the weights had moved when the second was trained on
