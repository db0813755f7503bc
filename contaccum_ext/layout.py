"""How the slots of a bank are grouped for the table of partial log-sum-exps and for the offsets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

ROW_STATES = 6  # rows of the row_state buffer: enum RowState in csrc/params.h
EXPECTED_STATES = 4  # the last rows of the expected buffer: enum ExpectedState in csrc/params.h


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, float32 for every narrower floating type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class BankLayout:
    """Slot counts: `group` divides `offset_block` divides `block`; the last of each may be short.

    Args:
        group: step in which the oldest block is aged out and the next one prepared.
        offset_block: slots that share one stored mean, hence one offset (drift correction).
        block: width W of the table of partial log-sum-exps, and granularity of the window.

    Raises:
        ValueError: one of them is less than 1 or does not divide the next.
    """

    group: int
    offset_block: int
    block: int

    def __post_init__(self) -> None:
        chain = (1, self.group, self.offset_block, self.block)
        if any(size < 1 or size % part for part, size in pairwise(chain)):
            raise ValueError(
                "layout: expected group >= 1 dividing offset_block dividing block, got "
                f"group={self.group}, offset_block={self.offset_block}, block={self.block}"
            )

    @staticmethod
    def default(capacity: int) -> BankLayout:
        """Balance the table's two parts, capacity / block and block / group entries a row.

        The group grows with the capacity so that both together stay a small fraction of a bank row:
        128 entries (512 bytes) at 32,768 slots, 256 at a million. An offset serves 64 slots, from
        8,192 slots on up to a 64th of the bank: little drift beside that over all of it, and no
        bank has more than 256 offsets.
        """
        group = 8 if capacity <= 1 << 16 else 16 if capacity <= 1 << 18 else 64
        block = max(group, math.isqrt(max(capacity, 1) * group))
        # Of an offset block: a power of two, at most half of a block, at least 128 in the bank.
        unit = 1 << max(6, min(block // 2, capacity // 128).bit_length() - 1)
        unit = group if block < 64 else unit
        block = -(-block // unit) * unit
        most = max(64, capacity // 64)
        parts = 1
        while block % (parts * unit) or block > parts * most:
            parts += 1
        return BankLayout(group, block // parts, block)

    def blocks(self, capacity: int) -> int:
        """Rows of the table."""
        return -(-capacity // self.block)

    def groups(self) -> int:
        """Groups in a whole block."""
        return self.block // self.group

    def offset_blocks(self, capacity: int) -> int:
        """Stored means, not counting the spare one of the block being overwritten."""
        return -(-capacity // self.offset_block)

    def mean_rows(self, capacity: int, slots: Tensor, head: Tensor) -> Tensor:
        """(S,) int64 rows of the means buffer that hold the stored means of slots.

        What head has yet to overwrite in its offset block is a lap older than the rest of it: its
        mean is in the last row.

        Args:
            capacity: slots C.
            slots: (S,) int64 ring positions.
            head: (scalar) int64 tensor, the next slot to be written.
        """
        block = slots // self.offset_block
        older = (slots >= head) & (block == head // self.offset_block)
        older &= head % self.offset_block != 0
        return torch.where(older, 1 + self.offset_blocks(capacity), 1 + block)

    def window_blocks(self, capacity: int, window: int | None) -> int:
        """Whole blocks in use besides the one being filled; -1 for all slots."""
        if window is None or window >= capacity:
            return -1
        whole = -(-window // self.block)
        return whole if whole < self.blocks(capacity) else -1

    def effective_window(self, capacity: int, head: int, window: int | None) -> int:
        """Newest slots in use when the next write goes to slot `head`."""
        whole = self.window_blocks(capacity, window)
        if whole < 0:
            return capacity
        current, count = head // self.block, head % self.block
        for age in range(1, whole + 1):
            b = (current - age) % self.blocks(capacity)
            count += min(self.block, capacity - b * self.block)
        return count

    def window_within(self, capacity: int, head: int, most: int, least: int) -> int | None:
        """The window that has `least` newest slots and, if blocks allow, no more than `most`.

        Args:
            capacity: slots of the bank.
            head: where the next write goes.
            most: slots that may be in use; one whole block always is.
            least: slots that must be, even where these are more.

        Returns:
            What to set as the bank's window; None for every slot.
        """
        current, count = head // self.block, head % self.block
        for age in range(1, self.blocks(capacity)):
            b = (current - age) % self.blocks(capacity)
            size = min(self.block, capacity - b * self.block)
            if age > 1 and count >= least and count + size > most:
                return (age - 1) * self.block
            count += size
        whole = (self.blocks(capacity) - 1) * self.block
        return whole if whole and most < capacity and count >= least else None

    def buffers(
        self, capacity: int, m: int, dim: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of a bank's buffers, in the order of the op's schema."""
        acc, index = accumulation_dtype(dtype), torch.int64
        return {
            "bank_queries": ((capacity, dim), dtype),
            "bank_passages": ((capacity, m, dim), dtype),
            "bank_ids": ((capacity, m), index),
            "cursor": ((2,), index),
            "block_lse": ((self.blocks(capacity), capacity), acc),
            "group_lse": ((self.groups(), capacity), acc),
            "row_state": ((ROW_STATES, capacity), acc),
            "means": ((2 + self.offset_blocks(capacity), 1 + m, dim), acc),
        }

    def expected_rows(self, capacity: int) -> int:
        """Rows of the table of expected scores: one for each log-sum-exp of the other table."""
        return self.blocks(capacity) + self.groups() + EXPECTED_STATES
