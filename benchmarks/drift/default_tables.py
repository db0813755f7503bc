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
CHOSEN: dict[str, Any] = {**LIBRARY, "decay": 0.97}
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
            here = [Setting(data, seed, "inbatch"), *banks(seed, data, "none", (128,))]
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


def lags() -> list[Setting]:
    """Means that lag less, or are averaged over more, and updates of one or a few micro-batches."""
    changes: tuple[dict[str, Any], ...] = (
        {"learning_rate": 2e-5},
        {},
        *DRIFTING,
        {"epochs": 1},
        {"epochs": 1, "updates": 40},
    )
    now: dict[str, Any] = {"current": True}
    found = []
    for seed in (1, 2, 3):
        for data in DATA:
            for n, decays in ((128, (0.36, 0.0, 0.9)), (32, (0.7, 0.9))):
                here = [*baselines(seed, data), *banks(seed, data, "none", (128,))]
                for decay in decays:
                    lag: dict[str, Any] = {"decay": decay}
                    for name, options in (("mean", lag), ("follow-mean", LIBRARY | lag)):
                        here += [
                            Setting(data, seed, bank=1024, correction=name, options=options | more)
                            for more in ({}, now)
                        ]
                here += [Setting(data, seed, bank=1024, correction="oracle", options=DROPOUT)]
                here += [Setting(data, seed, bank=1024, correction="follow", options=SAFE)]
                found += [replace(x, n=n, accumulation=128 // n, epochs=1) for x in here]
            here = [
                Setting(data, seed, bank=bank, correction="follow-mean", options=LIBRARY | more)
                for more in ({"decay": 0.97}, {"decay": 0.99}, now)
                for bank in (4096, 512)
            ]
            here += [Setting(data, seed, bank=512, correction="mean", options=x) for x in ({}, now)]
            found += [replace(x, **change) for change in changes for x in here]
    return found


def chosen() -> list[Setting]:
    """The default: probes about means averaged over two updates, a bank of four; fewer probes."""
    central: tuple[dict[str, Any], ...] = (
        {},
        {"learning_rate": 2e-5},
        {"epochs": 1},
        {"epochs": 1, "updates": 40},
    )
    others: tuple[dict[str, Any], ...] = (
        {"epochs": 10},
        {"layers": 6},
        {"towers": "shared"},
        {"row_weighting": "all"},
        *DRIFTING,
    )
    found = []
    for seed in (1, 2, 3, 4, 5):
        here = [
            Setting(data, seed, bank=bank, correction="follow-mean", options=options)
            for data in DATA
            for bank, options in (
                (512, CHOSEN),
                (512, CHOSEN | {"probes": 32}),
                (512, CHOSEN | {"probes": 16}),
                (4096, CHOSEN),
            )
        ]
        default = [x for x in here if x.bank == 512 and x.options == CHOSEN]
        if seed <= 3:
            found += [replace(x, **change) for change in others for x in default]
            found += [replace(x, **change) for change in central[1:] for x in default]
        found += here if seed <= 2 else default
        if seed <= 2:
            found += [replace(x, **change) for change in central[1:] for x in here]
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
