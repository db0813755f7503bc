"""The tables on the default with as many slots as there are queries, and without masking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.drift.bank_tables import EVERYWHERE, plain_banks
from benchmarks.drift.default_bank import by_default
from benchmarks.drift.families import DATA
from benchmarks.drift.settings import Setting

# The slowest first: nothing waits for the others then.
_CHANGES: tuple[dict[str, Any], ...] = (
    {"epochs": 10},
    {"layers": 6},
    {"row_weighting": "all"},
    {},
    *EVERYWHERE[2:],
)
TRAINING_SET = 16384  # slots: more than medquad has queries, four in five of squad_sent's


def _lines(sizes: Callable[[dict[str, Any]], Sequence[int]]) -> Iterator[list[Setting]]:
    """For each seed, setting and set: in-batch, a plain bank of 128, the default of these sizes."""
    for seed in (1, 2, 3):
        for change in _CHANGES:
            for data in DATA:
                plain = [replace(x, **change) for x in plain_banks(seed, data)]
                banks = (Setting(data, seed, bank=size) for size in sizes(change))
                yield plain + [by_default(replace(x, **change)) for x in banks]


def trainset() -> list[Setting]:
    """The default with a bank of the training set's size, in every setting."""
    return [x for line in _lines(lambda _: (TRAINING_SET,)) for x in line]


def masking() -> list[Setting]:
    """What leaving false negatives out is worth, in every setting: each of these with and without.

    In-batch training, a plain bank of 128 slots, the default of 512, and larger ones of it.
    """
    lines = _lines(lambda change: (512, 4096) if change else (512, 4096, TRAINING_SET))
    return [x for line in lines for x in (*line, *(replace(x, mask=False) for x in line))]
