"""Rows to tables: means over seeds with standard errors, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.drift import rows
from benchmarks.drift.settings import Setting


@dataclass(frozen=True)
class Mean:
    """Of some seeds."""

    mean: float
    error: float | None  # standard error of the mean; None from a single value
    count: int

    def __str__(self) -> str:
        if not self.count:
            return "-"
        return f"{self.mean:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


def mean(values: Iterable[float]) -> Mean:
    """Mean and its standard error, from the sample's standard deviation."""
    found = list(values)
    if not found:
        return Mean(math.nan, None, 0)
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return Mean(statistics.fmean(found), error, len(found))


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Mean:
    """Of ours less theirs, over the seeds that both have."""
    return mean(ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys())


def table(settings: Sequence[Setting], done: dict[str, rows.Row], baseline: str) -> str:
    """Markdown, a part for each data set.

    Args:
        settings: of the table; their order is that of the lines.
        done: rows by key; settings that have none in any seed are left out.
        baseline: the label that differences are taken to, in the same varied setting.
    """
    parts = []
    for data in dict.fromkeys(setting.data for setting in settings):
        by_label: dict[str, list[rows.Row]] = {}
        compared: dict[str, str] = {}
        for setting in settings:
            if setting.data == data:
                found = by_label.setdefault(setting.label, [])
                compared[setting.label] = f"{baseline} {setting.varied}".strip()
                if setting.key in done:
                    found.append(done[setting.key])
        head = ["", "NDCG@10", "Recall@20", "valid NDCG@10", f"less {baseline}", "seeds"]
        lines = [
            _line(label, found, _by_seed(by_label.get(compared[label], []), "test_ndcg10"))
            for label, found in by_label.items()
            if found
        ]
        parts.append(f"{data}\n\n" + markdown(head, lines))
    return "\n\n".join(parts)


def brief(settings: Sequence[Setting], done: dict[str, rows.Row], baseline: str) -> str:
    """The same by NDCG@10 alone, data sets side by side.

    Args:
        settings: of the table; their order is that of the lines.
        done: rows by key; settings that have none in any seed are left out.
        baseline: the label that differences are taken to, in the same varied setting.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}  # by label and data set, by seed
    compared = {}
    for setting in settings:
        by_data = found.setdefault(setting.label, {})
        compared[setting.label] = f"{baseline} {setting.varied}".strip()
        if setting.key in done:
            by_data.setdefault(setting.data, {})[setting.seed] = done[setting.key]["test_ndcg10"]
    sets = list(dict.fromkeys(setting.data for setting in settings))
    head = [""] + [x for data in sets for x in (data, f"less {baseline}", "seeds")]
    lines = []
    for label, by_data in found.items():
        cells = [label]
        for data in sets:
            ours = by_data.get(data, {})
            theirs = found.get(compared[label], {}).get(data, {})
            difference = "-" if label == compared[label] else _signed(paired(ours, theirs))
            cells += [str(mean(ours.values())), difference, str(len(ours))]
        if by_data:
            lines.append(cells)
    return markdown(head, lines)


def _line(label: str, found: list[rows.Row], compared: dict[int, float]) -> list[str]:
    measures = [_by_seed(found, x) for x in ("test_ndcg10", "test_recall20", "valid_ndcg10")]
    return [
        label,
        *(str(mean(values.values())) for values in measures),
        _signed(paired(measures[0], compared)),
        str(len(found)),
    ]


def _signed(difference: Mean) -> str:
    return f"+{difference}" if difference.count and difference.mean >= 0 else str(difference)


def _by_seed(found: list[rows.Row], measure: str) -> dict[int, float]:
    return {row["setting"]["seed"]: row[measure] for row in found}


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table, its columns padded so that it also reads as text; the first one to the left."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    rule = [("-" * width)[:-1] + ("-" if i == 0 else ":") for i, width in enumerate(widths)]

    def joined(line: list[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    return "\n".join(map(joined, [head, rule, *lines]))
