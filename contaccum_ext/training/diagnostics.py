"""What a look at one micro-batch and the banks tells of a run."""

from __future__ import annotations

import math
import resource
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from contaccum_ext.bank import DualMemoryBank


class BankAges:
    """Which update each slot of a bank comes from, told by how many slots each update filled.

    Args:
        capacity: slots of the bank.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: deque[list[int]] = deque()  # [update, slots], oldest first

    def enqueue(self, update: int, slots: int) -> None:
        """Note that `update` filled so many slots more; the oldest fall out."""
        if self._entries and self._entries[-1][0] == update:
            self._entries[-1][1] += slots
        else:
            self._entries.append([update, slots])
        surplus = sum(count for _, count in self._entries) - self.capacity
        while surplus > 0:
            dropped = min(surplus, self._entries[0][1])
            self._entries[0][1] -= dropped
            surplus -= dropped
            if not self._entries[0][1]:
                self._entries.popleft()

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def oldest(self, update: int) -> int | None:
        """Age of the oldest slot in updates, as seen from `update`; None for an empty bank."""
        return update - self._entries[0][0] if self._entries else None

    def of_slots(self, update: int) -> Tensor:
        """(F,) int64 age of each slot in updates, oldest slot first."""
        ages = [torch.full((slots,), update - entered) for entered, slots in self._entries]
        return torch.cat(ages) if ages else torch.zeros(0, dtype=torch.int64)

    def state(self) -> list[list[int]]:
        """Plain values that `set_state` takes."""
        return [list(entry) for entry in self._entries]

    def set_state(self, state: Iterable[Iterable[int]]) -> None:
        """Take what `state` gave."""
        self._entries = deque(list(entry) for entry in state)


@dataclass(frozen=True)
class Look:
    """What one micro-batch met.

    Attributes:
        masked_pairs: pairs of row and column left out of the loss as false negatives.
        mass_local: softmax mass of a local row on local passages, its own among them, mean over
            rows.
        mass_by_age: the same on banked passages, by their age in updates from 0 on. All masses
            together make 1 (compare Figure 6 of arXiv 2406.12356).
    """

    masked_pairs: int
    mass_local: float
    mass_by_age: list[float]


@torch.no_grad()
def look(
    queries: Tensor,
    passages: Tensor,
    passage_ids: Tensor | None,
    bank: DualMemoryBank,
    ages: Tensor,
    temperature: float,
    banks: str,
) -> Look:
    """Look at a micro-batch against a bank, in plain PyTorch with n x (nm + Fm) scores.

    Args:
        queries: (n, d).
        passages: (n, m, d), positive first.
        passage_ids: (n, m) int64, None where nothing is masked.
        bank: as the loss is going to see it.
        ages: (F,) from `BankAges.of_slots`.
        temperature: of the scores.
        banks: as in `contaccum_loss`; what the loss leaves out has no mass and no masked pairs.
    """
    n, m, d = passages.shape
    newest = slice(len(bank) - bank.used, None)
    ahead = bank.ahead(queries, passages[:, : bank.passages_per_query])
    offsets = bank.passage_offsets() + ahead[1:]
    banked = (bank.passages() + offsets.to(bank.dtype))[newest]  # (used, its m, d)
    others, ages = bank.passage_ids()[newest], ages[newest]
    if banks == "queries":
        banked, ages = banked[:0], ages[:0]
    columns = torch.cat([passages.reshape(n * m, d), banked.reshape(-1, d).to(passages)])
    scores = queries @ columns.T / temperature
    masked = 0
    if passage_ids is not None:
        local = passage_ids.reshape(-1)
        column_ids = torch.cat([local, others[: len(banked)].reshape(-1)])
        row_ids = passage_ids[:, :1]
        same = (row_ids == column_ids) & (column_ids != -1)
        targets = torch.arange(n, device=queries.device) * m
        same[torch.arange(n, device=queries.device), targets] = False
        scores = scores.masked_fill(same, -math.inf)
        banked_rows = (others[:, :1] == local) & (local != -1)
        masked = int(same.sum() + (banked_rows.sum() if banks != "passages" else 0))
    mass = scores.softmax(1).mean(0).cpu()  # (nm + F bank's m)
    per_slot = mass[n * m :].reshape(len(ages), bank.passages_per_query).sum(1)
    by_age = torch.zeros(int(ages.max()) + 1 if len(ages) else 0)
    return Look(masked, mass[: n * m].sum().item(), by_age.index_add_(0, ages, per_slot).tolist())


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure anew, where that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """MiB: allocated on a GPU since `reset_peak_memory`; elsewhere the process's highest so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
