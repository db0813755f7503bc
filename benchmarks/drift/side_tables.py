"""What is beside the default: sizes, no masking, tables that lag, other keys, both directions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from benchmarks.drift import rows
from benchmarks.drift.bank_tables import CHOSEN
from benchmarks.drift.centre_tables import SPREAD
from benchmarks.drift.default_bank import is_default
from benchmarks.drift.default_bank_tables import TRAINING_SET
from benchmarks.drift.momentum_tables import FOLLOWED, MOMENTUM
from benchmarks.drift.rebuild_tables import ALWAYS, AN_EIGHTH, HALF, NEVER
from benchmarks.drift.report import markdown, mean, paired
from benchmarks.drift.summary import BASELINE, CENTRAL, COLUMNS, Column, bank_column, scores, signed
from benchmarks.drift.symmetric_tables import BOTH

_DEFAULTS: dict[str, Column] = {
    f"default, {size:,}": partial(is_default, bank=size) for size in (512, 4096, TRAINING_SET)
}


def any_size(done: Iterable[rows.Row], data: str) -> str:
    """Markdown of a data set: the default as the library has it, up to the training set's size."""
    return _gains(done, data, [("", _DEFAULTS)], needed=tuple(_DEFAULTS)[-1])


def unmasked(done: Iterable[rows.Row], data: str) -> str:
    """Markdown of a data set: what false negatives that are left in cost, and what banks gain."""
    done = list(done)
    columns = {name: COLUMNS[name] for name in ("in-batch 128", BASELINE)} | _DEFAULTS
    masked, found = (scores(done, data, columns, mask) for mask in (True, False))
    lines = []
    for varied, line in found.items():
        if BASELINE not in line:
            continue
        costs = [
            paired(line.get(name, {}), masked.get(varied, {}).get(name, {})) for name in columns
        ]
        gains = [paired(line.get(name, {}), line[BASELINE]) for name in _DEFAULTS]
        lines.append([varied, *(signed(x) if x.count else "-" for x in (*costs, *gains))])
    lines.sort(key=lambda cells: (cells[0] != CENTRAL, cells[0]))
    told = (f"{name}, less {BASELINE}" for name in _DEFAULTS)
    return markdown([f"{data}, unmasked less masked", *columns, *told], lines)


def rebuilt(done: Iterable[rows.Row], data: str) -> str:
    """Markdown of a data set: 4,096 slots whose table is rebuilt ever more rarely."""
    kinds = {
        "in every update": {},
        "in every 4th": AN_EIGHTH,
        "in every 16th": HALF,
        "never": NEVER,
    }
    columns = {
        name: bank_column(4096, "follow-mean", ALWAYS | change) for name, change in kinds.items()
    }
    return _gains(done, data, [("", columns)], needed="in every 16th")


def alike(done: Iterable[rows.Row], data: str) -> str:
    """Markdown of a data set: slow keys for what is banked, and for positives as well."""
    parts = []
    for size in (512, 4096):
        columns = {
            "default": bank_column(size, "follow-mean", CHOSEN | SPREAD),
            "both ways": bank_column(size, "follow-mean", CHOSEN | SPREAD | BOTH),
            "slow bank, 0.99": bank_column(size, *MOMENTUM[-1]),
        }
        for name, options in MOMENTUM[::2]:
            columns[f"alike, {options['decay']:g}"] = bank_column(size, name, options)
        for name, options in FOLLOWED:
            columns[f"alike, {options['decay']:g}, probes"] = bank_column(size, name, options)
        parts.append((f"{size:,}", columns))
    return _gains(done, data, parts, needed="alike, 0.99")


def both_ways(done: Iterable[rows.Row], data: str) -> str:
    """Markdown of a data set: losses one way and in both directions."""
    columns: dict[str, Column] = {
        "in-batch 128": COLUMNS["in-batch 128"],
        "both ways": lambda x: x.method == "inbatch" and x.options == BOTH,
        "bank 128, both ways": bank_column(128, "none", BOTH),
    }
    for size in (512, 4096):
        columns[f"default, {size:,}"] = bank_column(size, "follow-mean", CHOSEN | SPREAD)
        columns[f"default, {size:,}, both ways"] = bank_column(
            size, "follow-mean", CHOSEN | SPREAD | BOTH
        )
    return _gains(done, data, [("", columns)], needed="both ways")


def _gains(
    done: Iterable[rows.Row], data: str, parts: list[tuple[str, dict[str, Column]]], needed: str
) -> str:
    """What columns gain over the plain bank of 128, in every setting where `needed` was run."""
    done, lines = list(done), []
    plain = {BASELINE: COLUMNS[BASELINE]}
    for part, columns in parts:
        for varied, found in scores(done, data, columns | plain).items():
            if BASELINE not in found or needed not in found:
                continue
            cells = [varied, part, str(mean(found[BASELINE].values()))]
            for name in columns:
                values = found.get(name, {})
                cells.append(signed(paired(values, found[BASELINE])) if values else "-")
            lines.append(cells)
    lines.sort(key=lambda cells: (cells[0] != CENTRAL, cells[0]))
    head = [data, "bank", BASELINE, *(f"{name}, less" for name in parts[0][1])]
    if not parts[0][0]:
        head, lines = [head[0], *head[2:]], [[line[0], *line[2:]] for line in lines]
    return markdown(head, lines)
