"""What end-to-end runs are made of: the ways to train, what they share, and what comes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contaccum_ext.datasets import RetrievalDataset
from contaccum_ext.drift_signs import ScoreShift
from contaccum_ext.training import TrainConfig

THIN, SENTENCE_TRANSFORMERS = "contaccum train", "sentence-transformers"
UNTRAINED = "untrained"
METRIC = "NDCG@10"


@dataclass(frozen=True)
class Method:
    """A way to train: settings of `TrainConfig`, or a loss of sentence-transformers with its own.

    Args:
        name: of the row.
        integration: which trainer.
        settings: beyond those that all share.
        loss: name of the class, in sentence-transformers or in the integration.
        cached: an update is one batch, encoded n rows at a time.
    """

    name: str
    integration: str
    settings: dict[str, Any] = field(default_factory=dict)
    loss: str = ""
    cached: bool = False


_WIDE = {"bank_size": 2048}

METHODS = {
    method.name: method
    for method in (
        Method("gradaccum", THIN, {"method": "gradaccum"}),
        Method("contaccum-128", THIN, {"method": "contaccum", "bank_size": 128}),
        Method("contaccum", THIN, {"method": "contaccum"}),
        Method("contaccum-2048", THIN, {"method": "contaccum", **_WIDE}),
        Method("gradcache-contaccum", THIN, {"method": "gradcache_contaccum"}),
        Method("st-mnrl", SENTENCE_TRANSFORMERS, {}, "MultipleNegativesRankingLoss"),
        Method("st-contaccum", SENTENCE_TRANSFORMERS, {}, "ContAccumLoss"),
        Method("st-contaccum-2048", SENTENCE_TRANSFORMERS, _WIDE, "ContAccumLoss"),
        Method(
            "st-cached-mnrl", SENTENCE_TRANSFORMERS, {}, "CachedMultipleNegativesRankingLoss", True
        ),
        Method("st-cached-contaccum", SENTENCE_TRANSFORMERS, {}, "CachedContAccumLoss", True),
    )
}


@dataclass(frozen=True)
class EndToEndOptions:
    """What all methods share.

    Args:
        data: directory of a data set with train and test parts.
        model: Hugging Face directory that every method starts from.
        layers: of it that are kept, the first ones; None for all.
        methods: names from `METHODS`.
        updates: of the optimizer; None for one pass over the training set's whole updates.
        n: queries per micro-batch.
        accumulation: micro-batches per update.
        learning_rate: peak.
        seed: of order, negatives and dropout.
        processes: methods trained side by side; with more than one, times are those of processes
            that share the machine.
    """

    data: Path
    model: Path
    layers: int | None = None
    methods: tuple[str, ...] = tuple(METHODS)
    updates: int | None = None
    n: int = 8
    accumulation: int = 16
    learning_rate: float = 2e-4
    seed: int = 1
    processes: int = 1


@dataclass(frozen=True)
class Setup:
    """What a method is given."""

    dataset: RetrievalDataset
    start: Path  # model and tokenizer
    config: TrainConfig  # of all methods; its max_updates is the budget

    @property
    def updates(self) -> int:
        assert self.config.max_updates is not None
        return self.config.max_updates


@dataclass(frozen=True)
class Trained:
    """What came of a method's training."""

    seconds: float
    bank_filled: int = 0
    bank_window: int | None = None  # slots in use at the end
    shift: ScoreShift | None = None  # at the last look


@dataclass(frozen=True)
class Outcome:
    """A row: empty where it was not measured, and `note` says why."""

    method: str
    integration: str
    queries: int = 0  # trained on
    trained: Trained | None = None
    peak_bytes: int | None = None  # of the device, in training
    score: float | None = None  # METRIC
    note: str = ""
