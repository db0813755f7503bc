"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

from contaccum_ext.training.comparison import Comparison

MAX_METRICS = 6


def metric_names(comparison: Comparison) -> list[str]:
    """The metrics shown, in the order they were computed."""
    return list(comparison.rows[0].metrics)[:MAX_METRICS]


def metric_cells(comparison: Comparison) -> list[list[str]]:
    """Heading and one line per row: name, metrics, training seconds."""
    names = metric_names(comparison)
    lines = [["", *names, "training"]]
    for row in comparison.rows:
        seconds = "-" if row.train_seconds is None else f"{row.train_seconds:.0f} s"
        lines.append([row.name, *(f"{row.metrics[name]:.3f}" for name in names), seconds])
    return lines


def metric_table(comparison: Comparison) -> str:
    """The comparison as an aligned table, one retriever per line."""
    return align(metric_cells(comparison))


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], rule, *text[1:]])
