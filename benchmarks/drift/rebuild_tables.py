"""The table on scores among banked vectors that lag behind the vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.drift.bank_tables import CHOSEN, SHORT, plain_banks
from benchmarks.drift.centre_tables import SPREAD
from benchmarks.drift.families import DATA
from benchmarks.drift.settings import Setting

_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    *SHORT[:2],
    {"learning_rate": 5e-4},
    {"similarity": "dot", "scale": 1.0},
)
ALWAYS: dict[str, Any] = CHOSEN | SPREAD
AN_EIGHTH: dict[str, Any] = {"rebuild": 4}  # of a bank of 4,096 is written in 4 updates
HALF: dict[str, Any] = {"rebuild": 16}
NEVER: dict[str, Any] = {"moved": False}


def rebuilt() -> list[Setting]:
    """The table rebuilt in every update, in every fourth or sixteenth, or never."""
    found = []
    for seed in (1, 2, 3):
        for change in _CHANGES:
            for data in DATA:
                always = Setting(data, seed, bank=4096, correction="follow-mean", options=ALWAYS)
                here = [*plain_banks(seed, data), always]
                here += [replace(always, options=ALWAYS | x) for x in (AN_EIGHTH, NEVER, HALF)]
                found += [replace(x, **change) for x in here]
    return found
