"""BM25: the yardstick for dense retrievers, and the source of hard negatives."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from ..datasets import EvalQuery, Passage, RetrievalDataset, TrainExample
from .optional import require
from .search import topk_stable

logger = logging.getLogger(__name__)

# The words Lucene leaves out of English text, and the question words: in a question "what" says
# nothing about the passage sought, yet it is rare enough in prose to outweigh the topic.
_STOP_WORD_LIST = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with "
    "what who whom whose when where which why how did does do were"
)
_STOP_WORDS = frozenset(_STOP_WORD_LIST.split())
# An underscore ends a word: so words find identifiers in code, and prose has none.
_WORD = re.compile(r"[^\W_]+")


def bm25_tokens(text: str) -> list[str]:
    """Lower-case words without stop words, unstemmed.

    Args:
        text: a query or a passage.
    """
    return [word for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS]


class BM25Index:
    """BM25 as in Lucene over the title and text of every passage.

    Args:
        corpus: passage id -> passage.
        k1: term frequency saturation; 0.9 and b = 0.4 are the usual choice for passages.
        b: length normalisation.

    Raises:
        ValueError: a corpus without a single word.
        ImportError: bm25s is not installed.
    """

    def __init__(self, corpus: Mapping[str, Passage], k1: float = 0.9, b: float = 0.4) -> None:
        documents = [bm25_tokens(passage.full()) for passage in corpus.values()]
        if not any(documents):
            raise ValueError(f"corpus: expected words to index, got none in {len(corpus)} passages")
        self._ids = list(corpus)
        self._index = require("bm25s").BM25(k1=k1, b=b, method="lucene")
        self._index.index(documents, show_progress=False)

    def search(self, query: str, k: int) -> list[tuple[str, float]]:
        """The k best (passage id, score), equal scores in corpus order.

        Passages that share no word with the query are not found: the list may be shorter than k.

        Args:
            query: text.
            k: results wanted, at least 1.
        """
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        tokens = [token for token in bm25_tokens(query) if token in self._index.vocab_dict]
        if not tokens:
            return []
        scores = torch.from_numpy(self._index.get_scores(tokens))  # (N,)
        matching = scores.nonzero().squeeze(1)
        values, order = topk_stable(scores[matching].unsqueeze(0), min(k, len(matching)))
        found = matching[order[0]].tolist()
        return [
            (self._ids[index], value)
            for index, value in zip(found, values[0].tolist(), strict=True)
        ]


def bm25_run(
    dataset: RetrievalDataset, queries: Iterable[EvalQuery], k: int = 100
) -> dict[str, list[tuple[str, float]]]:
    """Query id -> the k best (passage id, score) of the whole corpus, as `evaluate_run` takes them.

    Args:
        dataset: whose corpus to search.
        queries: e.g. `dataset.test`.
        k: results per query.
    """
    index = BM25Index(dataset.corpus)
    return {query.id: index.search(query.query, k) for query in queries}


def mine_negatives(
    dataset: RetrievalDataset,
    per_query: int = 1,
    *,
    examples: Sequence[TrainExample] | None = None,
    depth: int = 100,
    seed: int = 0,
) -> list[TrainExample]:
    """Gives every training example exactly `per_query` hard negatives, replacing those it has.

    They are the best BM25 results that are neither positives nor the same text as one. Where the
    first `depth` results do not suffice, random passages fill up; how often is logged.

    Args:
        dataset: whose corpus to search.
        per_query: negatives per example, at least 1.
        examples: what to mine for; `dataset.train_examples()` by default.
        depth: results looked at per example.
        seed: of the random passages; an example's depend on its id too, not on its position.

    Raises:
        ValueError: `per_query` below 1, or a corpus too small to have as many negatives.
    """
    if per_query < 1:
        raise ValueError(f"per_query: expected at least 1, got {per_query}")
    index = BM25Index(dataset.corpus)
    mined = []
    n_filled = 0
    for example in dataset.train_examples() if examples is None else examples:
        refused = {dataset.corpus[passage_id].full() for passage_id in example.positives}
        found = [
            passage_id
            for passage_id, _ in index.search(example.query, depth)
            if dataset.corpus[passage_id].full() not in refused
        ][:per_query]
        n_missing = per_query - len(found)
        n_filled += n_missing > 0
        if n_missing:
            candidates = [
                passage_id
                for passage_id, passage in dataset.corpus.items()
                if passage.full() not in refused and passage_id not in found
            ]
            if len(candidates) < n_missing:
                raise ValueError(
                    f"per_query: expected at most {len(found) + len(candidates)} for example "
                    f"'{example.id}' (the passages that are not positive), got {per_query}"
                )
            found += random.Random(f"{seed}:{example.id}").sample(candidates, n_missing)
        mined.append(replace(example, negatives=tuple(found)))
    if n_filled:
        logger.info("random negatives complete those of %d of %d examples", n_filled, len(mined))
    return mined
