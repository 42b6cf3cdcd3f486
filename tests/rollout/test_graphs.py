"""Which steps are captured and replayed; and that a step can be: on a CPU by its tape, on a GPU by itself."""

import contextlib
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1fast.models import moe
from r1fast.models.decoder import Decoder
from r1fast.rollout import engine as engine_module
from r1fast.rollout import graphs, scheduler
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.fast_decode import unknown_parts
from r1fast.rollout.fused_decode import FusedDecode
from r1fast.rollout.graphs import CudaCapture, StepGraphs, bucket_of
from r1fast.rollout.sampling import Completion, SamplingParams
from tests import zoo
from tests.rollout.test_engine import FAMILIES, PROMPTS

# What waits for the device, or has a shape that it must wait for: capturing ends with an error there.
WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}


class Tape(TorchDispatchMode):
    """A CUDA graph for a CPU: the ops of one step, played again on the very tensors that they had."""

    def __init__(self) -> None:
        super().__init__()
        self.played: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.played.append((func, args, kwargs or {}, out))
        return out

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        with self:
            step()
        return self.replay

    def replay(self) -> None:
        for func, args, kwargs, out in self.played:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():  # neither a view nor in place
                    kept.copy_(new)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    made: list[Tape] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        made.append(Tape())
        return made[-1].capture(step)

    monkeypatch.setitem(graphs.CAPTURES, "cpu", lambda: capture)
    monkeypatch.setattr(graphs, "STEPS_BEFORE", 1)
    return made


