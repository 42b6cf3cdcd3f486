"""Generation computes what training computes, or says why not, whatever somebody has added to a decoder."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from r1fast.models.decoder import Decoder, DecoderLayer
from r1fast.models.layers import MLP
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams
from r1fast_kernels import decode_layers as op
from r1fast_kernels import use
from tests.kernels.backends import needs_cpp
from tests.kernels.test_decode_layers import CONFIGS, make_step

pytestmark = needs_cpp


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of decode_layers."""
    seen: list[int] = []
    for name in ("__call__", "prefill"):
        run = getattr(op.DecodeLayers, name)
        monkeypatch.setattr(
            op.DecodeLayers, name, lambda self, ids, *x, run=run: seen.append(len(ids)) or run(self, ids, *x)
        )
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_moves_both_paths_alike(name: str, calls: list[int]) -> None:
    step = make_step(name, num_rows=9)
    modules = step.by_modules()
    with use("reference"):
        before = modules.logits()
    tensors = dict(step.model.named_parameters()) | dict(step.model.named_buffers())
    assert len(tensors) > 15
    for tensor_name, tensor in tensors.items():
        kept = tensor.detach().clone()
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            tensor.add_(noise * tensor.abs().mean().clamp(min=0.1))
        with use("reference"):
            want = modules.logits()
        got = step.logits()
        with torch.no_grad():
            tensor.copy_(kept)
        assert (want - before).abs().max() > 1e-3, f"{tensor_name} does nothing"
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=tensor_name)
    assert len(calls) == len(tensors)


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


class Tanh(MLP):
    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x_TD).tanh() * self.up_proj(x_TD))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Doubling(DecoderLayer):
    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Any]:
        x_TD, routing = super().forward(*args, **options)
        return 2 * x_TD, routing


class DoublingBoth(Doubling):
    def decode(self, *args: Any) -> tuple[Tensor, Any]:
        x_BD, routing = super().decode(*args)
        return 2 * x_BD, routing


def become(kind: type[nn.Module]) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, "__class__", kind)


def with_bias(module: nn.Module) -> None:
    module.bias = nn.Parameter(torch.linspace(-1, 1, module.weight.shape[0]))


def with_own_forward(module: nn.Module) -> None:
    module.forward = lambda x_TD: 3 * type(module).forward(module, x_TD)


def with_factor(module: nn.Module) -> None:
    """A weight that is read by a method of its own."""
    module.factor = nn.Parameter(torch.tensor(1.7))
    module.forward = lambda x: module.factor * type(module).forward(module, x)


# What is done to which module: the modules run, and sampler and trainer agree.
RUN_BY_MODULES: dict[str, tuple[str, str, Callable[[nn.Module], Any]]] = {
    "bias": ("qwen2", "layers.1.self_attn.o_proj", with_bias),
    "bias-of-gate": ("qwen3", "layers.0.mlp.gate_proj", with_bias),
    "bias-of-q_b": ("deepseek-odd", "layers.1.self_attn.q_b_proj", with_bias),
    "no-bias": ("llama", "layers.1.mlp.up_proj", lambda module: setattr(module, "bias", None)),
    "parameter": ("llama", "layers.0.post_attention_layernorm", with_factor),
    "inert-parameter": ("llama", "layers.0", lambda x: x.register_parameter("alpha", nn.Parameter(torch.ones(1)))),
    "buffer": ("llama", "layers.0.mlp", lambda module: module.register_buffer("alpha", torch.ones(1))),
    "attribute": ("qwen3-moe", "layers.1.self_attn.q_norm", lambda module: setattr(module, "eps", 0.3)),
    "scale": ("llama", "layers.0.self_attn", lambda module: setattr(module, "scale", 0.01)),
    "subclass": ("llama", "layers.1.mlp", become(Tanh)),
    "shared-experts": ("deepseek", "layers.1.mlp.shared_experts", become(Tanh)),
    "hook": ("qwen2", "layers.0.mlp", lambda module: module.register_forward_hook(double)),
    "hook-of-router": ("qwen3-moe", "layers.1.mlp.experts", lambda module: module.register_forward_hook(double)),
    "forward": ("qwen2", "layers.0.self_attn.v_proj", with_own_forward),
    "norm": ("qwen2", "norm", with_own_forward),
    "parametrization": (
        "llama",
        "layers.1.mlp.down_proj",
        lambda module: nn.utils.parametrize.register_parametrization(module, "weight", Halved()),
    ),
    "module": (
        "llama",
        "layers.0.mlp",
        lambda module: setattr(module, "up_proj", nn.Sequential(module.up_proj, nn.Tanh())),
    ),
    "layer-with-decode": ("llama", "layers.0", become(DoublingBoth)),
}


