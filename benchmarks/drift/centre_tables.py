"""The tables on gradients of passages that sum to zero, as those of an in-batch loss do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.drift.bank_tables import CHOSEN, SHORT, in_every_setting, plain_banks
from benchmarks.drift.default_tables import DROPOUT
from benchmarks.drift.families import DATA, banks, baselines
from benchmarks.drift.settings import Setting

BATCH: dict[str, Any] = {"centre": "batch"}
SPREAD: dict[str, Any] = {"centre": "spread"}
UPDATE: dict[str, Any] = {"centre": "update"}
_LARGE: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (512, "follow-mean", CHOSEN),
    (4096, "follow-mean", CHOSEN),
)
_SMALL: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (128, "none", {}),
    (128, "mean", {}),
    (256, "mean", {}),
)
_STALE: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (1024, "none", {}),
    (1024, "mean", {}),
    (4096, "mean", {}),
)
_FRESH: tuple[tuple[int, str, dict[str, Any]], ...] = ((1024, "oracle", DROPOUT),)


def centred() -> list[Setting]:
    """Every correction with centred gradients, over what they are centred, where banks lost."""
    found = []
    for seed in (1, 2, 3):
        for change in SHORT:
            for data in DATA:
                found += [replace(x, **change) for x in plain_banks(seed, data)]
                for centre, kinds in (
                    (SPREAD, (*_LARGE, *_SMALL, *_FRESH)),
                    (BATCH, _LARGE if seed > 1 else (*_LARGE, *_SMALL, *_STALE, *_FRESH)),
                    (UPDATE, () if seed > 1 else (*_LARGE, *_SMALL, *_STALE, *_FRESH)),
                ):
                    found += [
                        replace(
                            Setting(data, seed, bank=b, correction=c, options=o | centre), **change
                        )
                        for b, c, o in kinds
                    ]
    return found


def anysize() -> list[Setting]:
    """Probes and centred gradients with banks of any size, in every setting."""
    return in_every_setting(
        lambda seed, data: [
            *plain_banks(seed, data),
            *(
                Setting(data, seed, bank=b, correction=c, options=o | SPREAD)
                for b, c, o in (*_LARGE, *_SMALL)
            ),
        ]
    )


def centred_updates() -> list[Setting]:
    """Centred gradients where an update has few micro-batches, or few queries."""
    found = []
    for seed in (1, 2):
        for data in DATA:
            for n, k, decay in ((128, 1, 0.67), (32, 4, 0.89), (8, 4, 0.89)):
                size = n * k
                here = [*baselines(seed, data), *banks(seed, data, "none", (size,))]
                here.append(Setting(data, seed, bank=size, options=SPREAD))
                for updates in (4, 8):
                    predicted = CHOSEN | {"decay": decay}
                    here.append(
                        Setting(
                            data,
                            seed,
                            bank=updates * size,
                            correction="follow-mean",
                            options=predicted | SPREAD,
                        )
                    )
                if size < 64:
                    here += [
                        Setting(
                            data,
                            seed,
                            bank=updates * size,
                            correction="mean",
                            options={"decay": 0.69} | centre,
                        )
                        for updates in (2, 8)
                        for centre in ({}, SPREAD)
                    ]
                found += [replace(x, n=n, accumulation=k, epochs=1) for x in here]
    return found


def largest() -> list[Setting]:
    """Centred gradients with banks as large as the training set, and where training overfits.

    "narrow" has a large bank for the first three of ten epochs, four updates of slots afterwards;
    with row weights 1/(n + F), four updates of its slots from the beginning.
    """
    found = []
    for seed in (1, 2, 3):
        for data in DATA:
            one = Setting(data, seed, bank=16384, correction="follow-mean", options=CHOSEN | SPREAD)
            narrow = replace(one, bank=4096, options=one.options | {"narrow": 0.3})
            plain = plain_banks(seed, data)
            if seed < 3:
                found += [replace(x, **c) for c in ({}, *SHORT[:2]) for x in (*plain, one)]
            found += [replace(x, epochs=10) for x in (*plain, narrow)]
            always = replace(narrow, options=one.options | {"narrow": 0.0})
            found += [replace(x, row_weighting="all") for x in (*plain, always)]
        if seed < 3:
            found.append(replace(one, data="squad_sent", bank=1024, epochs=10))
    return found
