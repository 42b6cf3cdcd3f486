"""What generation is counted to take, against layers that are run, the scheduler's tensors and those of a kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast.activations import layer_activations
from r1fast.models.cache import BlockCache
from r1fast.rollout import engine as engine_module
from r1fast.rollout import scheduler
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.needs import Call, activation_bytes, rows_of_part, work_bytes
from r1fast.rollout.sampling import SamplingParams
from r1fast_kernels import decode_attention_triton as kernel
from tests import zoo
from tests.rollout.test_engine import FAMILIES

CONFIGS = {family: zoo.decoder(family, **FAMILIES[family]).config for family in FAMILIES}
CALL = Call(
    rows=40, prompts=3, prompt_tokens=900, max_num_batched_tokens=500, longest=3000, max_tokens=2000, has_graphs=False
)


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_take_no_more_than_is_counted(family: str) -> None:
    """Of what operators make; inside, experts make rows sorted by expert, which are counted too."""
    config, dtype = CONFIGS[family], torch.bfloat16
    indices = range(config.num_hidden_layers)
    run = max(layer_activations(config, i, 1000, 0, dtype, "cpu", "none").inference for i in indices)
    states = 2 * 1000 * config.hidden_size * dtype.itemsize
    assert run + states <= activation_bytes(config, 1000, dtype) <= (6 if config.has_router else 3) * run


def test_terms_follow_the_call() -> None:
    config, item = CONFIGS["qwen3_moe"], 2
    row = config.vocab_size * item

    def terms(device: str = "cpu", **changes: Any) -> dict[str, int]:
        return work_bytes(config, torch.bfloat16, device, Call(**vars(CALL) | changes))

    found = terms()
    assert found["outputs"] == 40 * 2001 * 12 and found["logits"] == 43 * row and "graphs" not in found
    assert found["activations"] == activation_bytes(config, 500, torch.bfloat16)  # of a prefill
    assert terms(bans_stops=True)["logits"] == 83 * row
    pairs = config.num_hidden_layers * config.num_experts_per_tok
    assert terms(records=True)["outputs"] == 40 * 2001 * (12 + 2 * pairs)
    # 12 spans, of 256 rows: of a sequence that is computed in parts.
    step = activation_bytes(config, 256, torch.bfloat16)
    sums = 256 * config.num_attention_heads * (12 * (config.attention_head_dim + 1) + 1) * 4
    on_gpu = terms("cuda", has_graphs=True)
    assert on_gpu["activations"] == step + sums > found["activations"]
    # A graph steps rows, never a part.
    assert on_gpu["graphs"] == activation_bytes(config, 40, torch.bfloat16) + 2 * sums * 40 // 256 + 40 * row
    assert rows_of_part(40, 500) == 256 and rows_of_part(400, 500) == 400 and rows_of_part(40, 7) == 7


@pytest.mark.parametrize("tokens", [16, 256, 272, 1000])
@pytest.mark.parametrize(("heads", "width", "value_width"), [(4, 16, 16), (4, 48, 32), (66, 48, 32)])
def test_scratch_is_what_the_launcher_takes(
    tokens: int, heads: int, width: int, value_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor | None] = []
    monkeypatch.setattr(kernel, "launch", lambda _, grid, *args, **options: given.extend(args))
    k_SKd, table_BN = torch.zeros(2048, 2, width), torch.zeros(3, -(-tokens // 16), dtype=torch.int32)
    lengths_B = torch.ones(3, dtype=torch.int32)
    inputs = torch.zeros(3, heads, width), k_SKd, torch.zeros(2048, 2, value_width), table_BN, lengths_B
    out = kernel.launch_decode(*inputs, 1.0)
    known = {x.data_ptr() for x in (*inputs, out)}
    made = {x.data_ptr(): x.nbytes for x in given if isinstance(x, Tensor) and x.data_ptr() not in known}
    assert sum(made.values()) == kernel.scratch_bytes(3, heads, 2, value_width, tokens)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_scheduler_makes_what_is_counted(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with its cache stays inside of what is free."""
    model, free = zoo.decoder(family, **FAMILIES[family]), 800_000
    made: list[scheduler.Scheduler] = []
    init = scheduler.Scheduler.__init__

    def keep(self: scheduler.Scheduler, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(scheduler.Scheduler, "__init__", keep)
    monkeypatch.setattr(engine_module, "free_memory", lambda device: free)
    params = SamplingParams(n=16, max_tokens=100, ignore_eos=True)
    record = model.config.has_router
    RolloutEngine(model, None, enable_return_routed_experts=record).generate([[5] * 20], params)
    (found,) = made
    outputs = [found.ids_RS, found.logprobs_RS, *([] if found.experts_RSLK is None else [found.experts_RSLK])]
    config = model.config
    call = Call(16, 1, 20, 8192, 120, 100, has_graphs=False, records=record)
    counted = work_bytes(config, torch.float32, "cpu", call)
    assert sum(x.nbytes for x in outputs) == counted["outputs"]
    size = BlockCache.bytes_per_block(config, torch.float32)
    blocks = found.cache.num_blocks
    assert sum(counted.values()) + blocks * size <= free < sum(counted.values()) + (blocks + 1) * size + free * 0.06
    assert blocks < 16 * 8
