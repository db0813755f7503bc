"""How stale a bank is, by age: measured truths, and cheap signs that need no re-encoding.

Ages are in updates. Kinds of vectors: queries, and passages (positives and hard negatives, each
compared with their own, then averaged).

    residual_*     truth: mean |vector as the loss sees it - re-encoded now| over a sample of slots,
                   relative to the spread of this update's vectors (root mean squared distance
                   from their mean); at age 0 it is what dropout does
    systematic_*   truth: the norm of the mean residual, on the same scale
    score_gap      cheap: mean score of fresh queries with banked passages of that age, less that
                   with the update's own passages, in standard deviations of the latter
    score_spread   cheap: standard deviation of the former relative to that of the latter
    hardness       cheap: log of the mean exponential of scores with banked passages of that age,
                   less that with the update's own other passages, mean over fresh queries: above
                   0 old negatives are found harder than fresh ones
    mass           cheap: softmax mass of banked columns of that age relative to a uniform share of
                   the banked columns' mass: above 1 they are found harder than the bank's average
    shift_*        cheap: norm of the difference of the raw update means, now and then, on the
                   same scale

A line also has `window`, the slots that the loss used, as a number of updates.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from benchmarks.drift.corrections import Context
from benchmarks.drift.loss import BankView

AGES = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_SAMPLE = 64  # slots of an age
_NAMES = (
    "residual_query",
    "residual_passage",
    "systematic_query",
    "systematic_passage",
    "shift_query",
    "shift_passage",
    "score_gap",
    "score_spread",
    "hardness",
    "mass",
)


class Staleness:
    """Keeps the means of all updates and measures on demand.

    Args:
        context: of the run.
        updates: in the whole run.
        scale: of the scores.
    """

    def __init__(self, context: Context, updates: int, scale: float) -> None:
        self.context, self.scale = context, scale
        _, m, d = context.history.passages.shape
        self.means = torch.zeros(updates, 1 + m, d, device=context.device)

    def record(self, update: int, queries: Tensor, passages: Tensor) -> None:
        """Called in every update with its (K, n, d) and (K, n, m, d), before any measuring."""
        vectors = torch.cat([queries[:, :, None], passages], 2)
        self.means[update] = vectors.flatten(0, 1).mean(0)

    def measure(self, update: int, queries: Tensor, passages: Tensor, view: BankView) -> dict:
        """One line of the trace: lists by age, for the ages present in the bank.

        Args:
            update: counted from 0.
            queries: (K, n, d), detached.
            passages: (K, n, m, d), detached.
            view: of the update's loss; measured as its last micro-batch sees it.
        """
        history = self.context.history
        size = history.update_size
        oldest = history.view(update).start // size
        ages = [age for age in AGES if update - age >= oldest]
        k, n = queries.shape[:2]
        fresh = torch.cat([queries[:, :, None], passages], 2).flatten(0, 1)  # (Kn, 1 + m, d)
        samples = [self._sample(update, age, n) for age in ages]
        encoded = self.context.encode_slots(np.concatenate(samples))
        truth = torch.cat([encoded[0][:, None], encoded[1]], 1).split([len(x) for x in samples])
        by_age = [
            self._at_age(update, age, fresh, view, (sample, true))
            for age, sample, true in zip(ages, samples, truth, strict=True)
        ]
        mass = self._mass(update, fresh[:, 0], view, ages, k, n)
        table = torch.stack([torch.cat([a, b]) for a, b in zip(by_age, mass, strict=True)])
        values = {
            name: [round(x, 5) for x in column]
            for name, column in zip(_NAMES, table.T.tolist(), strict=True)
        }
        slots = len(view.queries) - n
        if view.absent is not None:
            slots -= int(view.absent[:slots].sum())
        return {"update": update, "ages": ages, **values, "window": slots / size}

    def _sample(self, update: int, age: int, n: int) -> np.ndarray:
        """Some slots of that age. Of the update's own the last micro-batch sees all but its own."""
        history = self.context.history
        first = (update - age) * history.update_size
        stop = min(first + history.update_size, history.view(update).stop - n)
        slots = np.arange(max(first, history.view(update).start), stop)
        return slots[:: max(1, len(slots) // _SAMPLE)][:_SAMPLE]

    def _at_age(
        self,
        update: int,
        age: int,
        fresh: Tensor,
        view: BankView,
        sample: tuple[np.ndarray, Tensor],
    ) -> Tensor:
        history, (slots, truth) = self.context.history, sample
        offset, m = history.view(update).start, fresh.shape[1] - 1
        where = torch.from_numpy(slots - offset).to(self.context.device)
        seen = view.seen(where, -1)  # (S, 1 + m, d)
        residual = seen - truth
        spread = _spread(fresh)
        away = residual.norm(dim=-1).mean(0) / spread
        systematic = residual.mean(0).norm(dim=-1) / spread
        shift = (self.means[update] - self.means[update - age]).norm(dim=-1) / spread

        own = torch.eye(len(fresh), device=fresh.device).bool().repeat_interleave(m, 1)
        others = self.scale * fresh[:, 0] @ fresh[:, 1:].flatten(0, 1).T  # (Kn, Kn m)
        banked = self.scale * fresh[:, 0] @ seen[:, 1:].flatten(0, 1).T
        same = torch.zeros_like(banked, dtype=torch.bool)
        if age == 0:  # a query's own passages are among them
            number = where - (history.view(update).stop - history.update_size - offset)
            rows = torch.arange(len(fresh), device=fresh.device)[:, None]
            same = (rows == number).repeat_interleave(m, 1)
        gap = (banked[~same].mean() - others[~own].mean()) / others[~own].std()
        ratio = banked[~same].std() / others[~own].std()
        harder = _log_mean_exp(banked, same) - _log_mean_exp(others, own)
        kinds = [x for v in (away, systematic, shift) for x in (v[0], v[1:].mean())]
        return torch.stack([*kinds, gap, ratio, harder])

    def _mass(
        self, update: int, queries: Tensor, view: BankView, ages: list[int], k: int, n: int
    ) -> Tensor:
        """(ages, 1), over the last micro-batch's queries and all slots but its own."""
        slots = self.context.history.view(update)
        banked = slice(0, slots.stop - slots.start - n)
        passages = view.seen(banked, k - 1)[:, 1:]
        scores = self.scale * torch.einsum("nd,jmd->njm", queries[-n:], passages)
        if view.bias is not None:
            scores = scores + view.bias[banked, None]
        share = scores.flatten(1).softmax(1).view_as(scores).sum(2).mean(0)  # (slots,)
        number = torch.arange(slots.start, slots.stop - n, device=queries.device)
        age = update - number // self.context.history.update_size
        chosen = age[:, None] == torch.tensor(ages, device=queries.device)  # (slots, ages)
        counts = chosen.sum(0)
        return (share @ chosen.to(share) / counts * len(age))[:, None]


def _spread(vectors: Tensor) -> Tensor:
    """(kinds,) root mean squared distance from the mean, of (S, kinds, d)."""
    return (vectors - vectors.mean(0)).square().sum(-1).mean(0).sqrt()


def _log_mean_exp(scores: Tensor, without: Tensor) -> Tensor:
    """() mean over rows; `without` marks entries that do not count."""
    count = (~without).sum(1).log()
    return (scores.masked_fill(without, -math.inf).logsumexp(1) - count).mean()
