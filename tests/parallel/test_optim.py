"""AdamW against torch's, Muon against its definition, schedules against numbers worked out by hand."""

import math

import pytest
import torch

from r1fast.parallel import optim
from r1fast.parallel.mesh import Dist
from r1fast.parallel.optim import build_optimizer, lr_at, newton_schulz
from r1fast.parallel.parallelize import local_tensor
from tests.parallel.tiny_model import (
    TinyDecoder,
    backward_all,
    full,
    full_state_dict,
    loss_of,
    sharded,
    tokens_of_rank,
    train,
)


def test_adamw_equals_torch(dist: Dist) -> None:
    model, plain = sharded(dist), TinyDecoder()
    settings = {"betas": (0.9, 0.95), "eps": 1e-6}
    train(model, dist, 4, build_optimizer(model, learning_rate=1e-2, weight_decay=0.1, **settings))
    matrices = [param for param in plain.parameters() if param.ndim > 1]
    vectors = [param for param in plain.parameters() if param.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, fused=True, **settings)
    for _ in range(4):
        backward_all(plain)
        reference.step()
        reference.zero_grad()
    for name, tensor in full_state_dict(model, dist).items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_newton_schulz_is_close_to_u_vt() -> None:
    torch.manual_seed(0)
    for shape in [(3, 16, 16), (6, 8, 24)]:
        matrices = torch.randn(shape)
        u, _, vh = torch.linalg.svd(newton_schulz(matrices), full_matrices=False)
        exact_u, _, exact_vh = torch.linalg.svd(matrices, full_matrices=False)
        torch.testing.assert_close(u @ vh, exact_u @ exact_vh, rtol=0, atol=1e-3)
        singular = torch.linalg.svdvals(newton_schulz(matrices))
        assert singular.min() > 0.3 and singular.max() < 1.25, singular
    assert newton_schulz(torch.zeros(2, 4, 4)).abs().max() == 0


def test_muon_first_step_by_hand(dist: Dist) -> None:
    model = sharded(dist)
    before = full_state_dict(model, dist)
    before = {name: tensor.clone() for name, tensor in before.items()}
    backward_all(model, dist)
    block = model.layers[0]
    grads = {
        "layers.0.up_proj.weight": block.up_proj.weight.grad.to_local().clone(),
        "layers.0.experts": block.experts.grad.to_local().clone(),
    }
    optimizer = build_optimizer(model, name="muon", learning_rate=0.01, weight_decay=0.5)
    optimizer.step()
    after = full_state_dict(model, dist)
    for name, rows_or_cols in [("layers.0.up_proj.weight", 16), ("layers.0.experts", 8)]:
        # Momentum after one step is (1 - 0.95) g and the Nesterov mix a multiple of g: its direction is that of g.
        wide = grads[name] if grads[name].shape[-2] <= grads[name].shape[-1] else grads[name].mT
        found = newton_schulz(wide.reshape(-1, *wide.shape[-2:])).view(wide.shape)
        direction = 0.2 * math.sqrt(rows_or_cols) * (found if wide is grads[name] else found.mT)
        expected = before[name] * (1 - 0.01 * 0.5) - 0.01 * direction
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_muon_takes_the_matrices_of_the_blocks_only(dist: Dist) -> None:
    model = sharded(dist)
    optimizer = build_optimizer(model, name="muon", learning_rate=0.01, weight_decay=0.1)
    name_of = {param: name for name, param in model.named_parameters()}
    muon = {name_of[p] for group in optimizer.param_groups if group["algorithm"] == "muon" for p in group["params"]}
    kinds = {"up_proj.weight", "down_proj.weight", "experts"}
    assert muon == {f"layers.{index}.{kind}" for index in range(2) for kind in kinds}
    undecayed = {
        name_of[p].rpartition(".")[2] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]
    }
    assert undecayed <= {"weight", "bias"} and "bias" in undecayed


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_lowers_the_loss(dist: Dist, name: str) -> None:
    model = sharded(dist)
    first = loss_of(model, tokens_of_rank(0)).item()
    train(model, dist, 30, build_optimizer(model, name=name, learning_rate=3e-2))
    last = loss_of(model, tokens_of_rank(0)).item()
    assert last < 0.5 * first


def test_set_lr_scales_every_group_and_zero_changes_nothing(dist: Dist) -> None:
    model = sharded(dist)
    optimizer = build_optimizer(model, name="muon", learning_rate=0.02, weight_decay=0.1)
    before = {name: tensor.clone() for name, tensor in full_state_dict(model, dist).items()}
    optimizer.set_lr(0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    optimizer.set_lr(0.0)
    train(model, dist, 1, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in full_state_dict(model, dist).items())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_offloaded_state_comes_in_parts(dist: Dist, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a few parameters or one: the bits are those of a step on all, and between steps no state is left."""
    monkeypatch.setattr(optim, "PART_NUMEL", 200)
    found = []
    for offload in (False, True):
        model = sharded(dist)
        optimizer = build_optimizer(model, name=name, learning_rate=1e-2, weight_decay=0.1, offload=offload)
        train(model, dist, 3, optimizer)
        states = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
        assert {local_tensor(x).untyped_storage().nbytes() == 0 for x in states} == {offload}
        with optimizer.here():
            found.append([full(x) for x in (*states, *model.parameters())])
    assert all(torch.equal(got, expected) for got, expected in zip(*found, strict=True))


def test_frozen_parameters_are_left_out(dist: Dist) -> None:
    model = sharded(dist)
    model.embed_tokens.weight.requires_grad_(False)
    optimizer = build_optimizer(model, learning_rate=0.01)
    assert all(p is not model.embed_tokens.weight for g in optimizer.param_groups for p in g["params"])
    with pytest.raises(ValueError, match="without trainable parameters"):
        build_optimizer(model.requires_grad_(False), learning_rate=0.01)


def test_unknown_names_are_errors(dist: Dist) -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'adam'; expected one of adamw, muon"):
        build_optimizer(sharded(dist), name="adam", learning_rate=0.01)
    with pytest.raises(ValueError, match="unknown lr_scheduler_type 'cos'"):
        lr_at(0, max_steps=1, lr_scheduler_type="cos")


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("constant", 0, 0.25),  # warm-up: (0 + 1) / 4
        ("constant", 3, 1.0),  # its last step
        ("constant", 13, 1.0),
        ("linear", 4, 1.0),  # progress 0
        ("linear", 9, 0.55),  # progress 5 / 10: 0.1 + 0.9 * 0.5
        ("linear", 14, 0.1),  # past the end: the floor
        ("cosine", 9, 0.55),  # 0.1 + 0.9 * (1 + cos(pi / 2)) / 2
        ("cosine", 6, 0.1 + 0.45 * (1 + math.cos(0.2 * math.pi))),
        ("wsd", 9, 1.0),  # decay over the last round(0.3 * 14) = 4 steps, from step 10
        ("wsd", 10, 1.0),
        ("wsd", 12, 0.55),  # progress 2 / 4
        ("wsd", 20, 0.1),
    ],
)
def test_lr_at_by_hand(kind: str, step: int, expected: float) -> None:
    got = lr_at(step, max_steps=14, warmup_steps=4, lr_scheduler_type=kind, min_lr_ratio=0.1, decay_ratio=0.3)
    assert got == pytest.approx(expected)


def test_lr_at_without_steps_to_decay_over() -> None:
    assert lr_at(0, max_steps=0, lr_scheduler_type="linear") == 1.0
    assert lr_at(0, max_steps=1, lr_scheduler_type="wsd", decay_ratio=0.0) == 1.0
