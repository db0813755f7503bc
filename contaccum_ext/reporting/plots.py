"""Curves of a comparison as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from contaccum_ext.training.comparison import Comparison
from contaccum_ext.training.metrics import UpdateMetrics

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = {
    "gradaccum": "#0072b2",
    "contaccum": "#d55e00",
    "inbatch": "#009e73",
    "prebatch": "#cc79a7",
    "gradcache": "#56b4e9",
    "gradcache_contaccum": "#e69f00",
}
Value = Callable[[UpdateMetrics], float | None]


def loss_plot(comparison: Comparison) -> str:
    """In-batch loss over the updates, per method."""

    def finish(axes: Axes) -> None:
        axes.set_ylabel("in-batch loss (groups of n, no bank)")
        axes.set_ylim(bottom=0)

    return _plot(comparison, lambda metrics: metrics.in_batch_loss, finish)


def gradient_ratio_plot(comparison: Comparison) -> str:
    """Gradient norm of the passage encoder over that of the query encoder, per method."""

    def finish(axes: Axes) -> None:
        axes.set_ylabel("gradient norm, passage / query encoder")
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter("{x:g}")
        axes.axhline(1, color="0.5", linewidth=0.8)

    return _plot(comparison, lambda metrics: metrics.grad_norm_ratio, finish)


def learning_rate_plot(comparison: Comparison) -> str:
    """Learning rate over the updates: the same for every method."""

    def finish(axes: Axes) -> None:
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)

    return _plot(comparison, lambda metrics: metrics.learning_rate, finish, noisy=False)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Running mean over the last `width` values, over fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _plot(
    comparison: Comparison, value: Value, finish: Callable[[Axes], None], noisy: bool = True
) -> str:
    # Text stays text, and the same numbers give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "contaccum"}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for row in comparison.rows:
            points = [(m.update, v) for m in row.history if (v := value(m)) is not None]
            if not points:
                continue
            updates, values = zip(*points, strict=True)
            colour = COLOURS.get(row.name)
            if noisy:
                axes.plot(updates, values, color=colour, alpha=0.2, linewidth=0.8)
            width = max(1, len(values) // 20) if noisy else 1
            axes.plot(updates, smooth(values, width), color=colour, label=row.name)
        finish(axes)
        axes.set_xlabel("optimizer update")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # an XML heading does not belong inside a page
