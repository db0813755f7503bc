"""DPR's files, and the streamed JSON array below them."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from contaccum_ext.datasets import (
    DataError,
    EvalQuery,
    Passage,
    TrainExample,
    load_dataset,
    load_dpr,
)
from contaccum_ext.datasets.json_array import _Window, read_json_array

_read = _Window.read


def raised(directory: Path, load) -> DataError:
    with pytest.raises(DataError) as caught:
        load(directory)
    return caught.value


def context(text: str, passage_id: object = None, key: str = "passage_id") -> dict[str, object]:
    return {"title": "T", "text": text} | ({} if passage_id is None else {key: passage_id})


DPR = [
    {
        "question": "who flew on sputnik 2",
        "answers": ["Laika"],
        "positive_ctxs": [context("Laika flew.", "7"), context("No id.")],
        "hard_negative_ctxs": [context("Belka flew.", 8, "psg_id"), context("Laika flew.", "7")],
        "negative_ctxs": [context("Unused.", "99")],
    },
    {"question": "nobody knows", "answers": [], "positive_ctxs": [], "negative_ctxs": []},
    {
        "question": "who came back",
        "answers": ["Belka"],
        "positive_ctxs": [context("Belka flew and landed.", "8")],
        "hard_negative_ctxs": [],
        "negative_ctxs": [context("Laika flew.", "7")],
    },
]


@pytest.mark.parametrize("indent", [None, 4])
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_dpr_file(tmp_path, caplog, indent, suffix):
    path = tmp_path / f"nq-train{suffix}"
    data = json.dumps(DPR, indent=indent).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(path)
    assert dataset == load_dpr(path)
    assert dataset.name == "nq-train"
    first, second = dataset.train
    hashed = first.positives[1]
    assert hashed.startswith("sha256:")
    assert first == TrainExample("train0", "who flew on sputnik 2", ("7", hashed), ("8",))
    assert second == TrainExample("train1", "who came back", ("8",), ("7",))
    assert {p.id: p.text for p in dataset.corpus.values()} == {
        "7": "Laika flew.",
        "8": "Belka flew.",
        hashed: "No id.",
    }
    assert "1 examples without positives left out" in caplog.text
    assert "1 negatives left out that are positives too" in caplog.text
    assert "1 passages with the id but not the text of an earlier one" in caplog.text


def test_dpr_directory(tmp_path):
    (tmp_path / "nq-train.json").write_text(json.dumps(DPR[:1]))
    (tmp_path / "nq-dev.json").write_text(json.dumps(DPR[2:]))
    (tmp_path / "nq-test.qa.csv").write_text("who is it?\t['Laika', \"O'Hara\"]\n")
    (tmp_path / "psgs_w100.tsv").write_text(
        'id\ttext\ttitle\n7\t"Laika ""the dog"" flew."\tT\n55\tElsewhere.\t"A ""B"""\n'
    )
    dataset = load_dataset(tmp_path)
    assert [example.query for example in dataset.train] == ["who flew on sputnik 2"]
    assert dataset.valid == [EvalQuery("valid0", "who came back", ("8",), ("Belka",))]
    assert dataset.test == [EvalQuery("test0", "who is it?", (), ("Laika", "O'Hara"))]
    assert dataset.corpus["7"].text == 'Laika "the dog" flew.'
    assert dataset.corpus["55"] == Passage("55", 'A "B"', "Elsewhere.")


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"question": ""}, "[1].question", "expected text, got an empty string"),
        (
            {"positive_ctxs": [context(" ", "7")]},
            "[1].positive_ctxs[0].text",
            "expected text, got an empty string",
        ),
        (
            {"hard_negative_ctxs": [context("a", "7"), "b"]},
            "[1].hard_negative_ctxs[1]",
            "expected an object, got 'b'",
        ),
        (
            {"positive_ctxs": {}},
            "[1].positive_ctxs",
            "expected a list of objects, got dict",
        ),
        (
            {"positive_ctxs": [context("a", [7])]},
            "[1].positive_ctxs[0].passage_id",
            "expected a string or an integer, got [7]",
        ),
    ],
)
def test_bad_dpr_record(tmp_path, change, field, problem):
    path = tmp_path / "train.json"
    records = ",\n".join(json.dumps(record) for record in [DPR[0], {**DPR[2], **change}])
    path.write_text(f"[\n{records}\n]\n")
    assert str(raised(path, load_dpr)) == f"{path}:3: field '{field}': {problem}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: not a JSON array: expected '[', got the end of the file"),
        ('{"data": []}', ":1: not a JSON array: expected '[', got '{'"),
        ('[{"a": 1}\n{"a": 2}]', ":2: not a JSON array: expected ',' or ']', got '{'"),
        ('[{"a": 1},\n\n{"a": 2}', ":3: not a JSON array: expected ',' or ']', got the end"),
        ('[{"a": 1},\n{"a": tru}]', ":2: not valid JSON (Expecting value)"),
        ('[\n{"a": "open}]', ":2: not valid JSON (Unterminated string starting at)"),
        ("[\n3]", ":2: field '[0]': expected an object, got int"),
    ],
)
def test_bad_json_array(tmp_path, text, message):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_json_array(path))
    assert str(caught.value).startswith(f"{path}{message}")


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 4096])
def test_json_array_across_reads(tmp_path, monkeypatch, chunk):
    """Wherever a read ends - in a string, an escape, a number - the records are the same."""
    monkeypatch.setattr("contaccum_ext.datasets.json_array._CHUNK", chunk)
    records = [{"n": -12.5e3, "s": 'a "q" \\ \u00e9\n', "x": [None, True, {"y": []}]}, {}, *DPR]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records, indent=2) + "\n")
    assert [record.values for record in read_json_array(path)] == records
    path.write_text("[ ]")
    assert list(read_json_array(path)) == []


def test_malformed_json_array_is_noticed_without_reading_on(tmp_path, monkeypatch):
    monkeypatch.setattr("contaccum_ext.datasets.json_array._CHUNK", 256)
    reads = []
    monkeypatch.setattr(
        "contaccum_ext.datasets.json_array._Window.read",
        lambda self, size, read=_read: (reads.append(size), read(self, size)),
    )
    path = tmp_path / "train.json"
    path.write_text('[{"a" 1},' + '{"a": 1},' * 10_000)
    with pytest.raises(DataError, match="Expecting ':' delimiter"):
        list(read_json_array(path))
    assert sum(reads) < 1024
