"""What a GPU would be asked for, held to budgets: kernels, scratch memory and compilations of each op, and kernels of a
decode step.

A kernel is a launch of Triton's or an operator of torch that is no view and no allocation (fake_gpu.py's `kernels`).
A change that stays below a budget lowers it; one that goes above says in docs/LOG.md what it is worth.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor

import r1fast_kernels as kernels
from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.rollout.fast_decode import fast_decode
from r1fast.rollout.fused_decode import FusedDecode
from r1fast_kernels import dispatch
from tests import zoo
from tests.kernels.fake_gpu import FakeGpu, fake_gpu
from tests.kernels.production_calls import CALLS, ON_HOPPER

pytestmark = pytest.mark.skipif(dispatch.INTERPRETING, reason="the interpreter asks no driver")


class Cost(NamedTuple):
    """Of a call forward, then backward."""

    kernels: int = 0
    backward_kernels: int = 0
    scratch_mb: float = 0.0  # 2^20 bytes, at a time, beyond results and what is saved
    backward_scratch_mb: float = 0.0


# Of 16,384 tokens; of 256 rows where they decode. Tiles of logits are 256 MB, or 1 GB with sums of dWeight in fp32.
BUDGETS = {
    "selective_logprobs": Cost(1, 1, 0, 0.2),
    "linear_logprobs": Cost(48, 78, 257, 353),
    "linear_cross_entropy": Cost(82, 2, 1850),
    "linear_grpo_loss": Cost(118, 2, 1850),
    "grpo_loss": Cost(2, 1, 0.1, 0.1),
    "group_advantages": Cost(1),
    "sample_tokens": Cost(1),
    "sample_tokens, top_k": Cost(1, 0, 8),
    "sample_tokens, top_p": Cost(1, 0, 8),
    "route_topk": Cost(2, 1, 0.1, 1.1),
    "moe_dispatch": Cost(3, 0, 0.6),
    "grouped_gemm": Cost(1, 2),
    "grouped_gemm, on Hopper": Cost(2, 3),
    "moe_experts": Cost(6, 8, 704, 1282),
    "moe_experts, on Hopper": Cost(8, 8, 704, 1282),
    "decode_attention": Cost(2, 0, 25),
    "decode_attention, latents": Cost(2, 0, 129),
    "decode_attention, longer": Cost(2, 0, 25),
}
DECODES = ("sample_tokens", "decode_attention")

# Rows of one step after another; and how often a kernel may be compiled in all of them, where more than once.
STEPS = (1, 2, 17, 48, 160, 777, 4096, 4097, 16_384)
TILES = 3  # for few, some and many rows an expert
COMPILATIONS = {
    "linear_logprobs": {"_fold_kernel": 2},  # a tile that holds all columns needs no state
    "decode_attention, longer": {"_attend_kernel": 2},  # one span needs no merging
    "grouped_gemm": {"_gemm_kernel": 2 * TILES},  # x W, x W^T
    "moe_experts": {"_gate_up_kernel": TILES, "_gemm_kernel": 2 * TILES},
}  # fmt: skip
COMPILATIONS |= {f"{op}{ON_HOPPER}": COMPILATIONS[op] for op in ("grouped_gemm", "moe_experts")}


@contextmanager
def gpu_of(name: str, **options: Any) -> Iterator[FakeGpu]:
    with fake_gpu(**options) as gpu, pytest.MonkeyPatch.context() as patch:
        module = sys.modules["r1fast_kernels.grouped_gemm_vendor"]
        patch.setattr(module, "on_hopper", lambda _: name.endswith(ON_HOPPER))
        yield gpu


def cost(name: str) -> Cost:
    with gpu_of(name) as gpu:
        call = CALLS[name](256 if name.startswith(DECODES) else 16_384)
        gpu.kernels.clear()
        kept: list[Any] = []
        forward = gpu.scratch(lambda: kept.append(call())), len(gpu.kernels)
        found = kept[0] if isinstance(kept[0], tuple) else (kept[0],)
        learns = [x for x in found if x.requires_grad]
        gradients = [torch.ones_like(x) for x in learns]
        gpu.kernels.clear()
        scratch = gpu.scratch(lambda: torch.autograd.backward(learns, gradients)) if learns else 0
        return Cost(forward[1], len(gpu.kernels), forward[0] / 2**20, scratch / 2**20)


def run(name: str, rows: int) -> None:
    outputs = CALLS[name](rows)()
    learns = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    if learns:
        torch.autograd.backward(learns, [torch.ones_like(x) for x in learns])


def compiled(gpu: FakeGpu) -> dict[str, set[str]]:
    """The specialisations of each kernel."""
    found: dict[str, set[str]] = defaultdict(set)
    for launch in gpu.launches:
        found[launch.name].add(launch.specialisation.key)
    return found


def compilations(name: str) -> dict[str, int]:
    """Of each kernel, in STEPS."""
    with gpu_of(name) as gpu:
        for rows in STEPS:
            run(name, rows)
    return {kernel: len(keys) for kernel, keys in compiled(gpu).items()}


def excess(name: str) -> dict[str, tuple[float, float]]:
    """(found, budget) of what is above its budget."""
    pairs = {field: pair for field, *pair in zip(Cost._fields, cost(name), BUDGETS[name])}
    return {field: (found, budget) for field, (found, budget) in pairs.items() if found > budget}


def recompiled(name: str) -> dict[str, int]:
    """Kernels that are compiled more often than they may be."""
    allowed = COMPILATIONS.get(name, {})
    return {kernel: count for kernel, count in compilations(name).items() if count > allowed.get(kernel, 1)}


def test_every_op_has_a_budget() -> None:
    assert set(BUDGETS) == set(CALLS)
    of_triton = {op for op, exists in dispatch.IMPLEMENTATIONS.items() if "triton" in exists}
    assert of_triton - {"decode_layers"} == {name.split(",")[0] for name in CALLS}  # that one has DECODE


@pytest.mark.parametrize("name", CALLS)
def test_a_call_stays_in_its_budget(name: str) -> None:
    assert excess(name) == {}


@pytest.mark.parametrize("name", CALLS)
def test_steps_of_other_sizes_compile_nothing_new(name: str) -> None:
    assert recompiled(name) == {}


@pytest.mark.parametrize("name", CALLS)
def test_more_rows_than_the_short_axes_of_a_grid(name: str) -> None:
    with gpu_of(name) as gpu:
        run(name, 70_000)  # fake_gpu refuses more than 65,535 programs on the second and third (vllm#52381, fla#172)
    assert gpu.launches


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 80], ids=["sm90", "sm80"])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_launched_loads(name: str, arch: int) -> None:
    """Triton's own checks of a kernel against a device, as it is first launched."""
    with gpu_of(name, arch=arch, compiles=True) as gpu:
        for rows in (256, 16_384):
            run(name, rows)
    assert all(launch.shared_bytes is not None for launch in gpu.launches)


