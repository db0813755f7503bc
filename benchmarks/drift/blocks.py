"""Means that a block of slots shares, as a bank of the library stores them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.drift.corrections import History


class BlockMeans:
    """Of the running means at which a block's slots were enqueued: the average, so far.

    The capacity is a multiple of the block, so slot t is in block t // block on every lap of the
    ring. What is older in the block being overwritten keeps the average of its own lap.

    Args:
        history: of the run.
        block: slots, a multiple of n.

    Raises:
        ValueError: the block is none of n, or does not divide the capacity.
    """

    def __init__(self, history: History, block: int) -> None:
        if block < 1 or block % history.n or history.capacity % block:
            raise ValueError(
                f"block: expected a multiple of n = {history.n} dividing the capacity "
                f"{history.capacity}, got {block}"
            )
        self.n = history.n
        self.per = block // history.n  # micro-batches of a block
        examples, m, d = history.passages.shape
        whole = -(-examples // block) * self.per
        # (micro-batches, 1 + m, d): the mean at which each was enqueued, or was last moved to
        self.then = history.passages.new_zeros(whole, 1 + m, d)

    def enqueue(self, slots: slice, means: Tensor) -> None:
        """(K, 1 + m, d): the running means at which the micro-batches of some slots come."""
        self.then[slots.start // self.n : slots.stop // self.n] = means

    def move(self, slots: slice, mean: Tensor) -> None:
        """Stored vectors have been moved to lie about one mean (1 + m, d)."""
        first = slots.start // self.n
        self.then[first - first % self.per : slots.stop // self.n] = mean

    def apart(self, slots: slice) -> Tensor:
        """(slots, 1 + m, d): their own mean less their block's when none are written after them."""
        first, stop = slots.start // self.n, slots.stop // self.n
        begin, end = first - first % self.per, stop + -stop % self.per
        counts = stop - torch.arange(begin, end, self.per, device=self.then.device)
        sums = self.then[begin:end].unflatten(0, (len(counts), self.per)).sum(1)
        average = sums / counts.clamp(max=self.per)[:, None, None]
        own = average.repeat_interleave(self.per, 0)[first - begin : stop - begin]
        return (self.then[first:stop] - own).repeat_interleave(self.n, 0)

    def seen(self, slots: slice, own: int, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How an update's micro-batches see banked vectors.

        Args:
            slots: in view.
            own: the first of them that the update itself enqueues.
            shift: (K, 1 + m, d), the running mean of each micro-batch.

        Returns:
            (slots, 1 + m, d) to add to what a vector is beyond its own mean; (K, 1 + B, 1 + m, d)
            shifts, the first for blocks that are full, the others for the B that the update writes
            to; (slots,) int64, which of these.
        """
        first, begin, end = own // self.n, slots.start // self.n, slots.stop // self.n
        changing = first - first % self.per  # from here on averages change within the update
        device = self.then.device
        written = self.then[changing:end]
        total = torch.nn.functional.pad(written.double().cumsum(0), (0, 0, 0, 0, 1, 0))
        starts = torch.arange(0, len(written), self.per, device=device)
        before = torch.arange(first - changing, end - changing, device=device)[:, None]
        counts = (before - starts).clamp(0, self.per)  # (K, B) micro-batches there by then
        sums = total[starts + counts] - total[starts]
        average = (sums / counts.clamp(min=1)[..., None, None]).to(shift)
        shifts = torch.cat([shift[:, None], shift[:, None] - average], 1)
        place = torch.arange(begin, end, device=device) - changing
        which = place.div(self.per, rounding_mode="floor").clamp(min=-1) + 1
        added = torch.cat(
            [
                self.apart(slice(slots.start, changing * self.n)),
                written.repeat_interleave(self.n, 0),
            ]
        )
        return added, shifts, which.repeat_interleave(self.n)
