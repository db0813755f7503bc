"""The layouts around corpus.jsonl: what the readers return, and what their errors say."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path

import pytest

from contaccum_ext.datasets import (
    DataError,
    EvalQuery,
    Passage,
    TrainExample,
    load_beir,
    load_beir_style,
    load_dataset,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"

CORPUS = [
    {"id": "p1", "title": "Laika", "text": "Laika flew on Sputnik 2."},
    {"id": "p2", "title": "", "text": "Sputnik 1 was the first satellite."},
    {"id": "p3", "text": "Belka and Strelka came back."},
]
TRAIN = {"id": "t1", "query": "who flew on Sputnik 2?", "pos": ["p1"], "neg": ["p3", "p2"]}


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def raised(directory: Path, load=load_beir_style) -> DataError:
    with pytest.raises(DataError) as caught:
        load(directory)
    return caught.value


# --- base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "text", "full"),
    [
        ("Laika", "A dog.", "Laika. A dog."),
        ("", "A dog.", "A dog."),
        ("Who was Laika?", "A dog.", "Who was Laika? A dog."),
    ],
)
def test_passage_full(title, text, full):
    assert Passage("p", title, text).full() == full


def test_error_without_line_or_field():
    assert str(DataError("no such file", "x.jsonl")) == "x.jsonl: no such file"


# --- the project's own layout ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_beir_style(tmp_path, suffix):
    write_jsonl(tmp_path / f"corpus.jsonl{suffix}", CORPUS)
    write_jsonl(tmp_path / f"train.jsonl{suffix}", [TRAIN, {**TRAIN, "id": "t2", "neg": []}])
    write_jsonl(
        tmp_path / f"test.jsonl{suffix}",
        [
            {"id": "q1", "query": "first satellite?", "pos": ["p2"], "answers": ["Sputnik 1"]},
            {"id": "q2", "query": "who came back?", "answers": ["Belka"]},
        ],
    )
    dataset = load_beir_style(tmp_path)
    assert dataset == load_dataset(tmp_path)
    assert dataset.name == tmp_path.name
    assert list(dataset.corpus) == ["p1", "p2", "p3"]
    assert dataset.corpus["p1"] == Passage("p1", "Laika", "Laika flew on Sputnik 2.")
    assert dataset.corpus["p3"].title == ""
    assert dataset.train == [
        TrainExample("t1", "who flew on Sputnik 2?", ("p1",), ("p3", "p2")),
        TrainExample("t2", "who flew on Sputnik 2?", ("p1",), ()),
    ]
    assert dataset.test == [
        EvalQuery("q1", "first satellite?", ("p2",), ("Sputnik 1",)),
        EvalQuery("q2", "who came back?", (), ("Belka",)),
    ]
    assert dataset.valid == []


def test_absent_split_is_an_error_when_asked_for(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    write_jsonl(tmp_path / "test.jsonl", [{"id": "q", "query": "x", "pos": ["p1"]}])
    dataset = load_beir_style(tmp_path)
    assert [query.id for query in dataset.eval_queries("test")] == ["q"]
    message = f"data set '{tmp_path.name}' has no 'valid' split; it has test (1)"
    with pytest.raises(ValueError, match=re.escape(message)):
        dataset.eval_queries("valid")
    with pytest.raises(ValueError, match="has no 'train' split; it has test"):
        dataset.train_examples()
    with pytest.raises(ValueError, match="expected 'valid' or 'test', got 'train'"):
        dataset.eval_queries("train")


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"pos": ["p9"]}, "pos", "passage id 'p9' is not in the corpus"),
        ({"neg": ["p2", "p9"]}, "neg", "passage id 'p9' is not in the corpus"),
        ({"neg": ["p1"]}, "neg", "passage id 'p1' is also among 'pos'"),
        ({"neg": ["p2", "p2"]}, "neg", "passage id 'p2' occurs twice"),
        ({"pos": []}, "pos", "expected at least one passage id, got an empty list"),
        ({"pos": "p1"}, "pos", "expected a list of strings, got str"),
        ({"pos": [1]}, "pos", "expected non-empty strings, got 1"),
        ({"query": "  "}, "query", "expected text, got an empty string"),
        ({"query": 3}, "query", "expected a string, got int"),
    ],
)
def test_bad_training_record_names_file_line_and_field(tmp_path, change, field, problem):
    write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    path = write_jsonl(tmp_path / "train.jsonl", [TRAIN, {**TRAIN, "id": "t2", **change}])
    error = raised(tmp_path)
    assert str(error) == f"{path}:2: field '{field}': {problem}"
    assert (error.path, error.line, error.field) == (path, 2, field)


def test_missing_field(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    path = write_jsonl(tmp_path / "train.jsonl", [{"id": "t", "pos": ["p1"]}])
    problem = "missing; the record has ['id', 'pos']"
    assert str(raised(tmp_path)) == f"{path}:1: field 'query': {problem}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "p4", "text": ', "not valid JSON (Expecting value at column 21)"),
        ("[1]", "expected a JSON object, got list"),
        ('{"id": "p1", "text": "again"}', "id 'p1' occurs twice"),
        ('{"id": "p4", "text": ""}', "field 'text': expected text, got an empty string"),
        ('{"id": "", "text": "a"}', "field 'id': expected text, got an empty string"),
    ],
)
def test_bad_corpus_line(tmp_path, line, message):
    path = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    # The blank line counts as a line and is otherwise passed over.
    path.write_text(path.read_text() + "\n" + line + "\n")
    write_jsonl(tmp_path / "train.jsonl", [TRAIN])
    assert str(raised(tmp_path)) == f"{path}:5: {message}"


def test_unreadable_files(tmp_path):
    (tmp_path / "corpus.jsonl").write_bytes(b'{"id": "p1", "text": "\xff"}\n')
    assert "corpus.jsonl: not UTF-8 text" in str(raised(tmp_path))
    (tmp_path / "corpus.jsonl").write_text("")
    assert "expected at least one passage, got an empty file" in str(raised(tmp_path))
    (tmp_path / "corpus.jsonl").unlink()
    compressed = gzip.compress(b'{"id": "p1", "text": "a"}\n' * 99)
    (tmp_path / "corpus.jsonl.gz").write_bytes(compressed[: len(compressed) // 2])
    assert "corpus.jsonl.gz: not a complete gzip file" in str(raised(tmp_path))
    (tmp_path / "corpus.jsonl.gz").write_bytes(b"plain")
    assert "corpus.jsonl.gz: not a complete gzip file" in str(raised(tmp_path))


def test_nothing_to_read(tmp_path):
    assert str(raised(tmp_path)) == f"{tmp_path}: no corpus: looked for corpus.jsonl, plain or .gz"
    write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    assert "no split: looked for train|valid|test.jsonl" in str(raised(tmp_path))


def test_load_dataset_says_what_it_looked_for(tmp_path):
    message = str(raised(tmp_path, load_dataset))
    for word in ("corpus.jsonl", "qrels/", "*train*.json", "(BEIR)", "(DPR)"):
        assert word in message
    assert str(raised(tmp_path / "none", load_dataset)).endswith("none: no such file or directory")


# --- BEIR -----------------------------------------------------------------------------------------


@pytest.fixture
def beir(tmp_path):
    corpus = [{"_id": record["id"], **record, "title": ""} for record in CORPUS]
    write_jsonl(tmp_path / "corpus.jsonl", [*corpus, {"_id": "p4", "title": "", "text": ""}])
    queries = [{"_id": f"q{i}", "text": f"question {i}", "metadata": {}} for i in range(4)]
    write_jsonl(tmp_path / "queries.jsonl", queries)
    (tmp_path / "qrels").mkdir()
    head = "query-id\tcorpus-id\tscore\n"
    (tmp_path / "qrels" / "train.tsv").write_text(head + "q0\tp1\t1\nq0\tp2\t1\n")
    (tmp_path / "qrels" / "test.tsv").write_text(head + "q2\tp1\t2\nq2\tp3\t1\nq2\tp2\t0\n")
    return tmp_path


def test_beir(beir, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(beir)
    assert dataset == load_beir(beir)
    assert len(dataset.corpus) == 4
    assert "1 of 4 passages have no text" in caplog.text
    assert dataset.train == [TrainExample("q0", "question 0", ("p1", "p2"), ())]
    assert dataset.valid == []
    assert dataset.test == [EvalQuery("q2", "question 2", ("p1", "p3"), grades=(2, 1))]


def test_beir_first_judgment_without_heading_counts(beir):
    (beir / "qrels" / "dev.tsv").write_text("q1\tp3\t1\n")
    assert load_beir(beir).valid == [EvalQuery("q1", "question 1", ("p3",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q9\tp1\t1", "field 'query-id': query id 'q9' is unknown"),
        ("q1\tp9\t1", "field 'corpus-id': passage id 'p9' is not in the corpus"),
        ("q1\tp1\thigh", "field 'score': expected an integer, got 'high'"),
        ("q1\tp1", "expected 3 tab-separated cells, got 2"),
        ("q1\tp2\t1", "field 'corpus-id': passage id 'p2' is judged twice for query 'q1'"),
    ],
)
def test_bad_judgment(beir, line, message):
    path = beir / "qrels" / "dev.tsv"
    path.write_text(f"query-id\tcorpus-id\tscore\nq1\tp2\t1\n{line}\n")
    assert str(raised(beir, load_beir)) == f"{path}:3: {message}"


def test_beir_parts_missing(beir):
    for name in ("train.tsv", "test.tsv"):
        (beir / "qrels" / name).unlink()
    assert "no judgments: looked for qrels/train|dev|test.tsv" in str(raised(beir, load_beir))
    (beir / "queries.jsonl").unlink()
    assert "no queries: looked for queries.jsonl" in str(raised(beir, load_dataset))


# --- real sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "pairs"),
    [
        ("squad_sent", (13446, 20672, 472, 1185), 20701),
        ("medquad", (15785, 11746, 806, 1276), 13373),
    ],
)
def test_real_sets(name, sizes, pairs):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not beside the repository")
    dataset = load_dataset(SHARED / name)
    splits = (dataset.corpus, dataset.train, dataset.valid, dataset.test)
    assert tuple(len(split) for split in splits) == sizes
    assert sum(len(example.positives) for example in dataset.train) == pairs
    assert any(query.answers for query in dataset.test) == (name == "squad_sent")
