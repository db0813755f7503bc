"""What is done when a bank is too stale whatever the correction: a smaller window, or less pull."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.drift.corrections import Context, Correction, Mean
from benchmarks.drift.data import upload
from benchmarks.drift.loss import BankView
from benchmarks.drift.transport import Displacement, Transport, TransportMean

_AGES = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # at which a guard looks, in updates
_NARROW = 4  # updates
_SMOOTH = 0.8  # decay of what a guard has seen, per update


class Guard(Correction):
    """A correction within a window that shrinks as the bank goes stale, and grows again.

    Slots older than the window stay in the bank; they are neither rows nor columns of the loss.
    The window ends at the age where the staleness, interpolated between the ages looked at,
    reaches `limit`. All on the device: nothing waits.

    Args:
        context: of the run.
        limit: of the staleness, relative to the spread of the vectors.
        measure: "residual": re-encodes `sample` slots of each age looked at and takes the root
            mean square of what the correction left, without what dropout does (age 0);
            "shift": the distance between the means of updates, without their sampling error;
            "scores": how far the distribution of fresh queries' scores with banked passages is
            from that with the update's own other passages: the root of the squares of
            the means' difference in standard deviations and of the deviations' log ratio.
        sample: slots of an age that "residual" re-encodes, and "scores" scores, in an update.
        correction: within the window, by name.
        options: of the correction.
    """

    def __init__(
        self,
        context: Context,
        limit: float,
        measure: str = "residual",
        sample: int = 4,
        correction: str = "mean",
        options: dict[str, Any] | None = None,
    ) -> None:
        from benchmarks.drift.methods import make

        super().__init__(context)
        measures = {"residual": self._residual, "shift": self._shift, "scores": self._scores}
        if measure not in measures:
            raise ValueError(f"measure: expected one of {tuple(measures)}, got {measure!r}")
        self.limit, self.measure, self.sample = limit, measures[measure], sample
        self.inner = make(correction, context, options or {})
        self.seen = torch.zeros(len(_AGES), 2, device=context.device)
        self.weight = torch.zeros(len(_AGES), 1, device=context.device)  # of the running average
        self.means: list[Tensor] = []

    def gradients(self, update: int, queries: Tensor, passages: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.gradients(update, queries, passages)

    def before_step(self, update: int) -> None:
        self.inner.before_step(update)

    def after_step(self, update: int) -> None:
        self.inner.after_step(update)

    def after_encode(self, update: int, queries: Tensor, passages: Tensor) -> None:
        self.inner.after_encode(update, queries, passages)
        self.fresh = torch.cat([queries[:, :, None], passages], 2).flatten(0, 1)
        self.means.append(self.fresh.mean(0))
        self.spread = (self.fresh - self.means[-1]).square().sum(-1).mean(0)  # (1 + m,), squared

    def before_loss(self, update: int) -> BankView:
        view = self.inner.before_loss(update)
        slots, size = self.history.view(update), self.history.update_size
        present = [age for age in _AGES if update - age >= slots.start // size]
        now = self.measure(update, view, present)  # (ages, 2)
        number = len(present)
        self.seen[:number] = _SMOOTH * self.seen[:number] + (1 - _SMOOTH) * now
        self.weight[:number] = _SMOOTH * self.weight[:number] + (1 - _SMOOTH)
        average = self.seen[:number] / self.weight[:number]
        # Squares come with the noise that age 0 has too; differences of scores have none to speak
        # of once they are averaged.
        signed = self.measure == self._scores
        stale = average.norm(dim=1) if signed else (average - average[0]).sum(1).clamp(min=0).sqrt()
        # Where a measure is not a number the model is lost: the smallest window is right.
        stale = stale.nan_to_num(nan=torch.inf).cummax(0).values
        ages = torch.tensor(present, device=stale.device, dtype=stale.dtype)
        within = ((stale <= self.limit).sum(0, True) - 1).clamp(min=0)  # the last fresh enough
        after = (within + 1).clamp(max=number - 1)
        share = (self.limit - stale.gather(0, within)) / (
            stale.gather(0, after) - stale.gather(0, within)
        )
        between = ages.gather(0, after) - ages.gather(0, within)
        window = ages.gather(0, within) + between * share.nan_to_num().clamp(0, 1)
        window = window.masked_fill(after == within, torch.inf)  # (1,) updates
        position = torch.arange(slots.start, slots.stop, device=stale.device)
        return replace(view, absent=update - position // size > window)

    def _residual(self, update: int, view: BankView, ages: list[int]) -> Tensor:
        slots = self._slots(update, ages)
        queries, passages = self.context.encode_slots(slots)
        truth = torch.cat([queries[:, None], passages], 1)
        away = self._view_of(slots, update, view) - truth
        relative = (away.square().sum(-1) / self.spread).unflatten(0, (len(ages), -1))
        return _squares(relative.mean((1, 2)))

    def _shift(self, update: int, view: BankView, ages: list[int]) -> Tensor:
        then = torch.stack([self.means[update - age] for age in ages])
        moved = (self.means[update] - then).square().sum(-1) / self.spread  # (ages, 1 + m)
        noise = torch.tensor([0.0] + [2 / len(self.fresh)] * (len(ages) - 1), device=moved.device)
        return _squares(moved.mean(1) - noise)

    def _scores(self, update: int, view: BankView, ages: list[int]) -> Tensor:
        queries, m = self.fresh[:, 0], self.fresh.shape[1] - 1
        others = queries @ self.fresh[:, 1:].flatten(0, 1).T  # (K n, K n m)
        own = torch.eye(len(others), device=others.device).repeat_interleave(m, 1)
        weight = (1 - own) / (1 - own).sum()
        mean = (weight * others).sum()
        deviation = (weight * (others - mean).square()).sum().sqrt()
        seen = self._view_of(self._slots(update, ages), update, view)[:, 1:]
        banked = (queries @ seen.flatten(0, 1).T).unflatten(1, (len(ages), -1))
        gap = (banked.mean((0, 2)) - mean) / deviation
        return torch.stack([gap, (banked.transpose(0, 1).flatten(1).std(1) / deviation).log()], 1)

    def _slots(self, update: int, ages: list[int]) -> np.ndarray:
        """(ages sample,) slots, others in every update."""
        size, slots = self.history.update_size, self.history.view(update)
        picks = (np.arange(self.sample) * size // self.sample + update * 7) % size
        chosen = np.concatenate([(update - age) * size + picks for age in ages])
        return chosen.clip(slots.start, slots.stop - 1)

    def _view_of(self, slots: np.ndarray, update: int, view: BankView) -> Tensor:
        """(slots, 1 + m, d) as the last micro-batch sees them."""
        return view.seen(upload(slots - self.history.view(update).start, self.context.device), -1)


def _squares(values: Tensor) -> Tensor:
    """(ages, 2) whose sum is the (ages,) values."""
    return torch.stack([values, torch.zeros_like(values)], 1)


class Trust:
    """How stale each update's slots are: the errors of the maps that they have been through add up.

    An error is that of predicting each probe from the others (`Displacement.error`), the larger of
    both sides. A slot beyond the limit takes no part any more; what is not older than `floor`
    updates always does.

    Args:
        context: of the run.
        limit: of the sum, in spreads of the probes.
        floor: 1 keeps the last update and this one, as a bank of one update does in part.
        ramp: share of the training during which the window grows evenly from `floor` updates to the
            whole bank, whatever its errors; 0: it is whole from the beginning.
        narrow: share of the training after which no more than four updates of slots take part.
    """

    def __init__(
        self,
        context: Context,
        limit: float,
        floor: int,
        ramp: float = 0.0,
        narrow: float = 1.0,
    ) -> None:
        self.history, self.limit, self.floor = context.history, limit, floor
        updates = len(self.history.queries) // self.history.update_size + 1
        self.stale = torch.zeros(updates, device=context.device)  # by update of enqueueing
        self.grown = ramp * (updates - 1)  # the update at which the window is whole
        self.narrowed = narrow * (updates - 1)

    def add(self, update: int, errors: list[Tensor]) -> None:
        """Those of both sides' maps after an update's step."""
        self.stale[: update + 1] += torch.stack(errors).max().to(self.stale)

    def absent(self, update: int) -> Tensor:
        """(slots in view,) bool."""
        slots = self.history.view(update)
        position = torch.arange(slots.start, slots.stop, device=self.stale.device)
        written = position // self.history.update_size
        # Not >: where an error is not a number the model is lost, and the smallest window right.
        beyond = ~(self.stale[written] <= self.limit)
        if update < self.grown:
            whole = self.history.capacity / self.history.update_size
            beyond |= written < update - whole * update / self.grown
        if update >= self.narrowed:
            beyond |= position < slots.stop - (1 + _NARROW) * self.history.update_size
        return beyond & (written < update - self.floor)


class Follow(Transport):
    """Transport within the window of slots that may be trusted (`Trust`).

    Args:
        context: of the run.
        limit: see `Trust`.
        choose: do nothing, shift, or map, whichever predicts probes best.
        floor: see `Trust`.
        options: of `Transport`, linear.
    """

    def __init__(
        self,
        context: Context,
        limit: float,
        choose: bool = False,
        floor: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(context, **options)
        self.trust, self.chooses = Trust(context, limit, floor), choose

    def before_loss(self, update: int) -> BankView:
        return replace(super().before_loss(update), absent=self.trust.absent(update))

    def fields(self, update: int) -> list[Displacement]:
        found = super().fields(update)
        errors = [field.choose() if self.chooses else field.error for field in found]
        self.trust.add(update, errors)
        return found


class FollowMean(TransportMean):
    """`TransportMean` within the window of slots that may be trusted (`Trust`).

    Args:
        context: of the run.
        limit: see `Trust`.
        floor: see `Trust`.
        ramp: see `Trust`.
        narrow: see `Trust`.
        discount: 1 lets all banked negatives together count as much as one update's, 0 each as one:
            their logits are lowered by `discount` times the log of their number of updates.
        options: of `TransportMean`.
    """

    def __init__(
        self,
        context: Context,
        limit: float,
        floor: int = 1,
        ramp: float = 0.0,
        narrow: float = 1.0,
        discount: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(context, **options)
        self.trust, self.discount = Trust(context, limit, floor, ramp, narrow), discount

    def before_loss(self, update: int) -> BankView:
        absent = self.trust.absent(update)
        view = replace(super().before_loss(update), absent=absent)
        if not self.discount:
            return view
        updates = (~absent).sum() / self.history.update_size - 1  # beside the update's own
        bias = -self.discount * updates.clamp(min=1).log()
        return replace(view, bias=bias.expand(len(absent)))

    def turn(self, update: int, fields: list[Displacement]) -> None:
        self.trust.add(update, [field.error for field in fields])
        super().turn(update, fields)


class Project(Mean):
    """Takes the direction of the drift out of the gradient; banked vectors stay as they were.

    The direction is from the mean of the bank's vectors to that of the update's, for queries and
    each kind of passage, and it is the embeddings' gradients that lose it.
    """

    def before_loss(self, update: int) -> BankView:
        return Correction.before_loss(self, update)

    def gradients(self, update: int, queries: Tensor, passages: Tensor) -> tuple[Tensor, Tensor]:
        bank, view = self.history.bank(update), self.history.view(update)
        if not bank:
            return queries, passages
        old, new = slice(bank.start, bank.stop), slice(bank.stop, view.stop)
        found = []
        for gradient, vectors in (
            (queries, self.history.queries),
            (passages, self.history.passages),
        ):
            direction = vectors[new].mean(0) - vectors[old].mean(0)  # (d) or (m, d)
            direction = torch.nn.functional.normalize(direction, dim=-1)
            along = (gradient * direction).sum(-1, keepdim=True)
            found.append(gradient - along * direction)
        return found[0], found[1]
