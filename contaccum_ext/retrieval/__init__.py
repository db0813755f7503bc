"""Encode a corpus, search it, score it."""

from __future__ import annotations

from .bm25 import BM25Index, bm25_run, mine_negatives
from .encode import Encoder, encode_texts
from .evaluate import EvalOptions, EvalResult, evaluate_dense
from .metrics import default_metrics, evaluate_per_query, evaluate_run, mean_values
from .search import search

__all__ = [
    "BM25Index",
    "Encoder",
    "EvalOptions",
    "EvalResult",
    "bm25_run",
    "default_metrics",
    "encode_texts",
    "evaluate_dense",
    "evaluate_per_query",
    "evaluate_run",
    "mean_values",
    "mine_negatives",
    "search",
]
