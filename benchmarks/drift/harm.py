"""Which sign of staleness tells harm: rank correlations over the runs there are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from benchmarks.drift import rows
from benchmarks.drift.report import markdown
from benchmarks.drift.settings import Setting, from_row

_FROM = 8  # the update from which a trace is looked at: before, means are those of few vectors
_NOISE = 0.005  # NDCG@10 that two seeds may differ by

# What a line of a trace says of one age; larger is worse.
SIGNS: dict[str, Callable[[dict[str, float], dict[str, float]], float]] = {
    "gap and spread of scores": lambda at, _: math.hypot(at["score_gap"], _log(at["score_spread"])),
    "spread of scores alone": lambda at, _: abs(_log(at["score_spread"])),
    "gap of scores alone": lambda at, _: abs(at["score_gap"]),
    "hardness, less that of age 0": lambda at, now: abs(at["hardness"] - now["hardness"]),
    "softmax mass": lambda at, _: abs(_log(at["mass"])),
    "shift of raw means": lambda at, _: max(at["shift_query"], at["shift_passage"]),
    "truth: residual beyond dropout": lambda at, now: _beyond(at, now, "residual"),
    "truth: systematic residual": lambda at, _: max(
        at["systematic_query"], at["systematic_passage"]
    ),
}


def harm(done: Sequence[rows.Row]) -> str:
    """Two tables in Markdown.

    Harm is the NDCG@10 of a plain bank of one update's size, mean over its seeds in the same
    setting, less the run's. A sign of a run is its largest over ages in the window and lines.

    Args:
        done: rows; banks beyond one update are looked at where the plain one was run too.
            `follow` and `follow-mean` are left out: their window is chosen by none of the signs and
            hides what these would show; and what is no matter of old vectors, momentum encoders'
            keys and losses in both directions.
    """
    plain: dict[str, list[float]] = {}
    for row in done:
        setting = from_row(row["setting"])
        if setting == _plain(setting):
            plain.setdefault(setting.without_seed(), []).append(row["test_ndcg10"])
    found = []
    for row in done:
        setting = from_row(row["setting"])
        base = plain.get(_plain(setting).without_seed())
        if setting.correction.startswith(("follow", "momentum")) or "symmetric" in setting.options:
            continue
        if setting.bank > setting.update_size and base and row["trace"]:
            signs = {name: _worst(row["trace"], sign) for name, sign in SIGNS.items()}
            found.append((setting, statistics.fmean(base) - row["test_ndcg10"], signs))
    central = [run for run in found if not run[0].varied]
    lines = [
        [name, *(f"{_correlation(part, name):.2f}" for part in (central, found))] for name in SIGNS
    ]
    head = ["sign", f"central ({len(central)} runs)", f"all ({len(found)} runs)"]
    return markdown(head, lines) + "\n\n" + _by_sign(found)


def _plain(setting: Setting) -> Setting:
    return replace(setting, method="bank", bank=setting.update_size, correction="none", options={})


def _worst(trace: list[dict], sign: Callable) -> float:
    worst = 0.0
    for line in trace:
        if line["update"] < _FROM:
            continue
        by_age = [
            {k: math.inf if v[i] is None else v[i] for k, v in line.items() if isinstance(v, list)}
            for i in range(len(line["ages"]))
        ]
        inside = [at for at in by_age if 0 < at["ages"] <= line["window"]]
        worst = max([worst, *(sign(at, by_age[0]) for at in inside)])
    return worst


def _correlation(found: list, name: str) -> float:
    ranks = [_ranks([run[1] for run in found]), _ranks([run[2][name] for run in found])]
    if min(np.ptp(each) for each in ranks) == 0:
        return math.nan
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: list[float]) -> np.ndarray:
    """Spearman's: equal values share the mean of their ranks."""
    array = np.array(values)
    below = (array[None] < array[:, None]).sum(1)
    return below + ((array[None] == array[:, None]).sum(1) - 1) / 2


def _by_sign(found: list) -> str:
    """How many runs were harmed, by the first sign; a guard's window is chosen by such signs."""
    name = next(iter(SIGNS))
    bounds = [0.0, 0.15, 0.3, 0.5, 1.0, math.inf]
    lines = []
    for kind, chosen in (
        ("fixed bank, central", [r for r in found if not r[0].varied and not _guarded(r[0])]),
        ("fixed bank, varied", [r for r in found if r[0].varied and not _guarded(r[0])]),
        ("guarded", [r for r in found if _guarded(r[0])]),
    ):
        cells = [kind]
        for low, high in pairwise(bounds):
            harms = [run[1] for run in chosen if low <= run[2][name] < high]
            cells.append(f"{sum(x > _NOISE for x in harms)} of {len(harms)}" if harms else "-")
        lines.append(cells)
    head = [f"harmed by more than {_NOISE}"] + [
        f"{low:g} to {high:g}" for low, high in pairwise(bounds)
    ]
    return markdown(head, lines)


def _guarded(setting: Setting) -> bool:
    return setting.correction == "guard"


def _log(value: float) -> float:
    return math.log(max(value, 1e-3))


def _beyond(at: dict[str, float], now: dict[str, float], kind: str) -> float:
    names = (f"{kind}_query", f"{kind}_passage")
    return math.sqrt(max(0.0, sum(at[name] ** 2 - now[name] ** 2 for name in names) / 2))
