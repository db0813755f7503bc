"""DPR's files: `nq-train.json` and its kin, the Wikipedia passages, the question lists."""

from __future__ import annotations

import ast
import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

from .base import (
    DataError,
    EvalQuery,
    Passage,
    RetrievalDataset,
    Split,
    TrainExample,
)
from .json_array import read_json_array
from .records import Record, read_tsv, refuse_duplicate

logger = logging.getLogger(__name__)

_SPLIT_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("dev", "valid"),
    "test": ("test",),
}


def load_dpr(path: str | Path) -> RetrievalDataset:
    """Reads DPR's retriever data: one JSON file, or a directory of DPR's files.

    A single `*.json(.gz)` file becomes the split its name speaks of (`train`, `dev`, `test`;
    `train` where it speaks of none). In a directory are read, where present,

    - `*train*.json`, `*dev*.json`, `*test*.json` (each plain or `.gz`): a list of objects with
      `question`, `answers`, `positive_ctxs`, `hard_negative_ctxs`, `negative_ctxs`, whose
      contexts have `title`, `text` and `passage_id` or `psg_id`;
    - `*test*.csv`: lines of `question <tab> ['answer', ...]`, scored by answer strings alone,
      used where there is no test JSON;
    - `psgs*.tsv(.gz)`: the passages (`id`, `text`, `title`), all of which join the corpus.

    Every context becomes a passage of the corpus, keyed by its id, or by a hash of its title and
    text where it has none. As in DPR, `negative_ctxs` stand in where an example has no
    `hard_negative_ctxs`, and training examples without positives are left out, as are negatives
    that are positives too. An id that comes with two texts keeps the first. All of these are
    counted in one warning per file.

    Without `psgs*.tsv` the corpus is what the JSON files mention, far smaller than Wikipedia:
    figures on it compare only with each other.

    Raises:
        DataError: nothing to read, a malformed file, or an empty question or passage.
    """
    path = Path(path)
    files = _dpr_files(path)
    reader = _Reader()
    for file in files.passages:
        reader.read_passages(file)
    for file in files.json["train"]:
        reader.read_train(file)
    reader.read_eval(files.json["valid"], "valid")
    reader.read_eval(files.json["test"], "test")
    if not files.json["test"]:
        for file in files.questions:
            reader.read_questions(file)
    return RetrievalDataset(
        path.resolve().name.split(".")[0], reader.corpus, reader.train, reader.valid, reader.test
    )


@dataclass
class _DprFiles:
    json: dict[Split, list[Path]]
    passages: list[Path] = field(default_factory=list)
    questions: list[Path] = field(default_factory=list)


def is_dpr(path: Path) -> bool:
    """Whether `load_dpr` would find a JSON file at `path`."""
    if path.is_dir():
        return any(_dpr_files(path).json.values())
    return path.is_file() and path.name.endswith((".json", ".json.gz"))


def _dpr_files(path: Path) -> _DprFiles:
    files = _DprFiles(json={"train": [], "valid": [], "test": []})
    if not path.is_dir():
        split = _split_of(path.name) or "train"
        files.json[split].append(path)
        return files
    for file in sorted(path.iterdir()):
        name = file.name.removesuffix(".gz")
        split_or_none = _split_of(name)
        if name.endswith(".json") and split_or_none:
            files.json[split_or_none].append(file)
        elif name.endswith(".csv") and split_or_none == "test":
            files.questions.append(file)
        elif name.startswith("psgs") and name.endswith(".tsv"):
            files.passages.append(file)
    return files


def _split_of(name: str) -> Split | None:
    for split, words in _SPLIT_WORDS.items():
        if any(word in name for word in words):
            return split
    return None


class _Reader:
    """Collects one corpus over several files, and counts what it passes over."""

    def __init__(self) -> None:
        self.corpus: dict[str, Passage] = {}
        self.train: list[TrainExample] = []
        self.valid: list[EvalQuery] = []
        self.test: list[EvalQuery] = []

    def read_passages(self, file: Path) -> None:
        for index, (line, (passage_id, text, title)) in enumerate(
            read_tsv(file, columns=3, quoted=True)
        ):
            if index == 0 and passage_id == "id":
                continue
            refuse_duplicate(passage_id, self.corpus, file, line)
            if not text.strip():
                raise DataError("expected text, got an empty string", file, line, "text")
            self.corpus[passage_id] = Passage(passage_id, title.strip(), text.strip())

    def read_train(self, file: Path) -> None:
        counts = _Counts()
        for record in read_json_array(file):
            question = record.string("question")
            positives = self._contexts(record, "positive_ctxs", counts)
            negatives = self._contexts(record, "hard_negative_ctxs", counts)
            if not negatives:
                negatives = self._contexts(record, "negative_ctxs", counts)
            if not positives:
                counts.without_positives += 1
                continue
            kept = tuple(passage_id for passage_id in negatives if passage_id not in positives)
            counts.negatives_also_positive += len(negatives) - len(kept)
            self.train.append(TrainExample(f"train{len(self.train)}", question, positives, kept))
        counts.report(file)

    def read_eval(self, files: list[Path], split: Split) -> None:
        queries = self.valid if split == "valid" else self.test
        for file in files:
            counts = _Counts()
            for record in read_json_array(file):
                question = record.string("question")
                positives = self._contexts(record, "positive_ctxs", counts)
                for name in ("hard_negative_ctxs", "negative_ctxs"):
                    self._contexts(record, name, counts)
                answers = record.strings("answers", default=())
                if not positives and not answers:
                    counts.without_positives += 1
                    continue
                queries.append(EvalQuery(f"{split}{len(queries)}", question, positives, answers))
            counts.report(file)

    def read_questions(self, file: Path) -> None:
        for line, (question, answers_text) in read_tsv(file, columns=2, quoted=True):
            if not question.strip():
                raise DataError("expected text, got an empty string", file, line, "question")
            try:
                answers = ast.literal_eval(answers_text)
            except (ValueError, SyntaxError):
                answers = None
            if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
                problem = f"expected a list of strings, got {answers_text!r:.60}"
                raise DataError(problem, file, line, "answers")
            query_id = f"test{len(self.test)}"
            self.test.append(EvalQuery(query_id, question.strip(), (), tuple(answers)))

    def _contexts(self, record: Record, name: str, counts: _Counts) -> tuple[str, ...]:
        """The ids of a list of contexts, without repetition, added to the corpus."""
        ids: dict[str, None] = {}
        for context in record.records(name):
            title = context.string("title", default="", empty=True)
            text = context.string("text")
            passage_id = _passage_id(context, title, text)
            known = self.corpus.setdefault(passage_id, Passage(passage_id, title, text))
            counts.texts_differ += known.text != text
            ids[passage_id] = None
        return tuple(ids)


def _passage_id(context: Record, title: str, text: str) -> str:
    for name in ("passage_id", "psg_id"):
        value = context.values.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise context.error(name, f"expected a string or an integer, got {value!r:.60}")
        if value not in (None, ""):
            return str(value)
    digest = hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()
    return f"sha256:{digest[:20]}"


@dataclass
class _Counts:
    without_positives: int = 0
    negatives_also_positive: int = 0
    texts_differ: int = 0

    def report(self, file: Path) -> None:
        found = {
            "examples without positives left out": self.without_positives,
            "negatives left out that are positives too": self.negatives_also_positive,
            "passages with the id but not the text of an earlier one": self.texts_differ,
        }
        parts = [f"{count} {what}" for what, count in found.items() if count]
        if parts:
            logger.warning("%s: %s", file, "; ".join(parts))
