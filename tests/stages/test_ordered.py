"""A step on a GPU has the same bits every time: torch's switch is on inside it, and all that it calls has a kernel that
adds in one order."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1fast.models import flash
from r1fast.models.layers import Embedding
from r1fast.parallel.ordered import ordered_sums
from r1fast.stages import training
from r1fast.stages.sampler import Sampler
from r1fast_kernels import dispatch
from tests.kernels import launch_cases
from tests.kernels.fake_gpu import fake_gpu
from tests.models.flash_attention import Calls, install
from tests.stages.conftest import SHORT
from tests.tiny_checkpoint import DEEPSEEK_V3, GRPO, SFT, write_checkpoint, write_recipe

pytestmark = pytest.mark.usefixtures("stage_files")
CUDA = torch.device("cuda", 0)
# On a GPU these raise inside ordered_sums, as torch's documentation of the switch says: cumsum of floating point alone,
# bincount with weights.
RAISE = {
    "aten::cumsum", "aten::put_", "aten::histc", "aten::bincount", "aten::median", "aten::nanmedian", "aten::kthvalue",
    "aten::scatter_reduce", "aten::index_reduce", "aten::nll_loss2d_forward", "aten::_embedding_bag_backward",
    "aten::_ctc_loss_backward", "aten::grid_sampler_2d_backward", "aten::upsample_bilinear2d_backward",
}  # fmt: skip


def switches() -> tuple[bool, bool, bool]:
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns, torch.utils.deterministic.fill_uninitialized_memory


def inside_a_step() -> None:
    with ordered_sums(CUDA, True):
        assert switches() == (True, False, False)
        raise ZeroDivisionError


def test_the_switch_holds_inside_and_is_put_back() -> None:
    before = switches()
    with pytest.raises(ZeroDivisionError):
        inside_a_step()
    assert switches() == before == (False, False, True)
    for device, wanted in ((CUDA, False), (torch.device("cpu"), True)):
        with ordered_sums(device, wanted):
            assert switches() == before


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Steps on a CPU run as if on a GPU with FlashAttention 3, whose norms are torch's."""

    def of_gpu(device: torch.device, wanted: bool) -> AbstractContextManager[None]:
        return ordered_sums(CUDA, wanted)

    monkeypatch.setattr(training, "ordered_sums", of_gpu)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "rms_norm", ("reference",))
    yield install(monkeypatch, flash.FLASH3)
    flash.libraries.cache_clear()


@pytest.mark.parametrize("wanted", [True, False])
def test_gradients_of_attention_follow_the_recipe(
    wanted: bool, as_on_a_gpu: Calls, base_model: Path, command: Callable[..., int], tmp_path: Path
) -> None:
    sections = {"model": {"path": str(base_model), "dtype": "bfloat16"}, "trainer": {"deterministic": wanted}}
    config = write_recipe(tmp_path / "mine.yaml", {**SFT, "num_train_epochs": 1}, **sections)
    assert command("--config", config, "--output-dir", "run") == 0
    learned = [call["deterministic"] for call in as_on_a_gpu if call["learns"]]
    assert learned and set(learned) == {wanted}


class Seen(TorchDispatchMode):
    """Of RAISE, what is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.calls = set[str](), 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = op.name().split(".")[0]
        exact = (name == "aten::cumsum" and not args[0].is_floating_point()) or (
            name == "aten::bincount" and args[1:2] in ((), (None,))
        )
        if name in RAISE and not exact:
            self.found.add(name)
        return op(*args, **kwargs or {})


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every optimizer step, forward and backward, and every generation."""
    seen = Seen()

    def inside(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with seen:
                return method(*args, **kwargs)

        return run

    monkeypatch.setattr(training.Trainer, "update", inside(training.Trainer.update))
    monkeypatch.setattr(Sampler, "run", inside(Sampler.run))
    return seen


def test_what_launchers_call_of_torch_has_an_ordered_kernel() -> None:
    seen = Seen()
    with seen, fake_gpu():
        for case in launch_cases.CASES.values():
            for options in launch_cases.covering(case.options, 1, case.valid):
                case.call(**options)
    assert seen.calls > 1000 and seen.found == set()


def with_cumsum(self: Embedding, input: torch.Tensor) -> torch.Tensor:
    x = torch.nn.functional.embedding(input, self.weight)
    return x + 0 * x.cumsum(0)


@pytest.mark.parametrize("broken", [False, True], ids=["as-it-is", "with-a-float-cumsum"])
def test_every_op_of_a_step_has_an_ordered_kernel(
    broken: bool, as_on_a_gpu: Calls, watched: Seen, monkeypatch, train: Callable[..., Any], tmp_path: Path
) -> None:
    if broken:
        monkeypatch.setattr(Embedding, "forward", with_cumsum)
    stage = {**GRPO, **SHORT, "max_completion_length": 8, "num_generations": 4, "beta": 0.01, "num_iterations": 2}
    rewards = {"red": {"function": "my_rewards.py:say_red"}}
    model = write_checkpoint(tmp_path / "model", **DEEPSEEK_V3)
    train(model, {**stage, "rewards": rewards, "router_aux_loss_coef": 0.01}, dtype="bfloat16")
    assert watched.calls > 1000 and as_on_a_gpu
    assert watched.found == ({"aten::cumsum"} if broken else set())
