"""Hugging Face checkpoint folders small enough to train in a test, written by transformers, and files beside them."""

import json
from pathlib import Path
from typing import Any

import yaml

TEXTS = [
    "What is 1 + 2 ? What is 3 * 4 ?",
    "<think> one and two make three </think> <answer> 3 </answer>",
    "red red red blue blue blue green green green yes yes yes no no no good good good bad bad bad",
    "the quick brown fox jumps over the lazy dog, and the lazy dog sleeps on",
]
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "initializer_range": 0.1,
}
PROMPTS = [{"prompt": f"What is {i} + {i} ?", "answer": str(2 * i)} for i in range(20)]
GRPO: dict[str, Any] = {
    "name": "zero",
    "kind": "grpo",
    "train_files": ["train.jsonl"],
    "num_generations": 2,
    "prompts_per_step": 2,
    "max_prompt_length": 40,
    "max_completion_length": 8,
    "max_steps": 1,
    "prompt_template": "chat",
}
SFT: dict[str, Any] = {"name": "tuned", "kind": "sft", "train_files": ["sft.jsonl"]}
PRETRAIN: dict[str, Any] = {
    "name": "base",
    "kind": "pretrain",
    "train_files": ["sft.jsonl"],
    "architecture": {key: value for key, value in QWEN2.items() if key != "initializer_range"},
    "max_steps": 1,
    "max_length": 128,
}


def write_checkpoint(folder: Path, *, seed: int = 0, with_tokenizer: bool = True, **fields: Any) -> Path:
    """A random model (QWEN2 unless `fields` say otherwise) with a byte-level tokenizer of 320 entries."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from r1fast.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(TEXTS, 320)
    values = {**(fields or QWEN2), "vocab_size": -(-len(tokenizer) // 8) * 8}
    values |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    if with_tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(path: Path, *stages: dict, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump({**sections, "stages": list(stages)}, sort_keys=False), encoding="utf-8")
    return path


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below root, with the bytes of files."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
