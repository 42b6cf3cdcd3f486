"""A decode step by few launches, against the modules whose arithmetic it is; its kernels: test_decode_parts.py."""

import contextlib
import gc
import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.models.lora import LoraConfig, add_adapters, init_adapters, merged
from r1fast.parallel.mesh import init_distributed
from r1fast.parallel.parallelize import generation_phase, parallelize
from r1fast.rollout import scheduler
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.fast_decode import unknown_parts
from r1fast.rollout.fused_decode import FusedDecode, stacked_bytes
from r1fast.rollout.sampling import SamplingParams
from tests import zoo
from tests.rollout.test_engine import FAMILIES, PROMPTS
from tests.rollout.test_graphs import random_model

CONFIGS = {family: zoo.decoder(family, **FAMILIES[family]).config for family in FAMILIES}
FUSED = [family for family, config in CONFIGS.items() if not unknown_parts(config, on_gpu=True)]


def decode(decoder: Decoder | FusedDecode, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any, BlockCache]:
    """A step of five rows behind what is in the cache."""
    config = (decoder.model if isinstance(decoder, FusedDecode) else decoder).config
    cache = BlockCache(config, 10, dtype, "cpu")
    for seed, buffer in enumerate(cache.buffers):
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed)))
    table_BN = torch.arange(10, dtype=torch.int32).view(5, 2)
    logits_BV, routing = decoder.decode(
        torch.arange(5), torch.tensor([0, 3, 15, 16, 30]), cache, table_BN, with_routing=True
    )
    return logits_BV, routing, cache


