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
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

FAMILIES = {
    "deepseek_v3": {
        **_MLA, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "rope_parameters": _YARN, "attention_bias": True,
    },
    "deepseek_v3-plain-q-tied": {
        **_MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False,
        "tie_word_embeddings": True, "n_shared_experts": 2, "routed_scaling_factor": 1.0,
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
    return AutoConfig.for_model(**zoo.fields(name.split("-")[0], **_COMMON, **FAMILIES[name]))


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
