"""Key-value cache of generation: preallocated rows, one sequence each.

GQA layers keep keys and values [rows, K, S, d]. MLA layers keep one latent per token, [rows, S, kv_lora + rope]: the
normed compressed kv beside the rotated shared key. For DeepSeek-V3 that is 576 values per token and layer, not 40,960.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from r1fast.models.attention import AttentionPlan
from r1fast.models.config import ModelConfig


@dataclass(frozen=True)
class DecodeStep:
    """What every layer of one decode step shares."""

    rows_B: Tensor
    positions_B: Tensor  # where the new token is written
    span: int  # slots attended over: the longest row, the new token included
    mask_B1S: Tensor  # additive, -inf past each row's own length


class KVCache:
    """num_rows sequences of at most max_len tokens; `lengths` int64 [rows] on the device.

    Slots never written are zero: attention multiplies them by probability 0, and 0 * NaN would not be 0.
    """

    def __init__(
        self, config: ModelConfig, num_rows: int, max_len: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        self.config, self.num_rows, self.max_len, self.dtype = config, num_rows, max_len, dtype
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.max_length = 0  # of lengths, known without asking the device
        shapes: list[tuple[int, ...]]
        if config.uses_mla:
            shapes = [(num_rows, max_len, config.kv_lora_rank + config.qk_rope_head_dim)]
        else:
            shapes = [(num_rows, config.kv_heads, max_len, config.attention_head_dim)] * 2
        # Per layer (latent,) or (keys, values); the sequence dimension is the last but one in all of them.
        self.layers = [
            tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
            for _ in range(config.num_hidden_layers)
        ]

    def write_packed(self, layer_idx: int, plan: AttentionPlan, *packed_T: Tensor) -> None:
        """Prefill: the tokens of sequence n go to row n. packed_T: the layer's (latent [T, C],) or (k, v) [T, K, d]."""
        for buffer, values in zip(self.layers[layer_idx], packed_T, strict=True):
            buffer.transpose(1, -2)[plan.rows_T, plan.positions_T] = values.to(self.dtype)

    def finish_prefill(self, plan: AttentionPlan) -> None:
        self.lengths[: plan.num_sequences] = plan.lengths_cpu_N.to(self.lengths.device)
        self.max_length = max(self.max_length, plan.max_length)

    def check_prefill(self, plan: AttentionPlan) -> None:
        if plan.num_sequences > self.num_rows or plan.max_length > self.max_len:
            raise ValueError(
                f"prefill of {plan.num_sequences} sequences up to {plan.max_length} tokens into a cache of "
                f"{self.num_rows} rows of {self.max_len}; make the cache larger"
            )

    def begin_step(self, positions_B: Tensor) -> DecodeStep:
        """Room for one more token per row. positions_B: the place of that token, at most the row's length."""
        if len(positions_B) != self.num_rows:
            raise ValueError(f"decode got {len(positions_B)} positions for {self.num_rows} cache rows; give one each")
        if self.max_length >= self.max_len:
            raise ValueError(f"the cache is full: {self.max_length} of {self.max_len} tokens; make max_len larger")
        span = self.max_length + 1
        slots_S = torch.arange(span, device=positions_B.device)
        hidden_B1S = slots_S > positions_B[:, None, None]
        mask_B1S = torch.zeros(hidden_B1S.shape, dtype=self.dtype, device=positions_B.device)
        rows_B = torch.arange(self.num_rows, device=positions_B.device)
        return DecodeStep(rows_B, positions_B, span, mask_B1S.masked_fill_(hidden_B1S, -torch.inf))

    def append(self, layer_idx: int, step: DecodeStep, *new_B: Tensor) -> tuple[Tensor, ...]:
        """Write the step's token, (latent [B, C],) or (k, v) [B, K, d]; returns views of the first `span` slots."""
        buffers = self.layers[layer_idx]
        for buffer, values in zip(buffers, new_B, strict=True):
            buffer.transpose(1, -2)[step.rows_B, step.positions_B] = values.to(self.dtype)
        return tuple(buffer.narrow(-2, 0, step.span) for buffer in buffers)

    def finish_step(self, step: DecodeStep) -> None:
        self.lengths = step.positions_B + 1
        self.max_length = step.span

    def select(self, index_R: Tensor) -> "KVCache":
        """A new cache whose row r is this one's row index_R[r]: fan-out to samples, compaction. Room stays max_len."""
        chosen = KVCache.__new__(KVCache)
        chosen.config, chosen.max_len, chosen.dtype = self.config, self.max_len, self.dtype
        chosen.num_rows = len(index_R)
        chosen.lengths = self.lengths[index_R]
        chosen.max_length = int(chosen.lengths.max()) if chosen.num_rows else 0
        chosen.layers = [tuple(self._select_rows(buffer, index_R, chosen.max_length) for buffer in layer)
                         for layer in self.layers]  # fmt: skip
        return chosen

    def _select_rows(self, buffer: Tensor, index_R: Tensor, used: int) -> Tensor:
        out = buffer.new_zeros(len(index_R), *buffer.shape[1:])
        out.narrow(-2, 0, used).copy_(buffer.narrow(-2, 0, used)[index_R])
        return out
