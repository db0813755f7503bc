"""Two layouts of a directory around `corpus.jsonl`: this project's own, and BEIR's."""

from __future__ import annotations

import logging
from pathlib import Path

from .base import (
    SPLITS,
    DataError,
    EvalQuery,
    Passage,
    RetrievalDataset,
    TrainExample,
)
from .records import (
    Record,
    find_file,
    read_jsonl,
    read_tsv,
    refuse_duplicate,
)

logger = logging.getLogger(__name__)

# BEIR calls the split for choosing hyper-parameters "dev".
_QRELS_FILES = {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}


def load_beir_style(directory: str | Path) -> RetrievalDataset:
    """Reads a directory of JSON lines, one file per split (each plain or `.gz`).

    - `corpus.jsonl`: `{"id", "title" (may be empty or absent), "text"}`
    - `train.jsonl`: `{"id", "query", "pos": [ids], "neg": [ids] (may be absent)}`
    - `valid.jsonl`, `test.jsonl`: `{"id", "query", "pos": [ids], "answers": [strings]}`, where
      one of the last two may be absent, and `"grades"` may give an integer from 1 on per positive

    A split without a file is empty; using it is the error (`RetrievalDataset.eval_queries`).

    Raises:
        DataError: no corpus, no split at all, a malformed record, an id that occurs twice in its
            file, or a passage id that the corpus does not have.
    """
    directory = Path(directory)
    corpus = _read_corpus(_corpus_file(directory), id_field="id", empty_text=False)
    files = {split: find_file(directory, f"{split}.jsonl") for split in SPLITS}
    if not any(files.values()):
        raise DataError("no split: looked for train|valid|test.jsonl, plain or .gz", directory)
    train_file, valid_file, test_file = files["train"], files["valid"], files["test"]
    return RetrievalDataset(
        name=directory.resolve().name,
        corpus=corpus,
        train=_read_train(train_file, corpus) if train_file else [],
        valid=_read_eval(valid_file, corpus) if valid_file else [],
        test=_read_eval(test_file, corpus) if test_file else [],
    )


def load_beir(directory: str | Path) -> RetrievalDataset:
    """Reads a data set in BEIR's own layout (each file plain or `.gz`).

    - `corpus.jsonl`: `{"_id", "title", "text"}`; `queries.jsonl`: `{"_id", "text"}`
    - `qrels/train.tsv`, `qrels/dev.tsv`, `qrels/test.tsv`: a heading, then `query-id`,
      `corpus-id`, `score`, separated by tabs; judgments with score 0 or less are passed over

    Grades above 1 are kept in `EvalQuery.grades`. Published sets hold a few passages without any
    text; they stay in the corpus, so that its size is the published one, and are counted in a
    warning.

    Raises:
        DataError: a file is missing or malformed, an id occurs twice, or a judgment names a query
            or a passage that does not exist.
    """
    directory = Path(directory)
    corpus = _read_corpus(_corpus_file(directory), id_field="_id", empty_text=True)
    queries_file = find_file(directory, "queries.jsonl")
    if queries_file is None:
        raise DataError("no queries: looked for queries.jsonl, plain or .gz", directory)
    queries = _read_queries(queries_file)
    qrels = {
        split: _read_qrels(file, queries, corpus) if file else {}
        for split, file in (
            (split, find_file(directory / "qrels", name)) for split, name in _QRELS_FILES.items()
        )
    }
    if not any(qrels.values()):
        raise DataError("no judgments: looked for qrels/train|dev|test.tsv", directory)
    return RetrievalDataset(
        name=directory.resolve().name,
        corpus=corpus,
        train=[
            TrainExample(query_id, queries[query_id], positives=tuple(grades), negatives=())
            for query_id, grades in qrels["train"].items()
        ],
        valid=_graded_queries(qrels["valid"], queries),
        test=_graded_queries(qrels["test"], queries),
    )


def _corpus_file(directory: Path) -> Path:
    file = find_file(directory, "corpus.jsonl")
    if file is None:
        raise DataError("no corpus: looked for corpus.jsonl, plain or .gz", directory)
    return file


