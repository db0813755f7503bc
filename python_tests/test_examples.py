"""The examples run, and their settings are settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_retriever import tiny_dataset

from contaccum_ext.training import TrainConfig
from contaccum_ext.training.config_text import read_yaml

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_own_loop_runs(capsys):
    source = (EXAMPLES / "own_loop.py").read_text(encoding="utf-8")
    assert "UPDATES = 400" in source
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source.replace("UPDATES = 400", "UPDATES = 3"), "own_loop.py", "exec"), names)
    printed = capsys.readouterr().out
    assert "Recall@20 before training: 0." in printed
    assert "Recall@20 after training: 0." in printed
    assert len(names["bank"]) == 3 * 4 * 8


def test_sentence_transformers_one_line_runs(capsys, monkeypatch, tmp_path):
    for module in ("sentence_transformers", "accelerate", "datasets"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    source = (EXAMPLES / "sentence_transformers_one_line.py").read_text(encoding="utf-8")
    monkeypatch.setattr("contaccum_ext.datasets.load_stdlib", tiny_dataset)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source, "sentence_transformers_one_line.py", "exec"), names)
    assert "NDCG@10 before training 0." in capsys.readouterr().out
    assert names["loss"].memory.filled() == {"256x1": 3 * 40}
    assert len(list(tmp_path.glob("*/trained/model.safetensors"))) == 1


def test_settings_are_read_and_are_the_defaults_they_claim():
    config = TrainConfig.from_mapping(read_yaml(EXAMPLES / "settings.yaml"))
    assert config.bank_capacity(10**6) == 512
    assert config.learning_rate == pytest.approx(5e-5)
    assert config.update_size == 128
