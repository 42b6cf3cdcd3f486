import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from r1fast_kernels import moe_experts


def random_layer(
    num_tokens: int,
    num_experts: int = 5,
    k: int = 2,
    width: int = 12,
    inner: int = 7,
    dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:k] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, k, generator=generator, dtype=dtype).requires_grad_()
    tensors = [normal(num_tokens, width), normal(num_experts, 2 * inner, width), normal(num_experts, width, inner)]
    return [*tensors, ids, weights]


def transformers_experts(layer: list[torch.Tensor]) -> torch.Tensor:
    hidden, gate_up, down, ids, weights = layer
    config = DeepseekV3Config(
        hidden_size=hidden.shape[1], moe_intermediate_size=down.shape[2], n_routed_experts=len(down)
    )
    config._experts_implementation = "eager"
    experts = DeepseekV3Experts(config).to(hidden.dtype)
    parameters = {"gate_up_proj": gate_up, "down_proj": down}
    return torch.func.functional_call(experts, parameters, (hidden, ids, weights))


def route(layer: list[torch.Tensor], how: str) -> None:
    ids = layer[3]
    if how == "one-takes-all":
        ids.fill_(3)
    elif how == "some-skipped":  # ids >= E, and not sorted to the end
        ids[::3, 0] = 5
    elif how == "empty-experts":  # the first and the last get nothing
        ids.clamp_(1, 3)


@pytest.mark.parametrize("how", ["random", "one-takes-all", "some-skipped", "empty-experts"])
def test_equals_transformers_with_gradients(how: str) -> None:
    layer = random_layer(41)
    route(layer, how)
    hidden, gate_up, down, _, weights = layer
    outputs = [moe_experts(*layer), transformers_experts(layer)]
    torch.testing.assert_close(outputs[0], outputs[1])
    scale = torch.linspace(-1, 1, outputs[0].numel(), dtype=torch.float64).view_as(outputs[0])
    ours, theirs = (torch.autograd.grad((out * scale).sum(), (hidden, gate_up, down, weights)) for out in outputs)
    torch.testing.assert_close(ours, theirs)


def test_all_skipped_is_zero_with_zero_gradients() -> None:
    hidden, gate_up, down, ids, weights = random_layer(6)
    out = moe_experts(hidden, gate_up, down, torch.full_like(ids, 5), weights)
    gradients = torch.autograd.grad(out.sum(), (hidden, gate_up, down, weights))
    assert out.shape == hidden.shape and not any(x.any() for x in (out, *gradients))


@pytest.mark.parametrize(("num_tokens", "k"), [(1, 1), (3, 1), (4, 5)], ids=["T1-K1", "K1", "K-is-E"])
def test_gradcheck(num_tokens: int, k: int) -> None:
    hidden, gate_up, down, ids, weights = random_layer(num_tokens, k=k, width=3, inner=2)
    assert torch.autograd.gradcheck(lambda h, g, d, w: moe_experts(h, g, d, ids, w), (hidden, gate_up, down, weights))


def test_bf16_is_as_exact_as_transformers() -> None:
    layer = random_layer(200, width=64, inner=48)
    exact = moe_experts(*layer)
    low = [x.bfloat16() if x is not layer[4] else x.float() for x in layer[:3]] + [layer[3], layer[4].float()]
    ours, theirs = moe_experts(*low), transformers_experts(low)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm()


def test_no_token_and_same_bits() -> None:
    hidden, gate_up, down, ids, weights = random_layer(50, dtype=torch.float32)
    assert moe_experts(hidden[:0], gate_up, down, ids[:0], weights[:0]).shape == (0, 12)
    runs = []
    for _ in range(3):
        out = moe_experts(hidden, gate_up, down, ids, weights)
        runs.append([out, *torch.autograd.grad(out.sum(), (hidden, gate_up, down, weights))])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


def test_errors_say_what_was_expected() -> None:
    hidden, gate_up, down, ids, weights = random_layer(4)
    with pytest.raises(ValueError, match=r"expected \[T, D\], \[E, 2F, D\], \[E, D, F\]"):
        moe_experts(hidden, down, gate_up, ids, weights)
    with pytest.raises(ValueError, match=r"for 4 tokens, expected both \[T, K\]"):
        moe_experts(hidden, gate_up, down, ids[:3], weights[:3])
