"""Every setting in a line: without a bank, with a plain one of one update, with corrected ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from benchmarks.drift import rows
from benchmarks.drift.bank_tables import BLOCKS, CHOSEN, FAST
from benchmarks.drift.centre_tables import SPREAD
from benchmarks.drift.default_tables import DROPOUT, LIBRARY
from benchmarks.drift.report import Mean, markdown, mean, paired
from benchmarks.drift.settings import Setting, from_row

BASELINE = "bank 128"
CENTRAL = "central"


Column = Callable[[Setting], bool]


def bank_column(size: int, correction: str, options: dict) -> Column:
    """The column of banks of that size, with that correction and exactly these options."""
    return lambda x: (x.bank, x.correction, x.options) == (size, correction, options)


COLUMNS: dict[str, Column] = {
    "gradaccum": lambda x: x.method == "gradaccum",
    "in-batch 128": lambda x: x.method == "inbatch" and not x.options,
    BASELINE: bank_column(128, "none", {}),
    "default, 128": bank_column(128, "none", SPREAD),
    "with `mean`": bank_column(128, "mean", SPREAD),
    "default, 256": bank_column(256, "mean", SPREAD),
    "default, 512": bank_column(512, "follow-mean", CHOSEN | SPREAD),
    "the same, 4,096": bank_column(4096, "follow-mean", CHOSEN | SPREAD),
    "not centered: `mean`, 256": bank_column(256, "mean", {}),
    "`mean`, 1,024": bank_column(1024, "mean", {}),
    "probes, 512": bank_column(512, "follow-mean", CHOSEN),
    "probes, 4,096": bank_column(4096, "follow-mean", LIBRARY),
}
_COMPARED = tuple(COLUMNS)[3:]


def summary(done: Iterable[rows.Row], data: str) -> str:
    """Markdown of a data set: NDCG@10, and of corrected banks the paired differences to `bank 128`.

    Args:
        done: rows, in any order.
        data: whose rows to take.
    """
    lines = []
    for varied, columns in scores(done, data, COLUMNS).items():
        if "default, 512" not in columns or BASELINE not in columns:
            continue
        cells = [varied]
        for name in COLUMNS:
            values = columns.get(name, {})
            if name in _COMPARED:
                cells.append(signed(paired(values, columns[BASELINE])) if values else "-")
            else:
                cells.append(str(mean(values.values())))
        lines.append(cells)
    lines.sort(key=lambda cells: cells[0] != CENTRAL)
    head = [data, *(f"{name}, less" if name in _COMPARED else name for name in COLUMNS)]
    return markdown(head, lines)


_SIZES = (128, 256, 512, 1024, 4096, 16384)
_KINDS: dict[str, tuple[str, dict]] = {
    "fresh": ("oracle", DROPOUT),
    "`mean`": ("mean", {}),
    "probes": ("follow-mean", LIBRARY),
    "default": ("follow-mean", CHOSEN | SPREAD),
}
_FEW = ("epochs=1 updates=40", "epochs=1", "learning_rate=2e-05", CENTRAL, "epochs=10")


def amounts(done: Iterable[rows.Row], data: str) -> str:
    """Markdown of a data set: what banks of each size gain over a plain one of 128 slots.

    Args:
        done: rows, in any order.
        data: whose rows to take.
    """
    belongs = {f"{k} {size}": bank_column(size, *_KINDS[k]) for k in _KINDS for size in _SIZES}
    found = scores(done, data, belongs | {BASELINE: COLUMNS[BASELINE]})
    lines = []
    for varied in _FEW:
        columns = found.get(varied, {})
        if BASELINE not in columns:
            continue
        for kind in _KINDS:
            sizes = [columns.get(f"{kind} {size}", {}) for size in _SIZES]
            differences = [paired(x, columns[BASELINE]) if x else None for x in sizes]
            lines.append([varied, kind, *(signed(x) if x else "-" for x in differences)])
    return markdown([data, "", *(f"{size:,}" for size in _SIZES)], lines)


def shared(done: Iterable[rows.Row], data: str) -> str:
    """Markdown of a data set: what means that a block of slots shares change.

    Args:
        done: rows, in any order.
        data: whose rows to take.
    """
    kinds = {kind: _KINDS[kind] for kind in ("`mean`", "probes")}
    found = scores(
        done,
        data,
        {
            f"{kind} {size} {block}": bank_column(
                size, name, options | ({"block": block} if block else {})
            )
            for kind, (name, options) in kinds.items()
            for size in (16384, 4096)
            for block in (0, *BLOCKS)
        },
    )
    lines = []
    for size, changes in ((16384, ({},)), (4096, ({}, *FAST))):
        for varied in (Setting(data, method="gradaccum", **x).varied or CENTRAL for x in changes):
            for kind in kinds:
                own, *others = (
                    found.get(varied, {}).get(f"{kind} {size} {block}", {})
                    for block in (0, *BLOCKS)
                )
                differences = [paired(x, own) for x in others]
                if any(x.count for x in differences):
                    cells = [signed(x) if x.count else "-" for x in differences]
                    lines.append([varied, f"{size:,}", kind, str(mean(own.values())), *cells])
    head = [data, "bank", "", "a micro-batch", *(f"{block:,}, less" for block in BLOCKS)]
    return markdown(head, lines)


def scores(
    done: Iterable[rows.Row], data: str, columns: dict[str, Column], mask: bool = True
) -> dict[str, dict[str, dict[int, float]]]:
    """NDCG@10 by setting and column, by seed; updates of 16 micro-batches alone.

    Args:
        done: rows, in any order.
        data: whose rows to take.
        columns: what belongs where.
        mask: whose rows to take; the setting's name does not tell it.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in done:
        if "error" in row or row["setting"]["data"] != data:
            continue
        setting = from_row(row["setting"])
        if setting.accumulation != 16 or setting.mask != mask:
            continue
        for name, belongs in columns.items():
            if belongs(setting):
                line = found.setdefault(replace(setting, mask=True).varied or CENTRAL, {})
                line.setdefault(name, {})[setting.seed] = row["test_ndcg10"]
    return found


def signed(difference: Mean) -> str:
    """With its sign, and of how many seeds."""
    sign = "+" if difference.mean >= 0 else ""
    return f"{sign}{difference} ({difference.count})"
