"""A dense retriever's scores on a split, over the whole corpus."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..datasets import RetrievalDataset
from .encode import Encoder, Tokenizer, encode_texts
from .metrics import default_metrics, evaluate_per_query, mean_values
from .search import Backend, search


@dataclass(frozen=True)
class EvalOptions:
    """How `evaluate_dense` encodes and searches.

    Args:
        query_max_length: tokens kept of a query.
        passage_max_length: tokens kept of a passage.
        batch_size: texts per call of an encoder.
        device: where batches are sent; where the encoder's parameters are by default.
        autocast_dtype: encode under autocast with this dtype, e.g. torch.bfloat16.
        backend: see `search`.
        progress: show progress bars.
    """

    query_max_length: int = 64
    passage_max_length: int = 256
    batch_size: int = 64
    device: torch.device | str | None = None
    autocast_dtype: torch.dtype | None = None
    backend: Backend = "auto"
    progress: bool = False


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate_dense` measured.

    Args:
        metrics: metric -> mean over the queries.
        per_query: metric -> query id -> value, for tests of significance.
        seconds: wall time of encoding, searching and scoring.
        n_queries: queries scored.
        n_passages: passages searched.
    """

    metrics: dict[str, float]
    per_query: dict[str, dict[str, float]] = field(repr=False)
    seconds: float
    n_queries: int
    n_passages: int


def evaluate_dense(
    query_encoder: Encoder,
    passage_encoder: Encoder,
    tokenizer: Tokenizer,
    dataset: RetrievalDataset,
    *,
    split: str = "test",
    k: int = 100,
    metrics: Sequence[str] | None = None,
    options: EvalOptions | None = None,
) -> EvalResult:
    """Scores `query_encoder(query) . passage_encoder(passage)` as a ranking of the whole corpus.

    Args:
        query_encoder: see `encode.Encoder`.
        passage_encoder: may be the same object.
        tokenizer: a transformers tokenizer.
        dataset: whose queries to score, over all of its passages.
        split: "valid" or "test".
        k: passages retrieved per query (all of them in a smaller corpus).
        metrics: see `evaluate_run`; the usual ones by default.
        options: see `EvalOptions`.

    Raises:
        ValueError: the split is absent, the encoders' outputs differ in d or are not finite, or a
            metric does not fit the queries.
    """
    begin = time.perf_counter()
    options = options or EvalOptions()
    queries = dataset.eval_queries(split)
    # Before the hours of encoding: an unknown metric is an error at once.
    chosen = default_metrics(queries) if metrics is None else tuple(metrics)
    evaluate_per_query(queries, {}, dataset.corpus, chosen)

    def encode(encoder: Encoder, texts: Sequence[str], max_length: int) -> torch.Tensor:
        return encode_texts(
            encoder,
            tokenizer,
            texts,
            max_length=max_length,
            batch_size=options.batch_size,
            device=options.device,
            autocast_dtype=options.autocast_dtype,
            progress=options.progress,
        )

    passage_ids = list(dataset.corpus)
    query_vectors = encode(
        query_encoder, [query.query for query in queries], options.query_max_length
    )
    corpus_vectors = encode(
        passage_encoder,
        [passage.full() for passage in dataset.corpus.values()],
        options.passage_max_length,
    )
    scores, indices = search(
        query_vectors, corpus_vectors, min(k, len(passage_ids)), backend=options.backend
    )
    run = {
        query.id: [
            (passage_ids[index], score)
            for index, score in zip(row_indices, row_scores, strict=True)
        ]
        for query, row_indices, row_scores in zip(
            queries, indices.tolist(), scores.tolist(), strict=True
        )
    }
    per_query = evaluate_per_query(queries, run, dataset.corpus, chosen)
    return EvalResult(
        metrics=mean_values(per_query),
        per_query=per_query,
        seconds=time.perf_counter() - begin,
        n_queries=len(queries),
        n_passages=len(passage_ids),
    )
