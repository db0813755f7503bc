"""What is known of an update when it is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UpdateMetrics:
    """One line of metrics.jsonl.

    The last five are not of every update, else None. Three are of the last micro-batch of every
    `diagnostics_every`-th update, and two of the bank behind that and behind every tenth one.

    Args:
        update: counted from 1.
        loss: of the method, comparable within a method only; None in a skipped update.
        in_batch_loss: over groups of n without a bank, comparable between methods; None likewise.
        learning_rate: of this update.
        grad_norm_query: of the query encoder, before clipping; None in a skipped update.
        grad_norm_passage: of the passage encoder; None with a shared encoder too.
        grad_norm_ratio: passage / query (compare Figure 5 of arXiv 2406.12356); None likewise.
        queries_per_second: trained on, in this update.
        bank_filled: slots.
        skipped: updates so far that left the weights as they were.
        loss_scale: of fp16; None without.
        bank_oldest: age of the oldest slot, in updates; None without a bank.
        bank_window: filled slots in use; fewer than bank_filled where transport has given some up.
        bank_staleness: of the oldest slot in use, in spreads of fresh vectors; None but with
            transport.
        peak_memory: MiB, of this update on a GPU, else of the process so far.
        temperature: of this update's losses; changes where it is learned.
        masked_pairs: pairs of row and column left out of the loss as false negatives.
        mass_local: softmax mass of a local row on local passages, its own among them, mean over
            rows.
        mass_by_age: the same on banked passages, by their age in updates from 0 on; all masses
            together make 1 (compare Figure 6 of arXiv 2406.12356).
        bank_score_gap: mean score of the newest queries with the oldest banked passages in use,
            less that with each other's passages, in standard deviations of the latter.
        bank_score_spread: ratio of those standard deviations. docs/drift.md: sqrt(gap^2 +
            log(spread)^2) above 0.5 is a sign of harm; None while the bank is too small to tell.
    """

    update: int
    loss: float | None
    in_batch_loss: float | None
    learning_rate: float
    grad_norm_query: float | None
    grad_norm_passage: float | None
    grad_norm_ratio: float | None
    queries_per_second: float
    bank_filled: int
    skipped: int
    loss_scale: float | None = None
    bank_oldest: int | None = None
    bank_window: int | None = None
    bank_staleness: float | None = None
    peak_memory: float | None = None
    temperature: float | None = None
    masked_pairs: int | None = None
    mass_local: float | None = None
    mass_by_age: list[float] | None = None
    bank_score_gap: float | None = None
    bank_score_spread: float | None = None


class DivergedError(RuntimeError):
    """Loss or gradient is not finite; the weights are still those before the update."""
