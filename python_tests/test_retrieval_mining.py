"""Hard negatives from vectors: what is passed over, in which order the rest comes."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch
from tiny_retriever import tiny_dataset

from contaccum_ext.datasets import Passage, RetrievalDataset, TrainExample
from contaccum_ext.retrieval.mining import mine_dense_negatives

# One query (1, 0): a passage's score is its first component.
SCORES = {"a": 0.9, "b": 0.8, "pos": 0.7, "copy": 0.65, "c": 0.6, "other": 0.5, "d": 0.1}


def data() -> tuple[RetrievalDataset, torch.Tensor, torch.Tensor]:
    corpus = {key: Passage(key, "", f"text of {key}") for key in SCORES}
    corpus["copy"] = Passage("copy", "", corpus["pos"].text)
    examples = [TrainExample("q", "query", ("other", "pos"), ("d",))]
    vectors = torch.tensor([[score, 1.0] for score in SCORES.values()])
    dataset = RetrievalDataset("made", corpus, examples, [], [])
    return dataset, torch.tensor([[1.0, 0.0]]), vectors


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"per_query": 1}, "a"),
        ({"per_query": 9}, "abcd"),
        ({"per_query": 2, "depth": 3}, "ab"),
        ({"per_query": 9, "depth": 4}, "ab"),
        ({"per_query": 9, "margin": 0.0}, "cd"),  # below the best positive, 0.7
        ({"per_query": 9, "margin": 0.2}, "d"),
        ({"per_query": 9, "margin": -0.15}, "bcd"),  # up to 0.85
    ],
)
def test_positives_copies_of_them_and_what_is_too_near_are_passed_over(options, expected):
    (example,) = mine_dense_negatives(*data(), **options)
    assert "".join(example.negatives) == expected
    assert (example.id, example.positives) == ("q", ("other", "pos"))


def test_every_example_gets_the_best_of_its_own_query():
    dataset = tiny_dataset()
    torch.manual_seed(0)
    queries = torch.randn(len(dataset.train), 8)
    corpus = torch.randn(len(dataset.corpus), 8)
    mined = mine_dense_negatives(dataset, queries, corpus, 3)
    ids = list(dataset.corpus)
    for example, before, query in zip(mined, dataset.train, queries, strict=True):
        ranked = [ids[index] for index in (corpus @ query).argsort(descending=True)]
        expected = [key for key in ranked if key not in example.positives][:3]
        assert list(example.negatives) == expected
        assert replace(example, negatives=before.negatives) == before


def test_shortage_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        mine_dense_negatives(*data(), per_query=3, margin=0.0)
    assert "1 of 1 examples have fewer than 3 negatives" in caplog.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"per_query": 0}, "per_query: expected at least 1, got 0"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"query_vectors": torch.zeros(2, 2)}, "query_vectors: expected 1 rows, got 2"),
        ({"corpus_vectors": torch.zeros(3, 2)}, "corpus_vectors: expected 7 rows, got 3"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    dataset, queries, corpus = data()
    arguments = {"query_vectors": queries, "corpus_vectors": corpus, "per_query": 1} | change
    with pytest.raises(ValueError, match=re.escape(says)):
        mine_dense_negatives(dataset, **arguments)
