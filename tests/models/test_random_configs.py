"""Any architecture that a recipe may name: refused at once, or saved so that transformers loads it and agrees."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from r1fast.models.decoder import Decoder
from r1fast.models.families import FAMILIES
from r1fast.models.model_config import ModelConfig
from r1fast.models.weights import load_model, save_model

IDS = torch.tensor([5, 6, 7, 30, 3, 9, 11, 2, 2, 17, 23, 29])
COMMON: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 20, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
CU_SEQLENS = torch.tensor([0, len(IDS)], dtype=torch.int32)


def random_rope(rng: random.Random) -> dict[str, Any]:
    original = rng.choice([8, 16])
    return rng.choice(
        [
            {"rope_theta": 100.0},
            {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "llama3", "factor": 4, "low_freq_factor": 1.0, "high_freq_factor": rng.choice([2, 4.0]),
             "original_max_position_embeddings": original},
            {"rope_type": "yarn", "factor": rng.choice([2.0, 8]), "original_max_position_embeddings": original,
             **rng.choice(
                 [{}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"attention_factor": 1.5}, {"truncate": False}]
             )},
        ]
    )  # fmt: skip


def random_architecture(family: str, rng: random.Random) -> dict[str, Any]:
    heads, fields = rng.choice([1, 2, 3, 4]), FAMILIES[family].fields
    values: dict[str, Any] = {
        "model_type": family,
        "vocab_size": rng.choice([31, 32, 40]),
        "hidden_size": rng.choice([12, 20, 24]),
        "intermediate_size": rng.choice([1, 20]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "initializer_range": 0.3,
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "tie_word_embeddings": rng.random() < 0.5,
        "bos_token_id": rng.choice([None, 1]),
        "eos_token_id": rng.choice([None, 2, [2, 3]]),
        "pad_token_id": rng.choice([None, 0, 31]),
        "rope_parameters": random_rope(rng),
    }
    if family in ("deepseek_v2", "deepseek_v3"):
        values |= {
            "q_lora_rank": rng.choice([None, 8]), "kv_lora_rank": 8, "qk_nope_head_dim": rng.choice([4, 6]),
            "qk_rope_head_dim": rng.choice([2, 4]), "v_head_dim": rng.choice([4, 6]),
            "n_shared_experts": rng.choice([0, 1, 2]),
            "first_k_dense_replace": rng.choice([0, 1, 3]), "routed_scaling_factor": rng.choice([1.0, 2.5]),
        }  # fmt: skip
    else:
        values |= {
            **({"head_dim": rng.choice([None, 4, 6])} if "head_dim" in fields else {}),
            "num_key_value_heads": rng.choice([None, *(n for n in (1, 2, 3) if heads % n == 0)]),
        }
    if family == "deepseek_v3":
        values |= {
            "rope_interleave": rng.random() < 0.5, "n_group": rng.choice([1, 2, 4]), "topk_group": rng.choice([1, 2]),
            "norm_topk_prob": rng.random() < 0.5,
        }  # fmt: skip
    if "decoder_sparse_step" in fields:
        values |= {
            "decoder_sparse_step": rng.choice([1, 2]), "mlp_only_layers": rng.choice([[], [0]]),
            "norm_topk_prob": rng.random() < 0.5,
        }  # fmt: skip
    if "n_routed_experts" in fields:
        values |= {"n_routed_experts": 8, "num_experts_per_tok": rng.choice([1, 3])}
        values["moe_intermediate_size" if "moe_intermediate_size" in fields else "intermediate_size"] = 4
    layers = values["num_hidden_layers"]
    own = {
        "sliding_window": rng.choice([1, 3, None]), "query_pre_attn_scalar": rng.choice([None, 3, 5]),
        "layer_types": [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)],
        "no_rope_layers": [rng.choice([0, 1]) for _ in range(layers)], "shared_expert_intermediate_size": 6,
        "attn_logit_softcapping": rng.choice([None, 0.5, 3]),
    }  # fmt: skip
    values |= {name: value for name, value in own.items() if name in fields}
    if FAMILIES[family].norms[3]:
        values["intermediate_size"] = 20  # the norm of one channel's sum is mostly rounding
    if FAMILIES[family].partial_rotary:
        values["rope_parameters"] = {"rope_theta": 100.0, "partial_rotary_factor": rng.choice([0.5, 1.0])}
    if rng.random() < 0.3:
        values["attention_bias"] = True
    if rng.random() < 0.2:
        values["mlp_bias"] = True
    return values


def check(family: str, seed: int, folder: Path) -> bool:
    """Whether the architecture was accepted."""
    rng = random.Random(f"{family},{seed}")
    values = random_architecture(family, rng)
    try:
        config = ModelConfig.from_dict(values)
    except ValueError:
        return False
    decoder = Decoder(config)
    decoder.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, tensor in decoder.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.rand(tensor.shape))
        expected_TV = decoder.eval()(IDS, CU_SEQLENS)
    save_model(config, decoder.state_dict(), folder)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    missing = [name for name in info["missing_keys"] if theirs.get_parameter(name).numel()]  # no shared experts: empty
    assert not (missing or info["unexpected_keys"] or info["mismatched_keys"]), (values, info)
    again, _ = load_model(folder)
    assert again.config == config
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval()(IDS[None]).logits[0], expected_TV, rtol=1e-4, atol=1e-4, msg=str(values)
        )
        assert torch.equal(again(IDS, CU_SEQLENS), expected_TV)
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_random_architectures(family: str, tmp_path: Path) -> None:
    accepted = [check(family, seed, tmp_path / str(seed)) for seed in range(12)]
    assert any(accepted)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_architectures(family: str, tmp_path: Path) -> None:
    accepted = [check(family, seed, tmp_path / str(seed)) for seed in range(100, 400)]
    assert any(accepted) and not all(accepted)


@pytest.mark.parametrize(
    "own",
    [{"num_attention_heads": 4, "head_dim": 10}, {"num_attention_heads": 3, "head_dim": 4}],
    ids=["10", "3-heads"],
)
def test_qwen2_with_a_head_dim_of_its_own(own: dict[str, int], tmp_path: Path) -> None:
    values = random_architecture("qwen2", random.Random(0)) | {"hidden_size": 20, "num_key_value_heads": 1} | own
    values.pop("mlp_bias", None), values.pop("attention_bias", None)
    decoder = Decoder(ModelConfig.from_dict(values))
    decoder.init_weights()
    save_model(decoder.config, decoder.state_dict(), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS[None]).logits[0], decoder(IDS, CU_SEQLENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"num_attention_heads": 3, "head_dim": 4}, "hidden_size=20, expected a multiple of num_attention"),
        ("qwen2", {"attention_bias": True}, "attention_bias does not apply to model_type 'qwen2'"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias does not apply to model_type 'qwen3'"),
        ("llama", {"n_routed_experts": 4}, "n_routed_experts does not apply to model_type 'llama'"),
        ("llama", {"pad_token_id": 32}, "pad_token_id=32, expected below vocab_size=32"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_parameters.factor=None, expected a number"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "rope_parameters.beta_fast=32"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic', expected one of default"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_could_not_be_loaded_again_is_refused(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(COMMON | {"model_type": family} | change)