def sampler_and_trainer(model: Decoder) -> tuple[Tensor, Tensor]:
    """Log-probs of the same sampled tokens, by both."""
    prompts = [[5, 9, 14], [7] * 20]
    found, wanted = [], []
    for prompt, (completion,) in zip(
        prompts, RolloutEngine(model, None).generate(prompts, SamplingParams(max_tokens=7, ignore_eos=True))
    ):
        ids = torch.tensor([*prompt, *completion.token_ids])
        with torch.no_grad():
            logits = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32))
        logprobs_T = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
        found.append(torch.tensor(completion.logprobs))
        wanted.append(logprobs_T[len(prompt) - 1 :])
    return torch.cat(found), torch.cat(wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_as_built_runs_by_decode_layers(name: str, calls: list[int]) -> None:
    torch.testing.assert_close(*sampler_and_trainer(make_step(name).model), rtol=1e-4, atol=1e-4)
    assert len(calls) == 7


@pytest.mark.parametrize(("in_fp32", "num_calls"), [(False, 7), (True, 0)])
def test_a_head_in_float32_runs_by_modules(
    calls: list[int], caplog: pytest.LogCaptureFixture, in_fp32: bool, num_calls: int
) -> None:
    """It is an option, of which nobody has to be warned; that it is off is no difference."""
    model = make_step("qwen2").model
    model.head.in_fp32 = in_fp32
    with caplog.at_level(logging.WARNING, "r1fast"):
        torch.testing.assert_close(*sampler_and_trainer(model), rtol=1e-4, atol=1e-4)
    assert len(calls) == num_calls and not caplog.text


@pytest.mark.parametrize("change", RUN_BY_MODULES)
def test_what_was_added_runs_by_modules(change: str, calls: list[int], caplog: pytest.LogCaptureFixture) -> None:
    name, module, apply = RUN_BY_MODULES[change]
    model = make_step(name).model
    before, _ = sampler_and_trainer(model)
    calls.clear()
    apply(model.get_submodule(module))
    with caplog.at_level(logging.WARNING, "r1fast"):
        found, wanted = sampler_and_trainer(model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not calls and module in caplog.text
    assert change in ("inert-parameter", "buffer") or (found - before).abs().max() > 1e-3


LEFT_OUT: dict[str, tuple[str, str, Callable[[nn.Module], Any]]] = {
    "layer": ("llama", "layers.1", become(Doubling)),
    "hook-of-a-layer": ("llama", "layers.1", lambda module: module.register_forward_hook(double)),
    "hook-of-attention": ("qwen2", "layers.0.self_attn", lambda module: module.register_forward_hook(double)),
    "hook-of-the-head": ("qwen2", "lm_head", lambda module: module.register_forward_hook(double)),
    "hook-of-the-decoder": ("qwen2", "", lambda module: module.register_forward_hook(double)),
    "forward-of-attention": ("deepseek", "layers.0.self_attn", with_own_forward),
    "kv_b_proj": ("deepseek", "layers.1.self_attn.kv_b_proj", with_bias),
    "hook-of-kv_b_proj": ("deepseek", "layers.1.self_attn.kv_b_proj", lambda x: x.register_forward_hook(double)),
}


@pytest.mark.parametrize("change", LEFT_OUT)
def test_what_decoding_would_leave_out_is_an_error(change: str) -> None:
    name, module, apply = LEFT_OUT[change]
    model = make_step(name).model
    apply(model.get_submodule(module))
    with pytest.raises(ValueError, match=f"would leave out what training computes: {module or 'the decoder'}"):
        sampler_and_trainer(model)


def test_decode_layers_takes_no_name_that_it_does_not_read() -> None:
    layer = {"input_layernorm.weight": torch.ones(8), "mlp.router_scale": torch.ones(1)}
    with pytest.raises(ValueError, match=r"layer 1 has mlp.router_scale, which it does not read"):
        op.weights_of([{}, layer])


def test_a_class_that_was_patched_runs_by_modules(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model was built from it, or since."""
    models = [make_step("llama").model]
    own = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x_TD: 2 * own(self, x_TD))
    models.append(make_step("llama").model)
    for model in models:
        torch.testing.assert_close(*sampler_and_trainer(model), rtol=1e-4, atol=1e-4)
    assert not calls


def test_a_global_hook_is_an_error_whenever_it_came() -> None:
    with nn.modules.module.register_module_forward_hook(double):
        model = make_step("llama").model
        with pytest.raises(ValueError, match="training computes: the decoder has another hook double"):
            sampler_and_trainer(model)
    sampler_and_trainer(model)
