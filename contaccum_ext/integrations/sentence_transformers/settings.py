"""What can be chosen about the banks of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from contaccum_ext import validation


class BankOptions(TypedDict, total=False):
    """What the losses accept beside the arguments of the losses that they replace."""

    bank_size: int | str
    drift: str
    drift_decay: float | None
    row_weighting: str
    symmetric: bool
    mask_duplicates: bool
    drift_probes: int
    drift_ridge: float
    drift_limit: float | None


@dataclass(frozen=True)
class BankSettings:
    """What does not change during the life of a loss.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    normalize: bool  # cosine scores
    bank_size: int | str = "auto"  # slots; 0 for no bank; "auto"
    drift: str = "auto"  # "mean", "transport", "none", or "auto": by the age of the bank
    drift_decay: float | None = None  # of running means, per batch; None: by batches per update
    row_weighting: str = "local"  # "local" or "all"
    symmetric: bool = False  # half of the loss has passages for rows and anchors for columns
    mask_duplicates: bool = True
    drift_probes: int = 64  # of transport
    drift_ridge: float = 0.1  # of transport
    drift_limit: float | None = 0.3  # of transport: staleness in use; None for any

    def __post_init__(self) -> None:
        size = self.bank_size
        number = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if size != "auto" and not number:
            raise ValueError(f"bank_size: expected 'auto' or a number of slots >= 0, got {size!r}")
        validation.choice("drift", self.drift, ("auto", "mean", "transport", "none"))
        if self.drift_decay is not None:
            decay = validation.number("drift_decay", self.drift_decay)
            if not 0 <= decay < 1:
                raise ValueError(f"drift_decay: expected None or a number in [0, 1), got {decay}")
        validation.choice("row_weighting", self.row_weighting, ("local", "all"))
        validation.instance("symmetric", self.symmetric, bool)
        validation.count("drift_probes", self.drift_probes)
        validation.positive("drift_ridge", self.drift_ridge)
        if self.drift_limit is not None:
            validation.positive("drift_limit", self.drift_limit)
