"""The report of a comparison: one HTML file that needs no network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from html import escape
from pathlib import Path

from contaccum_ext.datasets import EvalQuery
from contaccum_ext.reporting import plots
from contaccum_ext.reporting.page import figure, table, versions, write_page
from contaccum_ext.reporting.table import metric_cells, metric_names
from contaccum_ext.training.comparison import BM25, DEPTH, Comparison, Row, paired_difference

SAMPLE_QUERIES = 8
SAMPLE_RESULTS = 3
SNIPPET = 160  # characters


def write_report(comparison: Comparison, path: Path, command: str) -> None:
    """Write the page.

    Args:
        comparison: what to show.
        path: HTML file; its directory is made.
        command: the command that makes it again.
    """
    title = f"Dense retrieval on {comparison.dataset.name}"
    histories = comparison.histories()
    parts = [
        _summary(comparison),
        table(metric_cells(comparison)),
        *_verdicts(comparison),
        "<h2>Training</h2>",
        figure(
            plots.loss_plot(histories),
            "Loss of each micro-batch against itself only, without any bank: the one loss that "
            "means the same for every method. Pale: each update; strong: running mean.",
        ),
    ]
    if not comparison.config.shared_encoder:
        caption = (
            "Gradient norms of the two encoders, before clipping: near 1 both learn at the same "
            "pace. Banked passages without banked queries as loss rows ('prebatch') upset it."
        )
        parts.append(figure(plots.gradient_ratio_plot(histories), caption))
    parts += [
        figure(plots.learning_rate_plot(histories), "Learning rate, the same for all."),
        "<h2>A sample of queries</h2>",
        f"<p class=note>{SAMPLE_QUERIES} test queries drawn at random with the run's seed. Below "
        "each, the right answer (marked), then the first results of each retriever.</p>",
        *_samples(comparison),
        "<h2>Settings</h2>",
        _settings(comparison),
        "<h2>Versions</h2>",
        table(versions(), text=True),
        f"<p>Made by <code>{escape(command)}</code></p>",
    ]
    write_page(path, title, parts)


def verdict(better: Row, worse: Row, metric: str) -> str:
    """One sentence: the difference of two rows with its interval, and whether it is clear."""
    gap = paired_difference(better, worse, metric)
    clear = "" if gap.low > 0 or gap.high < 0 else ": no clear difference"
    return (
        f"{better.name} - {worse.name}: {gap.mean:+.3f} {metric} "
        f"(95% interval {gap.low:+.3f} to {gap.high:+.3f} over the test queries{clear})"
    )


def trained_verdicts(comparison: Comparison) -> list[str]:
    """`verdict` of each later method against the first one trained, on the first metric."""
    trained = [row for row in comparison.rows if row.history]
    metric = metric_names(comparison)[0]
    return [verdict(row, trained[0], metric) for row in trained[1:]]


def _summary(comparison: Comparison) -> str:
    dataset, config = comparison.dataset, comparison.config
    return (
        f"<p>{len(dataset.train)} training queries, {len(dataset.test)} test queries, "
        f"{len(dataset.corpus)} passages searched. Every method saw the same examples in the same "
        f"order, n = {config.local_batch_size} queries at a time, "
        f"K = {config.accumulation_steps} such micro-batches per optimizer update.</p>"
    )


def _verdicts(comparison: Comparison) -> list[str]:
    lines = [f"<p>{escape(line)}</p>" for line in trained_verdicts(comparison)]
    if lines:
        lines.append(
            "<p class=note>One seed. The interval comes from resampling the test queries; another "
            "seed moves all trained rows too.</p>"
        )
    return lines


def _samples(comparison: Comparison) -> list[str]:
    queries = comparison.dataset.test
    count = min(SAMPLE_QUERIES, len(queries))
    chosen = random.Random(comparison.config.seed).sample(queries, count)
    rows = [row for row in comparison.rows if row.name != BM25]
    return [_sample(comparison, query, rows) for query in chosen]


def _sample(comparison: Comparison, query: EvalQuery, rows: Sequence[Row]) -> str:
    right = "".join(_hit(comparison, query, passage_id) for passage_id in query.positives[:1])
    parts = [f"<details open><summary>{escape(query.query)}</summary>{right}"]
    for row in rows:
        found = [passage_id for passage_id, _ in row.run.get(query.id, [])]
        parts.append(f"<p><b>{escape(row.name)}</b>: {_rank(query, found)}</p>")
        parts += [_hit(comparison, query, passage_id) for passage_id in found[:SAMPLE_RESULTS]]
    parts.append("</details>")
    return "".join(parts)


def _rank(query: EvalQuery, found: Sequence[str]) -> str:
    for rank, passage_id in enumerate(found, 1):
        if passage_id in query.positives:
            return f"right answer at rank {rank}"
    return f"right answer not among the first {DEPTH}"


def _hit(comparison: Comparison, query: EvalQuery, passage_id: str) -> str:
    text = " ".join(comparison.dataset.corpus[passage_id].full().split())
    snippet = text if len(text) <= SNIPPET else text[:SNIPPET].rstrip() + " ..."
    kind = "hit right" if passage_id in query.positives else "hit"
    return f'<p class="{kind}">{escape(snippet)}</p>'


def _settings(comparison: Comparison) -> str:
    settings = comparison.config.to_dict()
    del settings["method"]  # each row's own
    return table([["setting", "value"], *([k, str(v)] for k, v in settings.items())], text=True)
