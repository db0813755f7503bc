"""A figure from traces: what the oldest banked passages look like to fresh queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.drift import rows
from benchmarks.drift.settings import Setting
from benchmarks.drift.tables import TRANSPORT

_DATA, _SEED = "squad_sent", 1
_RUNS = (
    (Setting(_DATA, _SEED, bank=1024), "bank 1,024, nothing done"),
    (Setting(_DATA, _SEED, bank=1024, correction="mean"), "bank 1,024, mean"),
    (Setting(_DATA, _SEED, bank=4096, correction="mean"), "bank 4,096, mean"),
    (
        Setting(_DATA, _SEED, bank=4096, correction="transport", options=TRANSPORT),
        "bank 4,096, probes",
    ),
    (Setting(_DATA, _SEED, bank=4096, correction="oracle"), "bank 4,096, re-encoded"),
)
_PANELS = (
    ("score_gap", "mean score of old negatives less fresh ones\n(standard deviations)"),
    ("score_spread", "standard deviation of scores,\nold negatives over fresh ones"),
)


def figure(done: Sequence[rows.Row], out: Path) -> None:
    """Draw the two first moments of the scores with the oldest slots, by update.

    Args:
        done: rows; runs that are not among them are left out.
        out: a PNG file.
    """
    by_key = {row["key"]: row for row in done}
    canvas, panels = plt.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
    for axes, (measure, title) in zip(panels, _PANELS, strict=True):
        for setting, name in _RUNS:
            if setting.key in by_key:
                trace = by_key[setting.key]["trace"]
                old = [line[measure][-1] for line in trace]
                axes.plot([line["update"] for line in trace], old, ".-", label=name, lw=1)
        axes.set_xlabel("update")
        axes.set_title(title, fontsize=8)
    panels[0].set_yscale("symlog", linthresh=1)
    panels[1].set_ylim(0.3, 1.4)
    panels[0].legend(fontsize=7)
    canvas.savefig(out, dpi=110)
    plt.close(canvas)
