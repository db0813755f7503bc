"""Train several methods on equal terms and score each, beside BM25 and the untrained model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from contaccum_ext.datasets import RetrievalDataset
from contaccum_ext.retrieval import (
    bm25_run,
    encode_texts,
    evaluate_per_query,
    mean_values,
    search,
)
from contaccum_ext.training.config import TrainConfig
from contaccum_ext.training.encoder import DualEncoder, load_tokenizer
from contaccum_ext.training.metrics import UpdateMetrics
from contaccum_ext.training.precision import autocast_dtype
from contaccum_ext.training.trainer import Trainer

BM25 = "BM25"
UNTRAINED = "untrained"
DEPTH = 100  # passages retrieved per query

Run = dict[str, list[tuple[str, float]]]  # query id -> (passage id, score), best first


@dataclass(frozen=True)
class Row:
    """One retriever of a comparison."""

    name: str
    metrics: dict[str, float]  # means over the test queries
    per_query: dict[str, dict[str, float]]  # metric -> query id -> value
    run: Run
    history: list[UpdateMetrics] = field(default_factory=list)  # empty when nothing was trained
    train_seconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Retrievers scored on the same queries over the same corpus."""

    dataset: RetrievalDataset
    config: TrainConfig  # shared by all methods but for `method`
    rows: list[Row]

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def histories(self) -> dict[str, list[UpdateMetrics]]:
        """Metrics of every update, by the name of what was trained."""
        return {row.name: row.history for row in self.rows if row.history}


def compare(
    dataset: RetrievalDataset,
    encoder: str | Path,
    config: TrainConfig,
    methods: Sequence[str],
    output: Path,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Train each method from the same start on the same examples and score all of them.

    Args:
        dataset: trained on and tested on.
        encoder: Hugging Face directory or name both encoders start from.
        config: settings; `method` is replaced by each method in turn.
        methods: names from `METHODS`.
        output: each method's run goes to output/METHOD.
        say: told what happens next, also shows progress bars; None is silent.

    Raises:
        EncoderError: the encoder cannot be opened.
        TrainingDataError: the data set cannot be trained on.
        ValueError: the data set has no test split.
    """
    tell = say or (lambda message: None)
    tokenizer = load_tokenizer(encoder)
    start = DualEncoder.from_pretrained(encoder, config)
    tell(f"BM25 over {len(dataset.corpus)} passages")
    rows = [_scored(BM25, dataset, bm25_run(dataset, dataset.eval_queries("test"), DEPTH))]
    tell(f"the untrained model on {len(dataset.test)} test queries")
    rows.append(_scored(UNTRAINED, dataset, dense_run(start, tokenizer, dataset, config)))
    for method in methods:
        tell(f"training with {method}")
        method_config = replace(config, method=method)
        model = DualEncoder.from_pretrained(encoder, method_config)
        trainer = Trainer(model, tokenizer, dataset, method_config, output / method)
        begin = time.perf_counter()
        history = trainer.train(progress=say is not None)
        seconds = time.perf_counter() - begin
        run = dense_run(model, tokenizer, dataset, method_config)
        rows.append(_scored(method, dataset, run, history, seconds))
    return Comparison(dataset, config, rows)


def dense_run(
    model: DualEncoder,
    tokenizer: PreTrainedTokenizerBase,
    dataset: RetrievalDataset,
    config: TrainConfig,
    split: str = "test",
) -> Run:
    """The passages a dual encoder ranks first for each query, over the whole corpus."""
    queries = dataset.eval_queries(split)
    query_vectors = encode_texts(
        model.query,
        tokenizer,
        [query.query for query in queries],
        max_length=config.query_max_length,
        autocast_dtype=autocast_dtype(config),
    )
    passage_vectors = encode_texts(
        model.passage,
        tokenizer,
        [passage.full() for passage in dataset.corpus.values()],
        max_length=config.passage_max_length,
        autocast_dtype=autocast_dtype(config),
    )
    ids = list(dataset.corpus)
    scores, indices = search(query_vectors, passage_vectors, min(DEPTH, len(ids)))
    return {
        query.id: [(ids[index], score) for index, score in zip(*ranking, strict=True)]
        for query, *ranking in zip(queries, indices.tolist(), scores.tolist(), strict=True)
    }


def _scored(
    name: str,
    dataset: RetrievalDataset,
    run: Run,
    history: list[UpdateMetrics] | None = None,
    seconds: float | None = None,
) -> Row:
    per_query = evaluate_per_query(dataset.test, run, dataset.corpus)
    return Row(name, mean_values(per_query), per_query, run, history or [], seconds)


@dataclass(frozen=True)
class Difference:
    """How far one retriever is ahead of another on a metric."""

    mean: float
    low: float  # 2.5th percentile of the paired bootstrap
    high: float  # 97.5th percentile


def paired_difference(
    better: Row, worse: Row, metric: str, resamples: int = 2000, seed: int = 0
) -> Difference:
    """Mean difference over the queries, with a 95% interval from a paired bootstrap.

    The interval speaks of the choice of test queries; it says nothing about other seeds.

    Args:
        better, worse: rows of the same comparison; the difference is better - worse.
        metric: one that both have.
        resamples: bootstrap samples of the queries.
        seed: of the resampling.
    """
    ours, theirs = better.per_query[metric], worse.per_query[metric]
    gaps = torch.tensor([ours[query] - theirs[query] for query in ours], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(gaps), (resamples, len(gaps)), generator=generator)
    means = gaps[picks].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(gaps.mean().item(), low, high)
