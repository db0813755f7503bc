"""Retrieval quality: exact search of the whole corpus on the device, NDCG@10 and Recall@20."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.drift.data import DataSet, upload
from benchmarks.drift.encoder import Towers

_DEPTH, _NDCG, _RECALL = 20, 10, 20


def evaluate(towers: Towers, data: DataSet, bf16: bool) -> dict[str, float]:
    """{"test_ndcg10", "test_recall20", "valid_ndcg10"}, means over queries.

    Args:
        towers: in any mode; dropout is off meanwhile.
        data: its corpus is searched.
        bf16: encode under autocast; the search is fp32.
    """
    corpus = towers.passage.encode(data.corpus, np.arange(len(data.corpus)), bf16)
    found = {}
    for split in ("valid", "test"):
        texts = data.queries[split]
        queries = towers.query.encode(texts, np.arange(len(texts)), bf16)
        top = search(queries, corpus, min(_DEPTH, len(corpus)))
        positives = upload(data.positives[split], queries.device)
        found[f"{split}_ndcg10"] = ndcg(top, positives, _NDCG)
        found[f"{split}_recall20"] = recall(top, positives, _RECALL)
    return {name: found[name] for name in ("test_ndcg10", "test_recall20", "valid_ndcg10")}


def search(queries: Tensor, corpus: Tensor, depth: int) -> Tensor:
    """(queries, depth) numbers of the nearest by dot product; -1 where a score is not a number."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    scores = queries @ corpus.T
    torch.set_float32_matmul_precision(precision)
    # topk puts NaN first: a collapsed model would find whatever stands there.
    values, numbers = scores.nan_to_num(nan=-torch.inf).topk(depth, dim=1)
    return numbers.masked_fill(values == -torch.inf, -1)


def ndcg(top: Tensor, positives: Tensor, depth: int) -> float:
    """Binary relevance, log2 discount. top: (q, >= depth); positives: (q, p), -1 padded."""
    hits = _hits(top[:, :depth], positives)
    discount = 1 / torch.arange(2, depth + 2, device=top.device).double().log2()
    best = discount.cumsum(0)[(positives >= 0).sum(1).clamp(max=depth) - 1]
    return ((hits * discount[: hits.shape[1]]).sum(1) / best).mean().item()


def recall(top: Tensor, positives: Tensor, depth: int) -> float:
    """Share of the positives among the first `depth`."""
    return (_hits(top[:, :depth], positives).sum(1) / (positives >= 0).sum(1)).mean().item()


def _hits(top: Tensor, positives: Tensor) -> Tensor:
    return ((top[:, :, None] == positives[:, None]) & (top >= 0)[:, :, None]).any(2).double()