def random_model(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
    model = zoo.decoder(family, **FAMILIES[family])
    model.init_weights(torch.Generator().manual_seed(3))
    return model.to(device, dtype).requires_grad_(False).eval()


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


# ---- which bucket, and when ----


def most_graphs(max_rows: int) -> int:
    """Two for each power of two, and the last."""
    return 2 * max_rows.bit_length() + 1


@pytest.mark.parametrize("max_rows", [1, 3, 200, 1000])
def test_buckets_have_room_little_padding_and_are_few(max_rows: int) -> None:
    buckets = [bucket_of(n, max_rows) for n in range(1, max_rows + 1)]
    assert all(n <= bucket <= min(2 * n, max_rows) for n, bucket in enumerate(buckets, 1))
    assert buckets == sorted(buckets) and len(set(buckets)) <= most_graphs(max_rows)


@pytest.mark.parametrize("seed", range(5))
def test_each_step_runs_once_and_most_by_a_graph_with_little_padding(seed: int) -> None:
    """Rows leave, and at times enter; the longest grows, leaves, and another is the longest."""
    rng, max_rows, widths = random.Random(seed), 200, [16, 32, 64, 100]
    events: list[tuple[str, int, int]] = []  # what ran a step, how many rows, and how wide

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        step()
        _, *bucket = events.pop()
        events.append(("capture", *bucket))
        return lambda: events.append(("replay", *bucket))

    steps, num_rows, place, num_poor = StepGraphs(max_rows, capture), max_rows, 0, 0
    for step in range(2000):
        num_rows = max(1, min(max_rows, num_rows - rng.choice([0, 0, 0, 1, -2, 3])))
        place = max(0, min(3, place + (rng.random() < 0.01) - (rng.random() < 0.005)))
        steps.run(lambda n, w: events.append(("eager", n, w)), num_rows, widths[place])
        assert len(events) == step + 1
        how, rows, width = events[-1]
        assert num_rows <= rows <= max_rows and width >= widths[place]
        is_far = rows > graphs.MOST_PADDING * num_rows or width > graphs.MOST_PADDING * widths[place]
        num_poor += how == "eager" or is_far
    assert num_poor <= graphs.STEPS_BEFORE * most_graphs(max_rows) * len(widths)
    captured = [bucket for how, *bucket in events if how == "capture"]
    assert 0 < len(captured) <= most_graphs(max_rows) * len(widths) and {width for _, width in captured} > {16}


# ---- steps that are captured ----


# Op after op: by the modules, and as on a GPU.
STEPS = [(family, False, {"min_tokens": 12, "top_p": 0.9}) for family in FAMILIES]
STEPS += [
    (family, not unknown_parts(zoo.decoder(family, **FAMILIES[family]).config, on_gpu=True), {}) for family in FAMILIES
]


@pytest.mark.parametrize(("family", "fused", "options"), STEPS, ids=str)
def test_a_tape_of_the_step_samples_the_same(
    family: str, fused: bool, options: dict[str, Any], tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that changes from step to step is baked in, nothing outside of the buffers survives it."""
    monkeypatch.setattr(scheduler, "fast_decode", FusedDecode if fused else lambda *_: None)
    model = random_model(family)
    is_moe = any(True for _ in model.moe_layers())
    params = SamplingParams(n=5, max_tokens=30, seed=4, stop_token_ids=[5, 6, 7], **options)

    def generate(**more: Any) -> list[Completion]:
        engine = RolloutEngine(model, None, max_num_seqs=11, enable_return_routed_experts=is_moe, **more)
        return flat(engine.generate(PROMPTS, params))

    eager = generate(enforce_eager=True)
    assert not tapes
    replayed = generate()
    assert len(tapes) > 1, "rows of several buckets"
    for x, y in zip(eager, replayed, strict=True):
        assert x.token_ids == y.token_ids
        assert x.logprobs == pytest.approx(y.logprobs, abs=1e-5)
        assert (x.routed_experts is None) == (not is_moe)
        assert x.routed_experts is None or (x.routed_experts == y.routed_experts).all()  # type: ignore[union-attr]


def test_a_step_that_waits_for_the_device_is_not_captured(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "fast_decode", lambda *_: None)
    model = random_model("qwen3_moe")
    monkeypatch.setattr(moe, "moe_experts", partial(moe.moe_experts, impl="reference"))
    with pytest.raises(AssertionError, match="waits for the device"):
        RolloutEngine(model, None).generate(PROMPTS, SamplingParams(max_tokens=30, ignore_eos=True))


def test_a_step_passes_by_hooks_of_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has them on what it shards by itself, and there makes its own streams wait: a capture that spreads to other
    streams fails."""
    monkeypatch.setattr(scheduler, "fast_decode", lambda *_: None)  # op after op, as on a GPU
    model = random_model("llama")
    hooked: list[str] = []
    for name in ("embed_tokens", "layers.0", "layers.1", "norm", "lm_head"):

        def hook(*_: Any, name: str = name) -> None:
            hooked.append(name)

        hook.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
        model.get_submodule(name).register_forward_pre_hook(hook)
    RolloutEngine(model, None).generate([[5]], SamplingParams(max_tokens=9, ignore_eos=True))
    assert len(hooked) == 5, "the prefill"


def test_cache_and_graphs_go_with_the_call(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not at the next garbage collection: training wants their memory."""
    caches: list[weakref.ref] = []
    made = scheduler.BlockCache

    def make(*args: Any) -> Any:
        cache = made(*args)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(scheduler, "BlockCache", make)
    engine = RolloutEngine(random_model("llama"), None)
    gc.disable()
    try:
        engine.generate(PROMPTS, SamplingParams(max_tokens=30, ignore_eos=True))
        graph = weakref.ref(tapes.pop())
        assert not tapes
        assert [cache() for cache in caches] == [None] and graph() is None
    finally:
        gc.enable()


def fake_cuda(monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """For CudaCapture. The step takes 3000 bytes on its stream; of the others none is free to it."""
    stream = SimpleNamespace(wait_stream=lambda other: None, device_index=0, cuda_stream=7)
    places = [(0, 7, (0, 0), 2000), (0, 7, [0, 0], 1000), (0, 7, (0, 5), 400), (0, 8, (0, 0), 70), (1, 7, (0, 0), 9)]
    names = "device", "stream", "segment_pool_id", "total_size"
    given: dict[str, Any] = {
        "graph_pool_handle": lambda: (0, 1),
        "current_device": lambda: -1,  # no other test gets its stream
        "current_stream": lambda: stream,
        "Stream": lambda device: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "get_allocator_backend": lambda: "native",
        "memory_snapshot": lambda: [dict(zip(names, place)) for place in places],
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (3000, 10_000),
    }
    for name, value in (given | more).items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError("not permitted when capturing"),
            r"enforce_eager=True \(in.* decodes without: not permitted when",
        ),
        (torch.OutOfMemoryError("tried to allocate"), r"no memory was left .* kv_cache_memory_bytes .*: tried to allo"),
    ],
    ids=["op", "memory"],
)
def test_a_capture_that_fails_says_why_and_what_to_do(
    error: Exception, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def capturing(*args: Any, **options: Any) -> Iterator[None]:
        assert options["capture_error_mode"] == "thread_local"
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    fake_cuda(monkeypatch, graph=capturing)
    runs = []

    def step() -> None:
        runs.append(len(runs))
        if len(runs) > 1:
            raise error

    with pytest.raises(RuntimeError, match=text):
        CudaCapture()(step)
    assert runs == [0, 1], "once for its token, once to be captured"


def test_no_capture_is_begun_that_would_run_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the step took as it ran has to be free again. Then steps run op by op, each once."""
    fake_cuda(monkeypatch, mem_get_info=lambda: (2999, 10_000), graph=None)
    runs: list[tuple[int, int]] = []
    steps = StepGraphs(4, CudaCapture())
    for num_rows in [4] * 20 + [1] * 20:
        steps.run(lambda n, w: runs.append((n, w)), num_rows, 16)
    assert runs == [(4, 16)] * 20 + [(1, 16)] * 20 and not steps.graphs
    (said,) = [record.getMessage() for record in caplog.records]
    assert "a CUDA graph takes up to 3,000 bytes, and 2,999 are free; lower max_num_seqs" in said
    fake_cuda(monkeypatch, graph=lambda *args, **options: contextlib.nullcontext())
    assert CudaCapture()(lambda: None) is not None


# ---- on a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def without_waits(run: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return checked


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), ("qwen2", torch.bfloat16), ("deepseek_v3", torch.bfloat16)],
    ids=str,
)
def test_graphs_sample_what_eager_steps_do(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither steps nor replays wait for the device. Weights that changed in place are those of the next call. The
    memory of cache and graphs is given back."""
    captures: list[int] = []
    capture = CudaCapture.__call__

    def counted(self: CudaCapture, step: Callable[[], None]) -> Callable[[], None]:
        captures.append(1)
        return without_waits(capture(self, step))

    monkeypatch.setattr(CudaCapture, "__call__", counted)
    monkeypatch.setattr(scheduler.Scheduler, "_step", without_waits(scheduler.Scheduler._step))
    model = random_model(family, "cuda", dtype)
    is_moe = any(True for _ in model.moe_layers())
    # In bf16 a product of more rows may round otherwise: rows of one length, and no padding.
    stops = [5] if dtype == torch.float32 else None  # a few rows at a time, so that several buckets last
    params = SamplingParams(n=6, max_tokens=100, seed=1, ignore_eos=True, stop_token_ids=stops)

    def generate(**more: Any) -> list[list[int]]:
        engine = RolloutEngine(model, None, max_num_seqs=24, enable_return_routed_experts=is_moe, **more)
        return [completion.token_ids for completion in flat(engine.generate(PROMPTS, params))]

    eager = generate(enforce_eager=True)
    assert not captures
    assert generate() == eager
    assert len(captures) > 1 if stops else captures == [1]
    allocated = torch.cuda.memory_allocated()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.2)
    changed = generate()
    assert changed != eager
    assert changed == generate(enforce_eager=True)
    assert torch.cuda.memory_allocated() <= allocated + 4096, "what was sampled last may have other experts' ids"


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_without_room_steps_op_by_op(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What a step takes is found in the allocator's own list."""
    engine = RolloutEngine(random_model("llama", "cuda"), None, max_num_seqs=24)
    params = SamplingParams(n=8, max_tokens=60, seed=1)
    expected = [completion.token_ids for completion in flat(engine.generate(PROMPTS, params))]
    monkeypatch.setattr(engine_module, "free_memory", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 1))
    monkeypatch.setattr(torch.cuda, "graph", None)
    assert [completion.token_ids for completion in flat(engine.generate(PROMPTS, params))] == expected
    (said,) = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert "takes up to 0 bytes" not in said


@pytest.mark.gpu
@needs_gpu
def test_captures_beside_a_thread_that_trains() -> None:
    """As with rollout.async_steps: sampling in a thread, on a stream of its own."""
    engine = RolloutEngine(random_model("llama", "cuda"), None, max_num_seqs=24)
    params = SamplingParams(n=8, max_tokens=100, seed=1)
    expected = [completion.token_ids for completion in flat(engine.generate(PROMPTS, params))]
    stream = torch.cuda.Stream()

    def sample() -> list[list[int]]:
        with torch.cuda.stream(stream):
            return [completion.token_ids for completion in flat(engine.generate(PROMPTS, params))]

    data, weight = torch.randn(512, 512, device="cuda"), torch.randn(512, 512, device="cuda", requires_grad=True)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(sample)
        while not future.done():
            loss = (data @ weight).square().mean()
            loss.backward()
            assert float(loss) > 0  # this thread waits for its own stream
    assert future.result() == expected
