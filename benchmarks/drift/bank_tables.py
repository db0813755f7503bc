"""The tables on the size of a bank, on means that lag, and on the default that came of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.drift.default_tables import DRIFTING, DROPOUT, LIBRARY, SAFE
from benchmarks.drift.families import DATA, banks, baselines
from benchmarks.drift.settings import Setting

CURRENT: dict[str, Any] = {"current": True}
CHOSEN: dict[str, Any] = {**LIBRARY, "decay": 0.97}
# Few steps, or small ones.
SHORT: tuple[dict[str, Any], ...] = (
    {"learning_rate": 2e-5},
    {"epochs": 1},
    {"epochs": 1, "updates": 40},
)
EVERYWHERE: tuple[dict[str, Any], ...] = (
    {"epochs": 10},
    {"layers": 6},
    {"towers": "shared"},
    *DRIFTING,
    *SHORT,
)


def plain_banks(seed: int, data: str) -> list[Setting]:
    """What corrected banks are read against."""
    return [Setting(data, seed, "inbatch"), *banks(seed, data, "none", (128,))]


def grown() -> list[Setting]:
    """Windows that grow with the training, where large banks lose, and where they gain."""
    changes: tuple[dict[str, Any], ...] = (
        {"epochs": 10},
        {"learning_rate": 2e-5},
        {"epochs": 1},
        {},
    )
    found = []
    for seed in (1, 2, 3):
        for data in DATA:
            here = plain_banks(seed, data)
            here += [
                Setting(data, seed, bank=4096, correction="follow-mean", options=LIBRARY | ramp)
                for ramp in ({}, {"ramp": 0.5}, {"ramp": 1.0})
            ]
            oracle = Setting(data, seed, bank=4096, correction="oracle", options=DROPOUT)
            found += [replace(x, **change) for change in changes for x in here]
            found += [replace(oracle, **change) for change in changes[1:]]
    return found


def amounts() -> list[Setting]:
    """How many negatives are worth having, fresh or not, in short, slow and long training."""
    found = []
    for seed in (1, 2, 3):
        for data in DATA:
            none, mean, fresh = (
                [
                    Setting(data, seed, bank=bank, correction=name, options=options)
                    for bank in (128, 256, 512, 1024, 4096)
                ]
                for name, options in (("none", {}), ("mean", {}), ("oracle", DROPOUT))
            )
            moved = [
                Setting(data, seed, bank=bank, correction="follow-mean", options=LIBRARY | change)
                for bank, change in (
                    (4096, {"discount": 1.0}),
                    (4096, {"discount": 0.5}),
                    (4096, {}),
                    (512, {}),
                    (128, {}),
                )
            ]
            found += [replace(x, epochs=10) for x in (fresh[2], *mean[:3], *moved[:2], moved[3])]
            found += [replace(x, learning_rate=2e-5) for x in (*fresh[:4], *mean[:3], *moved)]
            found += [replace(x, epochs=1) for x in (*fresh[:4], *mean[:3], *moved)]
            short = [*baselines(seed, data), none[0], *fresh[:4], *mean[:4], *moved]
            found += [replace(x, updates=40, epochs=1) for x in short]
            found += moved[:2]
    return found


def whole() -> list[Setting]:
    """Updates of one micro-batch of 128, or of four of 32, where means lag by whole updates."""
    return [
        x
        for seed in (1, 2)
        for data in DATA
        for n in (128, 32)
        for x in _large_batches(seed, data, n)
    ]


def _large_batches(seed: int, data: str, n: int) -> list[Setting]:
    here = [*baselines(seed, data), *banks(seed, data, "none", (128,))]
    for decay in (0.36, 0.0, 0.9) if n == 128 else (0.7, 0.9):
        lag: dict[str, Any] = {"decay": decay}
        here += [
            Setting(data, seed, bank=1024, correction=name, options=options | more)
            for name, options in (("mean", lag), ("follow-mean", LIBRARY | lag))
            for more in ({}, CURRENT)
        ]
    library = LIBRARY | {"decay": 0.67 if n == 128 else 0.89}
    here += [
        Setting(data, seed, bank=bank, correction="follow-mean", options=library | more)
        for more in ({}, {"between": True})
        for bank in (1024, 512)
    ]
    here += [Setting(data, seed, bank=1024, correction="oracle", options=DROPOUT)]
    here += [Setting(data, seed, bank=1024, correction="follow", options=SAFE)]
    return [replace(x, n=n, accumulation=128 // n, epochs=1) for x in here]


def lags() -> list[Setting]:
    """Means that lag less, or are averaged over more."""
    found = []
    for seed in (1, 2):
        for data in DATA:
            here = plain_banks(seed, data)
            here += [
                Setting(data, seed, bank=bank, correction="follow-mean", options=LIBRARY | more)
                for more in ({"decay": 0.97}, {"decay": 0.99}, CURRENT)
                for bank in (4096, 512)
            ]
            here += [
                Setting(data, seed, bank=512, correction="mean", options=x) for x in ({}, CURRENT)
            ]
            found += [replace(x, **change) for change in ({}, *DRIFTING, *SHORT) for x in here]
    return found


def chosen() -> list[Setting]:
    """Probes about means averaged over two updates, a bank of four; and simpler ones.

    "between" corrects between updates alone, which needs no offsets in the op.
    """
    found = []
    for seed in (1, 2, 3, 4, 5):
        for data in DATA:
            plain = plain_banks(seed, data)
            default = Setting(data, seed, bank=512, correction="follow-mean", options=CHOSEN)
            between = replace(default, options=CHOSEN | {"between": True})
            others = [replace(default, options=CHOSEN | {"probes": x}) for x in (32, 16)]
            if seed <= 3:
                here = (*plain, default, between)
                found += [replace(x, **change) for change in EVERYWHERE for x in here]
                found += [replace(x, row_weighting="all") for x in (default, between)]
            if seed <= 2:
                larger = replace(default, bank=4096)
                found += [replace(x, **c) for c in ({}, *SHORT) for x in (*others, larger)]
            found += [*plain, default, between]
    return found


def sizes() -> list[Setting]:
    """Banks of two and of 32 updates, moved between updates alone, everywhere."""
    found = []
    options = CHOSEN | {"between": True}
    changes = (*EVERYWHERE, {"row_weighting": "all"}, {})
    for seed in (1, 2):
        for data in DATA:
            here = plain_banks(seed, data) + [
                Setting(data, seed, bank=bank, correction="follow-mean", options=options)
                for bank in (4096, 256)
            ]
            found += [replace(x, **change) for change in changes for x in here]
    return found


def two() -> list[Setting]:
    """The default, the mean's shift alone with two updates of slots, everywhere."""
    return in_every_setting(
        lambda seed, data: [*plain_banks(seed, data), *banks(seed, data, "mean", (256,))]
    )


