"""What a run of the drift experiments reports, and the settings it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from test_drift_run import tiny

from benchmarks.drift.evaluate import ndcg, recall, search


def test_measures_of_retrieval():
    corpus = torch.eye(5)
    queries = torch.tensor([[0.0, 3, 2, 1, 0], [5.0, 4, 3, 2, 1]])
    top = search(queries, corpus, 3)
    assert top.tolist() == [[1, 2, 3], [0, 1, 2]]
    positives = torch.tensor([[2, -1], [0, 4]])
    second = (1 / math.log2(3) + 1 / (1 + 1 / math.log2(3))) / 2
    assert ndcg(top, positives, 10) == pytest.approx(second)
    assert recall(top, positives, 20) == pytest.approx((1 + 1 / 2) / 2)
    nothing = search(torch.full((1, 5), math.nan), corpus, 3)
    assert recall(nothing, torch.tensor([[0]]), 20) == 0


def test_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"method: expected one of .* got 'prayer'"):
        tiny(method="prayer")
    with pytest.raises(ValueError, match=r"bank: expected slots with method bank alone, got 8"):
        tiny(method="inbatch", bank=8)
    with pytest.raises(ValueError, match=r"bank: expected a multiple of n = 4, got 6"):
        tiny(bank=6)
