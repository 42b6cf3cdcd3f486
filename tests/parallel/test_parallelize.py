"""Sharded training equals the plain single-device model: gradients, clipping, generation, state dicts."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from r1fast.models.cache import BlockCache
from r1fast.parallel.mesh import Dist
from r1fast.parallel.optim import build_optimizer
from r1fast.parallel.parallelize import (
    KEPT_OPS,
    copy_weights,
    generation_phase,
    grad_norm_and_clip,
    parallelize,
)
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams
from r1fast_kernels import products
from r1fast_kernels.torch_private import OperatorMode, fake_tensors
from tests import zoo
from tests.forks import Forks
from tests.parallel.tiny_model import (
    TinyDecoder,
    backward_all,
    decoder_gradients,
    full,
    full_state_dict,
    loss_of,
    moe_decoder,
    sharded,
    tokens_of_rank,
    train,
)

LAYOUTS = {
    "one_unit": {},
    "units": {"one_unit_numel": 0},
    "tied": {"one_unit_numel": 0, "tied": True},
    "recompute": {"one_unit_numel": 0, "activation_checkpointing": "full"},
    "selective": {"one_unit_numel": 0, "activation_checkpointing": "selective"},
}


def plain_gradients(*, tied: bool = False, max_norm: float | None = None) -> dict[str, torch.Tensor]:
    model = TinyDecoder(tied=tied)
    backward_all(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    return {"norm": norm} | {name: param.grad for name, param in model.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    got = {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in got.items()}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (got[name] - tensor).norm() / tensor.norm().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.fixture(scope="module")
def two_ranks(made_once: Callable[..., Path], forks: Forks) -> dict[str, Any]:
    module = "tests.parallel.two_ranks_parallelize"
    folder = made_once("parallelize", lambda folder: forks.run(module, folder / "out.pt", ranks=2))
    return torch.load(folder / "out.pt", weights_only=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_gradients_and_clip_equal_the_plain_model(dist: Dist, layout: str) -> None:
    model = sharded(dist, **LAYOUTS[layout])
    backward_all(model, dist)
    norm = grad_norm_and_clip(model.parameters(), 0.05)
    got = {"norm": norm} | {name: full(param.grad) for name, param in model.named_parameters()}
    assert_same(got, plain_gradients(tied=layout == "tied", max_norm=0.05))


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_rank_gradients_and_clip_equal_the_plain_model(two_ranks: dict[str, Any], layout: str) -> None:
    assert_same(two_ranks[layout], plain_gradients(tied=layout == "tied", max_norm=0.05))


@pytest.mark.dist
def test_two_rank_gradients_of_the_real_decoder(two_ranks: dict[str, Any]) -> None:
    assert_same(two_ranks["decoder"], decoder_gradients())


@pytest.mark.parametrize("one_unit_numel", [0, 10**6], ids=["units", "one_unit"])
def test_the_real_decoder_trains_and_decodes(dist: Dist, one_unit_numel: int) -> None:
    assert_same(decoder_gradients(dist, one_unit_numel=one_unit_numel), decoder_gradients())
    model = parallelize(moe_decoder(), dist, param_dtype=torch.float32, one_unit_numel=one_unit_numel)
    ids_T = tokens_of_rank(0)
    cache = BlockCache(model.config, 1, torch.float32, torch.device("cpu"))
    table_11 = torch.zeros(1, 1, dtype=torch.int32)
    with generation_phase(model):
        for position, token in enumerate(ids_T):  # decode before any forward
            logits_BV = model.decode(token[None], torch.tensor([position]), cache, table_11)
    plain = moe_decoder()(ids_T, torch.tensor([0, len(ids_T)], dtype=torch.int32))
    torch.testing.assert_close(logits_BV[0], plain[-1].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.dist
def test_two_ranks_generate_and_train_like_one(two_ranks: dict[str, Any], dist: Dist) -> None:
    model = sharded(dist)
    optimizer = train(model, dist, 1)
    with torch.no_grad():
        logits = model(tokens_of_rank(0)).clone()
    train(model, dist, 1, optimizer)
    assert_same(two_ranks["generation"], {"logits": logits} | full_state_dict(model, dist))


@pytest.mark.dist
def test_two_rank_muon_equals_one_rank(two_ranks: dict[str, Any], dist: Dist) -> None:
    model = sharded(dist)
    train(model, dist, 3, build_optimizer(model, name="muon", learning_rate=1e-2, weight_decay=0.1))
    assert_same(two_ranks["muon"], full_state_dict(model, dist))
    assert_same(two_ranks["offloaded"], two_ranks["muon"], tolerance=0.0)


@pytest.mark.parametrize("tied", [False, True])
def test_generation_leaves_no_weight_gathered(dist: Dist, tied: bool) -> None:
    """One call of C++, for prompts or a token, runs the head and not the norm of its FSDP unit (tied, the embedding):
    the next phase would sample with weights of before a step."""
    decoder = zoo.decoder("llama", vocab_size=17, tie_word_embeddings=True) if tied else moe_decoder()
    model = parallelize(decoder, dist, param_dtype=torch.float32, one_unit_numel=0)
    optimizer = build_optimizer(model, learning_rate=1e-2)
    engine, params = RolloutEngine(model, None), SamplingParams(n=2, max_tokens=3, seed=0)
    for _ in range(2):
        with generation_phase(model):
            engine.generate([[3, 4, 5]], params)
        assert all(isinstance(param, DTensor) for param in model.parameters())
        model(tokens_of_rank(0), torch.tensor([0, 7], dtype=torch.int32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class Calls(OperatorMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_computes_no_product_twice(dist: Dist) -> None:
    """Of all that is computed in the backward pass; norms are computed again, so that this can fail."""
    calls = {}
    for kind in ("none", "selective", "full"):
        model = parallelize(
            moe_decoder(), dist, param_dtype=torch.float32, activation_checkpointing=kind, one_unit_numel=0
        )
        ids_T = tokens_of_rank(0)
        loss = model(ids_T, torch.tensor([0, len(ids_T)], dtype=torch.int32)).square().sum()
        with Calls() as found:
            loss.backward()
        calls[kind] = found.names
    again = {kind: calls[kind] - calls["none"] for kind in ("selective", "full")}
    assert not again["selective"].keys() & KEPT_OPS
    assert {"r1fast::rms_norm", "aten::silu"} <= again["selective"].keys()
    assert {"r1fast::moe_experts", "r1fast::packed_attention"} <= again["full"].keys()


def test_a_routers_product_on_a_gpu_is_kept_too() -> None:
    with fake_tensors(), Calls() as calls:
        x, weight = (torch.empty(size, 4, dtype=torch.bfloat16) for size in (2, 3))
        products._LinearOfHalves.apply(x, weight)
    assert {name for name in calls.names if "mm" in name} == {"aten::mm.dtype"} <= KEPT_OPS


@pytest.mark.dist
def test_collectives(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["collectives"] == {"sum": 3, "max": 2, "objects": [{"rank": 0}, {"rank": 1}]}


@pytest.mark.parametrize("one_unit_numel", [0, 10**6], ids=["units", "one_unit"])
def test_generation_sees_the_last_step_and_training_goes_on(dist: Dist, one_unit_numel: int) -> None:
    model = sharded(dist, one_unit_numel=one_unit_numel)
    ids = tokens_of_rank(0)
    with generation_phase(model):  # before any forward: FSDP must not take a child for its root
        before = model.decode(ids).clone()
        assert not any(hasattr(param, "full_tensor") for param in model.parameters())
    optimizer = train(model, dist, 1)
    with torch.no_grad():
        expected = model(ids).clone()
    with generation_phase(model):
        torch.testing.assert_close(model.decode(ids), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(ids), expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(before, expected)
    train(model, dist, 1, optimizer)
    uninterrupted = sharded(dist, one_unit_numel=one_unit_numel)
    train(uninterrupted, dist, 2)
    assert_same(full_state_dict(model, dist), full_state_dict(uninterrupted, dist), tolerance=0.0)


def test_generation_refuses_a_step_inside_and_a_plain_model(dist: Dist) -> None:
    model = sharded(dist)
    optimizer = train(model, dist, 1)
    backward_all(model, dist)
    with pytest.raises(RuntimeError, match="weights changed inside generation_phase"), generation_phase(model):
        optimizer.step()
    with pytest.raises(ValueError, match="call parallelize first"), generation_phase(TinyDecoder()):
        pass


def test_generation_leaves_a_clean_model_after_an_error(dist: Dist) -> None:
    model = sharded(dist, one_unit_numel=0)
    with pytest.raises(KeyError), generation_phase(model):
        raise KeyError("in the engine")
    backward_all(model, dist)
    assert_same({name: full(p.grad) for name, p in model.named_parameters()}, drop_norm(plain_gradients()))


def test_generation_gives_the_shards_back_when_a_forward_is_interrupted(dist: Dist) -> None:
    """Ctrl-C in a prefill: FSDP still counts the unit as running, and would keep its gathered weights."""
    model = sharded(dist, one_unit_numel=0)
    before = full_state_dict(model, dist)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model.layers[1].down_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), generation_phase(model):
        model(tokens_of_rank(0))
    assert all(isinstance(param, DTensor) for param in model.parameters())
    assert_same(full_state_dict(model, dist), before, tolerance=0.0)


def drop_norm(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in gradients.items() if name != "norm"}


def test_step_after_a_forward_without_backward_leaves_nothing_stale(dist: Dist) -> None:
    model = sharded(dist)
    optimizer = train(model, dist, 1)
    backward_all(model, dist)
    with torch.no_grad():
        before = model(tokens_of_rank(0)).clone()  # stays gathered: the root does not reshard after forward
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(model(tokens_of_rank(0)), before)


def test_bf16_compute_keeps_fp32_shards_and_gradients(dist: Dist) -> None:
    model = sharded(dist, param_dtype=torch.bfloat16)
    with generation_phase(model):
        assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
        assert model.layers[0].e_score_correction_bias.dtype == torch.float32
    loss_of(model, tokens_of_rank(0)).backward()
    assert {(param.dtype, param.grad.dtype) for param in model.parameters()} == {(torch.float32, torch.float32)}


def test_frozen_models_keep_their_dtype(dist: Dist) -> None:
    reference = TinyDecoder().to(torch.bfloat16).requires_grad_(False)
    parallelize(reference, dist, param_dtype=torch.bfloat16)
    assert {param.dtype for param in reference.parameters()} == {torch.bfloat16}


def test_copy_weights_refreshes_a_reference(dist: Dist) -> None:
    policy = sharded(dist, activation_checkpointing="full")
    reference = parallelize(TinyDecoder().requires_grad_(False), dist, param_dtype=torch.float32)
    with torch.no_grad():
        reference(tokens_of_rank(0))  # gathered copies must not survive the refresh
    train(policy, dist, 1)
    copy_weights(policy, reference)
    with torch.no_grad():
        assert torch.equal(reference(tokens_of_rank(0)), policy(tokens_of_rank(0)))
    with pytest.raises(ValueError, match="different parameters"):
        copy_weights(policy, torch.nn.Linear(2, 2))


def test_copy_into_a_plain_model_is_what_generation_gathers(dist: Dist) -> None:
    policy = sharded(dist, activation_checkpointing="full", param_dtype=torch.bfloat16)
    plain = TinyDecoder().bfloat16()
    train(policy, dist, 1)
    copy_weights(policy, plain)
    with torch.no_grad(), generation_phase(policy):
        gathered = [param.clone() for param in policy.parameters()]
    assert all(torch.equal(got, expected) for got, expected in zip(plain.parameters(), gathered, strict=True))


def test_full_state_dict_has_the_plain_names(dist: Dist) -> None:
    plain = TinyDecoder(tied=True)
    model = sharded(dist, tied=True, activation_checkpointing="full")
    assert_same(full_state_dict(model, dist), plain.state_dict(), tolerance=0.0)


def test_clip_needs_gradients(dist: Dist) -> None:
    with pytest.raises(ValueError, match="got no gradient"):
        grad_norm_and_clip(sharded(dist).parameters(), 1.0)
