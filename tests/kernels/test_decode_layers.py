"""decode_layers, against the modules whose work it does."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.models.moe import Routing
from r1fast.rollout.fast_decode import FastDecode, fast_decode, unknown_parts
from r1fast_kernels import decode_layers as op
from r1fast_kernels import dispatch, use
from r1fast_kernels.decode_attention import BLOCK
from tests import zoo
from tests.kernels.backends import BF16, FP32, FP64, assert_same_bits, needs_cpp, of_older_processor

pytestmark = needs_cpp

COMMON: dict[str, Any] = {"vocab_size": 1043, "num_hidden_layers": 2, "max_position_embeddings": 256}
# Widths that are no multiple of a vector, a strip or a block, and ones that are.
CONFIGS = {
    "llama": ModelConfig("llama", hidden_size=64, intermediate_size=96, num_attention_heads=4,
                         attention_bias=True, mlp_bias=True, **COMMON),
    "qwen2": ModelConfig("qwen2", hidden_size=80, intermediate_size=112, num_attention_heads=10,
                         num_key_value_heads=2, **COMMON),
    "qwen3": ModelConfig("qwen3", hidden_size=72, intermediate_size=100, num_attention_heads=6,
                         num_key_value_heads=3, head_dim=20, **COMMON),
    "qwen3-moe": ModelConfig("qwen3_moe", hidden_size=32, intermediate_size=50, num_attention_heads=4,
                             num_key_value_heads=2, head_dim=16, n_routed_experts=7, num_experts_per_tok=3,
                             moe_intermediate_size=18, norm_topk_prob=False, mlp_only_layers=(0,), **COMMON),
    "deepseek": ModelConfig("deepseek_v3", hidden_size=128, intermediate_size=64, num_attention_heads=4,
                            kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
                            n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=64,
                            first_k_dense_replace=1, **COMMON),
    "mixtral": ModelConfig("mixtral", hidden_size=40, intermediate_size=22, num_attention_heads=4,
                           num_key_value_heads=1, head_dim=14, n_routed_experts=5, num_experts_per_tok=2, **COMMON),
    "deepseek-v2": ModelConfig("deepseek_v2", hidden_size=48, intermediate_size=64, num_attention_heads=4,
                               q_lora_rank=20, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
                               n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=2, moe_intermediate_size=20,
                               routed_scaling_factor=1.7, first_k_dense_replace=1, **COMMON),
    "deepseek-odd": ModelConfig("deepseek_v3", hidden_size=50, intermediate_size=70, num_attention_heads=3,
                                attention_bias=True, q_lora_rank=22, kv_lora_rank=18, qk_nope_head_dim=10,
                                qk_rope_head_dim=6, v_head_dim=14, n_routed_experts=12, num_experts_per_tok=3,
                                n_group=3, topk_group=2, moe_intermediate_size=26, routed_scaling_factor=2.5,
                                rope_interleave=False, **COMMON),
}  # fmt: skip
LENGTHS = [1, 2, 15, 16, 17, 33, 48, 64]


@dataclass
class Step:
    """A model, and B rows at the end of sequences whose earlier tokens are in the cache."""

    model: Decoder
    ids_B: Tensor
    positions_B: Tensor
    table_BN: Tensor
    cache: BlockCache

    def logits(self, rows: slice | Tensor = slice(None), **options: Any) -> Any:
        inputs = (self.ids_B[rows], self.positions_B[rows], self.cache, self.table_BN[rows])
        return decoder_of(self.model).decode(*inputs, **options)

    def by_modules(self) -> "Step":
        """The same, in another cache, by the layers' own modules."""
        cache = BlockCache(self.model.config, self.cache.num_blocks, self.cache.dtype, "cpu")
        for to, source in zip(cache.buffers, self.cache.buffers):
            to.copy_(source)
        return replace(self, cache=cache)


def decoder_of(model: Decoder) -> Decoder | FastDecode:
    """What generates; the modules inside use("reference")."""
    return fast_decode(model) or model