def with_query_latents() -> Decoder:
    """And a bias on the projections of x, but that of the queries."""
    options = FAMILIES["deepseek_v3"] | {"q_lora_rank": 12, "attention_bias": True, "rope_interleave": False}
    model = zoo.decoder("deepseek_v3", **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("family", [*FUSED, "query latents"])
def test_a_step_is_that_of_the_modules(family: str) -> None:
    """To the bit where ops are torch's, but for the sums of joined products; by the cache and the experts too."""
    model = with_query_latents() if family == "query latents" else random_model(family)
    fused = FusedDecode(model)
    want, their_routing, theirs = decode(model)
    apart, _, _ = decode(fused)
    with fused.stacked():
        got, routing, ours = decode(fused)
        again, _, _ = decode(model)
    for logits in (got, apart, again):
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    for x, y in zip(ours.buffers, theirs.buffers, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert (routing is None) == (their_routing is None)
    assert routing is None or torch.equal(routing.expert_ids, their_routing.expert_ids)


def test_families_with_parts_of_their_own_keep_the_modules() -> None:
    assert set(FAMILIES) - set(FUSED) == {"gemma2", "gemma3_text", "olmo2", "olmoe", "phi3"}


# ---- weights that lie one behind the other ----


def test_a_weight_is_there_once_and_comes_back_to_its_storage() -> None:
    model = random_model("qwen2")
    before = {name: (p, p.data, p.detach().clone()) for name, p in model.named_parameters()}
    with contextlib.suppress(KeyError), FusedDecode(model).stacked():
        attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
        for first, second in ((attention.q_proj, attention.k_proj), (mlp.gate_proj, mlp.up_proj)):
            end = first.weight.data_ptr() + first.weight.nbytes
            assert first.weight.is_contiguous() and second.weight.data_ptr() == end
        for name, (p, old, value) in before.items():
            assert torch.equal(p, value)
            moved = any(part in name for part in ("q_proj.weight", "k_proj.w", "v_proj.w", "gate_proj", "up_proj"))
            assert old.untyped_storage().nbytes() == (0 if moved else old.nbytes)
        raise KeyError("while rows decode")
    for name, p in model.named_parameters():
        kept, old, value = before[name]
        assert p is kept and p.data_ptr() == old.data_ptr() and torch.equal(p, value)


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, -5, -3, -2, -1])
def test_a_signal_while_weights_are_stacked(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind each of the storages that give their bytes up, q, k and v of the first layer, gate and up; and of the last
    ones that get them back."""
    model = random_model("qwen2")
    before = {name: (p.data, p.detach().clone()) for name, p in model.named_parameters()}
    moved = [layer for x in FusedDecode(model).layers for joined in x.joined for layer in joined.layers]
    resize, calls = torch.UntypedStorage.resize_, []

    def interrupted(self: torch.UntypedStorage, size: int) -> Any:
        resize(self, size)
        calls.append(size)
        if len(calls) == (step + 1 if step >= 0 else step + 1 + 2 * len(moved)):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.UntypedStorage, "resize_", interrupted)
    with pytest.raises(KeyboardInterrupt), FusedDecode(model).stacked():
        pass
    for name, p in model.named_parameters():
        old, value = before[name]
        assert p.data_ptr() == old.data_ptr() and torch.equal(p, value)


def test_a_signal_at_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python looks for one as a function begins. Of generation those that have to do with stacking: weights are back as
    soon as it has ended, and no later."""
    monkeypatch.setattr(scheduler, "fast_decode", FusedDecode)
    model, files = random_model("qwen2"), ("contextlib.py", "fused_decode.py")
    before = {name: (p.data, p.detach().clone()) for name, p in model.named_parameters()}
    engine, params = RolloutEngine(model, None), SamplingParams(max_tokens=1)

    def comes_at(number: int) -> bool:
        calls = itertools.count()

        def first_line(frame: FrameType, event: str, argument: Any) -> None:
            raise KeyboardInterrupt

        def begins(frame: FrameType, event: str, argument: Any) -> Any:
            # Not of generators that go on: what is raised here comes a line later there, where no signal does.
            is_begin = frame.f_lineno == frame.f_code.co_firstlineno and frame.f_code.co_filename.endswith(files)
            return first_line if is_begin and next(calls) == number else None

        was = sys.gettrace()
        sys.settrace(begins)
        try:
            engine.generate([[1, 2, 3]], params)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(was)
        return next(calls) > number

    numbers = itertools.takewhile(comes_at, itertools.count())
    gc.disable()
    try:
        for number in numbers:
            for name, p in model.named_parameters():
                old, value = before[name]
                assert p.data_ptr() == old.data_ptr() and torch.equal(p, value), f"{number=} {name}"
    finally:
        gc.enable()
    assert number > 30


def test_a_weight_inside_another_tensor_is_copied() -> None:
    model = random_model("llama")
    mlp = model.layers[1].mlp
    both = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = both.chunk(2)
    kept = both.clone()
    with FusedDecode(model).stacked():
        assert torch.equal(both, kept)
    assert torch.equal(both, kept) and mlp.gate_proj.weight.data_ptr() == both.data_ptr()


def test_bytes_of_the_largest_joined_weight() -> None:
    for family in FUSED:
        model = random_model(family)
        joined = [x for layer in FusedDecode(model).layers for x in layer.joined]
        most = max(sum(layer.weight.nbytes for layer in x.layers) for x in joined)
        assert stacked_bytes(model.config, torch.float32) == most


Run = Callable[..., list[Any]]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(model: Decoder, *, fused: bool) -> list[Any]:
        monkeypatch.setattr(scheduler, "fast_decode", FusedDecode if fused else lambda _: None)
        params = SamplingParams(n=3, max_tokens=9, seed=1, ignore_eos=True)
        found = RolloutEngine(model, None, max_num_seqs=5).generate(PROMPTS, params)
        return [x.token_ids for completions in found for x in completions]

    return run


@pytest.mark.parametrize("one_unit_numel", [0, 10**6], ids=["units", "one unit"])
def test_sharded_training_goes_on(one_unit_numel: int, generate: Run) -> None:
    """FSDP gathers into the storages that it knows: each phase samples from the weights of the last step."""
    dist = init_distributed("cpu")
    try:
        models = [zoo.decoder("qwen2", **FAMILIES["qwen2"]) for _ in range(2)]
        for model in models:
            parallelize(model, dist, param_dtype=torch.float32, one_unit_numel=one_unit_numel)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in models]
        sampled = []
        for token in (3, 9, 4):
            for model, optimizer, fused in zip(models, optimizers, (True, False), strict=True):
                with generation_phase(model):
                    sampled.append([generate(model, fused=fused) for _ in range(2)])
                logits_TV = model(torch.arange(6), torch.tensor([0, 6], dtype=torch.int32))
                logits_TV.log_softmax(-1)[:, token].sum().neg().backward()
                optimizer.step()
                optimizer.zero_grad()
            ours, theirs = sampled[-2:]
            assert ours == theirs and ours[0] == ours[1]
        assert sampled[0] != sampled[2] != sampled[4], "a step that changes nothing shows nothing"
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(ours.full_tensor(), theirs.full_tensor())
    finally:
        dist.close()


def test_merged_adapters(generate: Run) -> None:
    model = random_model("llama")
    add_adapters(model, LoraConfig(r=2, alpha=64.0, target_modules="all-linear"))
    init_adapters(model, ((name, 0, p) for name, p in model.named_parameters()), seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_lora.B"):
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    base = {name: p.clone() for name, p in model.named_parameters()}
    found = []
    for fused in (True, False):
        with merged(model):
            found.append(generate(model, fused=fused))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(base[name])
    assert found[0] == found[1]
