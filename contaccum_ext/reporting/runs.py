"""Training runs side by side: what `contaccum train` wrote, as one page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path

from contaccum_ext.reporting import plots
from contaccum_ext.reporting.page import figure, table, versions, write_page
from contaccum_ext.training import RunDirectory, RunError, TrainConfig
from contaccum_ext.training.metrics import UpdateMetrics
from contaccum_ext.training.run_directory import read_identity

LAST = 20  # the end of a run is its last twentieth


@dataclass(frozen=True)
class Run:
    """A training run, finished or not."""

    path: Path
    config: TrainConfig
    data: dict[str, str]  # fingerprint of what it is trained on
    history: list[UpdateMetrics]
    finished: bool


def read_run(path: str | Path) -> Run:
    """Read what is known of the run in a directory.

    Raises:
        RunError: no run is there, or what it wrote is damaged.
    """
    directory = RunDirectory(path)
    config, data = read_identity(directory)
    try:
        lines = directory.metrics.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RunError(f"{directory.metrics}: cannot be read: {error.strerror}") from None
    known = {field.name for field in fields(UpdateMetrics)}
    history = []
    for number, line in enumerate(lines, 1):
        try:
            values = {key: value for key, value in json.loads(line).items() if key in known}
            history.append(UpdateMetrics(**values))
        except (ValueError, TypeError, AttributeError):
            # The last line may be half written: by a run that goes on, or one that was killed.
            if number < len(lines):
                raise RunError(f"{directory.metrics}:{number}: not a line of metrics") from None
    if not history:
        raise RunError(f"{directory.metrics}: no update has been written yet")
    return Run(directory.path, config, data, history, directory.final.exists())


def write_run_report(runs: Sequence[Run], path: Path, command: str) -> None:
    """Write the page.

    Args:
        runs: to compare, in this order; at least one.
        path: HTML file; its directory is made.
        command: the command that makes it again.
    """
    names = _names(runs)
    histories = {name: run.history for name, run in zip(names, runs, strict=True)}
    parts = [_table(names, runs), *_warnings(runs), *_differences(names, runs)]
    parts += [
        "<h2>Curves</h2>",
        figure(
            plots.loss_plot(histories),
            "Loss of each micro-batch against itself only, without any bank: the one loss that "
            "means the same for every method with the same n. Pale: each update; strong: running "
            "mean.",
        ),
        figure(
            plots.gradient_ratio_plot(histories),
            "Gradient norms of the two encoders, before clipping: near 1 both learn at the same "
            "pace.",
        ),
        figure(plots.learning_rate_plot(histories), "Learning rate."),
        figure(
            plots.bank_plot(histories),
            "How many updates ago the oldest slot of the bank was encoded.",
        ),
    ]
    if any(metrics.mass_by_age for run in runs for metrics in run.history):
        caption = (
            "How much of a local row's softmax falls on banked passages, by their age (compare "
            "Figure 6 of arXiv 2406.12356): what a larger bank could still add."
        )
        parts.append(figure(plots.mass_plot(histories), caption))
    parts += [
        figure(plots.speed_plot(histories), "Queries trained on per second."),
        figure(
            plots.memory_plot(histories),
            "Peak memory: of each update on a GPU, of the process so far elsewhere.",
        ),
        "<h2>Settings they share</h2>",
        table([["setting", "value"], *_shared(runs)], text=True),
        "<h2>Versions</h2>",
        "<p class=note>Of what made this page, not of what trained the runs.</p>",
        table(versions(), text=True),
        f"<p>Made by <code>{escape(command)}</code></p>",
    ]
    write_page(path, f"{len(runs)} training run{'s' if len(runs) > 1 else ''}", parts)


def _names(runs: Sequence[Run]) -> list[str]:
    short = [run.path.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]


def _table(names: Sequence[str], runs: Sequence[Run]) -> str:
    lines = [
        ["run", "method", "updates", "in-batch loss", "queries / s", "peak MiB", "skipped", ""]
    ]
    for name, run in zip(names, runs, strict=True):
        last = run.history[-1]
        end = run.history[-max(1, len(run.history) // LAST) :]
        losses = [m.in_batch_loss for m in end if m.in_batch_loss is not None]
        memory = [m.peak_memory for m in run.history if m.peak_memory is not None]
        lines.append(
            [
                name,
                run.config.method,
                str(last.update),
                f"{statistics.mean(losses):.4f}" if losses else "-",
                f"{statistics.median(m.queries_per_second for m in run.history):.1f}",
                f"{max(memory):.0f}" if memory else "-",
                str(last.skipped),
                "finished" if run.finished else "not finished",
            ]
        )
    note = (
        "<p class=note>In-batch loss: mean over the last twentieth of the updates. Queries per "
        "second: median.</p>"
    )
    return table(lines) + note


def _warnings(runs: Sequence[Run]) -> list[str]:
    """What keeps the runs from being compared."""
    said = []
    for part in runs[0].data:
        if len({run.data.get(part) for run in runs}) > 1:
            said.append(f"The runs differ in the {part}: their losses do not compare.")
    if len({run.config.local_batch_size for run in runs}) > 1:
        said.append("The runs differ in n: the in-batch loss of a larger n is higher.")
    return [f"<p><b>{escape(line)}</b></p>" for line in said]


def _differences(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    settings = [run.config.to_dict() for run in runs]
    lines = [
        [key, *(str(each[key]) for each in settings)]
        for key in settings[0]
        if len({str(each[key]) for each in settings}) > 1
    ]
    if not lines:
        return []
    return ["<h2>What differs</h2>", table([["setting", *names], *lines], text=True)]


def _shared(runs: Sequence[Run]) -> list[list[str]]:
    settings = [run.config.to_dict() for run in runs]
    return [
        [key, str(value)]
        for key, value in settings[0].items()
        if all(each[key] == value for each in settings)
    ]
