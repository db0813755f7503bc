"""Every setting in a line: without a bank, with a plain one of one update, with the defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.drift import rows
from benchmarks.drift.default_tables import LIBRARY, TURNED
from benchmarks.drift.report import Mean, markdown, mean, paired
from benchmarks.drift.settings import Setting, from_row

_BASELINE = "bank 128"
_CENTRAL = "central"


def _bank(size: int, correction: str, options: dict) -> Callable[[Setting], bool]:
    return lambda x: (x.bank, x.correction, x.options) == (size, correction, options)


def _transport(setting: Setting) -> bool:
    """As the library does it for a similarity."""
    options = LIBRARY if setting.similarity == "cosine" else TURNED
    return _bank(4096, "follow-mean", options)(setting)


COLUMNS: dict[str, Callable[[Setting], bool]] = {
    "gradaccum": lambda x: x.method == "gradaccum",
    "in-batch 128": lambda x: x.method == "inbatch",
    _BASELINE: _bank(128, "none", {}),
    "`mean` 1,024": _bank(1024, "mean", {}),
    "`transport` 4,096": _transport,
}
_COMPARED = ("`mean` 1,024", "`transport` 4,096")


def summary(done: Iterable[rows.Row], data: str) -> str:
    """Markdown of a data set: NDCG@10, and of the defaults the paired differences from `bank 128`.

    Args:
        done: rows, in any order.
        data: whose rows to take.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}  # by setting and column, by seed
    for row in done:
        if "error" in row or row["setting"]["data"] != data:
            continue
        setting = from_row(row["setting"])
        if setting.accumulation != 16:
            continue
        for name, belongs in COLUMNS.items():
            if belongs(setting):
                line = found.setdefault(setting.varied or _CENTRAL, {})
                line.setdefault(name, {})[setting.seed] = row["test_ndcg10"]
    lines = []
    for varied, columns in found.items():
        if not all(name in columns for name in COLUMNS):
            continue
        cells = [varied]
        for name in COLUMNS:
            values = columns[name]
            if name in _COMPARED:
                cells.append(_signed(paired(values, columns[_BASELINE])))
            else:
                cells.append(str(mean(values.values())))
        lines.append(cells)
    lines.sort(key=lambda cells: cells[0] != _CENTRAL)
    head = [data, *(f"{name}, less" if name in _COMPARED else name for name in COLUMNS)]
    return markdown(head, lines)


def _signed(difference: Mean) -> str:
    sign = "+" if difference.mean >= 0 else ""
    return f"{sign}{difference} ({difference.count})"
