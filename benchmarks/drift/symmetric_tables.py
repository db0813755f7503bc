"""The table on losses in both directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.drift.bank_tables import CHOSEN, in_every_setting, plain_banks
from benchmarks.drift.centre_tables import SPREAD
from benchmarks.drift.settings import Setting

BOTH: dict[str, Any] = {"symmetric": True}


def symmetric() -> list[Setting]:
    """Each of these with a loss one way and both ways: in-batch, a plain bank, the default."""
    return in_every_setting(_both_and_one)


def _both_and_one(seed: int, data: str) -> list[Setting]:
    one_way = [
        *plain_banks(seed, data),
        *(
            Setting(data, seed, bank=b, correction="follow-mean", options=CHOSEN | SPREAD)
            for b in (512, 4096)
        ),
    ]
    return [*one_way, *(replace(x, options=x.options | BOTH) for x in one_way)]
