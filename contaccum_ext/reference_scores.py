"""What scores among banked vectors are while the vectors are moved and the scores are not."""

from __future__ import annotations

import torch
from torch import Tensor

from contaccum_ext.layout import BankLayout


class LaggingScores:
    """A bank's scores among its own vectors, each as it was when it was last computed.

    That is when the younger of the two slots came, unless columns have been computed anew since,
    against every row, as the sums that the op keeps of them need it. With a batch head goes on in
    its block, or into another one:

    - groups that it has wholly passed: those at the same places of the next block. They count from
      when head enters that block.
    - once it has entered a block: what is ahead of it there and was not passed like that.
    - always: what is left of the group that head stands in.

    Where a batch leaves less than two blocks of older slots everything is computed anew.

    Slots are named by their places in the ring, (F,) int64, oldest first.

    Args:
        places: of the slots.
        queries: (F, d) floating, rows of the scores; oldest first.
        columns: (F, m, d) floating, the positive first.
        capacity: slots C.
        layout: of the bank.
    """

    def __init__(
        self, places: Tensor, queries: Tensor, columns: Tensor, capacity: int, layout: BankLayout
    ) -> None:
        self._capacity, self._layout = capacity, layout
        # By place, (C, C, m). `ahead` is what columns have that head has yet to come to.
        self._scores = self._now(places, queries, columns)
        self._ahead = self._scores.clone()
        self._own = self._scores[:, :, 0].diagonal().clone()  # (C,) of a row with its positive

    def _now(self, places: Tensor, queries: Tensor, columns: Tensor) -> Tensor:
        """(C, C, m) inner products of the vectors as they are; 0 where there is no slot."""
        now = torch.zeros(self._capacity, self._capacity, columns.shape[1], dtype=torch.float64)
        now[places[:, None], places] = torch.einsum(
            "id,jmd->ijm", queries.double(), columns.double()
        )
        return now

    def enqueued(
        self, head: int, count: int, places: Tensor, queries: Tensor, columns: Tensor
    ) -> bool:
        """Follow a batch; False if everything is computed anew.

        Args:
            head: where the batch began.
            count: its slots.
            places: (F,) int64 of all slots, the batch's last.
            queries: (F, d) floating, as they are now.
            columns: (F, m, d) floating.
        """
        capacity, block, group = self._capacity, self._layout.block, self._layout.group
        if min(count, capacity) > capacity - 2 * block:
            return False
        now, new = self._now(places, queries, columns), places[-count:]
        self._scores[new], self._ahead[new] = now[new], now[new]
        self._scores[:, new] = now[:, new]
        self._own[new] = now[new, new, 0]

        blocks, after = self._layout.blocks(capacity), (head + count) % capacity
        (left_block, was), (block_now, offset) = divmod(head, block), divmod(after, block)
        done, passed = was // group, offset // group  # groups wholly behind head, before and now
        first = -(-offset // group)  # the first one wholly ahead of it
        crossed = left_block != block_now
        if crossed:
            neighbour = (left_block + 1) % blocks == block_now
            for k in range(first, self._layout.groups()):
                at, known = self._group(block_now, k), neighbour and k < done
                self._scores[:, at] = (self._ahead if known else now)[:, at]
        for k in range(0 if crossed else done, passed):
            at = self._group((block_now + 1) % blocks, k)
            self._ahead[:, at] = now[:, at]
        if passed != first:
            at = slice(after, self._group(block_now, passed).stop)
            self._scores[:, at] = now[:, at]
        return True

    def _group(self, block: int, k: int) -> slice:
        """Places of group k of a block; it may be cut short, or empty, at the ring's end."""
        begin = block * self._layout.block
        end = min(begin + self._layout.block, self._capacity)
        first = begin + k * self._layout.group
        return slice(min(first, end), min(first + self._layout.group, end))

    def among(self, places: Tensor) -> Tensor:
        """(U, U, m) float64 inner products of slots at these places."""
        return self._scores[places[:, None], places]

    def own(self, places: Tensor) -> Tensor:
        """(U,) float64 inner products of queries and their positives."""
        return self._own[places]