def in_every_setting(make: Callable[[int, str], list[Setting]]) -> list[Setting]:
    """What `make` has for a seed and a set: three seeds everywhere, five in the central setting."""
    changes = (*EVERYWHERE, {"row_weighting": "all"}, {})
    return [
        replace(x, **change)
        for seed in (1, 2, 3, 4, 5)
        for data in DATA
        for change in changes[-1 if seed > 3 else 0 :]
        for x in make(seed, data)
    ]


BLOCKS = (64, 256, 1024)
# Where means that are shared are looked at, with a bank of 4,096.
FAST: tuple[dict[str, Any], ...] = ({"learning_rate": 5e-4}, {"epochs": 1})


def blocks() -> list[Setting]:
    """Means that 64 slots share, or more, in large banks."""
    found: list[Setting] = []
    for size, changes in ((16384, ({},)), (4096, ({},)), (4096, FAST)):
        for seed in (1, 2):
            for change in changes:
                for data in DATA:
                    plain = plain_banks(seed, data)
                    corrected = [
                        Setting(data, seed, bank=size, correction=name, options=options | more)
                        for more in ({}, *({"block": block} for block in BLOCKS))
                        for name, options in (("follow-mean", LIBRARY), ("mean", {}))
                    ]
                    found += [replace(x, **change) for x in (*plain, *corrected)]
    return found
