"""What can be done about banked vectors that older weights made.

A correction is a class with hooks; `run.Run` calls them in this order in every update:

    after_encode   the update's vectors are there and written to the history
    before_loss    returns the bank as the loss is to see it
    loss           of the update, then `gradients`
    before_step    gradients are there, the weights still those of this update
    after_step     the weights are new

To add one: a class here or beside, its name in `methods.py`, a line in `tables.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.drift.blocks import BlockMeans
from benchmarks.drift.centre import centred
from benchmarks.drift.data import Draws, upload
from benchmarks.drift.loss import BankView, Seen, update_loss


@dataclass
class History:
    """Every slot ever enqueued, by number: slot t is example t of the run."""

    queries: Tensor  # (examples, d)
    passages: Tensor  # (examples, m, d)
    n: int
    update_size: int
    capacity: int

    def bank(self, update: int) -> range:
        """The slots that are banked before an update."""
        end = update * self.update_size
        return range(max(0, end - self.capacity), end)

    def view(self, update: int) -> slice:
        """The same and the update's own."""
        bank = self.bank(update)
        return slice(bank.start, bank.stop + self.update_size)


@dataclass
class Context:
    """What a correction may use."""

    history: History
    draws: Draws
    # Training queries, and passages; with dropout or not; by other towers than those trained
    encode_queries: Callable[..., Tensor]
    encode_passages: Callable[..., Tensor]
    normalized: bool  # vectors have length 1
    seed: int
    device: torch.device
    towers: nn.Module | None = None  # those that are trained

    def encode_slots(self, slots: np.ndarray, dropout=False, *towers) -> tuple[Tensor, Tensor]:
        """(S, d) and (S, m, d)."""
        queries = self.encode_queries(self.draws.queries[slots], dropout, *towers)
        return queries, self.encode_passages(self.draws.passages[slots], dropout, *towers)


