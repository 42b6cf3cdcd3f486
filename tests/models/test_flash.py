"""Flash attention's libraries, by stand-ins that refuse what they refuse: which is chosen, and what it is given."""

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from r1fast import doctor
from r1fast.activations import layer_activations
from r1fast.models import flash
from r1fast.models.attention import AttentionPlan, packed_attention
from r1fast.models.decoder import Decoder
from r1fast.models.flash import FLASH2, FLASH3, VARLEN
from r1fast_kernels import dispatch, use
from r1fast_kernels.packed_attention import packed_attention_reference
from tests import zoo
from tests.kernels.backends import assert_as_exact, needs_gpu
from tests.models.flash_attention import Calls, install

CPU, BF16, FP64 = torch.device("cpu"), torch.bfloat16, torch.float64
LENGTHS = [1, 0, 13, 40]
# H, K, d, e, window, soft cap: grouped; of a size that no kernel has; MLA's; values wider than keys; the largest; caps.
Shape = tuple[int, int, int, int, int | None, float | None]
SHAPES = {
    "gqa": (6, 2, 16, 16, None, None),
    "odd-window": (4, 1, 20, 20, 7, None),
    "mla": (2, 2, 192, 128, None, None),
    "wide-values": (2, 2, 24, 40, 1, None),
    "256": (2, 1, 256, 256, None, None),
    "cap": (6, 2, 16, 16, None, 0.5),
    "cap-window": (4, 1, 24, 40, 7, 2.0),
    "cap-mla": (2, 2, 192, 128, None, 50.0),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "choices", {})
    forget = flash.libraries.cache_clear  # of the function that a test may replace
    forget()
    yield
    forget()


@pytest.fixture
def ordered() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(shape: Shape, device: torch.device = CPU) -> list[Tensor]:
    """q, k, v and the gradient of the result, as views of one tensor where nothing begins at a multiple of 16 bytes."""
    H, K, d, e, *_ = shape
    sizes, T = ((H, d), (K, d), (K, e), (H, e)), sum(LENGTHS)
    flat = torch.randn(T, 1 + sum(h * n for h, n in sizes), generator=torch.Generator().manual_seed(0)).to(BF16)
    parts = flat.to(device)[:, 1:].split([h * n for h, n in sizes], dim=1)
    return [x.unflatten(1, size).detach().requires_grad_() for x, size in zip(parts, sizes)]


def run(shape: Shape, given: list[Tensor]) -> tuple[Tensor, ...]:
    """Result and gradients of q, k and v."""
    q, k, v, grad = given
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    plan = AttentionPlan(cu_seqlens, len(q), q.device)
    out = packed_attention(q, k, v, plan, None, 0.3, window=shape[4], soft_cap=shape[5])
    return out, *torch.autograd.grad(out, (q, k, v), grad)


def assert_as_reference(shape: Shape, given: list[Tensor]) -> tuple[Tensor, ...]:
    cu_seqlens, got = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32), run(shape, given)
    found = []
    for dtype in (BF16, FP64):
        q, k, v, grad = (x.detach().to(dtype).requires_grad_() for x in given)
        out = packed_attention_reference(q, k, v, cu_seqlens, 0.3, window=shape[4], soft_cap=shape[5])
        found.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for name, mine, plain, exact in zip("oqkv", got, *found, strict=True):
        assert_as_exact(mine, plain, exact, 2 if name == "o" else 3, name)
    return got


@pytest.mark.parametrize("name", [FLASH3, FLASH2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients(shape: Shape, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, name)
    assert_as_reference(shape, inputs(shape))
    assert len(calls) == 1 and [op_name[1] for op_name in dispatch.choices] == [name]
    assert calls[0]["softcap"] == (shape[5] or 0.0)


@pytest.mark.parametrize("names", [(FLASH3, FLASH2), (FLASH3,)], ids=["both", "3"])
def test_values_are_padded_only_where_a_kernel_asks_for_it(names: tuple[str, ...], monkeypatch) -> None:
    calls = install(monkeypatch, *names)
    run(SHAPES["mla"], inputs(SHAPES["mla"]))
    assert calls[-1]["shapes"] == ((54, 2, 192), (54, 2, 128))
    run(SHAPES["odd-window"], inputs(SHAPES["odd-window"]))
    assert calls[-1]["shapes"] == ((54, 4, 24), (54, 1, 24)) and calls[-1]["window_size"] == (6, 0)


@pytest.mark.usefixtures("ordered")
def test_sums_have_an_order_where_torch_is_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, FLASH3, FLASH2)
    run(SHAPES["gqa"], inputs(SHAPES["gqa"]))
    assert calls[-1]["deterministic"] is True
    run(SHAPES["256"], inputs(SHAPES["256"]))  # FlashAttention 3 has no ordered gradient for it
    said = dispatch.choices["packed_attention", FLASH2]
    assert said.endswith("not FlashAttention 3: no head size 256 with sums in one order")


@pytest.mark.usefixtures("ordered")
def test_a_soft_cap_with_sums_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, FLASH3)
    assert_as_reference(SHAPES["cap-window"], inputs(SHAPES["cap-window"]))
    assert calls[-1]["deterministic"] is True and calls[-1]["softcap"] == 2.0 and calls[-1]["window_size"] == (6, 0)


