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
    center_gradients: bool | str
    wide_epochs: int | str


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
    center_gradients: bool | str = "auto"  # of passages, over an update; "auto": by the bank's age
    wide_epochs: int | str = "auto"  # in which more than an automatic bank's slots take part

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
        if self.center_gradients != "auto" and not isinstance(self.center_gradients, bool):
            raise TypeError(
                f"center_gradients: expected 'auto', True or False, got {self.center_gradients!r}"
            )
        if self.wide_epochs != "auto":
            count = isinstance(self.wide_epochs, int) and not isinstance(self.wide_epochs, bool)
            if not count or int(self.wide_epochs) < 0:
                raise ValueError(
                    f"wide_epochs: expected 'auto' or a number >= 0, got {self.wide_epochs!r}"
                )
        validation.count("drift_probes", self.drift_probes)
        validation.positive("drift_ridge", self.drift_ridge)
        if self.drift_limit is not None:
            validation.positive("drift_limit", self.drift_limit)