class Correction:
    """None: banked vectors stay what they were."""

    centre: str | None = None  # of CENTRES: over what gradients of columns sum to zero

    def __init__(self, context: Context) -> None:
        self.context = context
        self.history = context.history

    def after_encode(self, update: int, queries: Tensor, passages: Tensor) -> None:
        """queries: (K, n, d), passages: (K, n, m, d), detached."""

    def before_loss(self, update: int) -> BankView:
        queries, passages = self._now(update)
        return BankView(queries, passages, queries, passages)

    def loss(self, queries: Tensor, passages: Tensor, seen: Seen) -> Tensor:
        """() of an update; see `update_loss`."""
        return update_loss(queries, passages, seen)

    def gradients(self, update: int, queries: Tensor, passages: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the loss with respect to (K, n, d) and (K, n, m, d), as they are to be used."""
        return queries, passages if self.centre is None else centred(passages, self.centre)

    def before_step(self, update: int) -> None:
        pass

    def after_step(self, update: int) -> None:
        pass

    def _now(self, update: int) -> tuple[Tensor, Tensor]:
        slots = self.history.view(update)
        return self.history.queries[slots], self.history.passages[slots]


class Oracle(Correction):
    """The whole bank, re-encoded by the weights of the update.

    Args:
        context: of the run.
        dropout: re-encode with dropout, as the update's own vectors are.
    """

    def __init__(self, context: Context, dropout: bool = False) -> None:
        super().__init__(context)
        self.dropout = dropout

    def after_encode(self, update: int, queries: Tensor, passages: Tensor) -> None:
        bank = self.history.bank(update)
        if bank:
            slots = np.arange(bank.start, bank.stop)
            fresh_queries, fresh_passages = self.context.encode_slots(slots, self.dropout)
            self.history.queries[bank.start : bank.stop] = fresh_queries
            self.history.passages[bank.start : bank.stop] = fresh_passages


class Mean(Correction):
    """Shift by how far the running mean has come since the slot was enqueued.

    Queries, positives and hard negatives each have their own mean, an average over micro-batches
    that decays. Scores between banked vectors stay plain.

    Args:
        context: of the run.
        decay: of the running means, per micro-batch.
        current: a micro-batch is in the mean that its own loss sees, not only in the next one's.
        block: slots that share the average of their means (`BlockMeans`); None: a micro-batch's.
    """

    moved_among_themselves = False

    def __init__(
        self,
        context: Context,
        decay: float = 0.9,
        current: bool = False,
        block: int | None = None,
    ) -> None:
        super().__init__(context)
        self.decay, self.current = decay, current
        self.blocks = None if block is None else BlockMeans(self.history, block)
        self.means: Tensor | None = None  # (K + 1, 1 + m, d): before and after each micro-batch
        self.centred = stacked(self.history).zero_()  # (examples, 1 + m, d): vector less its mean

    def after_encode(self, update: int, queries: Tensor, passages: Tensor) -> None:
        batches = torch.cat([queries[:, :, None], passages], 2).mean(1)  # (K, 1 + m, d)
        self.means = running(self.means, batches, self.decay)
        own = slice(self.history.bank(update).stop, self.history.view(update).stop)
        at_enqueue = self.means[1:].repeat_interleave(self.history.n, 0)
        self.centred[own] = stacked(self.history, own) - at_enqueue
        if self.blocks:
            self.blocks.enqueue(own, self.means[1:])

    def before_loss(self, update: int) -> BankView:
        assert self.means is not None
        slots = self.history.view(update)
        moved = self.centred[slots]
        frozen = moved + self.means[0] if self.moved_among_themselves else None
        queries, passages = self._now(update)
        shift, part = self.means[1:] if self.current else self.means[:-1], None
        if self.blocks:
            added, shift, part = self.blocks.seen(slots, self.history.bank(update).stop, shift)
            moved = moved + added
        return BankView(
            moved[:, 0],
            moved[:, 1:].contiguous(),
            queries if frozen is None else frozen[:, 0],
            passages if frozen is None else frozen[:, 1:],
            shift=shift,
            part=part,
        )


class MeanAll(Mean):
    """As Mean, and scores between banked vectors by the correction of the update's beginning."""

    moved_among_themselves = True


class Moments(Correction):
    """Match mean and standard deviation of each dimension (adaptive cross-batch normalisation).

    Args:
        context: of the run.
        decay: of the running moments, per micro-batch.
    """

    def __init__(self, context: Context, decay: float = 0.9) -> None:
        super().__init__(context)
        self.decay = decay
        self.moments: Tensor | None = None  # (K + 1, 2, 1 + m, d): means of v and of v squared
        self.standard = stacked(self.history).zero_()  # (examples, 1 + m, d): mean 0, deviation 1

    def after_encode(self, update: int, queries: Tensor, passages: Tensor) -> None:
        vectors = torch.cat([queries[:, :, None], passages], 2)
        batches = torch.stack([vectors.mean(1), vectors.square().mean(1)], 1)
        self.moments = running(self.moments, batches, self.decay)
        own = slice(self.history.bank(update).stop, self.history.view(update).stop)
        gain, shift = (x[1:].repeat_interleave(self.history.n, 0) for x in self._affine())
        self.standard[own] = (stacked(self.history, own) - shift) / gain

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Standard deviations and means, (K + 1, 1 + m, d) each."""
        assert self.moments is not None
        mean, square = self.moments.unbind(1)
        return (square - mean.square()).clamp(min=1e-10).sqrt(), mean

    def before_loss(self, update: int) -> BankView:
        gain, shift = self._affine()
        standard = self.standard[self.history.view(update)]
        frozen = standard * gain[0] + shift[0]
        passages = standard[:, 1:].contiguous()
        return BankView(
            standard[:, 0], passages, frozen[:, 0], frozen[:, 1:], shift[:-1], gain[:-1]
        )


class Age(Mean):
    """As Mean; a banked negative's logit is lowered by `beta` for every update of its age.

    That is a weight exp(-beta age) in the softmax. Targets of banked rows keep their scores.
    """

    def __init__(self, context: Context, beta: float, decay: float = 0.9) -> None:
        super().__init__(context, decay)
        self.beta = beta

    def before_loss(self, update: int) -> BankView:
        view = super().before_loss(update)
        slots = self.history.view(update)
        numbers = torch.arange(slots.start, slots.stop, device=self.context.device)
        age = update - numbers // self.history.update_size
        return BankView(**vars(view) | {"bias": -self.beta * age})


class Refresh(Mean):
    """As Mean; `count` slots a micro-batch, those encoded longest ago, are encoded anew.

    All of an update's are done at its beginning, since its weights do not change.
    """

    def __init__(self, context: Context, count: int, decay: float = 0.9) -> None:
        super().__init__(context, decay)
        self.count = count * (self.history.update_size // self.history.n)
        self.encoded = np.arange(len(self.history.queries)) // self.history.update_size

    def after_encode(self, update: int, queries: Tensor, passages: Tensor) -> None:
        super().after_encode(update, queries, passages)
        bank = self.history.bank(update)
        if not bank:
            return
        oldest = np.argsort(self.encoded[bank.start : bank.stop], kind="stable")[: self.count]
        slots = oldest + bank.start
        self.encoded[slots] = update
        fresh_queries, fresh_passages = self.context.encode_slots(slots)
        index = upload(slots, self.context.device)
        self.history.queries[index] = fresh_queries
        self.history.passages[index] = fresh_passages
        assert self.means is not None
        fresh = torch.cat([fresh_queries[:, None], fresh_passages], 1)
        self.centred[index] = fresh - self.means[-1]


def running(before: Tensor | None, batches: Tensor, decay: float) -> Tensor:
    """Decaying averages before and after each of K batches.

    Args:
        before: (K + 1, ...) of the previous update, whose last one is gone on from; None at the
            very first batch, which counts in full.
        batches: (K, ...).
        decay: weight of the past.

    Returns:
        (K + 1, ...).
    """
    k = len(batches)
    start = batches[:1] if before is None else before[-1:]
    values = torch.cat([start, batches]).flatten(1).double()
    row = torch.arange(k + 1, device=batches.device)[:, None]
    exponent = (row - row.T).clamp(min=0).double()
    weights = torch.where(row >= row.T, (1 - decay) * decay**exponent, 0)
    weights[:, 0] = decay ** row[:, 0].double()
    return (weights @ values).to(batches.dtype).reshape(k + 1, *batches.shape[1:])


def stacked(history: History, slots: slice = slice(None)) -> Tensor:
    """(slots, 1 + m, d): query and passages together, a copy."""
    return torch.cat([history.queries[slots, None], history.passages[slots]], 1)
