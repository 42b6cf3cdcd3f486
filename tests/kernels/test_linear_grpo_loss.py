import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast_kernels import grpo_loss, linear_grpo_loss, linear_logprobs
from r1fast_kernels.grpo_loss_reference import LossArguments
from tests.kernels.backends import (
    BF16,
    FP16,
    FP32,
    FP64,
    Backend,
    assert_as_exact,
    assert_same_bits,
    needs_cpp,
    slow_when_interpreted,
)  # fmt: skip
from tests.kernels.heads import HEAD, TILINGS, random_head, set_one_thread_for_products, set_tiling
from tests.kernels.loss_settings import random_settings

LENGTHS = [5, 1, 0, 9, 8]  # 23 tokens; tall tiles of 6 rows cut three samples in two
TEMPERATURE = 0.8
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]


def batch(dtype: torch.dtype, masked: bool = False) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """(hidden, weight, ids, cu_seqlens), and an off-policy loss with every term; sample 3 of three groups is alone."""
    hidden, weight, _, ids = random_head(dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    logprobs = linear_logprobs(hidden.double(), weight.double(), ids, temperature=TEMPERATURE, impl="reference")

    def near(spread: float) -> Tensor:
        values = logprobs + spread * torch.randn(23, generator=generator, dtype=FP64)
        return values.to(torch.promote_types(dtype, FP32))

    options: dict[str, Any] = {
        "rewards_N": torch.tensor([1.0, 0.0, float("nan"), 0.5, 2.0]),
        "group_ids_N": torch.tensor([0, 0, 0, 7, 0]),
        "old_logprobs_T": near(0.3),
        "ref_logprobs_T": near(0.2),
        "sampler_logprobs_T": near(0.3),
        "beta": 0.1,
        "is_cap": 2.0,
        "max_completion_length": 12,
    }
    if masked:
        options["loss_mask_T"] = torch.arange(23) % 4 != 1
    return (hidden, weight, ids, torch.tensor([0, *LENGTHS]).cumsum(0).int()), options


def loss_and_gradients(
    inputs: tuple[Tensor, ...], options: dict[str, Any], backend: Backend, **more: Any
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """[loss, grad hidden, grad weight] with an incoming gradient of 0.7, and the metrics."""
    hidden, weight, ids, cu_seqlens = backend.to(inputs)
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss, metrics = linear_grpo_loss(*leaves, ids, cu_seqlens, temperature=TEMPERATURE, **backend.to(options), **more)
    return [loss, *torch.autograd.grad(loss, leaves, torch.tensor(0.7).to(loss))], metrics


def in_double(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: in_double(x) for key, x in value.items()}
    if isinstance(value, tuple):
        return tuple(in_double(x) for x in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_as_exact_as_torch(
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    loss_type: str,
    level: str,
    masked: bool,
    tiling: str,
    dtype: torch.dtype,
) -> None:
    """Against the two references in fp64, whatever the tiles: loss within 2x, gradients within 3x plain torch."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {dtype}")
    inputs, options = batch(dtype, masked)
    how = {"loss_type": loss_type, "importance_level": level}
    cpu = Backend("reference", "reference", "cpu", ())
    exact, exact_metrics = loss_and_gradients(in_double(inputs), in_double(options), cpu, impl="reference", **how)
    plain, _ = loss_and_gradients(inputs, options, backend, impl="reference", **how)
    set_tiling(monkeypatch, tiling)
    got, metrics = loss_and_gradients(inputs, options, backend, impl=backend.impl, **how)
    for name, g, p, e, times in zip(("loss", "grad hidden", "grad weight"), got, plain, exact, (2, 3, 3)):
        assert g.dtype == p.dtype, name
        assert_as_exact(g, p, e, times, name)
    assert set(metrics) == set(exact_metrics) and "entropy" in metrics
    for name, value in metrics.items():
        assert value.dim() == 0 and not value.requires_grad
        if dtype in (FP32, FP64):  # in half precision a token may cross the clip edge
            assert value.item() == pytest.approx(exact_metrics[name].item(), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("impl", ["reference", "backend"])
def test_equals_the_two_ops(backend: Backend, monkeypatch: pytest.MonkeyPatch, impl: str, tiling: str) -> None:
    """Masked targets and hidden rows may hold anything; on-policy, with advantages instead of rewards."""
    (hidden, weight, ids, cu_seqlens), options = batch(FP32, masked=True)
    mask = options["loss_mask_T"]
    del options["old_logprobs_T"], options["rewards_N"], options["group_ids_N"]
    options["advantages_N"] = torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0])
    logprobs, entropy = linear_logprobs(
        hidden, weight, ids, temperature=TEMPERATURE, with_entropy=True, impl="reference"
    )
    want, want_metrics = grpo_loss(logprobs, cu_seqlens, impl="reference", **options)
    hidden[~mask], ids[~mask] = float("nan"), -100
    set_tiling(monkeypatch, tiling)
    name = backend.impl if impl == "backend" else impl
    (loss, *_), metrics = loss_and_gradients((hidden, weight, ids, cu_seqlens), options, backend, impl=name)
    torch.testing.assert_close(loss.cpu(), want)
    torch.testing.assert_close(metrics.pop("entropy").cpu(), entropy[mask].mean())
    assert set(metrics) == set(want_metrics)
    for key, value in metrics.items():
        torch.testing.assert_close(value.cpu(), want_metrics[key])


@pytest.mark.parametrize("masked", ["all", "no token"])
def test_nothing_to_learn_from_is_zero(backend: Backend, masked: str) -> None:
    (hidden, weight, ids, cu_seqlens), options = batch(FP32)
    options["loss_mask_T"] = torch.zeros(23, dtype=torch.bool)
    if masked == "no token":
        hidden, ids, cu_seqlens = hidden[:0], ids[:0], cu_seqlens * 0
        options = {key: value[:0] if key.endswith("_T") else value for key, value in options.items()}
    for loss_type in LOSSES:
        found, metrics = loss_and_gradients(
            (hidden, weight, ids, cu_seqlens), options, backend, impl=backend.impl, loss_type=loss_type
        )
        assert not any(x.any() for x in found)
        assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize(("level", "tiling", "products"), [
    ("token", TILINGS[0], 1), ("token", TILINGS[1], 1), ("sequence", TILINGS[0], 1), ("sequence", TILINGS[1], 2),
])  # fmt: skip
def test_logits_are_computed_once_where_they_can_be(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, level: str, tiling: str, products: int
) -> None:
    """6 T D V FLOPs: one product forward, two backward. A sequence ratio over several tiles computes logits twice."""
    set_tiling(monkeypatch, tiling)
    head, projected = sys.modules[HEAD], []
    project = head.project

    def counted(*args: Any) -> Tensor:
        projected.append(args[0].shape[0] * args[1].shape[0])
        return project(*args)

    monkeypatch.setattr(head, "project", counted)
    inputs, options = batch(FP32)
    loss_and_gradients(inputs, options, backend, impl=backend.impl, importance_level=level)
    assert sum(projected) == products * 23 * 211


@slow_when_interpreted
@pytest.mark.parametrize("learned", ["hidden", "weight", "nothing"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_one_side_may_be_frozen(backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str, learned: str) -> None:
    set_tiling(monkeypatch, tiling)
    inputs, options = batch(FP32)
    (want, want_hidden, want_weight), _ = loss_and_gradients(inputs, options, backend, impl=backend.impl)
    hidden, weight, ids, cu_seqlens = backend.to(inputs)
    leaf = {"hidden": hidden, "weight": weight}.get(learned)
    if leaf is not None:
        leaf.requires_grad_()
    loss, _ = linear_grpo_loss(
        hidden, weight, ids, cu_seqlens, temperature=TEMPERATURE, impl=backend.impl, **backend.to(options)
    )
    assert torch.equal(loss, want)
    if leaf is not None:
        (loss * 0.7).backward()
        torch.testing.assert_close(leaf.grad, want_hidden if learned == "hidden" else want_weight)


@slow_when_interpreted
@pytest.mark.parametrize("tiling", TILINGS)
def test_micro_batches_sum_to_the_whole(backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    """Contract 1, through the head: samples in two calls, with the counts of both."""
    set_tiling(monkeypatch, tiling)
    (hidden, weight, ids, cu_seqlens), options = batch(FP32)
    del options["rewards_N"], options["group_ids_N"]
    options["advantages_N"] = torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0])
    for loss_type in LOSSES:
        how = {"loss_type": loss_type, "impl": backend.impl, "num_items": 23, "num_samples": torch.tensor(5)}
        whole, _ = loss_and_gradients((hidden, weight, ids, cu_seqlens), options, backend, **how)
        parts = []
        for samples, tokens in ((slice(0, 2), slice(0, 6)), (slice(2, 5), slice(6, 23))):
            part = {
                key: value[tokens] if key.endswith("_T") else value[samples] if key.endswith("_N") else value
                for key, value in options.items()
            }
            packed = cu_seqlens[samples.start : samples.stop + 1] - cu_seqlens[samples.start]
            parts.append(loss_and_gradients((hidden[tokens], weight, ids[tokens], packed), part, backend, **how)[0])
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
        torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts[0][2] + parts[1][2], whole[2], rtol=1e-5, atol=1e-6)


@slow_when_interpreted
@pytest.mark.parametrize("tiling", TILINGS)
def test_same_bits_and_backward_twice(backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    set_tiling(monkeypatch, tiling)
    set_one_thread_for_products(monkeypatch)
    inputs, options = batch(FP32, masked=True)
    assert_same_bits(lambda: loss_and_gradients(inputs, options, backend, impl=backend.impl)[0])
    hidden, weight, ids, cu_seqlens = backend.to(inputs)
    loss, _ = linear_grpo_loss(
        hidden.requires_grad_(), weight, ids, cu_seqlens, impl=backend.impl, **backend.to(options)
    )
    first = torch.autograd.grad(loss, hidden, torch.tensor(3.0).to(loss), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden, torch.tensor(3.0).to(loss))[0], first) and first.any()


@needs_cpp
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_gradcheck_and_compile(monkeypatch: pytest.MonkeyPatch, tiling: str, masked: bool) -> None:
    set_tiling(monkeypatch, tiling)
    (hidden, weight, ids, cu_seqlens), options = batch(FP64, masked)
    leaves = (hidden / 4).requires_grad_(), (weight[:, :]).requires_grad_()

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_grpo_loss(h, w, ids, cu_seqlens, temperature=TEMPERATURE, **options)[0]

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves), leaves))


@needs_cpp
def test_opcheck() -> None:
    """Of a loss above 0: opcheck sums |loss|, and times -1 the backward pass writes over gradients no caller sees."""
    inputs, options = batch(FP32)
    hidden, weight, ids, cu_seqlens = inputs
    options |= {"beta": 9.0, "num_items": 23, "counts_N": cu_seqlens.diff()}
    given = LossArguments.of("grpo_loss", options, len(hidden), cu_seqlens)
    arguments = (
        hidden.requires_grad_(), weight.requires_grad_(), ids, TEMPERATURE, True, True, cu_seqlens,
        *sys.modules["r1fast_kernels.grpo_loss"].op_arguments(given, hidden.device),
    )  # fmt: skip
    op = torch.ops.r1fast.linear_grpo_loss.default
    assert op(*arguments)[0] > 0
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("tiling", TILINGS)
def test_random_settings(backend: Backend, monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    """Any options of the loss, the entropy's gradient through the head among them, in every tiling."""
    set_tiling(monkeypatch, tiling)
    dtype = FP64 if FP64 in backend.dtypes else FP32
    for seed in range(3 if backend.interpreted else 40):
        inputs, options = batch(dtype, masked=seed % 2 == 1)
        settings = options | random_settings(seed)
        if settings["top_entropy_quantile"] < 1 and seed % 3:
            settings["entropy_threshold"] = torch.tensor(1.5, dtype=dtype)
        want, want_metrics = loss_and_gradients(inputs, settings, backend, impl="reference")
        got, metrics = loss_and_gradients(inputs, settings, backend, impl=backend.impl)
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == FP64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(got, want, **tolerance, msg=lambda m, o=settings: f"{o} {m}")
        torch.testing.assert_close(metrics, want_metrics, **tolerance)


def test_errors_name_the_argument(backend: Backend) -> None:
    (hidden, weight, ids, cu_seqlens), options = batch(FP32)
    mask = r"linear_grpo_loss: got loss_mask_T \(3,\) for 23 tokens of 5 samples, expected \(23,\)"
    with pytest.raises(ValueError, match=mask):
        linear_grpo_loss(hidden, weight, ids, cu_seqlens, loss_mask_T=torch.ones(3, dtype=torch.bool), **options)
    with pytest.raises(TypeError, match="got epsilon_low, expected keyword arguments of grpo_loss"):
        linear_grpo_loss(hidden, weight, ids, cu_seqlens, epsilon_low=0.1, **options)
    with pytest.raises(ValueError, match="linear_grpo_loss: got epsilon=-1, expected at least 0"):
        linear_grpo_loss(hidden, weight, ids, cu_seqlens, epsilon=-1, **options)
    with pytest.raises(TypeError, match="got counts_N"):
        linear_grpo_loss(hidden, weight, ids, cu_seqlens, counts_N=cu_seqlens.diff(), **options)
    with pytest.raises(ValueError, match="temperature=0"):
        linear_grpo_loss(hidden, weight, ids, cu_seqlens, temperature=0, **options)
    with pytest.raises(ValueError, match=r"linear_grpo_loss: got hidden \(23, 8\)"):
        linear_grpo_loss(hidden, weight[:, 1:], ids, cu_seqlens, **options)
