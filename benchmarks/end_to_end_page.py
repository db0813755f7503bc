"""The result of ``python -m benchmarks end-to-end``: rows and page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cases import MIB
from benchmarks.end_to_end_methods import METHODS, METRIC, UNTRAINED, EndToEndOptions, Outcome
from benchmarks.report import number, table


@dataclass(frozen=True)
class EndToEndRow:
    """One method. Empty where it was not measured; `note` says why, or what was warned of."""

    method: str
    integration: str
    loss: str
    settings: str
    queries: int
    ndcg_at_10: float | None
    seconds: float | None  # of training
    queries_per_second: float | None
    peak_mib: float | None  # of the device, in training: weights and optimizer state among it
    bank_filled: int | None
    bank_window: int | None
    score_gap: float | None  # at the last look
    score_spread: float | None
    note: str


def make_row(outcome: Outcome) -> EndToEndRow:
    method, trained = METHODS.get(outcome.method), outcome.trained
    shift = trained.shift if trained else None
    return EndToEndRow(
        method=outcome.method,
        integration=outcome.integration,
        loss=method.loss if method else "",
        settings=" ".join(f"{k}={v}" for k, v in method.settings.items()) if method else "",
        queries=outcome.queries,
        ndcg_at_10=outcome.score,
        seconds=trained.seconds if trained else None,
        queries_per_second=outcome.queries / trained.seconds if trained else None,
        peak_mib=None if outcome.peak_bytes is None else outcome.peak_bytes / MIB,
        bank_filled=trained.bank_filled if trained else None,
        bank_window=trained.bank_window if trained else None,
        score_gap=shift.gap if shift else None,
        score_spread=shift.spread if shift else None,
        note=outcome.note,
    )


def compose(
    header: dict[str, str], options: EndToEndOptions, updates: int, rows: Sequence[EndToEndRow]
) -> str:
    """Markdown: what was run, the table, and what was warned of."""
    lines = "\n".join(f"- {key}: {value}" for key, value in header.items())
    parts = ["# Training from data to NDCG@10, both integrations", lines]
    parts += ["## What was run", _setup(options, updates), "## Result", summary(rows)]
    notes = [f"- `{row.method}`: {row.note}" for row in rows if row.note]
    if notes:
        parts += ["## Warnings and failures", "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[EndToEndRow]) -> str:
    """The table."""
    head = [METRIC, "method", "trainer", "seconds", "queries/s", "peak MiB"]
    head += ["bank", "in use", "gap, spread"]
    lines = [
        [
            number(row.ndcg_at_10, 4),
            row.method,
            row.integration,
            number(row.seconds, 4),
            number(row.queries_per_second, 4),
            number(row.peak_mib, 5),
            str(row.bank_filled or "-"),
            "-" if row.bank_window is None else str(row.bank_window),
            "-" if row.score_gap is None else f"{row.score_gap:+.2f}, {row.score_spread:.2f}",
        ]
        for row in rows
    ]
    return table(head, lines)


def _setup(options: EndToEndOptions, updates: int) -> str:
    named = "\n".join(
        f"- `{method.name}`: "
        + (method.loss or f"method={method.settings['method']}")
        + "".join(f", {k}={v}" for k, v in method.settings.items() if k != "method")
        + (", an update is one batch" if method.cached else "")
        for method in (METHODS[name] for name in options.methods)
    )
    kept = f", its first {options.layers} layers" if options.layers else ""
    shared = (
        f"{options.processes} methods at a time share the machine, and times tell that. "
        if options.processes > 1
        else ""
    )
    return (
        f"Data `{options.data.name}`. Every method starts from the same encoder (`--model`{kept}), "
        f"one for queries and passages, mean pooling, cosine at scale 20, and sees the same "
        f"examples in the same order: {updates} updates of {options.n} x {options.accumulation} "
        f"queries with a positive and, where the data has them, a hard negative. AdamW at "
        f"{options.learning_rate:g}, linear warm-up over a tenth and linear decay, weight decay "
        f"0.01, clipping at 2.0, seed {options.seed}; bf16 autocast on GPUs, fp32 on CPUs. "
        f"Banks are of the default size (`bank_size: auto`) unless a line says more.\n\n{named}\n\n"
        f"`{METRIC}` is of the test queries over the whole corpus, by this package's evaluation "
        f"for all. `seconds` is training alone, tokenization among it: the updates of `contaccum "
        f"train`, the call of `train` in sentence-transformers. {shared}"
        f"`peak MiB` is the device's, with weights and optimizer; on a CPU it is not told by "
        f"method. `in use` and `gap, spread` are of the last look at the bank "
        f"(docs/sentence-transformers.md, What the log shows). One seed: "
        f"differences below 0.01 mean little. `{UNTRAINED}` is the start."
    )
