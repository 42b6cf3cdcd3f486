"""use("reference") is plain PyTorch everywhere: no operator of ours, and no product that torch would not choose."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1fast.models.decoder import Decoder
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams
from r1fast_kernels import group_advantages, linear_cross_entropy, linear_grpo_loss, linear_logprobs, products, use
from r1fast_kernels.dispatch import in_use
from tests.kernels.test_decode_layers import CONFIGS

CU_SEQLENS = torch.tensor([0, 5, 9], dtype=torch.int32)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ours: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("r1fast", "mkldnn"):
            self.ours.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU where oneDNN multiplies faster."""
    monkeypatch.setattr(products, "onednn_is_faster", torch.backends.mkldnn.is_available)


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(CONFIGS[name])
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to(dtype)


def train(model: Decoder) -> None:
    """Every loss of a stage."""
    ids_T = torch.arange(9)
    advantages_N = group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))

    def losses(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            old_T = linear_logprobs(hidden_TD, weight_VD, ids_T)
        given = {"advantages_N": advantages_N, "old_logprobs_T": old_T}
        sequence, _ = linear_grpo_loss(hidden_TD, weight_VD, ids_T, CU_SEQLENS, importance_level="sequence", **given)
        token, _ = linear_grpo_loss(hidden_TD, weight_VD, ids_T, CU_SEQLENS, **given)
        return token + sequence + linear_cross_entropy(hidden_TD, weight_VD, ids_T)

    model.train()(ids_T, CU_SEQLENS, head=losses).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_of_ours_runs(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype)
    params = SamplingParams(n=2, max_tokens=4, min_tokens=2, top_p=0.9, ignore_eos=True)
    with use("reference"), Recorder() as recorder:
        train(model)
        RolloutEngine(model, None).generate([[1, 2, 3], [4] * 20], params)
        RolloutEngine(model, None, max_num_batched_tokens=16).generate([[4] * 20], params)
    assert recorder.ours == set()


def test_without_it_ours_run() -> None:
    """Else the above could not fail."""
    model = make_model("qwen3-moe")
    with Recorder() as recorder:
        train(model)
        RolloutEngine(model, None).generate([[1, 2, 3]], SamplingParams(max_tokens=3))
    found = {name.split(".")[1] for name in recorder.ours}
    assert {"packed_attention", "rms_norm", "moe_experts", "route_topk", "decode_layers", "sample_tokens"} <= found
    assert "_linear_pointwise" in found or not torch.backends.mkldnn.is_available()


def test_use_holds_in_every_thread_until_its_end() -> None:
    with ThreadPoolExecutor() as pool:
        with use("reference"):
            with use(None):
                assert pool.submit(in_use).result() is None
            assert pool.submit(in_use).result() == "reference"
        assert pool.submit(in_use).result() is None
    with pytest.raises(ValueError, match=r"got 'fast', expected None or one of reference, cpp, triton"), use("fast"):
        pass
