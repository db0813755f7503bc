"""Checkpoints: what opens them, that they are never half written, that resumed runs go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_retriever import (
    assert_same_weights,
    tiny_dataset,
    weights,
    write_tiny_encoder,
)
from trainer_parts import make_trainer
from transformers import AutoModel, AutoTokenizer

from contaccum_ext.training import (
    DualEncoder,
    EncoderError,
    Trainer,
    load_checkpoint,
    save_checkpoint,
)
from contaccum_ext.training.checkpoint import write_atomically

TEXTS = ["who repairs engine no 1", "The old man paints the violin"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp("start") / "encoder", dropout=0.1)


def encode(encoder, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return encoder.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("side", ["query", "passage"])
def test_transformers_opens_it_and_gives_the_same_outputs(start, tmp_path, side):
    trainer = make_trainer(start, tmp_path, max_updates=2)
    trainer.train(progress=False)
    directory = tmp_path / "final" / f"{side}_encoder"
    assert (directory / "model.safetensors").is_file()
    backbone = AutoModel.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    ours = getattr(trainer.model, side).eval()
    with torch.no_grad():
        found = backbone(**inputs).last_hidden_state
        expected = ours.backbone(**inputs).last_hidden_state
    assert torch.equal(found, expected)
    assert not torch.equal(
        encode(ours, tokenizer),
        encode(DualEncoder.from_pretrained(start, trainer.config).query, tokenizer),
    )


def test_a_saved_tokenizer_does_not_truncate_as_training_did(start, tmp_path):
    trainer = make_trainer(start, tmp_path, max_updates=1, query_max_length=4)
    trainer.train(progress=False)
    saved = json.loads((tmp_path / "final" / "query_encoder" / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)


@pytest.mark.parametrize("shared", [False, True])
def test_a_loaded_checkpoint_is_what_was_saved(start, tmp_path, shared):
    settings = {"pooling": "cls", "normalize": False, "shared_encoder": shared, "max_updates": 1}
    trainer = make_trainer(start, tmp_path, **settings)
    trainer.train(progress=False)
    loaded = load_checkpoint(tmp_path)  # the run's directory finds its final checkpoint
    assert loaded.path == tmp_path / "final"
    assert loaded.config == trainer.config
    assert loaded.updates == 1
    assert loaded.model.shared is shared
    assert_same_weights(weights(loaded.model), weights(trainer.model))
    for side in ("query", "passage"):
        ours, theirs = getattr(trainer.model, side), getattr(loaded.model, side)
        assert torch.equal(encode(ours, trainer.tokenizer), encode(theirs, loaded.tokenizer))
    assert (tmp_path / "final" / "passage_encoder").exists() is not shared


def test_a_resumed_run_is_the_run_that_never_stopped(start, tmp_path):
    settings = {"epochs": 1, "checkpoint_every": 2, "bank_size": 16}
    whole = make_trainer(start, tmp_path / "whole", **settings)
    history = whole.train(progress=False)
    assert len(history) == 5
    assert [p.name for p in sorted((tmp_path / "whole").glob("checkpoint-*"))] == [
        "checkpoint-000002",
        "checkpoint-000004",
    ]

    interrupted = make_trainer(start, tmp_path / "part", **settings)
    original = interrupted.update

    def stop_in_the_fourth():
        if interrupted.done == 3:
            raise KeyboardInterrupt
        return original()

    interrupted.update = stop_in_the_fourth
    with pytest.raises(KeyboardInterrupt):
        interrupted.train(progress=False)
    assert len((tmp_path / "part" / "metrics.jsonl").read_text().splitlines()) == 3

    checkpoint = load_checkpoint(tmp_path / "part")
    assert checkpoint.updates == 2
    resumed = Trainer(
        checkpoint.model, checkpoint.tokenizer, tiny_dataset(), checkpoint.config, tmp_path / "part"
    )
    resumed.load_state_dict(checkpoint.training_state())
    resumed.train(progress=False)
    assert_same_weights(weights(resumed.model), weights(whole.model))
    assert_same_weights(resumed.method.bank.state_dict(), whole.method.bank.state_dict())

    def losses(run: str) -> list[float]:
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    assert losses("part") == losses("whole") == [metrics.loss for metrics in history]


def test_a_final_checkpoint_cannot_be_resumed(start, tmp_path):
    make_trainer(start, tmp_path, max_updates=1).train(progress=False)
    with pytest.raises(EncoderError, match=r"holds no training_state\.pt"):
        load_checkpoint(tmp_path).training_state()


@pytest.mark.parametrize("fails_in", ["model", "state", "flush", "rename"])
def test_a_failure_in_the_middle_leaves_the_old_checkpoint_whole(
    start, tmp_path, monkeypatch, fails_in
):
    trainer = make_trainer(start, tmp_path, max_updates=1)
    trainer.train(progress=False)
    final = tmp_path / "final"
    before = {p: p.read_bytes() for p in final.rglob("*") if p.is_file()}
    assert before
    old = load_checkpoint(final)
    trainer.update()
    new = replace(old, model=trainer.model, updates=2)

    def fail(*_, **__):
        raise OSError("disk full")

    if fails_in == "model":
        monkeypatch.setattr(trainer.model.passage, "save_pretrained", fail)
    elif fails_in == "state":
        monkeypatch.setattr(torch, "save", fail)
    elif fails_in == "flush":
        monkeypatch.setattr("os.fsync", fail)
    else:
        rename = Path.rename

        def fail_into_place(path, target):
            if path.name.endswith(".new"):
                fail()
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(new, state=trainer.state_dict())
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in final.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "final",
        "metrics.jsonl",
        "run.json",
    ]

    save_checkpoint(new, state=trainer.state_dict())  # and nothing stands in the way of the next
    assert load_checkpoint(final).updates == 2
    assert_same_weights(weights(load_checkpoint(final).model), weights(trainer.model))


def test_the_old_directory_stands_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "model"
    write_atomically(target, lambda directory: (directory / "a").write_text("old"))

    def write(directory: Path) -> None:
        (directory / "a").write_text("new")
        assert (target / "a").read_text() == "old"

    write_atomically(target, write)
    assert (target / "a").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(EncoderError, match="no checkpoint there"):
        load_checkpoint(tmp_path)
    (tmp_path / "contaccum.json").write_text('{"updates": 1}')
    with pytest.raises(EncoderError, match=r"damaged contaccum\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "contaccum.json").write_text('{"updates": 1, "config": {"metod": "inbatch"}}')
    with pytest.raises(EncoderError, match="unknown key 'metod'; did you mean 'method'"):
        load_checkpoint(tmp_path)