def _read_corpus(file: Path, id_field: str, empty_text: bool) -> dict[str, Passage]:
    corpus: dict[str, Passage] = {}
    n_empty = 0
    for record in read_jsonl(file):
        passage_id = record.string(id_field)
        refuse_duplicate(passage_id, corpus, file, record.line)
        title = record.string("title", default="", empty=True)
        text = record.string("text", empty=empty_text)
        n_empty += not title and not text
        corpus[passage_id] = Passage(passage_id, title, text)
    if not corpus:
        raise DataError("expected at least one passage, got an empty file", file)
    if n_empty:
        logger.warning("%s: %d of %d passages have no text", file, n_empty, len(corpus))
    return corpus


def _positives(record: Record, corpus: dict[str, Passage]) -> tuple[str, ...]:
    positives = record.passage_ids("pos", corpus)
    if not positives:
        raise record.error("pos", "expected at least one passage id, got an empty list")
    return positives


def _read_train(file: Path, corpus: dict[str, Passage]) -> list[TrainExample]:
    examples: dict[str, TrainExample] = {}
    for record in read_jsonl(file):
        example_id = record.string("id")
        refuse_duplicate(example_id, examples, file, record.line)
        positives = _positives(record, corpus)
        negatives = record.passage_ids("neg", corpus, default=())
        for passage_id in negatives:
            if passage_id in positives:
                raise record.error("neg", f"passage id '{passage_id}' is also among 'pos'")
        examples[example_id] = TrainExample(
            example_id, record.string("query"), positives, negatives
        )
    return list(examples.values())


def _read_eval(file: Path, corpus: dict[str, Passage]) -> list[EvalQuery]:
    queries: dict[str, EvalQuery] = {}
    for record in read_jsonl(file):
        query_id = record.string("id")
        refuse_duplicate(query_id, queries, file, record.line)
        answers = record.strings("answers", default=())
        positives = () if answers and "pos" not in record.values else _positives(record, corpus)
        grades = record.grades("grades", len(positives))
        queries[query_id] = EvalQuery(query_id, record.string("query"), positives, answers, grades)
    return list(queries.values())


def _read_queries(file: Path) -> dict[str, str]:
    queries: dict[str, str] = {}
    for record in read_jsonl(file):
        query_id = record.string("_id")
        refuse_duplicate(query_id, queries, file, record.line)
        queries[query_id] = record.string("text")
    return queries


def _read_qrels(
    file: Path, queries: dict[str, str], corpus: dict[str, Passage]
) -> dict[str, dict[str, int]]:
    """Query id -> passage id -> grade, positive grades only, in the file's order."""
    qrels: dict[str, dict[str, int]] = {}
    for index, (line, (query_id, passage_id, score)) in enumerate(read_tsv(file, columns=3)):
        try:
            grade = int(score)
        except ValueError as error:
            if index == 0:
                continue  # the heading
            raise DataError(f"expected an integer, got {score!r}", file, line, "score") from error
        if query_id not in queries:
            raise DataError(f"query id '{query_id}' is unknown", file, line, "query-id")
        if passage_id not in corpus:
            problem = f"passage id '{passage_id}' is not in the corpus"
            raise DataError(problem, file, line, "corpus-id")
        judged = qrels.setdefault(query_id, {})
        if passage_id in judged:
            problem = f"passage id '{passage_id}' is judged twice for query '{query_id}'"
            raise DataError(problem, file, line, "corpus-id")
        judged[passage_id] = grade
    positive = {
        query_id: {passage_id: grade for passage_id, grade in judged.items() if grade > 0}
        for query_id, judged in qrels.items()
    }
    return {query_id: grades for query_id, grades in positive.items() if grades}


def _graded_queries(qrels: dict[str, dict[str, int]], queries: dict[str, str]) -> list[EvalQuery]:
    return [
        EvalQuery(
            query_id,
            queries[query_id],
            positives=tuple(grades),
            grades=tuple(grades.values()) if any(g != 1 for g in grades.values()) else (),
        )
        for query_id, grades in qrels.items()
    ]
