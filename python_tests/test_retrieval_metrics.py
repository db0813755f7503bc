"""Metrics and answer matching, against values worked out by hand."""

from __future__ import annotations

import math
import random
import re
import sys
import unicodedata

import pytest

from contaccum_ext.datasets import (
    EvalQuery,
    Passage,
)
from contaccum_ext.retrieval import (
    default_metrics,
    evaluate_per_query,
    evaluate_run,
)
from contaccum_ext.retrieval.answers import AnswerMatcher, answer_tokens


def corpus_of(**texts: str) -> dict[str, Passage]:
    return {name: Passage(name, "", text) for name, text in texts.items()}


LETTERS = corpus_of(**{letter: f"text {letter}" for letter in "abcdefghijklmnop"})


def ranking(letters: str) -> list[tuple[str, float]]:
    return [(letter, 1.0 - rank / 100) for rank, letter in enumerate(letters)]


def test_metrics_by_hand():
    queries = [EvalQuery("q1", "?", ("b", "z1")), EvalQuery("q2", "?", ("d",))]
    corpus = LETTERS | corpus_of(z1="never found")
    run = {"q1": ranking("abc"), "q2": ranking("abcdefghijk")}
    values = evaluate_per_query(
        queries, run, corpus, ["NDCG@10", "MRR@10", "Recall@3", "Success@3", "MRR@2", "NDCG@1"]
    )
    ideal = 1 + 1 / math.log2(3)
    assert values["NDCG@10"]["q1"] == pytest.approx((1 / math.log2(3)) / ideal)
    assert values["NDCG@10"]["q2"] == pytest.approx(1 / math.log2(5))
    assert values["MRR@10"] == {"q1": 0.5, "q2": 0.25}
    assert values["MRR@2"] == {"q1": 0.5, "q2": 0.0}
    assert values["Recall@3"] == {"q1": 0.5, "q2": 0.0}
    assert values["Success@3"] == {"q1": 1.0, "q2": 0.0}
    assert values["NDCG@1"] == {"q1": 0.0, "q2": 0.0}
    means = evaluate_run(queries, run, corpus, ["Recall@3", "MRR@10"])
    assert means == {"Recall@3": 0.25, "MRR@10": 0.375}


def test_graded_ndcg_by_hand():
    query = EvalQuery("q", "?", ("a", "b"), grades=(1, 3))
    value = evaluate_run([query], {"q": ranking("ab")}, LETTERS, ["NDCG@10"])["NDCG@10"]
    assert value == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_order_given_decides_among_equal_scores(order):
    """trec_eval alone would rank "b" first in both."""
    run = {"q": [(letter, 1.0) for letter in order]}
    value = evaluate_run([EvalQuery("q", "?", ("a",))], run, LETTERS, ["MRR@10"])["MRR@10"]
    assert value == (1.0 if order == "ab" else 0.5)


def test_queries_without_results_count_as_zero():
    queries = [EvalQuery(f"q{i}", "?", ("a",), ("text a",)) for i in range(4)]
    run = {"q0": ranking("a"), "q1": []}
    metrics = ["NDCG@10", "MRR@10", "Recall@1", "Top@1"]
    assert evaluate_run(queries, run, LETTERS, metrics) == dict.fromkeys(metrics, 0.25)


def test_top_k_by_answer():
    corpus = corpus_of(a="nothing here", b="It was Laika-the-dog.", c="laika the dog")
    queries = [
        EvalQuery("q1", "?", (), ("Laika the dog",)),
        EvalQuery("q2", "?", (), ("NOTHING", "cat")),
        EvalQuery("q3", "?", (), ("...",)),
    ]
    run = {query.id: ranking("abc") for query in queries}
    values = evaluate_per_query(queries, run, corpus, ["Top@1", "Top@2", "Top@20"])
    assert values["Top@1"] == {"q1": 0.0, "q2": 1.0, "q3": 0.0}
    assert values["Top@2"] == {"q1": 0.0, "q2": 1.0, "q3": 0.0}
    assert values["Top@20"] == {"q1": 1.0, "q2": 1.0, "q3": 0.0}


