"""Random tiny checkpoints of every family, written by transformers: the oracle of the model tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from r1fast.models.decoder import Decoder
from r1fast.models.weights import load_model
from tests import zoo

_COMMON = {
    "vocab_size": 61,  # prime
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large, so that a wrong path shows in the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # transformers gives a padding row no gradient
}
_EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 24}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_mtp_layers": 0,
    **_EXPERTS,
}
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 1.0,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 3.0, 7.0], "original_max_position_embeddings": 40,  # one of the documents is longer
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# With every particular of the family; the zoo has the sizes.
FAMILIES = {
    "deepseek_v2": {
        **{name: value for name, value in _MLA.items() if name != "num_mtp_layers"}, "q_lora_rank": 24,
        "rope_parameters": _YARN, "attention_bias": True, "routed_scaling_factor": 2.5,
    },
    "deepseek_v3": {
        **_MLA, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "rope_parameters": _YARN, "attention_bias": True,
    },
    "deepseek_v3-plain-q-tied": {
        **_MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False,
        "tie_word_embeddings": True, "n_shared_experts": 2, "routed_scaling_factor": 1.0,
    },
    "gemma2": {
        "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 9, "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": None, "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    },
    "gemma3_text": {
        "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 9, "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
        },
    },
    "mistral": {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 9},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 9},
    "olmo2": {"num_key_value_heads": 2, "attention_bias": True, "rope_parameters": _YARN | {"mscale_all_dim": None}},
    "olmoe": {
        "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True,
        "attention_bias": True,
    },
    "phi3": {
        "num_key_value_heads": 2, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 40,
        "sliding_window": None,
    },
    "phi3-window": {"num_key_value_heads": 4, "sliding_window": 9, "tie_word_embeddings": True},
    "qwen2_moe": {
        **_EXPERTS, "num_key_value_heads": 2, "num_experts": 6, "norm_topk_prob": True, "mlp_only_layers": [0],
    },
    "smollm3": {
        "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3,
        "no_rope_layers": [1, 0, 1],
    },
    "llama": {"num_key_value_heads": 2, "rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True},
    "qwen2-tied": {
        "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
    },
    "qwen3": {"num_key_value_heads": 1, "head_dim": 10, "rope_parameters": _YARN | {"mscale_all_dim": None}},
    "qwen3_moe": {
        **_EXPERTS, "num_key_value_heads": 4, "head_dim": 12, "num_experts": 6, "norm_topk_prob": True,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe-unnormed": {
        **_EXPERTS, "num_key_value_heads": 2, "num_experts": 6, "norm_topk_prob": False, "mlp_only_layers": [0],
    },
}  # fmt: skip


@dataclass
class Checkpoint:
    name: str
    folder: Path
    oracle: PreTrainedModel  # transformers, fp32, eval

    def load(self) -> Decoder:
        return load_model(self.folder)[0]


def hf_config(name: str) -> PretrainedConfig:
    return AutoConfig.for_model(**zoo.fields(name.split("-")[0], **_COMMON | FAMILIES[name]))


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Norms off one, biases off zero, the router's too: else half of the parameters are not tested."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
            elif name.endswith(("bias", "e_score_correction_bias")):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            torch.manual_seed(0)
            oracle = AutoModelForCausalLM.from_config(hf_config(name), dtype=torch.float32).eval()
            randomise(oracle, torch.Generator().manual_seed(1))
            folder = tmp_path_factory.mktemp(name)
            oracle.save_pretrained(folder)
            made[name] = Checkpoint(name, folder, oracle)
        return made[name]

    return make


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    return make_checkpoint(request.param)


@pytest.fixture(scope="session")
def documents() -> list[torch.Tensor]:
    """Lengths: a prime, one token, two equal ones, one beyond the YaRN and llama3 pre-training lengths."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 61, (length,), generator=generator) for length in (13, 1, 7, 7, 70, 22)]


@pytest.fixture(scope="session")
def pack() -> Callable[[list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    def pack_documents(documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ends = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0)
        return torch.cat(documents), ends.to(torch.int32)

    return pack_documents
