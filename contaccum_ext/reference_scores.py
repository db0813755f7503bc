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
        shape = (capacity, capacity, columns.shape[1])
        # By place. `ahead` is what columns have that head has yet to come to.
        self._scores, self._ahead = torch.zeros(2, *shape, dtype=torch.float64)
        self._own = torch.zeros(capacity, dtype=torch.float64)  # of a row with its positive
        now = self._now(places, queries, columns)
        self._scores, self._ahead = now, now.clone()
        self._own[places] = now[places, places, 0]

    def _now(self, places: Tensor, queries: Tensor, columns: Tensor) -> Tensor:
        """(C, C, m) inner products of the vectors as they are; 0 where there is no slot."""
        now = torch.zeros(self._capacity, self._capacity, columns.shape[1], dtype=torch.float64)
        scores = torch.einsum("id,jmd->ijm", queries.double(), columns.double())
        now[places[:, None], places] = scores
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

        before, after = head, (head + count) % capacity
        current, offset = divmod(after, block)
        following = (current + 1) % self._layout.blocks(capacity)
        passed, left = offset // group, -(-offset // group)  # whole groups behind head and ahead
        done = before % block // group
        crossed = before // block != current
        if crossed:
            from_next = (before // block + 1) % self._layout.blocks(capacity) == current
            for k in range(left, self._layout.groups()):
                columns_of = self._group(current, k)
                known = from_next and k < done
                self._scores[:, columns_of] = (self._ahead if known else now)[:, columns_of]
        for k in range(0 if crossed else done, passed):
            columns_of = self._group(following, k)
            self._ahead[:, columns_of] = now[:, columns_of]
        if passed != left:
            columns_of = slice(after, self._group(current, passed).stop)
            self._scores[:, columns_of] = now[:, columns_of]
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
