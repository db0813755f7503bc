"""The named tables: which settings are run, most important first, and what they are compared with.

A table lists seed after seed, so that a grid that is cut off has whole columns of fewer seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.drift.bank_tables import amounts, blocks, chosen, grown, lags, sizes, two, whole
from benchmarks.drift.centre_tables import anysize, centred, centred_updates, largest
from benchmarks.drift.default_bank_tables import masking, trainset
from benchmarks.drift.default_tables import default, few, library, means
from benchmarks.drift.families import DATA, SCORES, TRANSPORT, banks, baselines
from benchmarks.drift.momentum_tables import momentum
from benchmarks.drift.rebuild_tables import rebuilt
from benchmarks.drift.settings import Setting
from benchmarks.drift.symmetric_tables import symmetric

BASELINE = "inbatch"  # the label compared with, unless the command names another

# (correction, options), in the order of interest
IDEAS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mean", {}),
    ("transport", TRANSPORT),
    ("transport", {"probes": 256, "ridge": 0.1}),
    ("mean-all", {}),
    ("moments", {}),
    ("transport", {"probes": 64, "kernel": "mean"}),
    ("transport-batch", {"batches": 4, "ridge": 0.1}),
    ("refresh", {"count": 8}),
    ("age", {"beta": 0.1}),
    ("project", {}),
    ("transport", {"probes": 256, "ridge": 0.01}),
    ("transport", {"probes": 64, "ridge": 1.0}),
    ("mean", {"decay": 0.97}),
    ("age", {"beta": 0.03}),
    ("transport", {"probes": 256, "ridge": 0.1, "kernel": "exp", "width": 0.1}),
    ("refresh", {"count": 32}),
    ("none", {}),
    ("oracle", {}),
    ("transport", {**TRANSPORT, "keep": True}),
    ("transport-mean", TRANSPORT),
    ("oracle", {"dropout": True}),
    ("transport", {"probes": 16, "ridge": 0.1}),
    ("mean", {"decay": 0.5}),
    ("transport", {"probes": 256, "ridge": 0.1, "renormalize": False}),
    ("transport-batch", {"batches": 16, "ridge": 0.1}),
    ("moments", {"decay": 0.97}),
    ("age", {"beta": 0.3}),
    ("transport", {"probes": 256, "ridge": 0.1, "kernel": "exp", "width": 0.3}),
)

# (correction, options) of the table `guards`
GUARDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("guard", {"limit": 0.5}),
    ("guard", {"limit": 0.5, "measure": "shift"}),
    ("guard", SCORES),
    ("guard", {**SCORES, "correction": "none"}),
    ("guard", {**SCORES, "limit": 0.1}),
    ("guard", {**SCORES, "limit": 0.1, "correction": "transport", "options": TRANSPORT}),
)


# Limits of `follow`.
FOLLOW: tuple[dict[str, Any], ...] = (
    {**TRANSPORT, "limit": 0.3, "choose": True},
    *({**TRANSPORT, "limit": limit} for limit in (0.3, 1.0, 3.0)),
)


def central() -> list[Setting]:
    """Sizes of the bank, plain, corrected by the mean, and fresh."""
    found = []
    for seed in (1, 2, 3, 4, 5):
        # What takes longest first: a GPU's processes share it, and nothing else waits for these.
        found += [x for data in reversed(DATA) for x in banks(seed, data, "oracle", (4096, 1024))]
        for data in DATA:
            found += baselines(seed, data)
            found += banks(seed, data, "none", (128, 1024))
            found += banks(seed, data, "mean", (128, 512, 1024, 4096, 16384))
            found += banks(seed, data, "transport", (1024, 4096, 16384))
    return found


def ideas() -> list[Setting]:
    """Every correction, with some values of its options."""
    found = []
    for seed in (1, 2):
        found += [x for data in DATA for x in baselines(seed, data)]
        found += [
            Setting(data, seed, bank=bank, correction=correction, options=options)
            for bank in (4096, 1024)
            for correction, options in IDEAS
            for data in DATA
        ]
    return found


def guards() -> list[Setting]:
    """Windows that shrink, beside banks of a fixed size."""
    found = []
    for seed in (1, 2):
        for data in DATA:
            found += baselines(seed, data) + banks(seed, data, "none", (128,))
            found += banks(seed, data, "mean", (512, 1024, 4096))
            found += [
                Setting(data, seed, bank=4096, correction=correction, options=options)
                for correction, options in GUARDS
            ]
    return found


def safe() -> list[Setting]:
    """Transport within a window that its own errors set, where it is needed and where not."""
    changes: list[dict[str, Any]] = [
        {"start": "random"},
        {"similarity": "dot", "scale": 1.0},
        {},
        {"learning_rate": 5e-4},
        {"learning_rate": 2e-5},
    ]
    found = []
    for seed in (1, 2, 3):
        for change in changes:
            for data in DATA:
                few = [
                    Setting(data, seed, bank=4096, correction="follow", options=options)
                    for options in FOLLOW
                ]
                few += baselines(seed, data) + banks(seed, data, "none", (128,))
                few += banks(seed, data, "transport", (4096,))
                found += [replace(setting, **change) for setting in few]
    return found


TABLES: dict[str, Callable[[], list[Setting]]] = {
    "central": central,
    "ideas": ideas,
    "guards": guards,
    "safe": safe,
    "default": default,
    "library": library,
    "means": means,
    "few": few,
    "grown": grown,
    "amounts": amounts,
    "lags": lags,
    "whole": whole,
    "chosen": chosen,
    "sizes": sizes,
    "two": two,
    "blocks": blocks,
    "centred": centred,
    "anysize": anysize,
    "centred-updates": centred_updates,
    "largest": largest,
    "momentum": momentum,
    "rebuilt": rebuilt,
    "symmetric": symmetric,
    "trainset": trainset,
    "masking": masking,
}


def settings(names: Sequence[str]) -> list[Setting]:
    """The settings of tables, in the order given, each once.

    Raises:
        ValueError: there is no such table.
    """
    for name in names:
        if name not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {name!r}")
    unique = {setting.key: setting for name in names for setting in TABLES[name]()}
    return list(unique.values())
