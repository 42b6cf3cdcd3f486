"""r1fast as an experts implementation of transformers: whole models, logits and every gradient."""

import copy
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from r1fast_kernels import hf
from tests.kernels.backends import BF16, FP32, FP64, assert_as_exact

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "deepseek_v3": DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        moe_intermediate_size=24, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    ),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, num_experts=7, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=5, num_experts_per_tok=2),
}  # fmt: skip


def run(config: PretrainedConfig, implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, experts_implementation=implementation, attn_implementation="eager"
    )
    ids = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    logits = model(ids, labels=ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_whole_model_equals_eager(family: str) -> None:
    hf.register()
    hf.register()
    logits, gradients = run(CONFIGS[family], "r1fast")
    want_logits, want = run(CONFIGS[family], "eager")
    torch.testing.assert_close(logits, want_logits, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == want.keys() and sum("experts" in name for name in want) >= 2
    for name, gradient in want.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_what_is_not_taken_is_said() -> None:
    hf.register()
    config = GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="r1fast")
    with pytest.raises(ValueError, match=r'does not take GptOssExperts: its experts have biases.*Use "grouped_mm"'):
        model(torch.zeros(1, 3, dtype=torch.int64))


# Of configurations, under the names that families have for them.
TINY = {
    "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 16, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2,
}  # fmt: skip
NUM_TOKENS, WIDTH, CHOSEN = 21, 32, 2


def families() -> list[str]:
    """Of the installed transformers, those whose experts can be another implementation."""
    folder = Path(transformers.__file__).parent / "models"
    return sorted(
        path.parent.name for path in folder.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    )  # fmt: skip


def expert_classes(family: str) -> list[type[nn.Module]]:
    found = []
    for path in (Path(transformers.__file__).parent / "models" / family).glob("modeling_*.py"):
        module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
        found += [
            value for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "_apply_gate")
        ]  # fmt: skip
    return found


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    for name, size in TINY.items():
        if hasattr(config, name):
            now = getattr(config, name)
            setattr(config, name, [size] * len(now) if isinstance(now, list) else size)
    config._experts_implementation = "eager"
    return config


def configurations(family: str) -> Iterator[PretrainedConfig]:
    """What a family has as a default; of layers that differ, one layer's."""
    for path in (Path(transformers.__file__).parent / "models" / family).glob("configuration_*.py"):
        module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, PretrainedConfig) and value.__module__ == module.__name__:
                config = value()
                yield config.per_layer_config[-1] if config.is_heterogeneous else config


def tiny_experts(family: str, experts_class: type[nn.Module]) -> nn.Module:
    """With the first configuration of the family that has what they ask for."""
    reasons = []
    for config in configurations(family):
        try:
            takes_width = "intermediate_size" in inspect.signature(experts_class).parameters
            experts = experts_class(shrink(config), *([16] if takes_width else []))
        except (AttributeError, TypeError) as error:  # a vision tower's, say
            reasons.append(f"{type(config).__name__}: {error}")
            continue
        generator = torch.Generator().manual_seed(0)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        return experts
    raise AssertionError(f"no configuration of {family} makes {experts_class.__name__}: {reasons}")


def experts_run(
    experts: nn.Module, implementation: str, dtype: torch.dtype, hidden_dtype: torch.dtype, autocast: bool
) -> list[torch.Tensor]:
    """Output, and the gradients of hidden, weights and parameters, of the same numbers whatever the dtypes."""
    experts = copy.deepcopy(experts).to(dtype)
    experts.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(1)
    width = experts.down_proj.shape[1]
    hidden = torch.randn(NUM_TOKENS, width, generator=generator).bfloat16().to(hidden_dtype).requires_grad_()
    ids = torch.rand(NUM_TOKENS, experts.down_proj.shape[0], generator=generator).argsort(1)[:, :CHOSEN]
    weights = torch.rand(NUM_TOKENS, CHOSEN, generator=generator).bfloat16()
    weights = weights.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = experts(hidden, ids, weights)
    assert out.dtype == hidden_dtype
    leaves = [hidden, weights, *experts.parameters()]
    return [
        out.detach(),
        *torch.autograd.grad(out.float().square().sum() if dtype != torch.float64 else out.square().sum(), leaves),
    ]


FEW = ("deepseek_v3", "qwen3_moe", "mixtral", "lfm2_moe", "olmoe")
# Of parameters, of the hidden states, and whether under autocast to bf16.
PRECISIONS = {
    "fp64": (FP64, FP64, False), "fp32": (FP32, FP32, False), "bf16": (BF16, BF16, False),
    "bf16-after-fp32-norm": (BF16, FP32, False), "autocast": (FP32, FP32, True),
    "autocast-bf16-experts": (BF16, FP32, True), "autocast-bf16-hidden": (FP32, BF16, True),
}  # fmt: skip


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in families()]
)
def test_experts_of_every_family(family: str) -> None:
    """Those that are taken: as near to fp64 as one of transformers' own."""
    hf.register()
    classes = expert_classes(family)
    assert classes
    for experts_class in classes:
        experts = tiny_experts(family, experts_class)
        if obstacles := hf._obstacles(experts):
            assert family not in FEW, obstacles
            continue
        experts = experts.to(BF16).to(FP32)  # all precisions see the same numbers
        exact = experts_run(experts, "eager", *PRECISIONS["fp64"])
        for name, (dtype, hidden_dtype, autocast) in PRECISIONS.items():
            # eager takes no fp32 hidden states with bf16 weights, grouped_mm no fp64, and it does not follow autocast.
            peer = "grouped_mm" if dtype == BF16 else "eager"
            plain = experts_run(experts, peer, dtype, hidden_dtype, autocast)
            got = experts_run(experts, "r1fast", dtype, hidden_dtype, autocast)
            for g, p, e in zip(got, plain, exact, strict=True):
                assert g.dtype == p.dtype, name
                assert_as_exact(g, p, e, 3, f"{experts_class.__name__}, {name}")


def test_what_an_activation_does_counts() -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.silu(x)

    assert all(
        hf._is_silu(act) for act in (nn.functional.silu, nn.SiLU(), Named(), nn.SiLU(inplace=True), torch.ops.aten.silu)
    )
    others = (
        nn.functional.gelu,
        nn.GELU(),
        nn.functional.relu,
        nn.functional.mish,
        lambda x: x * (1.702 * x).sigmoid(),
    )
    assert not any(hf._is_silu(act) for act in others)
