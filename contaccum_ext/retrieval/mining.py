"""Hard negatives from a dense retriever."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..datasets import RetrievalDataset, TrainExample
from .search import search

logger = logging.getLogger(__name__)


def mine_dense_negatives(
    dataset: RetrievalDataset,
    query_vectors: torch.Tensor,
    corpus_vectors: torch.Tensor,
    per_query: int = 1,
    *,
    depth: int = 100,
    margin: float | None = None,
) -> list[TrainExample]:
    """Gives each training example its best ranked passages that are no positives as negatives.

    A passage is passed over that is a positive, has the same text as one, or, with a margin, scores
    higher than the best positive's score less the margin: what a retriever ranks beside or above
    the positive is often an answer that nobody has marked as one.

    Args:
        dataset: whose corpus is searched.
        query_vectors: (Q, d) fp32, a row per training example.
        corpus_vectors: (N, d) fp32, a row per passage in the order of the corpus.
        per_query: negatives wanted per example, at least 1.
        depth: results looked at per example.
        margin: in units of the score; None applies none. Larger is stricter, 0 allows all below the
            positive.

    Returns:
        The examples in their order, with at most `per_query` negatives each, best first. How many
        have fewer is logged.

    Raises:
        ValueError: `per_query` or `depth` below 1, or vectors that do not fit the data.
    """
    for name, value in (("per_query", per_query), ("depth", depth)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    examples, ids = dataset.train_examples(), list(dataset.corpus)
    wanted = {"query_vectors": len(examples), "corpus_vectors": len(ids)}
    for name, vectors in (("query_vectors", query_vectors), ("corpus_vectors", corpus_vectors)):
        if len(vectors) != wanted[name]:
            raise ValueError(f"{name}: expected {wanted[name]} rows, got {len(vectors)}")
    rows = {passage_id: row for row, passage_id in enumerate(ids)}
    scores, indices = search(query_vectors, corpus_vectors, min(depth, len(ids)))
    mined = []
    for example, vector, values, found in zip(
        examples, query_vectors, scores.tolist(), indices.tolist(), strict=True
    ):
        limit = float("inf")
        if margin is not None:
            positives = corpus_vectors[[rows[key] for key in example.positives]]
            limit = (positives @ vector).max().item() - margin
        refused = {dataset.corpus[key].full() for key in example.positives}
        negatives = [
            ids[index]
            for value, index in zip(values, found, strict=True)
            if value <= limit and dataset.corpus[ids[index]].full() not in refused
        ]
        mined.append(replace(example, negatives=tuple(negatives[:per_query])))
    _log_shortage(mined, per_query)
    return mined


def _log_shortage(mined: Sequence[TrainExample], per_query: int) -> None:
    short = sum(len(example.negatives) < per_query for example in mined)
    if short:
        logger.info("%d of %d examples have fewer than %d negatives", short, len(mined), per_query)