def make_step(name: str, dtype: torch.dtype = FP32, num_rows: int = 70) -> Step:
    generator = torch.Generator().manual_seed(0)
    config = CONFIGS[name]
    model = Decoder(config)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():  # norms and biases that do something, logits that differ
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if p.dim() > 1 else 0.3) + (p.dim() == 1))
        for moe in model.moe_layers():
            if moe.gate.e_score_correction_bias is not None:
                moe.gate.e_score_correction_bias.normal_(0, 0.1, generator=generator)
    width = max(LENGTHS) // BLOCK
    cache = BlockCache(config, num_rows * width + 1, dtype, "cpu")
    for buffer in cache.buffers:
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return Step(
        model.to(dtype).eval(),
        torch.randint(config.vocab_size, (num_rows,), generator=generator),
        torch.tensor([LENGTHS[b % len(LENGTHS)] - 1 for b in range(num_rows)]),
        torch.randperm(num_rows * width, generator=generator).view(num_rows, width).int(),
        cache,
    )


# What it says of those that it cannot run: a decoder of the zoo, changed so.
BY_MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "norms after attention and MLP": ("olmo2", {}),
    "norms that add to their weight": ("gemma3_text", {}),
    "norms of whole projections": ("olmoe", {}),
    "more than one rotary embedding, or layers without": ("smollm3", {}),
    "frequencies that the length chooses": ("llama", {
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    }),
    "partly rotated heads": ("phi3", {"sliding_window": None}),
    "windows": ("mistral", {}),
    "soft caps": ("gemma2", {}),
    "a gate of the shared expert": ("qwen2_moe", {}),
}  # fmt: skip


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_what_it_cannot_run_is_said(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"sliding_window": None} if family in ("mistral", "phi3") else {}
    whole |= {"rope_parameters": {"rope_theta": 100.0}} if family == "phi3" else {}
    monkeypatch.setattr(dispatch, "choices", {})
    runs = fast_decode(zoo.decoder(family, vocab_size=32, **whole)) is not None
    assert runs == (family not in ("gemma2", "gemma3_text", "olmo2", "olmoe", "qwen2_moe", "smollm3"))
    assert [chosen for _, chosen in dispatch.choices] == ["cpp" if runs else "reference"]


