"""The tables that the defaults were chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.drift.families import DATA, TRANSPORT, banks, baselines
from benchmarks.drift.settings import Setting

# Other than the central setting, the longest first; and what makes models move fast.
VARIED: tuple[dict[str, Any], ...] = (
    {"epochs": 10},
    {"layers": 6},
    {"towers": "shared"},
    {"epochs": 1},
    {"row_weighting": "all"},
)
DRIFTING: tuple[dict[str, Any], ...] = (
    {"similarity": "dot", "scale": 1.0},
    {"start": "random"},
    {"learning_rate": 5e-4},
)

# What a trainer can do by default: probes alone, about running means, and these within a window.
SAFE: dict[str, Any] = {**TRANSPORT, "limit": 0.3}
PREDICTED: dict[str, Any] = {**TRANSPORT, "predict": True}
FOLLOW_MEAN: dict[str, Any] = {**SAFE, "predict": True}
LIBRARY: dict[str, Any] = {**FOLLOW_MEAN, "moved": True}
TURNED: dict[str, Any] = {**FOLLOW_MEAN, "turned": True}
DROPOUT: dict[str, Any] = {"dropout": True}


def _default(seed: int, data: str, sizes: Sequence[int] = (4096,)) -> list[Setting]:
    """The candidates for a default, and what they must not lose to."""
    return [
        *baselines(seed, data),
        *banks(seed, data, "none", (128,)),
        *(
            Setting(data, seed, bank=bank, correction=name, options=options)
            for bank in sizes
            for name, options in (("follow-mean", FOLLOW_MEAN), ("follow", SAFE))
        ),
    ]


def default() -> list[Setting]:
    """The candidates for a default in every setting."""
    found: list[Setting] = []

    def add(few: Sequence[Setting], **change: Any) -> None:
        found.extend(replace(setting, **change) for setting in few)

    for seed in (1, 2, 3, 4, 5):
        for data in DATA:  # what takes longest first
            if seed <= 3:
                add(_default(seed, data), epochs=10)
                add(_default(seed, data), layers=6)
                add(_default(seed, data, (16384, 1024, 128)))
            if seed <= 2:
                add(banks(seed, data, "oracle", (4096,)), learning_rate=2e-5)
                add([Setting(data, seed, bank=4096, correction="oracle", options=DROPOUT)])
        for data in DATA:
            if seed <= 3:
                for change in DRIFTING:
                    add(_default(seed, data), **change)
                    add(banks(seed, data, "mean", (1024,)), **change)
                    add(
                        [
                            Setting(data, seed, bank=4096, correction="transport-mean", options=o)
                            for o in (PREDICTED, TRANSPORT)
                        ],
                        **change,
                    )
                add(_default(seed, data), learning_rate=2e-5)
                add(_default(seed, data), towers="shared")
                add(_default(seed, data), row_weighting="all")
                add(_default(seed, data), epochs=1)
            add(_default(seed, data))
            add(banks(seed, data, "mean", (1024,)))
    return found


def library() -> list[Setting]:
    """What a library can do that scores banked vectors among themselves as it stores them.

    Either wholly moved, or turned about the means at which they were enqueued.
    """
    found: list[Setting] = []
    for seed in (1, 2, 3, 4, 5):
        for data in DATA:
            here = [
                Setting(data, seed, bank=4096, correction="follow-mean", options=options)
                for options in (LIBRARY, TURNED)
            ]
            near = banks(seed, data, "mean", (1024,))
            if seed < 3:
                found += [replace(x, **change) for change in VARIED for x in (*here, *near)]
                found += [replace(x, bank=size) for size in (16384, 1024, 128) for x in here]
            if seed <= 3:
                found += [replace(x, **change) for change in DRIFTING for x in (*here, *near)]
            if seed < 3:
                slow = [
                    *here,
                    *near,
                    *(replace(x, bank=1024) for x in here),
                    *banks(seed, data, "none", (1024,)),
                    Setting(data, seed, bank=4096, correction="oracle", options=DROPOUT),
                ]
                found += [replace(x, learning_rate=2e-5) for x in slow]
                found += _few_batches(seed, data)
            found += here
    return found


def means() -> list[Setting]:
    """Probes alone and about running means, where models move fast."""
    found = []
    for seed in (1, 2, 3):
        for data in DATA:
            few = [
                Setting(data, seed, "inbatch"),
                *banks(seed, data, "none", (128,)),
                *banks(seed, data, "mean", (1024,)),
                *(
                    Setting(data, seed, bank=4096, correction=name, options=options)
                    for name, options in (
                        ("follow", SAFE),
                        ("transport-mean", TRANSPORT),
                        ("transport-mean", PREDICTED),
                        ("follow-mean", FOLLOW_MEAN),
                        ("follow-mean", LIBRARY),
                        ("follow-mean", TURNED),
                    )
                ),
            ]
            found += [replace(x, **change) for change in (*DRIFTING, {}) for x in few]
    return found


def few() -> list[Setting]:
    """Updates of few micro-batches."""
    return [x for seed in (1, 2) for data in DATA for x in _few_batches(seed, data)]


def _few_batches(seed: int, data: str) -> list[Setting]:
    """Updates of 32 queries in 4 micro-batches, where running means lag sooner."""
    options = [("follow-mean", LIBRARY | {"decay": decay}) for decay in (0.9, 0.7, 0.5)]
    options += [("follow-mean", TURNED | {"decay": decay}) for decay in (0.9, 0.7)]
    options += [("follow", SAFE), ("mean", {"decay": 0.9}), ("mean", {"decay": 0.7})]
    corrected = [
        Setting(data, seed, bank=1024, correction=name, options=chosen) for name, chosen in options
    ]
    few = [*baselines(seed, data), *banks(seed, data, "none", (32,)), *corrected]
    return [replace(x, accumulation=4, epochs=1) for x in few]
