"""Signs that a model has begun to tell old vectors from new ones, and what to say then.

The sign is in the scores. With s_new those of the newest queries with each other's passages, and
s_old those of the same queries with the oldest passages in use, as the loss sees them::

    gap    = (mean(s_old) - mean(s_new)) / std(s_new)
    spread = std(s_old) / std(s_new)
    size   = sqrt(gap ** 2 + log(spread) ** 2)

Source: docs/drift.md, "Which sign tells harm": of all signs that were compared it goes with harm
best. Of runs that stayed below 0.3 next to none was harmed, of those above 0.5 three in four.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from contaccum_ext.bank import DualMemoryBank

SAMPLE = 64  # queries, and slots of either age
WARNING = 0.5
LOOKS = 3  # in a row, before anything is said
EVERY = 10  # updates between looks where nobody asks for more: each takes less than a millisecond
_NARROW_UPDATES = 2  # a window of so many has lost what a bank is for


@dataclass(frozen=True)
class ScoreShift:
    """How scores with old passages are distributed, beside those with new ones."""

    gap: float  # of the means, in standard deviations of the new
    spread: float  # ratio of the standard deviations

    @property
    def size(self) -> float:
        """Of both together: 0 where old and new cannot be told apart."""
        return math.hypot(self.gap, math.log(self.spread))


@torch.no_grad()
def score_shift(bank: DualMemoryBank, update_size: int) -> ScoreShift | None:
    """Compare the oldest slots in use with those of the last update (reads the device).

    A query's own passages, and all with the id of its positive, are left out. The newest banked
    queries stand for the batch: they are what it was, when nothing has been moved since.

    Args:
        bank: as it is when an update has been enqueued.
        update_size: slots that an update fills; at most 64 of each end are looked at.

    Returns:
        None where the bank is too small to have two ends, or one end's scores are all the same.
    """
    count = min(SAMPLE, update_size)
    in_use = bank.slots()[len(bank) - bank.used :]
    if count < 2 or len(in_use) < 2 * count:
        return None
    new, old = in_use[-count:], in_use[:count]
    kind = torch.promote_types(bank.dtype, torch.float32)
    queries = bank.bank_queries[new].to(kind)
    fresh = bank.bank_passages[new].to(kind)  # (count, m, d)
    aged = bank.bank_passages[old].to(kind) + bank.offsets(old)[:, 1:]
    own = bank.bank_ids[new, 0]
    scores = []
    for passages, slots in ((fresh, new), (aged, old)):
        ids = bank.bank_ids[slots].flatten()
        same = (own[:, None] == ids) & (ids != -1)
        same |= (new[:, None] == slots).repeat_interleave(bank.passages_per_query, 1)
        scores.append((queries @ passages.flatten(0, 1).T)[~same])
    if min(map(len, scores)) < 2:
        return None
    table = torch.stack([torch.stack([s.mean(), s.std()]) for s in scores]).tolist()
    (mean_new, std_new), (mean_old, std_old) = table
    if not (std_new > 0 and std_old > 0 and math.isfinite(mean_old - mean_new)):
        return None
    return ScoreShift((mean_old - mean_new) / std_new, std_old / std_new)


class DriftWatch:
    """Says in words what looks at a bank have shown: once a run, and again after it is resumed."""

    def __init__(self) -> None:
        self._above = 0  # looks in a row
        self._said: set[str] = set()

    def scores(self, shift: ScoreShift | None, drift: str) -> list[str]:
        """What to say of a look.

        Args:
            shift: None where it could not be told; then looks begin to be counted anew.
            drift: the correction in use: "none", "mean" or "transport".
        """
        self._above = self._above + 1 if shift is not None and shift.size > WARNING else 0
        if shift is None or self._above < LOOKS:
            return []
        other = {"none": ", or set drift=auto", "mean": ", or set drift=transport"}
        return self._once(
            "scores",
            f"{LOOKS} looks in a row have found old banked passages scored unlike new ones (gap "
            f"{shift.gap:+.2f} standard deviations, spread {shift.spread:.2f} times; together "
            f"{shift.size:.2f}, above {WARNING} most runs were harmed): the model learns to tell "
            f"old vectors from new ones; lower learning_rate or bank_size{other.get(drift, '')}",
        )

    def window(self, bank: DualMemoryBank, within_limit: int | None, update_size: int) -> list[str]:
        """What to say of a window that the staleness of slots has set.

        Args:
            bank: whose window it is.
            within_limit: newest slots that are not too stale; None where nothing has been left out.
            update_size: slots that an update fills.
        """
        filled, used = len(bank), bank.used
        narrow = within_limit is not None and within_limit <= _NARROW_UPDATES * update_size
        if not narrow or used == filled:
            return []
        return self._once(
            "window",
            f"bank_size {bank.capacity} is more than the model's speed allows: older slots cannot "
            f"be followed within drift_limit, and only the newest {used} of {filled} are used; "
            f"lower learning_rate or bank_size",
        )

    def _once(self, what: str, message: str) -> list[str]:
        if what in self._said:
            return []
        self._said.add(what)
        return [message]
