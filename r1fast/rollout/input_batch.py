"""What a step needs of each row, in buffers that stay where they are: a CUDA graph holds their addresses.

    position       0 1 2 3 4 5 6 7
                   a b c d e . . .      .  a padding row
    b, d leave     a c e . . . . .      the others move up, in order
    f enters       a c e f . . . .
                   |<----- 6 ---->      what a graph of 6 rows steps, whoever is there

A padding row is one that has stopped, on its first position: it changes nothing of itself but its last token, writes
its key to `spare_block`, which no sequence has, and its output where every stopped row does, behind the end of a line.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_WIDTH = 16  # blocks, a span of decode_attention


class RowState(NamedTuple):
    """As InputBatch has it, a number each; int64."""

    line: int = 0  # of the output buffers
    key: int = 0  # of the noise
    next: int = 1  # position in the sequence of the token sampled next
    last: int = 0  # the last position that is fed
    num_sampled: int = 0
    live: int = 0  # 1, and 0 once it has stopped
    id: int = 0  # the token sampled last


class RowViews(NamedTuple):
    """Views of some rows, a tensor for each field of RowState; what is written to them is written to the buffers."""

    line_B: Tensor
    key_B: Tensor
    next_B: Tensor
    last_B: Tensor
    num_sampled_B: Tensor
    live_B: Tensor
    id_B: Tensor
    block_table_BN: Tensor


def width_of(num_blocks: int, table_width: int) -> int:
    """Columns of the block table that a step is given whose longest row has num_blocks: 16, 32, 64, .. and at last all.
    Few widths, for each has graphs of its own; on a GPU attention starts programs for every column of every row."""
    return min(max(LEAST_WIDTH, 1 << (num_blocks - 1).bit_length()), table_width)


class InputBatch:
    def __init__(self, max_rows: int, table_width: int, spare_block: int, device: torch.device) -> None:
        self.padding_X1 = torch.tensor(RowState(), device=device)[:, None]
        self.spare_block = spare_block
        self.state_XR = self.padding_X1.repeat(1, max_rows)
        self.block_table_RN = torch.full((max_rows, table_width), spare_block, dtype=torch.int32, device=device)

    def span(self, start: int, stop: int, width: int | None = None) -> RowViews:
        return RowViews._make((*self.state_XR[:, start:stop].unbind(), self.block_table_RN[start:stop, :width]))

    def put(self, start: int, rows: Sequence[RowState], block_tables: Sequence[list[int]]) -> RowViews:
        """New rows, from position `start` on."""
        span = slice(start, start + len(rows))
        self.state_XR[:, span] = torch.tensor(rows, dtype=torch.int64).T.to(self.state_XR.device)
        self.block_table_RN[span] = torch.tensor(block_tables, dtype=torch.int32).to(self.block_table_RN.device)
        return self.span(span.start, span.stop)

    def add_blocks(self, grown: Sequence[tuple[int, int, list[int]]]) -> None:
        """(position, how many blocks the row had, those that it gets)."""
        places = [(row, had + i, block) for row, had, blocks in grown for i, block in enumerate(blocks)]
        if places:
            rows, columns, blocks = torch.tensor(places, device=self.block_table_RN.device).unbind(1)
            self.block_table_RN[rows, columns] = blocks.int()

    def keep(self, positions: Sequence[int], num_rows: int) -> None:
        """Of the first `num_rows` rows those at `positions`, which ascend."""
        kept = torch.tensor(positions, dtype=torch.int64, device=self.state_XR.device)
        gone = slice(len(positions), num_rows)
        self.state_XR[:, : len(positions)] = self.state_XR[:, kept]
        self.block_table_RN[: len(positions)] = self.block_table_RN[kept]
        self.state_XR[:, gone] = self.padding_X1
        self.block_table_RN[gone] = self.spare_block
