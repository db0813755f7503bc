"""Exact search, against Python's own sort."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contaccum_ext.retrieval import (
    search,
)
from contaccum_ext.retrieval.search import topk_stable


def brute_force(queries, corpus, k):
    """Python's sort by falling score, then rising index."""
    rows = (queries @ corpus.T).tolist()
    return [sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in rows]


def integer_vectors(seed: int, n: int, d: int, largest: int = 2) -> torch.Tensor:
    """Small integers: sums are exact, and equal scores abound."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, (n, d), generator=generator).float()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_torch_search_equals_brute_force_with_ties(data):
    n_queries, n, d = (data.draw(st.integers(1, top)) for top in (7, 40, 4))
    k, seed = data.draw(st.integers(1, n)), data.draw(st.integers(0, 10_000))
    at_once = data.draw(st.sampled_from([1, 4, 16, 1 << 20]))
    queries, corpus = integer_vectors(seed, n_queries, d), integer_vectors(seed + 1, n, d)
    module = sys.modules["contaccum_ext.retrieval.search"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SCORES_AT_ONCE", at_once)
        scores, indices = search(queries, corpus, k, backend="torch", query_block=3)
    assert indices.tolist() == brute_force(queries, corpus, k)
    torch.testing.assert_close(scores, (queries @ corpus.T).gather(1, indices), rtol=0, atol=0)


def test_faiss_equals_torch_where_no_scores_tie():
    pytest.importorskip("faiss")
    queries, corpus = integer_vectors(3, 50, 24, 1000), integer_vectors(4, 700, 24, 1000)
    ours = search(queries, corpus, 150, backend="torch", query_block=16)
    faiss = search(queries, corpus, 150, backend="faiss")
    assert (ours[0][:, :-1] > ours[0][:, 1:]).all(), "the example has ties"
    for a, b in zip(ours, faiss, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert ours[1].tolist() == brute_force(queries, corpus, 150)


def test_faiss_orders_ties_within_the_result():
    pytest.importorskip("faiss")
    corpus = torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0]])
    scores, indices = search(torch.ones(1, 1), corpus, 5, backend="faiss")
    assert indices.tolist() == [[1, 3, 0, 2, 4]]
    assert scores.tolist() == [[2, 2, 1, 1, 1]]


def test_search_without_faiss(monkeypatch):
    module = sys.modules["contaccum_ext.retrieval.search"]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "_search_faiss", None)
    corpus = torch.eye(3)
    assert search(corpus, corpus, 1)[1].tolist() == [[0], [1], [2]]


def test_topk_stable_takes_the_lower_index_at_rank_k():
    scores = torch.tensor([[0.0, 1, 1, 1, 2], [5.0, 4, 3, 2, 1]])
    values, indices = topk_stable(scores, 3)
    assert values.tolist() == [[2, 1, 1], [5, 4, 3]]
    assert indices.tolist() == [[4, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("queries", "corpus", "k", "message"),
    [
        (torch.ones(2), torch.ones(3, 2), 1, "query_vectors: expected non-empty (n, d), got (2,)"),
        (torch.ones(1, 2), torch.ones(0, 2), 1, "corpus_vectors: expected non-empty (n, d)"),
        (torch.ones(1, 2), torch.ones(3, 4), 1, "corpus_vectors: expected d = 2 as in"),
        (torch.ones(1, 2), torch.ones(3, 2), 4, "k: expected 1 to 3 (the corpus), got 4"),
        (torch.ones(1, 2), torch.ones(3, 2), 0, "k: expected 1 to 3 (the corpus), got 0"),
        (
            torch.ones(1, 2),
            torch.tensor([[1.0, 1], [1, math.nan]]),
            1,
            "corpus_vectors: expected finite numbers, row 1 is not",
        ),
    ],
)
def test_search_refuses_bad_input(queries, corpus, k, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        search(queries, corpus, k)


def test_search_refuses_other_types_and_backends():
    with pytest.raises(TypeError, match=r"query_vectors: expected torch\.float32, got .*64"):
        search(torch.ones(1, 2).double(), torch.ones(1, 2), 1)
    with pytest.raises(ValueError, match="backend: expected 'auto', 'faiss' or 'torch'"):
        search(torch.ones(1, 2), torch.ones(1, 2), 1, backend="annoy")  # type: ignore[arg-type]
