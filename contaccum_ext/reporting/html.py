"""The report of a comparison: one HTML file that needs no network."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Sequence
from html import escape
from importlib import metadata
from pathlib import Path

from contaccum_ext.datasets import EvalQuery
from contaccum_ext.reporting import plots
from contaccum_ext.reporting.table import metric_cells, metric_names
from contaccum_ext.training.comparison import BM25, DEPTH, Comparison, Row, paired_difference

SAMPLE_QUERIES = 8
SAMPLE_RESULTS = 3
SNIPPET = 160  # characters
PACKAGES = ("contaccum-ext", "torch", "transformers", "tokenizers", "numpy")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right;
         vertical-align: top; }
th:first-child, td:first-child, .text td { text-align: left; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .9rem; }
code, .hit { font-family: ui-monospace, monospace; font-size: .82rem; }
.hit { margin: 0 0 .4rem; } .right { background: #dff3e3; }
details { margin: 1.6rem 0; } details p { margin: .5rem 0 .2rem; }
summary { cursor: pointer; font-weight: 600; }
"""


def write_report(comparison: Comparison, path: Path, command: str) -> None:
    """Write the page.

    Args:
        comparison: what to show.
        path: HTML file; its directory is made.
        command: the command that makes it again.
    """
    title = f"Dense retrieval on {comparison.dataset.name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _summary(comparison),
        _table(metric_cells(comparison)),
        *_verdicts(comparison),
        "<h2>Training</h2>",
        _figure(
            plots.loss_plot(comparison),
            "Loss of each micro-batch against itself only, without any bank: the one loss that "
            "means the same for every method. Pale: each update; strong: running mean.",
        ),
    ]
    if not comparison.config.shared_encoder:
        caption = (
            "Gradient norms of the two encoders, before clipping: near 1 both learn at the same "
            "pace. Banked passages without banked queries as loss rows ('prebatch') upset it."
        )
        parts.append(_figure(plots.gradient_ratio_plot(comparison), caption))
    parts += [
        _figure(plots.learning_rate_plot(comparison), "Learning rate, the same for all."),
        "<h2>A sample of queries</h2>",
        f"<p class=note>{SAMPLE_QUERIES} test queries drawn at random with the run's seed. Below "
        "each, the right answer (marked), then the first results of each retriever.</p>",
        *_samples(comparison),
        "<h2>Settings</h2>",
        _settings(comparison),
        "<h2>Versions</h2>",
        _table(_versions(), text=True),
        f"<p>Made by <code>{escape(command)}</code></p>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


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


def _table(cells: Sequence[Sequence[str]], text: bool = False) -> str:
    head, *body = cells
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in body
    )
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    kind = " class=text" if text else ""
    return f"<table{kind}><tr>{heading}</tr>{rows}</table>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


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
    return _table([["setting", "value"], *([k, str(v)] for k, v in settings.items())], text=True)


def _versions() -> list[list[str]]:
    lines = [["", "version"], ["Python", platform.python_version()]]
    for package in PACKAGES:
        try:
            lines.append([package, metadata.version(package)])
        except metadata.PackageNotFoundError:
            lines.append([package, "not installed"])
    lines.append(["machine", f"{platform.machine()}, {os.cpu_count()} CPU cores"])
    return lines
