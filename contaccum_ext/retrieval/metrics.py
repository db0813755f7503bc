"""Scores of a run: ranking measures by passage id, Top@k by answer string."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..datasets import EvalQuery, Passage
from .answers import AnswerMatcher
from .optional import require

Run = Mapping[str, Sequence[tuple[str, float]]]

DEFAULT_METRICS = ("NDCG@10", "MRR@10", "Recall@20", "Recall@100")
ANSWER_METRICS = ("Top@1", "Top@5", "Top@20", "Top@100")
_METRIC = re.compile(r"(NDCG|MRR|Recall|Success|Top)@([1-9][0-9]*)")


def default_metrics(queries: Sequence[EvalQuery]) -> tuple[str, ...]:
    """The usual measures that all `queries` can be scored by."""
    by_id = DEFAULT_METRICS if all(query.positives for query in queries) else ()
    by_answer = ANSWER_METRICS if all(query.answers for query in queries) else ()
    return by_id + by_answer


def evaluate_run(
    queries: Sequence[EvalQuery],
    run: Run,
    corpus: Mapping[str, Passage],
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """Means over the queries of `evaluate_per_query`; same arguments, same errors."""
    return mean_values(evaluate_per_query(queries, run, corpus, metrics))


def mean_values(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metric -> mean of its values.

    Args:
        per_query: metric -> query id -> value, at least one query.
    """
    return {metric: math.fsum(v.values()) / len(v) for metric, v in per_query.items()}


def evaluate_per_query(
    queries: Sequence[EvalQuery],
    run: Run,
    corpus: Mapping[str, Passage],
    metrics: Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Scores a run query by query, for tests of significance.

    A query that the run leaves out, or for which it found nothing, scores 0.

    Args:
        queries: what to score; their `positives`, `grades` and `answers` are the truth.
        run: query id -> (passage id, score) in rank order. The order given counts, also among
            equal scores; trec_eval by itself would reorder those by passage id.
        corpus: passage id -> passage.
        metrics: any of `NDCG@k`, `MRR@k`, `Recall@k`, `Success@k` (a positive among the first
            k), `Top@k` (a passage with an answer string among the first k, as DPR reports);
            `default_metrics(queries)` where None. Cut-offs beyond the run's depth are allowed.

    Returns:
        metric -> query id -> value in [0, 1], in the order asked for.

    Raises:
        ValueError: no queries, an unknown metric, a run with unknown queries or passages,
            repeated passages or rising or NaN scores, or queries without what a metric needs.
        ImportError: ir-measures is not installed and a metric by passage id is asked for.
    """
    if not queries:
        raise ValueError("queries: expected at least one, got none")
    chosen = default_metrics(queries) if metrics is None else tuple(metrics)
    if not chosen:
        raise ValueError("metrics: got none; no usual one fits queries with and without positives")
    cutoffs = [_parse(metric) for metric in chosen]
    _check_run(queries, run, corpus)
    by_id = [metric for metric, (name, _) in zip(chosen, cutoffs, strict=True) if name != "Top"]
    by_answer = {
        metric: cutoff
        for metric, (name, cutoff) in zip(chosen, cutoffs, strict=True)
        if name == "Top"
    }
    values = _rank_metrics(queries, run, by_id) if by_id else {}
    if by_answer:
        values |= _answer_metrics(queries, run, corpus, by_answer)
    return {metric: values[metric] for metric in chosen}


def _parse(metric: str) -> tuple[str, int]:
    match = _METRIC.fullmatch(metric)
    if match is None:
        raise ValueError(
            f"metrics: expected NDCG@k, MRR@k, Recall@k, Success@k or Top@k, got {metric!r}"
        )
    return match[1], int(match[2])


def _check_run(queries: Sequence[EvalQuery], run: Run, corpus: Mapping[str, Passage]) -> None:
    known = {query.id for query in queries}
    for query_id, ranking in run.items():
        if query_id not in known:
            raise ValueError(f"run: query '{query_id}' is not among the queries to score")
        seen = set()
        previous = math.inf
        for passage_id, score in ranking:
            if passage_id not in corpus:
                raise ValueError(
                    f"run: query '{query_id}': passage '{passage_id}' is not in the corpus"
                )
            if passage_id in seen:
                raise ValueError(f"run: query '{query_id}': passage '{passage_id}' occurs twice")
            if not score <= previous:
                raise ValueError(
                    f"run: query '{query_id}': expected scores in falling order, "
                    f"got {score} after {previous}"
                )
            seen.add(passage_id)
            previous = score


def _rank_metrics(
    queries: Sequence[EvalQuery], run: Run, metrics: Sequence[str]
) -> dict[str, dict[str, float]]:
    ir_measures = require("ir_measures")
    qrels = {query.id: _grades(query) for query in queries}
    values = {metric: dict.fromkeys(qrels, 0.0) for metric in metrics}
    measures: dict[int | None, dict[Any, str]] = {}
    for metric in metrics:
        name, cutoff = _parse(metric)
        if name == "MRR":
            # trec_eval's reciprocal rank has no cut-off: the run gets it instead.
            measures.setdefault(cutoff, {})[ir_measures.RR] = metric
        else:
            measure = {
                "NDCG": ir_measures.nDCG,
                "Recall": ir_measures.R,
                "Success": ir_measures.Success,
            }[name]
            measures.setdefault(None, {})[measure @ cutoff] = metric
    for depth, named in measures.items():
        # Ranks as scores: trec_eval breaks ties by passage id, whatever order they came in.
        ranked = {
            query_id: {
                passage_id: float(-rank) for rank, (passage_id, _) in enumerate(ranking[:depth])
            }
            for query_id, ranking in run.items()
        }
        for result in ir_measures.pytrec_eval.iter_calc(list(named), qrels, ranked):
            values[named[result.measure]][result.query_id] = float(result.value)
    return values


def _grades(query: EvalQuery) -> dict[str, int]:
    if not query.positives:
        raise ValueError(f"queries: '{query.id}' has no positives to rank by; use Top@k")
    grades = query.grades or (1,) * len(query.positives)
    if len(grades) != len(query.positives) or min(grades) < 1:
        raise ValueError(
            f"queries: '{query.id}': expected a grade >= 1 for each of {len(query.positives)} "
            f"positives, got {grades}"
        )
    return dict(zip(query.positives, grades, strict=True))


def _answer_metrics(
    queries: Sequence[EvalQuery],
    run: Run,
    corpus: Mapping[str, Passage],
    cutoffs: Mapping[str, int],
) -> dict[str, dict[str, float]]:
    matcher = AnswerMatcher(corpus)
    depth = max(cutoffs.values())
    values: dict[str, dict[str, float]] = {metric: {} for metric in cutoffs}
    for query in queries:
        if not query.answers:
            raise ValueError(f"queries: '{query.id}' has no answers to look for; drop Top@k")
        ranking = [passage_id for passage_id, _ in run.get(query.id, ())[:depth]]
        rank = matcher.first_rank(ranking, query.answers)
        for metric, cutoff in cutoffs.items():
            values[metric][query.id] = float(rank is not None and rank <= cutoff)
    return values
