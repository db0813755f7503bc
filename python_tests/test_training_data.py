"""Which examples an update uses, and how they become tensors."""

from __future__ import annotations

import pytest
import torch
from tiny_retriever import (
    tiny_config,
    tiny_dataset,
)

from contaccum_ext.datasets import RetrievalDataset
from contaccum_ext.training import (
    METHODS,
    TrainingDataError,
)
from contaccum_ext.training.data import Collator, Sampler
from contaccum_ext.training.encoder import load_tokenizer

CPU = torch.device("cpu")


def test_all_methods_see_the_same_examples_in_the_same_order():
    seen = {
        method: [
            Sampler(tiny_dataset(), tiny_config(method=method)).update(index) for index in range(12)
        ]
        for method in METHODS
    }
    assert all(seen[method] == seen["inbatch"] for method in METHODS)


def test_an_epoch_is_every_example_once_and_the_next_one_another_order():
    sampler = Sampler(tiny_dataset(train=37), tiny_config())
    assert sampler.updates_per_epoch == 5
    epochs = [
        [draw for index in range(start, start + 5) for draw in sampler.update(index)]
        for start in (0, 5)
    ]
    queries = [[draw.query for draw in epoch] for epoch in epochs]
    assert (
        sorted(queries[0]) == sorted(queries[1]) == sorted(e.query for e in tiny_dataset(37).train)
    )
    assert queries[0] != queries[1]
    assert [len(sampler.update(index)) for index in range(5)] == [8, 8, 8, 8, 5]
    # Asked for out of order, as a resumed run does.
    assert sampler.update(7) == Sampler(tiny_dataset(train=37), tiny_config()).update(7)


def test_hard_negatives_are_the_examples_own_and_drawn_anew_every_epoch():
    dataset = tiny_dataset(negatives=3)
    own = {example.query: example for example in dataset.train}
    sampler = Sampler(dataset, tiny_config(hard_negatives=2))
    drawn = [
        {
            draw.query: draw.passages
            for index in range(5)
            for draw in sampler.update(epoch * 5 + index)
        }
        for epoch in range(2)
    ]
    for epoch in drawn:
        for query, (positive, *negatives) in epoch.items():
            assert (positive,) == own[query].positives
            assert len(set(negatives)) == 2
            assert set(negatives) < set(own[query].negatives)
    assert drawn[0] != drawn[1]


def test_missing_hard_negatives_are_filled_up_with_a_warning():
    dataset = tiny_dataset(negatives=1)
    dataset.train[3] = type(dataset.train[3])("q3", dataset.train[3].query, ("p3",), ())
    with pytest.warns(UserWarning, match=r"1 of 40 training examples .* \(first: q3\)"):
        sampler = Sampler(dataset, tiny_config())
    draws = [draw for index in range(5) for draw in sampler.update(index)]
    assert all(len(set(draw.passages)) == 2 for draw in draws)


def test_data_without_any_hard_negative_or_example_is_refused():
    with pytest.raises(TrainingDataError, match="tiny: hard_negatives is 1, but no training"):
        Sampler(tiny_dataset(negatives=0), tiny_config())
    Sampler(tiny_dataset(negatives=0), tiny_config(hard_negatives=0))
    dataset = tiny_dataset()
    with pytest.raises(TrainingDataError, match="tiny: no training examples"):
        Sampler(RetrievalDataset("tiny", dataset.corpus, [], [], []), tiny_config())


def test_collation_keeps_passages_of_a_query_together_and_numbers_them(start):
    dataset, config = tiny_dataset(), tiny_config(query_max_length=5)
    tokenizer = load_tokenizer(start)
    draws = Sampler(dataset, config).update(0)[:3]
    batch = Collator(tokenizer, dataset.corpus, config)(draws)
    assert batch.passages["input_ids"].shape[0] == 6
    assert batch.queries["input_ids"].shape == (3, 5)
    ids = list(dataset.corpus)
    assert [[ids[number] for number in row] for row in batch.passage_ids.tolist()] == [
        list(draw.passages) for draw in draws
    ]
    text = dataset.corpus[draws[1].passages[0]].full()
    alone = tokenizer(text)["input_ids"]
    assert batch.passages["input_ids"][2, : len(alone)].tolist() == alone
