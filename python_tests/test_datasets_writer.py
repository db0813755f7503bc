"""What is written is read again as it was."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from tiny_retriever import tiny_dataset

from contaccum_ext.datasets import (
    DataError,
    EvalQuery,
    Passage,
    RetrievalDataset,
    TrainExample,
    load_dataset,
    write_dataset,
)


def test_a_data_set_survives_the_round_trip(tmp_path):
    dataset = tiny_dataset()
    dataset.corpus["p0"] = Passage("p0", "A title", 'Zwölf Äpfel\nund "mehr"')
    dataset.test.append(EvalQuery("graded", "which", ("p1", "p2"), ("an answer",), (3, 1)))
    dataset.test.append(EvalQuery("answered", "who", (), ("one", "two")))
    dataset.train[3] = replace(dataset.train[3], negatives=())
    write_dataset(dataset, tmp_path / "data")
    read = load_dataset(tmp_path / "data")
    assert replace(read, name="tiny") == dataset


def test_a_split_without_queries_gets_no_file(tmp_path):
    write_dataset(replace(tiny_dataset(), valid=[]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "corpus.jsonl",
        "test.jsonl",
        "train.jsonl",
    ]


def test_passages_without_text_are_left_out_and_counted(tmp_path, caplog):
    corpus = {
        "a": Passage("a", "", "text"),
        "b": Passage("b", "title alone", ""),
        "c": Passage("c", "", ""),
    }
    train = [
        TrainExample("1", "one", ("a", "c"), ("b", "c")),
        TrainExample("2", "two", ("c",), ("a",)),
    ]
    test = [EvalQuery("3", "three", ("c", "b"), (), (2, 5)), EvalQuery("4", "four", ("c",))]
    with caplog.at_level(logging.WARNING):
        write_dataset(RetrievalDataset("x", corpus, train, [], test), tmp_path)
    assert "1 passages without text and 2 queries that have no other positive" in caplog.text
    read = load_dataset(tmp_path)
    assert read.corpus == {"a": corpus["a"], "b": Passage("b", "", "title alone")}
    assert read.train == [TrainExample("1", "one", ("a",), ("b",))]
    assert read.test == [EvalQuery("3", "three", ("b",), (), (5,))]


@pytest.mark.parametrize(
    ("grades", "says"),
    [
        ("[1]", "expected a list of 2 integers, got [1]"),
        ("3", "expected a list of 2 integers, got 3"),
        ("[1, 0]", "expected integers from 1 on, got 0"),
        ("[1, true]", "expected integers from 1 on, got True"),
        ('[1, "2"]', "expected integers from 1 on, got '2'"),
    ],
)
def test_grades_that_do_not_fit_are_refused(tmp_path, grades, says):
    write_dataset(tiny_dataset(), tmp_path)
    record = f'{{"id": "q", "query": "x", "pos": ["p1", "p2"], "grades": {grades}}}'
    (tmp_path / "test.jsonl").write_text(record + "\n")
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path)
    assert str(caught.value).endswith(f"test.jsonl:1: field 'grades': {says}")