def test_default_metrics():
    both = EvalQuery("q", "?", ("a",), ("x",))
    ids, answers = EvalQuery("q", "?", ("a",)), EvalQuery("q", "?", (), ("x",))
    assert default_metrics([ids]) == ("NDCG@10", "MRR@10", "Recall@20", "Recall@100")
    assert default_metrics([answers]) == ("Top@1", "Top@5", "Top@20", "Top@100")
    assert default_metrics([both]) == default_metrics([ids]) + default_metrics([answers])
    assert default_metrics([both, ids]) == default_metrics([ids])
    with pytest.raises(ValueError, match="metrics: got none"):
        evaluate_run([ids, answers], {}, LETTERS)


@pytest.mark.parametrize(
    ("run", "metrics", "message"),
    [
        ({}, ["MAP"], "metrics: expected NDCG@k, MRR@k, Recall@k, Success@k or Top@k, got 'MAP'"),
        ({}, ["NDCG@0"], "got 'NDCG@0'"),
        ({"x": []}, ["NDCG@10"], "run: query 'x' is not among the queries to score"),
        ({"q": [("?", 1.0)]}, ["NDCG@10"], "query 'q': passage '?' is not in the corpus"),
        ({"q": [("a", 1.0), ("a", 1.0)]}, ["NDCG@10"], "query 'q': passage 'a' occurs twice"),
        ({"q": [("a", 1.0), ("b", 2.0)]}, ["NDCG@10"], "expected scores in falling order, got 2.0"),
        ({"q": [("a", math.nan)]}, ["NDCG@10"], "expected scores in falling order, got nan"),
        ({}, ["Top@5"], "queries: 'q' has no answers to look for"),
    ],
)
def test_metrics_refuse_bad_input(run, metrics, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_run([EvalQuery("q", "?", ("a",))], run, LETTERS, metrics)


def test_metrics_refuse_bad_queries():
    with pytest.raises(ValueError, match="'q' has no positives to rank by"):
        evaluate_run([EvalQuery("q", "?", (), ("x",))], {}, LETTERS, ["NDCG@10"])
    with pytest.raises(ValueError, match="expected a grade >= 1 for each of 2"):
        evaluate_run([EvalQuery("q", "?", ("a", "b"), (), (1,))], {}, LETTERS, ["NDCG@10"])
    with pytest.raises(ValueError, match="queries: expected at least one"):
        evaluate_run([], {}, LETTERS)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("It was in 1957.", "1957", True),
        ("It was in 19570.", "1957", False),
        ("The Café opened.", "cafe\u0301", True),  # composed and decomposed
        ("The Café opened.", "cafe", False),
        ("STRASSE", "strasse", True),
        ("U.S. ships", "U.S.", True),
        ("U S ships", "U.S.", False),
        ("snake_case here", "case", True),
        ("the dog flew", "dog   flew", True),
        ("the dog never flew", "dog flew", False),
        ("price: $5", "$5", True),
        ("anything", "", False),
    ],
)
def test_answer_matching(text, answer, found):
    rank = AnswerMatcher(corpus_of(p=text)).first_rank(["p"], [answer])
    assert rank == (1 if found else None)


def test_answer_is_looked_for_in_the_text_only():
    matcher = AnswerMatcher({"p": Passage("p", "Laika", "A dog.")})
    assert matcher.first_rank(["p"], ["Laika"]) is None


def test_answer_tokens_follow_the_unicode_classes():
    """DPR's own expression, run by a library that knows the classes by name."""
    regex = pytest.importorskip("regex")
    pattern = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
    # Unassigned code points depend on each library's Unicode version.
    assigned = [
        chr(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    ]
    random.Random(0).shuffle(assigned)
    text = unicodedata.normalize("NFD", "".join(assigned))
    assert answer_tokens(text) == [token.lower() for token in pattern.findall(text)]
