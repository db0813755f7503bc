"""Time and memory against the size of the bank, from the CSV of a run. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import read_csv

# One colour and marker for each line, in both panels; apart in brightness as well as in hue. The
# full matrix is one colour whatever its precision.
_STYLES = {
    "ours": ("#0b6e4f", "o", "-"),
    "linear PyTorch": ("#d98e04", "s", "-"),
    "full matrix": ("#a4243b", "^", "-"),
    "full matrix fp32": ("#a4243b", "v", ":"),
    "full matrix tf32": ("#a4243b", ">", "--"),
    "full matrix bf16": ("#a4243b", "^", "-"),
    "full matrix compiled": ("#e07a8b", "<", "-"),
    "CCE": ("#1d4ed8", "d", "-"),
    "Liger": ("#7c3aed", "P", "-"),
    "Inf-CL": ("#0891b2", "X", "-"),
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


def sweep_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the shape of step that ours was measured at with the most sizes of the bank."""
    sizes: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        if row["peer"] == "ours":
            sizes.setdefault(_shape(row), set()).add(row["slots"])
    if not sizes:
        return []
    widest = max(sizes, key=lambda shape: len(sizes[shape]))
    return [row for row in rows if _shape(row) == widest]


def _shape(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("n", "d", "m", "drift"))


def scaling_plot(results: Path, out: Path) -> None:
    """Draw `results` (CSV) to `out` (.png or .svg); SystemExit if matplotlib is missing.

    Of results with several shapes of step, the one with the most sizes of the bank is drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("scaling-plot: needs matplotlib (pip install matplotlib)") from error
    header, rows = read_csv(results)
    rows = sweep_rows(rows)
    if not rows:
        raise SystemExit(f"{results}: no rows of ours")
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure = Figure(figsize=(11, 4.6), layout="constrained")
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
    machine = header.get("gpu") or f"{header.get('cpu', '')}, {header.get('threads', '?')} threads"
    memory_axes.set_title(f"{machine}, {header.get('date', '')[:10]}", fontsize=10)
    for axes in (time_axes, memory_axes):
        _set_axes(axes, sorted({int(row["slots"]) for row in rows}))
    lines = {line.get_label(): line for axes in (time_axes, memory_axes) for line in axes.lines}
    figure.legend(
        lines.values(), lines.keys(), loc="outside right center", frameon=False, fontsize=9
    )
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
