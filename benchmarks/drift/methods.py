"""The corrections by name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.drift import corrections, guards, momentum, transport
from benchmarks.drift.centre import CENTRES

CORRECTIONS: dict[str, Callable[..., corrections.Correction]] = {
    "none": corrections.Correction,
    "oracle": corrections.Oracle,
    "mean": corrections.Mean,
    "mean-all": corrections.MeanAll,
    "moments": corrections.Moments,
    "age": corrections.Age,
    "refresh": corrections.Refresh,
    "momentum": momentum.Momentum,
    "momentum-alike": momentum.MomentumAlike,
    "guard": guards.Guard,
    "follow": guards.Follow,
    "follow-mean": guards.FollowMean,
    "project": guards.Project,
    "transport": transport.Transport,
    "transport-batch": transport.TransportBatch,
    "transport-mean": transport.TransportMean,
}


def make(name: str, context: corrections.Context, options: dict) -> corrections.Correction:
    """The correction of that name.

    Besides its own options each has `centre`: gradients with respect to columns less their mean
    over the micro-batch or the update. `symmetric` is that of an `Objective`.

    Raises:
        ValueError: there is none of that name.
        TypeError: it has no such option.
    """
    if name not in CORRECTIONS:
        raise ValueError(f"correction: expected one of {tuple(CORRECTIONS)}, got {name!r}")
    own = {key: value for key, value in options.items() if key not in ("centre", "symmetric")}
    made = CORRECTIONS[name](context, **own)
    made.centre = options.get("centre")
    if made.centre not in (None, *CENTRES):
        raise ValueError(f"centre: expected one of {CENTRES}, got {made.centre!r}")
    return made