def grpo_update(model: Decoder, lengths: list[int]) -> None:
    N, cu_seqlens = len(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    ids, old = torch.zeros(sum(lengths), dtype=torch.int64), torch.zeros(sum(lengths))

    def head(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        given = {"advantages_N": torch.zeros(N), "old_logprobs_T": old}
        return kernels.linear_grpo_loss(hidden_TD, weight_VD, ids, cu_seqlens, **given)[0]

    model(ids, cu_seqlens, head=head).backward()


def test_updates_of_other_sizes_compile_nothing_new() -> None:
    """Of a whole model, with values: they decide how sequences are packed."""
    with fake_gpu(values=True) as gpu:
        model = zoo.decoder("deepseek_v3", vocab_size=320).bfloat16()
        for lengths in ([16, 48], [1], [64] * 16):  # some rows an expert, few and many
            grpo_update(model, lengths)
        before = compiled(gpu)
        for lengths in ([5, 32], [100, 29], [7] * 9, [16] * 16, [2, 1]):
            grpo_update(model, lengths)
    assert len(before) > 12 and compiled(gpu) == before


def test_a_launch_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["r1fast_kernels.moe_dispatch"]
    launch = module.launch

    def twice(*args: Any, **options: Any) -> None:
        launch(*args, **options)
        launch(*args, **options)

    monkeypatch.setattr(module, "launch", twice)
    assert excess("moe_dispatch") == {"kernels": (6, 3)}


def test_scratch_too_large_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["r1fast_kernels.selective_logprobs"]
    monkeypatch.setattr(module, "_unit_columns", torch.clone)
    assert excess("selective_logprobs").keys() >= {"scratch_mb", "backward_scratch_mb"}


def test_zeros_for_outputs_without_a_gradient_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch makes them, unless an op says otherwise."""
    monkeypatch.setattr(torch.autograd.function.FunctionCtx, "set_materialize_grads", lambda *_: None)
    assert excess("moe_experts").keys() == {"backward_kernels", "backward_scratch_mb"}


def test_a_number_of_each_step_that_is_specialised_on_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["r1fast_kernels.moe_dispatch"]
    monkeypatch.setattr(module, "_count_kernel", triton.jit(module._count_kernel.fn))
    assert recompiled("moe_dispatch") == {"_count_kernel": 2}


# Of production's sizes: tensors here take no memory.
QWEN: dict[str, Any] = {  # Qwen2.5-1.5B
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {  # V2-Lite's sizes, V3's router
    "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 10_944, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 102_400, "max_position_embeddings": 32_768, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "n_shared_experts": 2, "first_k_dense_replace": 0, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
ROWS, BLOCKS = 256, 64
# (a layer of a decode step, all else of the step)
DECODE = {"dense": (QWEN, 9, 21), "latent attention, experts": (DEEPSEEK, 21, 22)}


def decode_kernels(fields: dict[str, Any], num_layers: int, *, stacked: bool = True) -> list[str]:
    """What a step of 256 rows runs, in order."""
    with fake_gpu() as gpu:
        model = Decoder(ModelConfig.from_dict(fields | {"num_hidden_layers": num_layers}))
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device="cpu:1"))
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty_like(weight, dtype=torch.bfloat16)))
        cache = BlockCache(model.config, ROWS * BLOCKS, torch.bfloat16, "cpu:1")
        ids_B, positions_B = torch.empty(2, ROWS, dtype=torch.int64)
        table_BN = torch.empty(ROWS, BLOCKS, dtype=torch.int32)
        decoder = fast_decode(model) or model
        assert isinstance(decoder, FusedDecode)
        with decoder.stacked() if stacked else nullcontext():
            gpu.kernels.clear()
            decoder.decode(ids_B, positions_B, cache, table_BN)
            return list(gpu.kernels)


@pytest.mark.parametrize("name", DECODE)
def test_a_decode_step_runs_few_kernels(name: str) -> None:
    fields, a_layer, else_ = DECODE[name]
    one, two = (decode_kernels(fields, num_layers) for num_layers in (1, 2))
    assert len(two) - len(one) <= a_layer, two
    assert 2 * len(one) - len(two) <= else_, one


def test_products_that_are_apart_are_noticed() -> None:
    one, two = (decode_kernels(QWEN, num_layers, stacked=False) for num_layers in (1, 2))
    assert len(two) - len(one) > DECODE["dense"][1]
