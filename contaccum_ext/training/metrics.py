"""What is known of an update when it is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UpdateMetrics:
    """One line of metrics.jsonl."""

    update: int  # counted from 1
    loss: float | None  # of the method; comparable within a method only; None in a skipped update
    in_batch_loss: float | None  # over groups of n without a bank; comparable between methods
    learning_rate: float
    grad_norm_query: float | None  # None in a skipped update
    grad_norm_passage: float | None  # None with a shared encoder too
    grad_norm_ratio: float | None  # passage / query
    queries_per_second: float
    bank_filled: int  # slots
    skipped: int  # updates so far that left the weights as they were
    loss_scale: float | None = None  # of fp16
    bank_oldest: int | None = None  # age of the oldest slot, in updates
    peak_memory: float | None = None  # MiB: of this update on a GPU, else of the process so far
    # Of the last micro-batch, in every `diagnostics_every`-th update: see `diagnostics.Look`.
    masked_pairs: int | None = None
    mass_local: float | None = None
    mass_by_age: list[float] | None = None


class DivergedError(RuntimeError):
    """Loss or gradient is not finite; the weights are still those before the update."""
