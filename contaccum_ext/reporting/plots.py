"""Curves of training runs as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
Histories = Mapping[str, Sequence[UpdateMetrics]]  # by the name in the legend


def loss_plot(histories: Histories) -> str:
    """In-batch loss over the updates, per run."""
    return _plot(
        histories,
        lambda metrics: metrics.in_batch_loss,
        _from_zero("in-batch loss (groups of n, no bank)"),
    )


def gradient_ratio_plot(histories: Histories) -> str:
    """Gradient norm of the passage encoder over that of the query encoder, per run."""

    def finish(axes: Axes) -> None:
        axes.set_ylabel("gradient norm, passage / query encoder")
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter("{x:g}")
        axes.axhline(1, color="0.5", linewidth=0.8)

    return _plot(histories, lambda metrics: metrics.grad_norm_ratio, finish)


def learning_rate_plot(histories: Histories) -> str:
    """Learning rate over the updates, per run."""
    return _plot(
        histories, lambda metrics: metrics.learning_rate, _from_zero("learning rate"), noisy=False
    )


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Running mean over the last `width` values, over fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def bank_plot(histories: Histories) -> str:
    """Age of the oldest banked slot in updates, per run."""
    return _plot(
        histories,
        lambda metrics: metrics.bank_oldest,
        _from_zero("age of the oldest slot, updates"),
        noisy=False,
    )


def memory_plot(histories: Histories) -> str:
    """Peak memory in MiB, per run."""
    return _plot(
        histories, lambda metrics: metrics.peak_memory, _from_zero("peak memory, MiB"), noisy=False
    )


def speed_plot(histories: Histories) -> str:
    """Queries trained on per second, per run."""
    return _plot(histories, lambda metrics: metrics.queries_per_second, _from_zero("queries / s"))


def mass_plot(histories: Histories) -> str:
    """Softmax mass of banked passages by their age, mean over the looks of a run."""
    with _drawing() as (axes, svg):
        colours = _colours(histories)
        for name, history in histories.items():
            looks = [metrics.mass_by_age for metrics in history if metrics.mass_by_age]
            if not looks:
                continue
            # Early looks know no old passages: an age's mean is over those that do.
            ages = range(max(map(len, looks)))
            means = [np.mean([look[age] for look in looks if age < len(look)]) for age in ages]
            axes.plot(ages, means, color=colours[name], label=name, marker="o", markersize=3)
        axes.set_xlabel("age in updates")
        axes.set_ylabel("softmax mass")
        axes.set_ylim(bottom=0)
    return svg.getvalue()


def _from_zero(label: str) -> Callable[[Axes], None]:
    """Label the vertical axis, and let it begin at zero."""

    def finish(axes: Axes) -> None:
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)

    return finish


def _plot(
    histories: Histories, value: Value, finish: Callable[[Axes], None], noisy: bool = True
) -> str:
    with _drawing() as (axes, svg):
        colours = _colours(histories)
        for name, history in histories.items():
            points = [(m.update, v) for m in history if (v := value(m)) is not None]
            if not points:
                continue
            updates, values = zip(*points, strict=True)
            if noisy:
                axes.plot(updates, values, color=colours[name], alpha=0.2, linewidth=0.8)
            width = max(1, len(values) // 20) if noisy else 1
            axes.plot(updates, smooth(values, width), color=colours[name], label=name)
        finish(axes)
        axes.set_xlabel("optimizer update")
    return svg.getvalue()


def _colours(histories: Histories) -> dict[str, str]:
    """A colour by name: a method's own, else by position, the same in every plot of a page."""
    palette = list(COLOURS.values())
    return {
        name: COLOURS.get(name, palette[index % len(palette)])
        for index, name in enumerate(histories)
    }


@contextmanager
def _drawing() -> Iterator[tuple[Axes, io.StringIO]]:
    """Axes to draw in, and where the SVG stands afterwards."""
    svg = io.StringIO()
    # Text stays text, and the same numbers give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "contaccum"}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        yield axes, svg
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    svg.write(text[text.index("<svg") :])  # an XML heading does not belong inside a page
