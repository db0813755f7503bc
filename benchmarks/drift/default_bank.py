"""The default as the library has it, by the size of the bank and by the training."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from benchmarks.drift.bank_tables import CHOSEN
from benchmarks.drift.centre_tables import SPREAD
from benchmarks.drift.settings import Setting

# The library's, which need not be installed where this runs; a test compares them.
PARTS = 32  # of a bank: its table is rebuilt once one of them is new
AUTO_UPDATES = 4  # of slots: an automatic bank
WIDE_EPOCHS = 3  # in which more take part


def default_bank(seed: int, data: str, bank: int, change: dict[str, Any]) -> Setting:
    """A bank of more than two updates of slots in a training that differs by `change`."""
    plain = replace(Setting(data, seed, bank=bank, correction="follow-mean"), **change)
    options: dict[str, Any] = CHOSEN | SPREAD
    automatic = AUTO_UPDATES * plain.update_size
    if bank > automatic and plain.row_weighting == "all":
        options = options | {"narrow": 0.0}
    elif bank > automatic and plain.epochs > WIDE_EPOCHS:
        options = options | {"narrow": WIDE_EPOCHS / plain.epochs}
    if bank > PARTS * plain.update_size:
        options = options | {"parts": PARTS}
    return replace(plain, options=options)


def is_default(setting: Setting, bank: int) -> bool:
    """Whether it is what the library does with so many slots, more than two updates of them."""
    if setting.bank != bank:
        return False
    own = {"data", "seed", "bank", "correction", "options"}
    change = {name: value for name, value in asdict(setting).items() if name not in own}
    return setting == default_bank(setting.seed, setting.data, bank, change)
