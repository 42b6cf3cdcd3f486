"""A whole training step of a small DeepSeek-V3-style model on packed tokens, against transformers' own model.

Forward, mean cross-entropy, backward, AdamW (fused): 4 layers, one of them dense, about 1M parameters. Sequences of one
length, so that transformers has nothing to pad. Each timed step follows another of the same model. Floor: products of 6
FLOPs for each active parameter and token. Models of full size: large.py.
"""

import tempfile
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config

from bench import harness, large
from bench.cases import Case
from bench.head import can_multiply
from r1fast.models.weights import load_model
from r1fast_kernels import linear_cross_entropy

CONFIG = DeepseekV3Config(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=1,
    topk_group=1, moe_intermediate_size=64, first_k_dense_replace=1, tie_word_embeddings=True,
)  # fmt: skip


def active_parameters(model: nn.Module) -> int:
    """Those that a token meets; of routed experts (stacked in transformers) as many as a token goes to."""
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    return sum(sizes.values()) - routed + routed * CONFIG.num_experts_per_tok // CONFIG.n_routed_experts


def step(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> Callable[[], harness.Outputs]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> harness.Outputs:
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [loss.detach()]

    return run


def test_train_step(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    if case.mode in large.MODELS:
        compare(large.train_problem(case))
        return
    N, L = case.sizes["N"], case.sizes["L"]
    dtype = harness.DTYPES[case.dtype]
    if not can_multiply(torch.empty(0, dtype=dtype, device=harness.DEVICE)):
        pytest.skip(f"torch has no fast {case.dtype} product on this CPU")
    device = harness.DEVICE
    ids_NL = torch.randint(CONFIG.vocab_size, (N, L), generator=harness.generator(), device=device)
    cu_seqlens = torch.arange(N + 1, dtype=torch.int32, device=device) * L
    targets_T = torch.cat([ids_NL[:, 1:], torch.full_like(ids_NL[:, :1], -100)], 1).flatten()
    torch.manual_seed(0)
    oracle = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)

    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder)
        ours = load_model(folder, dtype=dtype, device=device)[0].train()

        def theirs(implementation: str, dtype: torch.dtype) -> nn.Module:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=implementation)
            return model.to(device).train()

        models = {"eager": theirs("eager", dtype), "grouped_mm": theirs("grouped_mm", dtype)}
        if dtype != torch.float32:
            models["grouped_mm fp32"] = theirs("grouped_mm", torch.float32)

    def our_loss(model: nn.Module) -> Tensor:
        return model(
            ids_NL.flatten(), cu_seqlens,
            head=lambda hidden_TD, weight_VD: linear_cross_entropy(hidden_TD, weight_VD, targets_T),
        )  # fmt: skip

    def their_loss(model: nn.Module) -> Tensor:
        return model(ids_NL, labels=ids_NL, use_cache=False).loss

    with torch.no_grad():
        exact = their_loss(oracle.to(device))
    active = active_parameters(oracle)
    flops = 6.0 * active * N * L
    x_TD, weight_DD = torch.randn(N * L, 128, device=device), torch.randn(128, 128, device=device)
    floor = harness.Floor(
        f"6 FLOPs of {active:,} active parameters a token, in fp32 products", lambda: x_TD @ weight_DD,
        scale=flops / (2.0 * N * L * 128 * 128), flops=flops,
    )  # fmt: skip
    compare(
        harness.Problem(
            case,
            {harness.OURS: step(ours, our_loss), **{name: step(model, their_loss) for name, model in models.items()}},
            floor=floor,
            check=harness.agrees_with([exact], 1e-4 if case.dtype == "fp32" else 1e-2),
            repeated=True,
        )
    )
