"""BM25 as a yardstick and as a source of negatives."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

from contaccum_ext.datasets import (
    EvalQuery,
    Passage,
    RetrievalDataset,
    TrainExample,
    load_dataset,
)
from contaccum_ext.retrieval import (
    BM25Index,
    bm25_run,
    evaluate_run,
    mine_negatives,
)
from contaccum_ext.retrieval.bm25 import bm25_tokens
from contaccum_ext.retrieval.optional import require

SHARED = Path(__file__).parents[2] / "shared" / "data"


def corpus_of(**texts: str) -> dict[str, Passage]:
    return {name: Passage(name, "", text) for name, text in texts.items()}


SPACE = corpus_of(
    p1="Laika was the dog that flew on Sputnik 2",
    p2="Sputnik 1 was the first satellite",
    p3="Belka and Strelka came back from orbit",
    p4="Laika was the dog that flew on Sputnik 2 ",
    p5="a satellite orbits the earth",
)


def space_dataset(*examples: TrainExample) -> RetrievalDataset:
    queries = [EvalQuery("q1", "Which dog flew on Sputnik 2?", ("p1",))]
    return RetrievalDataset("space", SPACE, list(examples), [], queries)


def test_bm25_tokens():
    assert bm25_tokens("What is the make_tarball of Laika's?") == ["make", "tarball", "laika", "s"]


def test_bm25_score_by_hand():
    corpus = corpus_of(a="dog dog cat", b="cat", c="bird")
    found = BM25Index(corpus, k1=0.9, b=0.4).search("dog cat", 10)

    def score(df, tf, length):
        idf = math.log(1 + (3 - df + 0.5) / (df + 0.5))
        return idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * length / (5 / 3)))

    assert [passage_id for passage_id, _ in found] == ["a", "b"]
    assert found[0][1] == pytest.approx(score(1, 2, 3) + score(2, 1, 3), rel=1e-5)
    assert found[1][1] == pytest.approx(score(2, 1, 1), rel=1e-5)


def test_bm25_run_puts_the_obvious_match_first():
    dataset = space_dataset()
    run = bm25_run(dataset, dataset.test, k=3)
    assert [passage_id for passage_id, _ in run["q1"]] == ["p1", "p4", "p2"]
    assert run["q1"][0][1] == run["q1"][1][1]  # a tie, in corpus order


def test_bm25_without_common_words():
    index = BM25Index(SPACE)
    assert index.search("zebra", 5) == []
    assert index.search("the what", 5) == []
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        index.search("dog", 0)
    with pytest.raises(ValueError, match="corpus: expected words to index, got none in 1 passages"):
        BM25Index(corpus_of(p="..."))


def test_mined_negatives_are_not_the_positive_nor_its_text():
    examples = [
        TrainExample("t1", "dog that flew on Sputnik 2", ("p1",), ("p5",)),
        TrainExample("t2", "zebra", ("p2",), ()),
    ]
    corpus = SPACE | {"p6": Passage("p6", "", SPACE["p1"].text)}
    dataset = RetrievalDataset("space", corpus, examples, [], [])
    first, second = mine_negatives(dataset, 2)
    assert (first.id, first.query, first.positives) == ("t1", examples[0].query, ("p1",))
    assert first.negatives[0] == "p4"  # other text, by a space
    assert "p6" not in first.negatives
    assert len(set(first.negatives)) == 2
    assert len(set(second.negatives) - {"p2"}) == 2
    assert mine_negatives(dataset, 2, examples=examples[::-1]) == [second, first]
    fills = {mine_negatives(dataset, 2, seed=seed)[1].negatives for seed in range(20)}
    assert len(fills) > 1


def test_mining_more_than_there_are():
    dataset = space_dataset(TrainExample("t1", "dog", ("p1",), ()))
    assert set(mine_negatives(dataset, 4)[0].negatives) == {"p2", "p3", "p4", "p5"}
    with pytest.raises(ValueError, match="per_query: expected at most 4 for example 't1'"):
        mine_negatives(dataset, 5)
    with pytest.raises(ValueError, match="per_query: expected at least 1, got 0"):
        mine_negatives(dataset, 0)
    with pytest.raises(ValueError, match="has no 'train' split"):
        mine_negatives(space_dataset())


@pytest.mark.parametrize(
    ("name", "ndcg", "recall"), [("squad_sent", 0.770, 0.892), ("medquad", 0.574, 0.874)]
)
def test_bm25_on_real_sets(name, ndcg, recall):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not beside the repository")
    dataset = load_dataset(SHARED / name)
    run = bm25_run(dataset, dataset.test)
    metrics = evaluate_run(dataset.test, run, dataset.corpus, ["NDCG@10", "Recall@20"])
    assert metrics["NDCG@10"] == pytest.approx(ndcg, abs=0.005)
    assert metrics["Recall@20"] == pytest.approx(recall, abs=0.005)


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=re.escape("pip install contaccum-ext[train]")):
        BM25Index(SPACE)
    with pytest.raises(ImportError, match=r"^no_such_module could not be imported"):
        require("no_such_module")
