"""The commands for a trained retriever: mine, encode, search."""

from __future__ import annotations

import io
import json

import pytest
import torch
from tiny_retriever import tiny_dataset, write_tiny_data
from trainer_parts import make_trainer

from contaccum_ext.cli import main
from contaccum_ext.datasets import load_dataset
from contaccum_ext.retrieval import encode_texts
from contaccum_ext.retrieval.vectors import CorpusVectors, weights_fingerprint
from contaccum_ext.training import load_checkpoint


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    """Options that name a run of ten updates and its data."""
    directory = tmp_path_factory.mktemp("retriever")
    make_trainer(start, directory / "run", epochs=2, normalize=False).train(progress=False)
    data = write_tiny_data(directory / "data")
    return ["--checkpoint", str(directory / "run"), "--data", str(data)]


def vectors_of(trained) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the training queries and of the corpus, encoded here."""
    checkpoint, dataset = load_checkpoint(trained[1]), tiny_dataset()
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    queries = [example.query for example in dataset.train]
    texts = [passage.full() for passage in dataset.corpus.values()]
    return (
        encode_texts(model.query, tokenizer, queries, max_length=16),
        encode_texts(model.passage, tokenizer, texts, max_length=24),
    )


def test_mine_writes_data_with_the_negatives_ranked_best(trained, tmp_path, capsys):
    output = tmp_path / "mined"
    assert main(["mine", *trained, "--output", str(output), "--negatives", "3"]) == 0
    assert "120 hard negatives for 40 training queries" in capsys.readouterr().out
    mined, before = load_dataset(output), load_dataset(trained[3])
    assert (mined.corpus, mined.valid, mined.test) == (before.corpus, before.valid, before.test)
    queries, corpus = vectors_of(trained)
    ids = list(before.corpus)
    for example, old, query in zip(mined.train, before.train, queries, strict=True):
        ranked = [ids[index] for index in (corpus @ query).argsort(descending=True)]
        expected = [key for key in ranked if key not in old.positives][:3]
        assert (list(example.negatives), example.positives) == (expected, old.positives)

    # and the next run takes it
    arguments = ["train", "--data", str(output), "--encoder", f"{trained[1]}/final/query_encoder"]
    arguments += ["--output", str(tmp_path / "next"), "--updates", "1"]
    for setting in ("hard_negatives=3", "query_max_length=16", "passage_max_length=24"):
        arguments += ["--set", setting]
    assert main(arguments) == 0


def test_a_margin_leaves_fewer_and_says_so(trained, tmp_path, capsys):
    output = tmp_path / "mined"
    options = ["--negatives", "3", "--depth", "56", "--margin", "1"]
    assert main(["mine", *trained, "--output", str(output), *options]) == 0
    queries, corpus = vectors_of(trained)
    rows = {key: row for row, key in enumerate(load_dataset(output).corpus)}
    fewer = 0
    for example, query in zip(load_dataset(output).train, queries, strict=True):
        limit = corpus[rows[example.positives[0]]] @ query - 1
        scores = [float(corpus[rows[key]] @ query) for key in example.negatives]
        assert all(score <= limit + 1e-4 for score in scores)
        fewer += len(scores) < 3
    assert fewer > 0
    assert f"{fewer} queries have fewer than 3: raise --depth" in capsys.readouterr().err


def test_encode_keeps_what_search_and_mine_would_encode(trained, tmp_path, capsys):
    stored = tmp_path / "vectors"
    assert main(["encode", *trained, "--output", str(stored)]) == 0
    assert "56 vectors of 16 dimensions" in capsys.readouterr().out
    model = load_checkpoint(trained[1]).model
    kept = CorpusVectors.load(stored, {"encoder": weights_fingerprint(model.passage)})
    assert kept.ids == list(tiny_dataset().corpus)
    torch.testing.assert_close(kept.vectors, vectors_of(trained)[1], rtol=0, atol=0)

    question = ["--query", "who paints violin no 4", "--results", "3"]
    found = []
    for vectors in ([], ["--vectors", str(stored)]):
        assert main(["search", *trained, *question, *vectors]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    for name, vectors in (("a", []), ("b", ["--vectors", str(stored)])):
        assert main(["mine", *trained, "--output", str(tmp_path / name), *vectors]) == 0
    assert load_dataset(tmp_path / "a").train == load_dataset(tmp_path / "b").train


def test_search_shows_the_best_passages(trained, capsys, monkeypatch):
    queries, corpus = vectors_of(trained)
    dataset = tiny_dataset()
    asked = [dataset.train[index].query for index in (7, 2)]
    ids = list(dataset.corpus)
    expected = []
    for index, text in zip((7, 2), asked, strict=True):
        scores, rows = (corpus @ queries[index]).topk(2)
        expected.append((text, [ids[row] for row in rows], scores.tolist()))

    arguments = ["search", *trained, "--results", "2"]
    assert main([*arguments, "--query", asked[0], "--query", asked[1], "--json"]) == 0
    for line, (text, keys, scores) in zip(
        capsys.readouterr().out.splitlines(), expected, strict=True
    ):
        record = json.loads(line)
        assert (record["query"], [r["id"] for r in record["results"]]) == (text, keys)
        assert [r["score"] for r in record["results"]] == pytest.approx(scores, rel=1e-5)
        assert record["results"][0]["text"] == dataset.corpus[keys[0]].full()

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{asked[0]}\n\n  {asked[1]}\n"))
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == asked[0]
    assert lines[2].split()[:3] == ["1", f"{expected[0][2][0]:.4f}", expected[0][1][0]]
    assert lines[5] == asked[1]
    assert len(lines) == 2 * 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: (s / "vectors.json").unlink(), "no usable vectors there"),
        (lambda s: (s / "vectors.safetensors").write_bytes(b"half"), "no usable vectors there"),
        (
            lambda s: (s / "vectors.json").write_text(
                (s / "vectors.json").read_text().replace('"encoder": "', '"encoder": "x')
            ),
            "vectors of another encoder: expected ",
        ),
        (
            lambda s: (s / "vectors.json").write_text(
                (s / "vectors.json").read_text().replace("56 passages", "57 passages")
            ),
            "vectors of another corpus: expected 56 passages, ",
        ),
    ],
)
def test_vectors_of_something_else_are_refused(trained, tmp_path, capsys, change, says):
    stored = tmp_path / "vectors"
    assert main(["encode", *trained, "--output", str(stored)]) == 0
    change(stored)
    assert main(["search", *trained, "--query", "x", "--vectors", str(stored)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"contaccum: error: {stored}: ") and says in error


def test_nothing_is_overwritten_and_bad_input_is_told(trained, tmp_path, capsys):
    for command in ("mine", "encode"):
        assert main([command, *trained, "--output", trained[3]]) == 2
        assert f"{trained[3]} is already there; choose another" in capsys.readouterr().err
    data = write_tiny_data(tmp_path / "untrainable")
    (data / "train.jsonl").unlink()
    output = tmp_path / "out"
    arguments = [*trained[:3], str(data), "--output", str(output)]
    assert main(["mine", *arguments]) == 2
    assert "has no 'train' split" in capsys.readouterr().err
    assert not output.exists()
    for wrong in (["--negatives", "0"], ["--depth", "no"]):
        with pytest.raises(SystemExit):
            main(["mine", *arguments, *wrong])
