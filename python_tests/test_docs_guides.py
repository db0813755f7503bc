"""The guides run from top to bottom, and what they say comes true."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
from docs_page import blocks, run_page
from tiny_retriever import tiny_dataset, write_tiny_data

from contaccum_ext.datasets import load_dataset
from contaccum_ext.training.scratch import ScratchConfig, write_scratch_encoder

DOCS = Path(__file__).resolve().parent.parent / "docs"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # the guides' encoder, which is not downloaded


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The directory that a reader of a guide stands in, with data and an encoder."""
    monkeypatch.chdir(tmp_path)
    write_tiny_data(tmp_path / "data" / "questions")
    texts = [passage.full() for passage in tiny_dataset().corpus.values()]
    shape = ScratchConfig(vocabulary=200, hidden=16, heads=2, max_length=256)
    write_scratch_encoder(tmp_path / "encoder", texts, shape)
    return tmp_path


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_own_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page(DOCS / "own-loop.md")
    assert len(names["resumed"]) == names["bank"].capacity == 64
    assert 32 <= names["narrow"] < names["bank"].window == 64
    # From the time that the bank is full, 9 rows of the loss for each local one.
    losses = names["losses"]
    assert losses[0] < losses[8] / 5
    assert losses[-1] < losses[8] / 4
    assert names["in_batch"] < 1
    assert len(names["followed"]) == 128 and 0 < names["follow"].staleness < 0.3


def test_command_line(reader, capsys):
    page = DOCS / "command-line.md"
    (settings,) = blocks(page, "yaml")
    (reader / "settings.yaml").write_text(settings.source)
    run_page(page, replace={MODEL: "./encoder"})
    said = capsys.readouterr()
    assert "runs/first: already trained to the end" in said.err
    assert "contaccum - gradaccum: " in said.out
    assert "80 hard negatives for 40 training queries: data/mined" in said.out
    assert said.out.splitlines()[-4] == "who repairs the engine"
    scores = json.loads((reader / "runs" / "first-scores.json").read_text())
    assert scores.keys() == {"BM25", "contaccum"}
    filled = [metrics["bank_filled"] for metrics in metrics_of(reader / "runs" / "first")]
    assert filled == [16, 32, *[40] * 18]  # eight updates of 16 are more than the training set
    assert "<svg" in (reader / "runs" / "report.html").read_text()
    assert (reader / "runs" / "first" / "checkpoint-000010").is_dir()


writers: list[Writer] = []


class Writer:
    """Stands for TensorBoard's, which is not needed to test."""

    def __init__(self, directory, purge_step) -> None:
        self.scalars: set[str] = set()

    def add_scalar(self, name, value, step) -> None:
        self.scalars.add(name)

    def close(self) -> None:
        writers.append(self)


def test_diagnostics(reader, capsys, monkeypatch):
    page = DOCS / "diagnostics.md"
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    writers.clear()
    names = run_page(page, replace={MODEL: "./encoder"})
    assert names["guessing"] == pytest.approx(math.log(16))
    assert names["end"][-1] < names["guessing"]
    looks = [metrics["update"] for metrics in names["history"] if metrics["mass_by_age"]]
    assert looks == [5, 10, 15, 20]
    assert sum(names["look"]["mass_by_age"]) + names["look"]["mass_local"] == pytest.approx(1)
    assert f"local: {names['look']['mass_local']:.3f}\n" in capsys.readouterr().out
    (writer,) = writers
    # Every number that the guide speaks of is there, under the name by which it is called.
    spoken = set(re.findall(r"\*\*`(\w+)`", page.read_text())) - {"loss_scale", "mass_by_age"}
    assert spoken | {"mass_by_age/0", "mass_by_age/1", "mass_local", "loss"} <= writer.scalars
    assert {"loss_scale", "mass_by_age"} <= names["history"][0].keys()
    report = (reader / "runs" / "watched.html").read_text()
    assert "without-queries" in report
    assert "Figure 6" in report


def test_the_files_that_the_guide_shows_are_data(tmp_path):
    names = ("corpus.jsonl", "train.jsonl", "test.jsonl")
    shown = blocks(DOCS / "command-line.md", "json")
    for name, block in zip(names, shown, strict=True):
        (tmp_path / name).write_text(block.source)
    dataset = load_dataset(tmp_path)
    assert list(dataset.corpus) == ["p1", "p2"]
    assert dataset.train[0].negatives == ("p2",)
    assert dataset.test[0].positives == ("p2",)
