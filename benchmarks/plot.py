"""Time and memory against the size of the bank, from the CSV of a run. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import read_csv

# One colour and marker for each line, in both panels; apart in brightness as well as in hue.
_STYLES = {
    "ours": ("#0b6e4f", "o", "-"),
    "linear PyTorch": ("#d98e04", "s", "-"),
    "full matrix": ("#a4243b", "^", "-"),
    "floor": ("#6b7280", "", ":"),
    "both banks": ("#6b7280", "", "--"),
    "our table": ("#0b6e4f", "", ":"),
}


def series(rows: list[dict[str, str]], peer: str, column: str) -> tuple[list[int], list[float]]:
    """(slots, values) of a peer where the column was measured and is above 0, as log axes need."""
    points = [
        (int(row["slots"]), float(row[column]))
        for row in rows
        if row["peer"] == peer and row[column] and float(row[column]) > 0
    ]
    points.sort()
    return [slots for slots, _ in points], [value for _, value in points]


def scaling_plot(results: Path, out: Path) -> None:
    """Draw `results` (CSV) to `out` (.png or .svg); SystemExit if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("scaling-plot: needs matplotlib (pip install matplotlib)") from error
    header, rows = read_csv(results)
    if not rows:
        raise SystemExit(f"{results}: no rows")
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for peer in peers:
        _draw(time_axes, *series(rows, peer, "ms_median"), peer)
        _draw(memory_axes, *series(rows, peer, "extra_mib"), peer)
    _draw(time_axes, *series(rows, "ours", "floor_ms"), "floor")
    _draw(memory_axes, *series(rows, "ours", "bank_mib"), "both banks")
    _draw(memory_axes, *series(rows, "ours", "table_mib"), "our table")
    time_axes.set_ylabel("milliseconds a step")
    memory_axes.set_ylabel("MiB: lines with marks, peak a step adds")
    first = rows[0]
    shape = f"n={first['n']}, d={first['d']}, m={first['m']}, {first['dtype']}"
    time_axes.set_title(f"loss + backward + enqueue, {shape}", fontsize=10)
    memory_axes.set_title(
        f"{header.get('cpu', '')}, {header.get('threads', '?')} threads, "
        f"{header.get('date', '')[:10]}",
        fontsize=10,
    )
    for axes in (time_axes, memory_axes):
        _set_axes(axes, sorted({int(row["slots"]) for row in rows}))
    figure.savefig(out, dpi=150)


def _draw(axes, slots: list[int], values: list[float], name: str) -> None:
    if not slots:
        return
    colour, marker, line = _STYLES.get(name, ("#1d4ed8", "d", "-"))
    axes.plot(slots, values, color=colour, marker=marker, linestyle=line, markersize=5, label=name)


def _set_axes(axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{s // 1024}k" if s % 1024 == 0 else str(s) for s in sizes])
    axes.minorticks_off()
    axes.set_xlabel("filled slots F")
    axes.grid(color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
