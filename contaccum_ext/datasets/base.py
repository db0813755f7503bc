"""The types every reader returns, and the one error every reader raises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class DataError(ValueError):
    """A data set that cannot be read; says in which file, on which line, in which field.

    Args:
        problem: what was expected and what came.
        path: the file or directory concerned.
        line: line number counted from 1, or None where no single line is at fault.
        field: the record's field at fault, or None.
    """

    def __init__(
        self, problem: str, path: Path | str, line: int | None = None, field: str | None = None
    ) -> None:
        self.problem = problem
        self.path = Path(path)
        self.line = line
        self.field = field
        place = str(path) if line is None else f"{path}:{line}"
        named = "" if field is None else f"field '{field}': "
        super().__init__(f"{place}: {named}{problem}")


@dataclass(frozen=True)
class Passage:
    """One unit of retrieval; `title` may be empty."""

    id: str
    title: str
    text: str

    def full(self) -> str:
        """What encoders and BM25 read: `"title. text"`, or the text alone without a title."""
        if not self.title:
            return self.text
        # A title that ends a sentence by itself ("Who was Laika?") needs no second mark.
        joint = " " if self.title[-1] in ".!?" else ". "
        return f"{self.title}{joint}{self.text}"


@dataclass(frozen=True)
class TrainExample:
    """A training query with the ids of its positives and hard negatives, best first.

    `positives` is never empty; `negatives` may be, and may differ in length between examples.
    """

    id: str
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class EvalQuery:
    """A query to be scored, by the ids of its positives, by answer strings, or by both.

    `grades` gives the relevance of each positive where a set grades it (an int >= 1 beside each
    id); empty means 1 for all.
    """

    id: str
    query: str
    positives: tuple[str, ...]
    answers: tuple[str, ...] = ()
    grades: tuple[int, ...] = ()


@dataclass(frozen=True)
class RetrievalDataset:
    """A corpus keyed by passage id and up to three splits over it; an absent split is empty."""

    name: str
    corpus: dict[str, Passage]
    train: list[TrainExample]
    valid: list[EvalQuery]
    test: list[EvalQuery]

    def eval_queries(self, split: str) -> list[EvalQuery]:
        """The queries of `"valid"` or `"test"`.

        Raises:
            ValueError: another split was asked for, or the set does not have this one.
        """
        if split not in ("valid", "test"):
            raise ValueError(f"split: expected 'valid' or 'test', got {split!r}")
        queries = self.valid if split == "valid" else self.test
        if not queries:
            raise ValueError(f"data set '{self.name}' has no '{split}' split; it has {self._has()}")
        return queries

    def train_examples(self) -> list[TrainExample]:
        """The training examples.

        Raises:
            ValueError: the set has no training split.
        """
        if not self.train:
            raise ValueError(f"data set '{self.name}' has no 'train' split; it has {self._has()}")
        return self.train

    def _has(self) -> str:
        sizes = {"train": len(self.train), "valid": len(self.valid), "test": len(self.test)}
        return ", ".join(f"{split} ({n})" for split, n in sizes.items() if n) or "no split at all"
