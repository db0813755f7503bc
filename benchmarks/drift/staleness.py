"""How stale a bank is, by age: measured truths, and cheap signs that need no re-encoding.

Ages are in updates. Kinds of vectors: queries, and passages (positives and hard negatives, each
compared with their own, then averaged).

    residual_*     truth: mean |vector as the loss sees it - re-encoded now| over a sample of slots,
                   relative to the spread of this update's vectors (root mean squared distance
                   from their mean); at age 0 it is what dropout does
    systematic_*   truth: the norm of the mean residual, on the same scale
    score_gap      cheap: mean score of fresh queries with banked passages of that age, less that
                   with the update's own passages, in standard deviations of the latter
    mass           cheap: softmax mass of banked columns of that age relative to a uniform share of
                   the banked columns' mass: above 1 they are found harder than the bank's average
    shift_*        cheap: norm of the difference of the raw update means, now and then, on the
                   same scale
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.drift.corrections import Context
from benchmarks.drift.loss import BankView

AGES = (0, 1, 2, 4, 8, 16, 32)
_SAMPLE = 64  # slots of an age


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
        by_age = [self._at_age(update, age, fresh, view, k, n) for age in ages]
        mass = self._mass(update, fresh[:, 0], view, ages, k, n)
        table = torch.stack([torch.cat([a, b]) for a, b in zip(by_age, mass, strict=True)])
        names = ("residual_query", "residual_passage", "systematic_query", "systematic_passage",
                 "shift_query", "shift_passage", "score_gap", "mass")  # fmt: skip
        values = {
            name: [round(x, 5) for x in column]
            for name, column in zip(names, table.T.tolist(), strict=True)
        }
        return {"update": update, "ages": ages, **values}

    def _at_age(
        self, update: int, age: int, fresh: Tensor, view: BankView, k: int, n: int
    ) -> Tensor:
        history = self.context.history
        first = (update - age) * history.update_size
        # Of the update's own slots the last micro-batch sees all but its own.
        stop = min(first + history.update_size, history.view(update).stop - n)
        slots = np.arange(max(first, history.view(update).start), stop)
        slots = slots[:: max(1, len(slots) // _SAMPLE)][:_SAMPLE]
        offset = history.view(update).start
        where = torch.from_numpy(slots - offset).to(self.context.device)
        seen = view.seen(where, k - 1)  # (S, 1 + m, d)
        queries, passages = self.context.encode_slots(slots)
        truth = torch.cat([queries[:, None], passages], 1)
        residual = seen - truth
        spread = _spread(fresh)
        away = residual.norm(dim=-1).mean(0) / spread
        systematic = residual.mean(0).norm(dim=-1) / spread
        shift = (self.means[update] - self.means[update - age]).norm(dim=-1) / spread
        scores = self.scale * fresh[:, 0] @ fresh[:, 1:].flatten(0, 1).T  # (Kn, Kn m)
        own = torch.eye(len(fresh), device=fresh.device).bool().repeat_interleave(
            fresh.shape[1] - 1, 1
        )  # fmt: skip
        others = scores[~own]
        banked = self.scale * fresh[:, 0] @ seen[:, 1:].flatten(0, 1).T
        if age == 0:  # a query's own passages are among them
            same = torch.arange(len(fresh), device=fresh.device)[:, None]
            number = where - (history.view(update).stop - history.update_size - offset)
            banked = banked[(same != number).repeat_interleave(fresh.shape[1] - 1, 1)]
        gap = (banked.mean() - others.mean()) / others.std()
        kinds = [x for v in (away, systematic, shift) for x in (v[0], v[1:].mean())]
        return torch.stack([*kinds, gap])

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