def test_a_build_of_unknown_flags_attends_without_a_soft_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FLASH3)
    monkeypatch.setattr(sys.modules["flash_attn_config"], "CONFIG", {"build_flags": {}})
    library = flash._imported(FLASH3, (9, 0))
    assert library.call is not None and library.no_cap == "its build does not say whether it has soft caps"


@pytest.mark.parametrize(
    ("built", "said"), [(False, "it was built without soft caps"), (None, "its build does not say whether it has")]
)
def test_a_soft_cap_goes_to_a_library_that_has_one(
    built: bool | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm#25502: a build without; flash-attention#1065: a version without its gradient. Last the reference."""
    shape = SHAPES["cap-window"]
    calls = install(monkeypatch, FLASH3, FLASH2, softcap=built)
    assert_as_reference(shape, inputs(shape))
    assert len(calls) == 1
    assert f"not FlashAttention 3: {said}" in dispatch.choices["packed_attention", FLASH2]
    monkeypatch.setattr(sys.modules["flash_attn"], "__version__", "2.6.1")
    monkeypatch.setattr(flash, "_of_torch", lambda found: flash.Library(VARLEN, print, no_cap="it has no soft cap"))
    flash.libraries.cache_clear()
    assert_as_reference(shape, inputs(shape))
    reason = dispatch.choices["packed_attention", "reference"]
    assert "2: version 2.6.1 has no gradient of a soft cap; not varlen_attn: it has no soft cap" in reason
    assert len(calls) == 1
    run((*shape[:5], None), inputs(shape))
    assert len(calls) == 2 and calls[-1]["softcap"] == 0.0


def test_a_cap_that_is_not_passed_on_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """sglang#33915."""
    install(monkeypatch, FLASH2)
    given, attend = inputs(SHAPES["cap"]), flash.attend
    monkeypatch.setattr(flash, "attend", lambda *args: attend(*args[:-1], args[-1]._replace(soft_cap=None)))
    with pytest.raises(AssertionError):
        assert_as_reference(SHAPES["cap"], given)


def _unpadded(x: Tensor, width: int) -> Tensor:
    return x


def _offset_ignored(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


@pytest.mark.parametrize(
    ("shape", "broken", "message"),
    [("odd-window", _unpadded, "multiple of 8|misaligned"), ("gqa", _offset_ignored, "misaligned address")],
    ids=["no-padding", "no-alignment"],
)
def test_the_stand_in_refuses_what_a_kernel_would_fault_on(
    shape: str, broken: Callable[[Tensor, int], Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FLASH3)
    monkeypatch.setattr(flash, "_padded", broken)
    with pytest.raises(RuntimeError, match=message):
        run(SHAPES[shape], inputs(SHAPES[shape]))


def test_a_window_of_another_width_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FLASH2)
    given, attend = inputs(SHAPES["odd-window"]), flash.attend
    monkeypatch.setattr(flash, "attend", lambda *args: attend(*args[:-1], args[-1]._replace(window=8)))
    with pytest.raises(AssertionError):
        assert_as_reference(SHAPES["odd-window"], given)


# Which is chosen for bf16 heads of 64 on a device, of what is installed; and what of the others is said.
CHOICES = {
    "hopper": ((9, 0), (FLASH3, FLASH2), FLASH3, ""),
    "hopper-with-2": ((9, 0), (FLASH2,), FLASH2, "flash_attn_interface is not installed; build the folder hopper/"),
    "ampere": ((8, 0), (FLASH3, FLASH2), FLASH2, "not FlashAttention 3: it has no kernels for sm_80"),
    "blackwell": ((10, 0), (FLASH3, FLASH2), FLASH2, "not FlashAttention 3: it has no kernels for sm_100"),
    "turing": ((7, 5), (FLASH3, FLASH2), None, "not FlashAttention 2: it has no kernels for sm_75"),
    "nothing": ((9, 0), (), None, "flash_attn is not installed; pip install flash-attn"),
}


@pytest.mark.parametrize(("capability", "installed", "want", "said"), CHOICES.values(), ids=CHOICES)
def test_choice(
    capability: tuple[int, int], installed: tuple[str, ...], want: str | None, said: str, monkeypatch
) -> None:
    install(monkeypatch, *installed, capability=capability)
    q = torch.empty(3, 2, 64, dtype=BF16)
    chosen, reason = flash.choose(flash.libraries(CPU), q, 64, deterministic=False)
    assert (chosen and chosen.name) == want and said in reason
    assert flash.choose(flash.libraries(CPU), q.float(), 64, deterministic=False)[0] is None
    assert flash.choose(flash.libraries(CPU), q, 264, deterministic=False)[0] is None


@pytest.mark.parametrize("error", [ImportError, OSError, AttributeError, TypeError, ValueError])
def test_a_library_that_is_too_old_or_broken_is_named(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FLASH3, FLASH2)
    old = flash.importlib.import_module("flash_attn")
    monkeypatch.setattr(old, "flash_attn_varlen_func", lambda q, k, v, softmax_scale, causal, window_size: q)
    real = flash.importlib.import_module

    def broken(name: str) -> object:
        if name == "flash_attn_interface":
            raise error("undefined symbol: _ZN3c104cuda")
        return real(name)

    monkeypatch.setattr(flash.importlib, "import_module", broken)
    three, two, _ = flash.libraries(CPU)
    assert three.call is None and "cannot be imported: undefined symbol" in three.obstacle
    assert two.call is None and "lacks deterministic, return_attn_probs" in two.obstacle


def test_the_doctor_says_which_and_why_not_a_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FLASH2)
    heads, cu_seqlens = torch.ones(4, 1, 64, dtype=BF16), torch.tensor([0, 2, 4], dtype=torch.int32)
    call = flash.partial(doctor.attend_once, heads, cu_seqlens)
    monkeypatch.setattr(doctor, "tiny_calls", lambda device: {"packed_attention": call})
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", {"packed_attention": ("reference", "cpp")})
    ((_, _, name, reason),) = doctor.op_choices()
    assert name == FLASH2 and "not FlashAttention 3: flash_attn_interface is not installed; build the folder" in reason


@pytest.mark.parametrize("says_gqa", [True, False], ids=["torch-2.13", "torch-2.11"])
def test_call_of_varlen_attn(says_gqa: bool) -> None:
    """With the options of either version; causal by its window."""
    seen = {}

    def of_213(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
        seen.update(scale=scale, window_size=window_size, enable_gqa=enable_gqa)
        return query

    def of_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1)):  # fmt: skip
        seen.update(scale=scale, window_size=window_size)
        return query

    call = flash.partial(flash._varlen, of_213 if says_gqa else of_211, says_gqa)
    given, cu_seqlens = inputs(SHAPES["gqa"]), torch.tensor([0, 54], dtype=torch.int32)
    flash.attend(flash.Choice(VARLEN, call, (16, 16)), *given[:3], cu_seqlens, 54, flash.Scores(0.3, 5))
    assert seen == {"scale": 0.3, "window_size": (4, 0)} | ({"enable_gqa": True} if says_gqa else {})


