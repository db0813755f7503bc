"""Writes a data set in this project's own layout."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .base import SPLITS, EvalQuery, Passage, RetrievalDataset

logger = logging.getLogger(__name__)


def write_dataset(dataset: RetrievalDataset, directory: str | Path) -> None:
    """Writes `corpus.jsonl` and a file per split, as `load_beir_style` reads them.

    Passages without title and text, which that layout does not have, are left out and counted in a
    warning, and so are queries whose positives are all among them; of a passage with a title alone
    the title becomes the text.

    Args:
        dataset: what to write; a split without queries gets no file.
        directory: made if missing.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kept = {key for key, passage in dataset.corpus.items() if passage.title or passage.text}
    _write(directory / "corpus.jsonl", _passages(dataset.corpus.values()))
    splits = {
        "train": list(_train(dataset, kept)),
        "valid": list(_eval(dataset.valid, kept)),
        "test": list(_eval(dataset.test, kept)),
    }
    for split in SPLITS:
        if splits[split]:
            _write(directory / f"{split}.jsonl", splits[split])
    if empty := len(dataset.corpus) - len(kept):
        lost = len(dataset.train) + len(dataset.valid) + len(dataset.test)
        lost -= sum(map(len, splits.values()))
        logger.warning(
            "%s: %d passages without text and %d queries that have no other positive left out",
            directory,
            empty,
            lost,
        )


def _passages(passages: Iterable[Passage]) -> Iterator[dict[str, Any]]:
    for passage in passages:
        title, text = (passage.title, passage.text) if passage.text else ("", passage.title)
        if text:
            yield {"id": passage.id, "title": title, "text": text}


def _train(dataset: RetrievalDataset, kept: set[str]) -> Iterator[dict[str, Any]]:
    for example in dataset.train:
        positives = [key for key in example.positives if key in kept]
        if positives:
            negatives = [key for key in example.negatives if key in kept]
            yield {"id": example.id, "query": example.query, "pos": positives, "neg": negatives}


def _eval(queries: Iterable[EvalQuery], kept: set[str]) -> Iterator[dict[str, Any]]:
    for query in queries:
        grades = query.grades or (1,) * len(query.positives)
        judged = [
            (key, grade) for key, grade in zip(query.positives, grades, strict=True) if key in kept
        ]
        record: dict[str, Any] = {"id": query.id, "query": query.query}
        if judged:
            record["pos"] = [key for key, _ in judged]
            if query.grades:
                record["grades"] = [grade for _, grade in judged]
        if query.answers:
            record["answers"] = list(query.answers)
        if judged or query.answers:
            yield record


def _write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
