"""The table on keys by momentum encoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.drift.bank_tables import CHOSEN, SHORT, plain_banks
from benchmarks.drift.centre_tables import SPREAD
from benchmarks.drift.families import DATA
from benchmarks.drift.settings import Setting

# (correction, options), in the order of interest
MOMENTUM: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (name, {"decay": decay})
    for decay in (0.9, 0.97, 0.99)
    for name in ("momentum-alike", "momentum")
)
# Slow keys that probes of their own move; 0 has keys of now, and no gradient through them.
FOLLOWED: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    ("momentum-alike", {"decay": decay, "correction": "follow-mean", "options": CHOSEN})
    for decay in (0.0, 0.9, 0.97)
)
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"epochs": 1},
    {"learning_rate": 5e-4},
    *(x for x in SHORT if x != {"epochs": 1}),
)


def momentum() -> list[Setting]:
    """Slow keys, for what is banked and for positives too, beside the default."""
    found = []
    for seed in (1, 2, 3):
        for change in _CHANGES if seed == 1 else _CHANGES[:1]:
            for data in DATA:
                here = plain_banks(seed, data)
                tried = MOMENTUM if change in _CHANGES[:3] else MOMENTUM[2::2]
                if seed == 1:
                    tried = (*FOLLOWED, *tried)
                for bank in (512, 4096):
                    default = Setting(
                        data, seed, bank=bank, correction="follow-mean", options=CHOSEN | SPREAD
                    )
                    here.append(default)
                    here += [
                        replace(default, correction=name, options=options)
                        for name, options in tried
                    ]
                found += [replace(x, **change) for x in here]
    return found
