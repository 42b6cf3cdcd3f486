"""Rotary frequencies against transformers for every scaling; the rotation and its gradient."""

import pytest
import torch
from transformers import AutoConfig, DeepseekV3ForCausalLM, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from r1fast.models.model_config import ModelConfig
from r1fast.models.rope import Rope, rope_frequencies, softmax_scale

YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 2},
    "yarn-untruncated": YARN | {"truncate": False, "attention_factor": 1.5},
}  # fmt: skip
DIMS = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_equal_transformers(scaling: dict[str, object]) -> None:
    hf = AutoConfig.for_model("llama", **DIMS, rope_parameters={"rope_theta": 500000.0, **scaling})
    got, factor = rope_frequencies(ModelConfig.from_hf(hf))
    if scaling["rope_type"] == "default":
        expected, expected_factor = LlamaForCausalLM(hf).model.rotary_emb.compute_default_rope_parameters(hf)
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](hf)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_softmax_scale_equals_transformers(scaling: dict[str, object]) -> None:
    dims = {"kv_lora_rank": 4, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 4, "q_lora_rank": None}
    experts = {"n_routed_experts": 8, "moe_intermediate_size": 4, "num_mtp_layers": 0}
    rope = {"rope_theta": 10000.0, **scaling}
    hf = AutoConfig.for_model("deepseek_v3", **DIMS, **dims, **experts, rope_parameters=rope)
    attention = DeepseekV3ForCausalLM(hf).model.layers[0].self_attn
    assert softmax_scale(ModelConfig.from_hf(hf)) == pytest.approx(attention.scaling)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dim", [6, 10], ids=["whole-head", "tail-only"])
def test_rotation_is_complex_product(dim: int, interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    rope = Rope(angles.cos(), angles.sin(), interleaved)
    tail = x.detach()[..., dim - 6 :]
    x1, x2 = (tail[..., 0::2], tail[..., 1::2]) if interleaved else tail.chunk(2, dim=-1)
    expected = torch.complex(x1, x2) * torch.polar(torch.ones_like(angles), angles)[:, None]
    out = rope.rotate(x)
    torch.testing.assert_close(out[..., dim - 6 :], torch.cat((expected.real, expected.imag), dim=-1))
    assert torch.equal(out[..., : dim - 6], x[..., : dim - 6])
    assert torch.autograd.gradcheck(rope.rotate, x)
