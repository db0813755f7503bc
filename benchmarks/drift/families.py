"""What many tables share: data sets, usual options, and the rows that others are read against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.drift.settings import Setting

DATA = ("squad_sent", "medquad")

TRANSPORT: dict[str, Any] = {"probes": 64, "ridge": 0.1}
SCORES: dict[str, Any] = {"limit": 0.25, "measure": "scores", "sample": 16}


def baselines(seed: int, data: str) -> list[Setting]:
    """The rows every table is read against."""
    return [
        Setting(data, seed, "inbatch"),
        Setting(data, seed, "gradaccum"),
    ]


def banks(seed: int, data: str, correction: str, sizes: Sequence[int]) -> list[Setting]:
    options = {"transport": TRANSPORT, "guard": SCORES}.get(correction, {})
    return [
        Setting(data, seed, bank=bank, correction=correction, options=options) for bank in sizes
    ]
