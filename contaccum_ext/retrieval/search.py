"""Exact maximum inner product search."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch

from .optional import require

Backend = Literal["auto", "faiss", "torch"]

# Elements of the largest score matrix held at a time: 256 MiB of fp32.
_SCORES_AT_ONCE = 1 << 26


def search(
    query_vectors: torch.Tensor,
    corpus_vectors: torch.Tensor,
    k: int,
    *,
    backend: Backend = "auto",
    query_block: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k passages with the largest inner products, as `(q @ c.T).topk(k)`, in blocks.

    Rows are ordered by falling score, equal scores by rising index. With the torch backend that
    also decides which of several equal scores at rank k stay; faiss decides that as it likes.

    Args:
        query_vectors: (Q, d) fp32.
        corpus_vectors: (N, d) fp32, same device.
        k: results per query, at most N.
        backend: "faiss" (IndexFlatIP, CPU only), "torch", or "auto": faiss where it is installed
            and the vectors are on the CPU.
        query_block: queries scored at a time by the torch backend.

    Returns:
        scores (Q, k) fp32 and indices (Q, k) int64, on the vectors' device.

    Raises:
        TypeError: vectors that are not fp32.
        ValueError: shapes, devices, k or backend that do not fit, or NaN or infinite vectors.
        ImportError: backend "faiss" where faiss is not installed.
    """
    _check(query_vectors, corpus_vectors, k)
    on_cpu = query_vectors.device.type == "cpu"
    if backend == "auto":
        backend = "faiss" if on_cpu and find_spec("faiss") is not None else "torch"
    if backend == "faiss":
        if not on_cpu:
            raise ValueError(f"backend 'faiss': expected CPU vectors, got {query_vectors.device}")
        return _search_faiss(query_vectors, corpus_vectors, k)
    if backend == "torch":
        if query_block < 1:
            raise ValueError(f"query_block: expected at least 1, got {query_block}")
        return _search_torch(query_vectors, corpus_vectors, k, query_block)
    raise ValueError(f"backend: expected 'auto', 'faiss' or 'torch', got {backend!r}")


def topk_stable(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`scores.topk(k)` along the last of two axes, with ties going to the lower index.

    Args:
        scores: (Q, N), no NaN.
        k: at most N.

    Returns:
        values (Q, k) and indices (Q, k) int64.
    """
    values, indices = scores.topk(k, dim=1)
    # topk picks any of the equal scores at rank k: such rows take a full stable sort.
    tied = (scores >= values[:, -1:]).sum(dim=1) > k
    if tied.any():
        sorted_values, sorted_indices = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], indices[tied] = sorted_values[:, :k], sorted_indices[:, :k]
    return _order_ties(values, indices)


def _order_ties(values: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts each row by falling value, then rising index."""
    by_index = indices.argsort(dim=1)
    values, indices = values.gather(1, by_index), indices.gather(1, by_index)
    by_value = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, by_value), indices.gather(1, by_value)


def _check(queries: torch.Tensor, corpus: torch.Tensor, k: int) -> None:
    for name, vectors in (("query_vectors", queries), ("corpus_vectors", corpus)):
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise ValueError(f"{name}: expected non-empty (n, d), got {tuple(vectors.shape)}")
        if vectors.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {vectors.dtype}")
        # The sum of a row is finite only where all its elements are: no (n, d) temporary.
        finite = vectors.sum(dim=1).isfinite()
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"{name}: expected finite numbers, row {row} is not")
    if queries.shape[1] != corpus.shape[1]:
        raise ValueError(
            f"corpus_vectors: expected d = {queries.shape[1]} as in query_vectors, "
            f"got {corpus.shape[1]}"
        )
    if queries.device != corpus.device:
        raise ValueError(
            f"corpus_vectors: expected device {queries.device} as for query_vectors, "
            f"got {corpus.device}"
        )
    if not 1 <= k <= corpus.shape[0]:
        raise ValueError(f"k: expected 1 to {corpus.shape[0]} (the corpus), got {k}")


def _search_faiss(
    queries: torch.Tensor, corpus: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    index = require("faiss").IndexFlatIP(corpus.shape[1])
    index.add(corpus.detach().contiguous().numpy())
    scores, indices = index.search(queries.detach().contiguous().numpy(), k)
    return _order_ties(torch.from_numpy(scores), torch.from_numpy(indices))


@torch.no_grad()
def _search_torch(
    queries: torch.Tensor, corpus: torch.Tensor, k: int, query_block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    corpus_block = max(k, _SCORES_AT_ONCE // query_block)
    found = []
    for block in queries.split(query_block):
        best: tuple[torch.Tensor, torch.Tensor] | None = None
        for start in range(0, corpus.shape[0], corpus_block):
            scores = block @ corpus[start : start + corpus_block].T  # (query_block, corpus_block)
            values, indices = topk_stable(scores, min(k, scores.shape[1]))
            indices += start
            if best is not None:
                # Earlier blocks have the lower indices and come first: a stable order keeps them.
                values = torch.cat([best[0], values], dim=1)
                indices = torch.cat([best[1], indices], dim=1)
                order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
                values, indices = values.gather(1, order), indices.gather(1, order)
            best = values, indices
        assert best is not None
        found.append(best)
    return torch.cat([scores for scores, _ in found]), torch.cat([ids for _, ids in found])
