"""Bytes that a call of `generate` takes beside weights and cache, counted before any work, and by `--dry-run`.

outputs      tokens, log-probs and, where they are recorded, experts of each row: 12 bytes a token and 2 L K
logits       of a step (with min_tokens twice), and of the prompts whose samples wait
activations  what a layer has at work, of a prefill or of a step, the larger; on a GPU with a step's partial sums of
             attention (decode_attention_triton.py), as wide as the longest row may be; or, before the first step and
             behind the last, the largest joined weight a second time (fused_decode.py)
graphs       CUDA: what a step has at work a second time, as graphs keep it; partial sums twice, for a graph that is
             wider by half finds no room in what narrower ones kept

Layers are counted by the widths of what they make, none of it given back before the layer's half is through: more
than is at work at a time, and no less (a test compares with layers that are run). RESERVE of what is free is left for
what is not counted: workspaces of libraries, scratch of kernels, what an allocator has between tensors.
"""

from dataclasses import dataclass

import torch

from r1fast.models.model_config import ModelConfig
from r1fast.rollout.admission import num_blocks_of
from r1fast.rollout.fused_decode import stacked_bytes
from r1fast_kernels.decode_attention_triton import BLOCK, scratch_bytes

RESERVE = 0.05  # of the memory that is free
BACKGROUND_SHARE = 0.5  # of it, that generation may take beside a training step, where no budget is given
PART_ROWS = 256  # tokens of a sequence that go through a decode step together, where max_rows is less


@dataclass(frozen=True)
class Call:
    """Of `generate`, as far as it decides what is taken."""

    rows: int  # at a time
    prompts: int  # whose samples may wait
    prompt_tokens: int  # of all prompts
    max_num_batched_tokens: int  # of a prefill
    longest: int  # tokens of a sequence
    max_tokens: int
    has_graphs: bool
    bans_stops: bool = False  # min_tokens
    records: bool = False  # experts


def rows_of_part(max_rows: int, max_num_batched_tokens: int) -> int:
    """Tokens of a sequence that go through a decode step together: no more than the memory of a step is counted for."""
    return min(max_num_batched_tokens, max(max_rows, PART_ROWS))


def work_bytes(config: ModelConfig, dtype: torch.dtype, device: str, call: Call) -> dict[str, int]:
    """By the terms above. device: its type."""
    moe_layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    experts = 2 * moe_layers * config.num_experts_per_tok if call.records else 0
    row = config.vocab_size * dtype.itemsize
    part = max(call.rows, rows_of_part(call.rows, call.max_num_batched_tokens))
    width = config.kv_lora_rank if config.uses_mla else config.attention_head_dim
    whole = num_blocks_of(call.longest) * BLOCK
    sums, step = {}, {}
    for rows in (call.rows, part):
        heads = config.num_attention_heads, 1 if config.uses_mla else config.kv_heads
        sums[rows] = scratch_bytes(rows, *heads, width, whole) if device == "cuda" else 0
        step[rows] = activation_bytes(config, rows, dtype) + sums[rows]
    prefill = activation_bytes(config, min(call.prompt_tokens, call.max_num_batched_tokens), dtype)
    logits = call.rows * (1 + call.bans_stops) * row
    found = {
        "outputs": call.rows * (call.max_tokens + 1) * (12 + experts),
        "logits": logits + call.prompts * row,
        "activations": max(step[part], prefill, stacked_bytes(config, dtype) if device == "cuda" else 0),
    }
    if call.has_graphs:
        found["graphs"] = step[call.rows] + sums[call.rows] + logits
    return found


def activation_bytes(config: ModelConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """What a layer makes of so many tokens, of its larger half, with what goes into it and out."""
    halves = [_attention_width(config)]
    layers = range(config.num_hidden_layers)
    if not all(map(config.is_moe_layer, layers)):
        halves.append(3 * config.intermediate_size + config.hidden_size)
    if any(map(config.is_moe_layer, layers)):
        routed = config.num_experts_per_tok * (3 * config.expert_width + 2 * config.hidden_size)
        router = 16 * (config.n_routed_experts + config.num_experts_per_tok) // dtype.itemsize  # fp32 and int64
        halves.append(routed + router + 3 * config.shared_width + 2 * config.hidden_size)
    return num_tokens * dtype.itemsize * (max(halves) + 4 * config.hidden_size)


def _attention_width(config: ModelConfig) -> int:
    """Projections, rotated copies, result, its projection."""
    heads, kv_heads, width = config.num_attention_heads, config.kv_heads, config.attention_head_dim
    if not config.uses_mla:
        return 3 * heads * width + 4 * kv_heads * width + config.hidden_size
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    up = config.qk_nope_head_dim + config.v_head_dim
    expanded = heads * (5 * head + up) + 3 * latent
    absorbed = heads * (2 * head + 3 * latent + config.v_head_dim) + 2 * latent
    return max(expanded, absorbed) + (config.q_lora_rank or 0) * 2 + config.hidden_size
