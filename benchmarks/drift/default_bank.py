"""The default as the library has it, by the size of the bank and by the training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.drift.bank_tables import CHOSEN
from benchmarks.drift.centre_tables import SPREAD
from benchmarks.drift.settings import Setting

# The library's, which need not be installed where this runs; a test compares them.
PARTS = 32  # of a bank: its table is rebuilt once one of them is new
AUTO_UPDATES = 4  # of slots: an automatic bank
WIDE_EPOCHS = 3  # in which more take part


def by_default(setting: Setting) -> Setting:
    """With the correction that the library has by default for more than two updates of slots."""
    updates = setting.bank / setting.update_size
    options: dict[str, Any] = CHOSEN | SPREAD
    if updates > AUTO_UPDATES and setting.row_weighting == "all":
        options = options | {"narrow": 0.0}
    elif updates > AUTO_UPDATES and setting.epochs > WIDE_EPOCHS:
        options = options | {"narrow": WIDE_EPOCHS / setting.epochs}
    if updates > PARTS:
        options = options | {"parts": PARTS}
    return replace(setting, correction="follow-mean", options=options)


def is_default(setting: Setting, bank: int) -> bool:
    """Whether it is what the library does with so many slots, more than two updates of them."""
    return setting.bank == bank and setting == by_default(setting)