def test_nothing_to_attend_to(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FLASH3)
    plan, empty = AttentionPlan(torch.zeros(2, dtype=torch.int32), 0, CPU), torch.empty(0, 2, 16, dtype=BF16)
    assert packed_attention(empty, empty, empty, plan, None, 1.0).shape == (0, 2, 16)


def test_one_token_beside_empty_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attention#1537: where no sequence is longer, heads of a group are taken for tokens, of every sequence."""
    install(monkeypatch, FLASH2)
    q, k = torch.randn(2, 4, 16).to(BF16), torch.randn(2, 1, 16).to(BF16)
    plan = AttentionPlan(torch.tensor([0, 0, 1, 1, 2], dtype=torch.int32), 2, CPU)
    assert torch.equal(packed_attention(q, k, k, plan, None, 1.0), k.expand_as(q))


def test_offsets_of_another_shape_are_refused() -> None:
    """trl#3243: [1, N+1], which flash_attn_varlen_func takes for other sequences."""
    with pytest.raises(ValueError, match=r"\(1, 3\)\), expected \[N\+1\]"):
        AttentionPlan(torch.tensor([[0, 2, 5]], dtype=torch.int32), 5, CPU)


def test_compiled_layers_stay_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FLASH2)
    plan = AttentionPlan(torch.tensor([0, 3], dtype=torch.int32), 3, CPU)
    plan.flash = (flash.Library(FLASH3, None, "not here"), flash.Library(FLASH2, lambda q, *_, **__: q * 2))
    q = torch.randn(3, 2, 20).to(BF16)
    compiled = torch.compile(
        lambda x: packed_attention(x, x, x, plan, None, 1.0, window=2), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(q), q * 2)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_an_estimate_of_memory_calls_no_library(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of FlashAttention 3 from before its pull request 1769 cannot be traced (flash-attention#1435). Where none
    takes the call, as of float32, padding is traced."""
    calls = install(monkeypatch, FLASH3, FLASH2)
    config = zoo.decoder("llama", vocab_size=64, hidden_size=80, num_attention_heads=4, num_key_value_heads=4).config
    kept = layer_activations(config, 0, 100, 0, dtype, "cpu", "none").kept
    assert kept > 100 * (8 * 80 + 3 * config.intermediate_size) * dtype.itemsize
    assert not calls


SHARED_S = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 0, 1, 2, 7, 8, 9])
# MLA of DeepSeek's head sizes; windows and a head size of 12; grouped heads.
MODELS = {
    "deepseek_v3": {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    "gemma2": {},
    "gemma3_text": {},
    "qwen3_moe": {},
}


def of_model(decoder: Decoder, shared_S: Tensor | None) -> list[Tensor]:
    """Logits and the gradient of every parameter that has one, in fp64."""
    decoder.zero_grad()
    ids_T = torch.randint(3, 60, (10,), generator=torch.Generator().manual_seed(1))
    routed = torch.arange(16).view(-1, 1, 1) % 2 + torch.tensor([0, 2])  # no rounding moves a token to other experts
    layers = sum(1 for _ in decoder.moe_layers())
    logits = decoder(
        ids_T if shared_S is not None else ids_T[SHARED_S], torch.tensor([0, 5, 10, 14, 16], dtype=torch.int32),
        head=lambda hidden_TD, weight_VD: hidden_TD @ weight_VD.T, shared_S=shared_S,
        replay_ids_TLK=routed.expand(16, layers, 2) if layers else None,
    )  # fmt: skip
    logits.double().log_softmax(-1)[:, 7].sum().backward()
    return [logits.detach().double(), *[p.grad.double() for p in decoder.parameters() if p.grad is not None]]


@pytest.mark.parametrize("shared_S", [None, SHARED_S], ids=["whole", "shared"])
@pytest.mark.parametrize("name", [FLASH3, FLASH2])
@pytest.mark.parametrize("family", MODELS)
def test_whole_models(family: str, name: str, shared_S: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = install(monkeypatch, name)
    decoder = zoo.decoder(family, vocab_size=64, initializer_range=0.1, **MODELS[family])
    with use("reference"):
        exact = of_model(decoder.double(), shared_S)
        plain = of_model(decoder.to(BF16), shared_S)
    assert not calls
    for got, rounded, want in zip(of_model(decoder, shared_S), plain, exact, strict=True):
        # Of a whole model: as its other parts, rounding of the reference is one draw of many.
        assert (got - want).norm() <= 2 * (rounded - want).norm() + 1e-12
    assert len(calls) == decoder.config.num_hidden_layers


@pytest.mark.parametrize("name", [FLASH3, FLASH2, VARLEN])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.gpu
@needs_gpu[1]
@pytest.mark.usefixtures("ordered")
def test_on_a_gpu(shape: Shape, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the reference; and, where torch is asked for it, the same bits every time."""
    device = torch.device("cuda", 0)
    (library,) = (library for library in flash.libraries(device) if library.name == name)
    missing = library.obstacle or (library.no_cap if shape[5] else "")
    if missing or flash._widths(name, shape[2], shape[3], True) is None:
        pytest.skip(f"{name}: {missing or 'no such head size with sums in one order'}")
    monkeypatch.setattr(flash, "libraries", lambda _: (library,))
    first = assert_as_reference(shape, inputs(shape, device))
    assert ("packed_attention", name) in dispatch.choices
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, run(shape, inputs(shape, device)), strict=True))
