"""How far off moved vectors may be by now, slot by slot, and the window that follows from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contaccum_ext import validation
from contaccum_ext.bank import DualMemoryBank

REBUILD_PARTS = 32  # of a bank: its table is rebuilt when one of them has been written


class SlotStaleness:
    """Adds up the errors of the maps that each slot has been through; the window ends at a limit.

    Call `note_written` before the vectors of the bank are moved and `age` afterwards. What was
    written in between two moves has been through the same maps, and is kept as one number.

    How many slots are new is read off the bank. Its cursor alone does not tell a whole lap from
    nothing, nor what came after ``clear``; but the newest query of last time stands where it stood
    in all other cases, and in none of these.

    A rebuild of the bank's table takes O(F^2). It is due whenever a 32nd of the filled slots has
    been written since the last one, which makes it O(F) for each slot.

    Args:
        bank: moved by someone else, with `transport`.
        limit: staleness in use, in spreads of fresh vectors; None sets no window.

    Attributes:
        widest: newest slots that may be in use, however fresh the others are; None for all.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, bank: DualMemoryBank, limit: float | None = None) -> None:
        self.bank = bank
        self.limit = None if limit is None else validation.positive("limit", limit)
        self.widest: int | None = None
        self._newest: Tensor | None = None  # (d,) query before the head, None for an empty bank
        self._head = 0
        self._written: list[int] = []  # slots, by moves, the last first; never 0
        self._stale: list[float] = []  # theirs
        self._unscored = 0  # slots written since the table was rebuilt

    def note_written(self) -> None:
        """Take in the slots written since the last call, as fresh; before the bank is moved."""
        written = self._new_slots()
        if written:
            self._written.insert(0, written)
            self._stale.insert(0, 0.0)
            self._unscored += written
        while self._written and sum(self._written[:-1]) >= len(self.bank):
            self._written.pop()
            self._stale.pop()
        self._mark()

    def rebuild_due(self) -> bool:
        """Whether the table is to be rebuilt with the next move; after `note_written`."""
        return REBUILD_PARTS * self._unscored >= len(self.bank)

    def age(self, error: float, rebuilt: bool = True) -> None:
        """Note that all slots have been moved by a map with that error; set the window.

        What was written last stays in use however stale it is, and so does a whole block.

        Args:
            error: as `transport` returns it, in spreads of fresh vectors.
            rebuilt: the table follows.
        """
        if rebuilt:
            self._unscored = 0
        self._stale = [stale + error for stale in self._stale]
        self._mark()
        if self.limit is None and self.widest is None:
            return
        bank, most = self.bank, self.within_limit()
        if self.widest is not None:
            most = min(most or self.widest, self.widest)
        if most is None:
            bank.window = None
        else:
            least = self._written[0]
            bank.window = bank.layout.window_within(bank.capacity, self._head, most, least)

    def within_limit(self) -> int | None:
        """Newest slots that are within the limit, as of the last move; None if all of them are."""
        if self.limit is None or max(self._stale, default=0.0) <= self.limit:
            return None
        fresh = sum(w for w, s in zip(self._written, self._stale, strict=True) if s <= self.limit)
        return max(fresh, self._written[0])

    @property
    def staleness(self) -> float:
        """Of the oldest slot in use, in spreads of fresh vectors; 0 before the first move."""
        # The window is made of whole blocks, and what has been written since is in it too.
        left = self.bank.used - self._new_slots()
        oldest = 0.0
        for written, stale in zip(self._written, self._stale, strict=True):
            if left <= 0:
                break
            oldest, left = stale, left - written
        return oldest

    def _new_slots(self) -> int:
        bank, newest = self.bank, self._newest
        if newest is None:
            return len(bank)
        now = bank.bank_queries[self._head - 1]
        if not torch.equal(now, newest.to(now)):
            return len(bank)
        return (int(bank.cursor[0]) - self._head) % bank.capacity

    def _mark(self) -> None:
        self._head = int(self.bank.cursor[0])
        filled = len(self.bank) > 0
        self._newest = self.bank.bank_queries[self._head - 1].clone() if filled else None

    def state_dict(self) -> dict[str, Any]:
        """All that later windows depend on, beside the bank."""
        return {
            "newest": self._newest,
            "head": self._head,
            "written": self._written[:],
            "stale": self._stale[:],
            "unscored": self._unscored,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what ``state_dict`` gave; nothing for a bank that has never been moved."""
        self._newest, self._head = state.get("newest"), state.get("head", 0)
        self._written, self._stale = state.get("written", [])[:], state.get("stale", [])[:]
        self._unscored = state.get("unscored", 0)
