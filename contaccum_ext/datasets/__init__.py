"""Readers and a writer of retrieval data sets; needs nothing beyond the standard library."""

from __future__ import annotations

from pathlib import Path

from .base import (
    DataError,
    EvalQuery,
    Passage,
    RetrievalDataset,
    TrainExample,
)
from .beir import load_beir, load_beir_style
from .dpr import is_dpr, load_dpr
from .records import find_file
from .stdlib import load_stdlib
from .writer import write_dataset

__all__ = [
    "DataError",
    "EvalQuery",
    "Passage",
    "RetrievalDataset",
    "TrainExample",
    "load_beir",
    "load_beir_style",
    "load_dataset",
    "load_dpr",
    "load_stdlib",
    "write_dataset",
]


def load_dataset(path: str | Path) -> RetrievalDataset:
    """Reads whichever layout stands at `path`.

    Looked for in this order: the word `"stdlib"` (see `load_stdlib`) where no file has that name;
    a DPR JSON file; a directory with `corpus.jsonl` and `queries.jsonl` (BEIR); one with
    `corpus.jsonl` alone (`load_beir_style`); one with DPR's JSON files.

    Raises:
        DataError: none of these is there, or the one found is malformed.
    """
    location = Path(path)
    if str(path) == "stdlib" and not location.exists():
        return load_stdlib()
    if not location.exists():
        raise DataError("no such file or directory", location)
    if location.is_dir() and find_file(location, "corpus.jsonl"):
        beir = find_file(location, "queries.jsonl") or (location / "qrels").is_dir()
        return load_beir(location) if beir else load_beir_style(location)
    if is_dpr(location):
        return load_dpr(location)
    raise DataError(
        "no known layout; looked for a DPR file (*.json), or a directory with corpus.jsonl and "
        "train|valid|test.jsonl, with corpus.jsonl, queries.jsonl and qrels/ (BEIR), or with "
        "*train*.json, *dev*.json, *test*.json (DPR), each plain or .gz",
        location,
    )