@pytest.mark.parametrize("part", BY_MODULES)
def test_each_part_that_it_has_not_is_found(part: str) -> None:
    family, changes = BY_MODULES[part]
    config = zoo.decoder(family, vocab_size=32, **changes).config
    assert part in unknown_parts(config)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the op: that it ran at all."""
    seen: list[int] = []
    run = op.DecodeLayers.__call__

    def spy(self: op.DecodeLayers, ids_B: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        seen.append(len(ids_B))
        return run(self, ids_B, *args)

    monkeypatch.setattr(op.DecodeLayers, "__call__", spy)
    return seen


def assert_same_experts(name: str, got: Routing | None, want: Routing | None) -> None:
    assert (got is None) == (want is None) == (not CONFIGS[name].n_routed_experts)
    if got is not None and want is not None:
        assert torch.equal(got.expert_ids, want.expert_ids)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 70, 300])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_modules(name: str, num_rows: int, calls: list[int]) -> None:
    step = make_step(name, num_rows=num_rows)
    other = step.by_modules()
    got, routing = step.logits(with_routing=True)
    assert calls == [num_rows]
    with use("reference"):
        want, their_routing = other.logits(with_routing=True)
    assert calls == [num_rows] and want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    for ours, theirs in zip(step.cache.buffers, other.cache.buffers):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_same_experts(name, routing, their_routing)


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_is_as_near_as_the_modules(name: str, calls: list[int]) -> None:
    """Compared where no expert is chosen differently: there a rounding makes another function."""
    step = make_step(name, BF16)
    exact, modules = step.by_modules(), step.by_modules()
    exact.cache = exact.by_modules().cache
    found = [step.logits(with_routing=True)]
    assert calls == [70]
    with use("reference"):
        found.append(modules.logits(with_routing=True))
    exact.model.double()
    exact.cache = BlockCache(step.model.config, step.cache.num_blocks, FP64, "cpu")
    for to, source in zip(exact.cache.buffers, make_step(name, BF16).cache.buffers):
        to.copy_(source)
    with use("reference"):
        found.append(exact.logits(with_routing=True))
    got, near, want = (logits.to(torch.promote_types(logits.dtype, FP32)).log_softmax(-1) for logits, _ in found)
    ids = [routing.expert_ids for _, routing in found if routing is not None]
    same = torch.ones(70, dtype=torch.bool)
    for other in ids:
        same &= (other == ids[-1]).flatten(1).all(1)
    assert same.float().mean() > 0.6
    error, their_error = ((x - want)[same].abs() for x in (got, near))
    assert error.mean() < 1.2 * their_error.mean() + 1e-4 and error.max() < 2 * their_error.max()


def prefill(step: Step, ids_T: Tensor, cu_seqlens: list[int], slots_T: Tensor) -> tuple[Tensor, Routing | None]:
    cu = torch.tensor(cu_seqlens, dtype=torch.int32)
    with torch.no_grad():
        return decoder_of(step.model)(ids_T, cu, cache=(step.cache, slots_T), with_routing=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_equals_the_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [1, 17, 128, 16, 2, 60, 100, 33, 5]
    step = make_step(name, num_rows=3 * len(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    blocks = torch.randperm(step.cache.num_blocks, generator=torch.Generator().manual_seed(1)).split(8)
    slots_T = torch.cat(
        [(blocks[n][:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:length] for n, length in enumerate(lengths)]
    )
    ids_T = torch.randint(1043, (ends[-1],), generator=torch.Generator().manual_seed(2))
    seen: list[int] = []
    run = op.DecodeLayers.prefill
    monkeypatch.setattr(op.DecodeLayers, "prefill", lambda self, ids, *x: seen.append(len(ids)) or run(self, ids, *x))

    other = step.by_modules()
    got, routing = prefill(step, ids_T, ends, slots_T)
    alone, _ = prefill(step.by_modules(), ids_T[ends[5] : ends[6]], [0, 60], slots_T[ends[5] : ends[6]])
    assert seen == [ends[-1], 60]
    torch.testing.assert_close(alone, got[ends[5] : ends[6]], rtol=1e-6, atol=1e-6)  # the head is a product of torch
    with use("reference"):
        want, their_routing = prefill(other, ids_T, ends, slots_T)
    assert len(seen) == 2 and want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=3e-5)
    for ours, theirs in zip(step.cache.buffers, other.cache.buffers):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_same_experts(name, routing, their_routing)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_gets_the_same_bits_in_any_batch(name: str, dtype: torch.dtype) -> None:
    step = make_step(name, dtype)
    together = step.logits()
    for rows in (slice(3, 4), slice(0, 17), torch.arange(69, 20, -1)):
        assert torch.equal(step.logits(rows), together[rows])
    assert_same_bits(lambda: [step.logits()])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_keeps_its_bits_beside_longer_ones(name: str) -> None:
    """A vector of angles that has one past 125 is turned into sines in another way."""
    step = make_step(name)
    short = torch.arange(0, 70, 2)
    alone = step.logits(short)
    step.table_BN = step.table_BN.repeat(1, 16)
    step.positions_B[1::2] += 900
    assert torch.equal(step.logits()[short], alone)


# Past 32 MB of weights, where threads share each product: widths that no strip divides, a vocabulary in parts.
LARGE: dict[str, ModelConfig] = {
    "qwen2": ModelConfig("qwen2", hidden_size=330, intermediate_size=1214, num_attention_heads=11, head_dim=30,
                         num_key_value_heads=1, **COMMON | {"vocab_size": 30011}),
    "qwen3-moe": ModelConfig("qwen3_moe", hidden_size=274, intermediate_size=530, num_attention_heads=4,
                             num_key_value_heads=2, head_dim=34, n_routed_experts=9, num_experts_per_tok=3,
                             moe_intermediate_size=526, mlp_only_layers=(0,), **COMMON | {"vocab_size": 30013}),
    "deepseek": ModelConfig("deepseek_v3", hidden_size=330, intermediate_size=914, num_attention_heads=4,
                            kv_lora_rank=34, qk_nope_head_dim=18, qk_rope_head_dim=6, v_head_dim=30,
                            n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=126,
                            first_k_dense_replace=1, **COMMON | {"vocab_size": 30009}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_threads_that_share_products(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of one thread, from 1 to 65 rows; and equal to the modules."""
    monkeypatch.setitem(CONFIGS, name, replace(LARGE[name], vocab_size=LARGE[name].vocab_size * 4 // dtype.itemsize))
    step = make_step(name, dtype, num_rows=160)
    assert sum(p.nbytes for p in (*step.model.layers.parameters(), step.model.head.weight)) > 32 << 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = step.logits()
        for count in (2, 3):
            torch.set_num_threads(count)
            for rows in (1, 7, 16, 33, 65, 160):
                assert torch.equal(step.logits(slice(0, rows)), alone[:rows])
        if dtype == FP32:
            with use("reference"):
                torch.testing.assert_close(alone, step.by_modules().logits(), rtol=1e-4, atol=1e-3)
    finally:
        torch.set_num_threads(threads)


def test_writes_one_slot_of_each_row_and_reads_none_behind_it() -> None:
    step = make_step("qwen2", num_rows=20)
    slots_B = step.table_BN.gather(1, (step.positions_B // BLOCK)[:, None]).squeeze(1) * BLOCK
    slots_B = slots_B + step.positions_B % BLOCK
    read = torch.zeros(step.cache.num_blocks * BLOCK, dtype=torch.bool)
    for b, position in enumerate(step.positions_B.tolist()):
        places = torch.arange(position)
        read[step.table_BN[b, places // BLOCK].long() * BLOCK + places % BLOCK] = True
    want = step.by_modules().logits()
    for buffer in step.cache.buffers:
        buffer[~read] = torch.nan
    before = [buffer.clone() for buffer in step.cache.buffers]
    assert torch.equal(step.logits(), want)
    for buffer, kept in zip(step.cache.buffers, before):
        assert not buffer[slots_B].isnan().any()
        buffer[slots_B] = kept[slots_B]
        torch.testing.assert_close(buffer, kept, rtol=0, atol=0, equal_nan=True)


def test_follows_weights_that_change_in_place() -> None:
    step = make_step("llama")
    before = step.logits()
    with torch.no_grad():
        step.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    after = step.logits()
    assert not torch.allclose(after, before)
    with use("reference"):
        want = step.logits()
    torch.testing.assert_close(after, want, rtol=1e-5, atol=2e-5)


def test_what_it_cannot_do_runs_by_modules(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op.DecodeLayers, "prefill", lambda self, ids, *_: calls.append(len(ids)))
    step = make_step("llama", num_rows=33)
    prefill(step, torch.zeros(129, dtype=torch.int64), [0, 129], torch.arange(129))  # too long for one thread
    make_step("llama", FP64).logits()
    odd = replace(CONFIGS["deepseek"], qk_nope_head_dim=15)
    monkeypatch.setitem(CONFIGS, "deepseek", odd)
    make_step("deepseek").logits()
    assert calls == []


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_builds_for_older_processors_agree(capability: str, tmp_path: Any) -> None:
    expression = "[make_step(n, d).logits() for n in ('qwen3', 'deepseek-odd') for d in (FP32, BF16)]"
    for got, want in zip(*of_older_processor(capability, "test_decode_layers", expression, tmp_path), strict=True):
        if want.dtype == BF16:  # of fp32 products: some tokens go to other experts
            assert (got - want).abs().float().quantile(0.9) < 0.1
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_errors_say_what_was_expected() -> None:
    step = make_step("llama", num_rows=6)
    step.table_BN[5, 0] = 1000  # of three blocks
    with pytest.raises(ValueError, match=r"block_table_BN\[5, 0\] = 1000, expected a block of the cache"):
        step.logits()
    step.positions_B[4] = 64
    with pytest.raises(ValueError, match=r"positions_B\[4\] = 64, expected 0 to 63, what 4 blocks hold"):
        step.logits()
    step.positions_B[4], step.table_BN[5, 0], step.ids_B[3] = 4, 0, 1043
    with pytest.raises(ValueError, match="got the id 1043 in row 3, expected 0 to 1042"):
        step.logits()
    step = make_step("llama", num_rows=2)
    step.cache.buffers[1] = step.cache.buffers[1].bfloat16()
    with pytest.raises(ValueError, match=r"got a cache .* in BFloat16, expected contiguous"):
        step.logits()
    step = make_step("llama", num_rows=2)
    slots_T = torch.tensor([0, 2, 1])
    with pytest.raises(ValueError, match=r"slots_T\[1\] = 2 for position 1, expected the same place in a block of 16"):
        prefill(step, torch.zeros(3, dtype=torch.int64), [0, 3], slots_T)
    step.model.layers[0].mlp.up_proj.weight.data = step.model.layers[0].mlp.up_proj.weight.data.T.contiguous().T
    with pytest.raises(ValueError, match="expected contiguous memory"):
        step.logits()
