"""The linear algorithm in plain PyTorch: what one can have without a kernel, written to be fast.

Banked x banked scores never change, so every banked row keeps log-sum-exps over blocks of W slots.
With ``c = head // W`` the block being overwritten:

- ``block_lse[b, i]`` over block b, for b != c;
- ``base[i]`` over all of them;
- ``fresh[i]`` over the columns of c written on this lap;
- ``old[k, i]`` over the columns of c from its k-th slot to its end, as they were on the last lap.

A row's log-sum-exp over the bank is then ``logaddexp(base, fresh, old[head - c W])``. A step scores
rows against the n*m local columns only. Once in W/n steps, when head enters the next block, the W*m
columns there are scored for `old` and the table is summed for `base`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.cases import TEMPERATURE, Case


class LinearTorch:
    """Bank and table. Batches of any size up to the capacity less one block."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        capacity, m, d = case.slots, case.m, case.d
        # Near sqrt(C): table and crossing are then both cheap.
        self.width = min(capacity, 1 << max(0, round(math.log2(capacity) / 2)))
        self.capacity, self.head, self.filled = capacity, 0, 0
        self.acc = torch.float64 if case.torch_dtype == torch.float64 else torch.float32
        self.queries = torch.zeros(capacity, d, dtype=case.torch_dtype, device=device)
        self.passages = torch.zeros(capacity, m, d, dtype=case.torch_dtype, device=device)
        blocks = -(-capacity // self.width)
        self.block_lse = self._nothing(blocks, capacity)
        self.old = self._nothing(self.width + 1, capacity)
        self.base, self.fresh, self.positive = self._nothing(3, capacity)

    def _nothing(self, *shape: int) -> Tensor:
        return torch.full(shape, -math.inf, dtype=self.acc, device=self.queries.device)

    def table_bytes(self) -> int:
        kept = (self.block_lse, self.old, self.base, self.fresh, self.positive)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def step(self, queries: Tensor, passages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, backward, enqueue; returns loss, dq and dp."""
        n, m, d = passages.shape
        used = self.filled
        banked_queries, banked_columns = self.queries[:used], self.passages[:used].view(-1, d)
        local_columns = passages.reshape(-1, d)
        # (banked, local) is the shape in which the library multiplies fastest by few local vectors.
        scaled_queries, scaled_columns = queries / TEMPERATURE, local_columns / TEMPERATURE
        local = (scaled_queries @ local_columns.T).to(self.acc)  # (n, nm)
        to_banked = (banked_columns @ scaled_queries.T).to(self.acc)  # (Fm, n)
        from_banked = (banked_queries @ scaled_columns.T).to(self.acc)  # (F, nm)
        targets = torch.arange(n, device=queries.device) * m
        loss = (local.logsumexp(1) - local.gather(1, targets[:, None])[:, 0]).sum()
        if used:
            lse = torch.logaddexp(local.logsumexp(1), to_banked.logsumexp(0))
            loss = (lse - local.gather(1, targets[:, None])[:, 0]).sum()
            banked_lse = torch.logaddexp(self.row_lse(), from_banked.logsumexp(1))
            loss = loss + (banked_lse - self.positive[:used]).sum()
        loss = loss / n
        d_queries, d_passages = torch.autograd.grad(loss, (queries, passages))
        with torch.no_grad():
            scores = (local.detach(), to_banked.detach(), from_banked.detach())
            self._enqueue(queries.detach(), passages.detach(), *scores)
        return loss.detach(), d_queries, d_passages

    def row_lse(self) -> Tensor:
        """(F,) each banked row's log-sum-exp over all banked columns."""
        used, offset = self.filled, self.head % self.width
        lse = torch.logaddexp(self.base[:used], self.fresh[:used])
        return torch.logaddexp(lse, self.old[offset, :used])

    @torch.no_grad()
    def fill(self, queries: Tensor, passages: Tensor) -> None:
        """Fill an empty bank to its end: every block's entries from one product of its own."""
        if self.filled or len(queries) != self.capacity:
            raise ValueError(
                f"queries: expected {self.capacity} for an empty bank, got {len(queries)}"
            )
        self.queries.copy_(queries)
        self.passages.copy_(passages)
        self.filled = self.capacity
        scaled, d = queries / TEMPERATURE, queries.shape[1]
        for block, columns in enumerate(passages.split(self.width)):
            scores = (columns.reshape(-1, d) @ scaled.T).to(self.acc)
            self.block_lse[block] = scores.logsumexp(0)
        self.positive.copy_((scaled * passages[:, 0]).sum(1))
        self._enter_block(0)

    def _enqueue(self, queries, passages, local, to_banked, from_banked) -> None:
        """Write the batch.

        Args:
            queries, passages: (n, d) and (n, m, d).
            local, to_banked, from_banked: (n, nm), (Fm, n) and (F, nm) scores; the last may be
                overwritten.
        """
        n, m, _ = passages.shape
        if n > self.capacity - self.width and self.filled:
            raise ValueError(f"n: expected at most {self.capacity - self.width}, got {n}")
        order = torch.arange(n, device=queries.device)
        slots = (self.head + order) % self.capacity
        new_filled = min(self.capacity, self.filled + n)
        # The new rows first, against the bank as it is: then columns change for all rows alike.
        self._enter_rows(slots, to_banked)
        self.positive[slots] = local[order, order * m]
        self.queries[slots] = queries
        by_row = from_banked
        if new_filled > self.filled:
            by_row = torch.cat(
                [from_banked, from_banked.new_empty(new_filled - self.filled, n * m)]
            )
        by_row[slots] = local
        self.filled = new_filled

        row = 0
        while row < n:
            block = self.head // self.width
            end = min((block + 1) * self.width, self.capacity)
            count = min(end - self.head, n - row)
            self.passages[self.head : self.head + count] = passages[row : row + count]
            added = by_row[:, row * m : (row + count) * m].logsumexp(1)
            self.fresh[:new_filled] = torch.logaddexp(self.fresh[:new_filled], added)
            self.head, row = self.head + count, row + count
            if self.head == end:
                self.block_lse[block] = self.fresh
                self._enter_block((block + 1) % len(self.block_lse))

    def _enter_rows(self, slots: Tensor, to_banked: Tensor) -> None:
        """Table entries of rows to be written at `slots`, over the columns banked now."""
        m, width, n = self.passages.shape[1], self.width, len(slots)
        block, offset = divmod(self.head, width)
        whole = to_banked.shape[0] // (width * m)
        entries = to_banked.new_full((len(self.block_lse), n), -math.inf)
        entries[:whole] = to_banked[: whole * width * m].view(whole, width * m, n).logsumexp(1)
        if whole * width * m < len(to_banked):  # a last short block, or one not yet full
            entries[whole] = to_banked[whole * width * m :].logsumexp(0)
        entries[block] = -math.inf
        self.block_lse[:, slots] = entries
        self.base[slots] = entries.logsumexp(0)
        current = to_banked[block * width * m : (block + 1) * width * m]
        self.fresh[slots] = current[: offset * m].logsumexp(0)
        self.old[:, slots] = -math.inf
        left = _sums_to_the_end(current[offset * m :].view(-1, m, n).logsumexp(1))
        self.old[offset : offset + len(left), slots] = left

    def _enter_block(self, block: int) -> None:
        """Head stands at the start of `block`: what its columns have been so far is now old."""
        used, width = self.filled, self.width
        self.head, rows = block * width, slice(0, used)
        columns = self.passages[self.head : min(self.head + width, used)]
        self.old[:, rows] = -math.inf
        if len(columns):
            scores = (columns.flatten(0, 1) / TEMPERATURE) @ self.queries[rows].T
            by_slot = scores.to(self.acc).view(len(columns), -1, used).logsumexp(1)
            self.old[: len(columns), rows] = _sums_to_the_end(by_slot)
        self.block_lse[block] = -math.inf
        self.fresh.fill_(-math.inf)
        self.base[rows] = self.block_lse[:, rows].logsumexp(0)


def _sums_to_the_end(lse: Tensor) -> Tensor:
    """out[k] = logsumexp(lse[k:]), along the first dimension (empty gives empty).

    Faster than logcumsumexp by far, exact while a column's entries lie within 87 of each other.
    """
    if not len(lse):
        return lse
    top = lse.amax(0)
    return lse.sub(top).exp_().flip(0).cumsum(0).flip(0).log_().add_(top)
