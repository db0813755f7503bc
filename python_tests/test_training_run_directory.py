"""The directory of a run: whose it is, what is refused, what is kept and what removed."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_children import lines_without_times
from tiny_retriever import tiny_dataset, write_tiny_data
from trainer_parts import make_trainer

from contaccum_ext.cli import main
from contaccum_ext.training import RunDirectory, RunError
from contaccum_ext.training.data import fingerprint


def test_only_the_newest_checkpoints_are_kept(start, tmp_path):
    trainer = make_trainer(start, tmp_path, epochs=3, checkpoint_every=3, keep_checkpoints=3)
    trainer.train(progress=False)
    assert [path.name for path in sorted(tmp_path.glob("*checkpoint*"))] == [
        "checkpoint-000006",
        "checkpoint-000009",
        "checkpoint-000012",
    ]


def test_checkpoints_are_ordered_by_number_not_by_name(tmp_path):
    run = RunDirectory(tmp_path)
    for updates in (999_998, 999_999, 1_000_000):
        run.checkpoint(updates).mkdir()
    assert run.newest() == run.checkpoint(1_000_000)
    run.prune(1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1000000"]


def test_a_second_process_is_kept_out(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with (
        run.locked(),
        pytest.raises(RunError, match="another process is training there"),
        RunDirectory(tmp_path / "run").locked(),
    ):
        pass
    with run.locked():  # and let in again afterwards
        pass


def test_the_log_keeps_whole_lines_of_updates_done(tmp_path):
    run = RunDirectory(tmp_path)
    lines = [json.dumps({"update": update}) + "\n" for update in (1, 2, 3)]
    run.metrics.write_text("".join(lines) + '{"update": 4, "lo')
    with run.open_log(9) as log:
        log.write("next\n")
    assert run.metrics.read_text() == "".join(lines) + "next\n"
    with run.open_log(2):
        pass
    assert run.metrics.read_text() == "".join(lines[:2])


def test_all_random_numbers_go_on(start, tmp_path):
    import numpy as np

    def draw() -> tuple:
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()

    trainer = make_trainer(start, tmp_path)
    np.random.randn()  # the second of a pair is kept for the next call
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    trainer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_the_fingerprint_tells_data_apart_by_what_training_uses():
    dataset = tiny_dataset()
    ours = fingerprint(dataset)
    assert fingerprint(tiny_dataset()) == ours
    assert ours["corpus"].startswith("56 passages, ")
    assert ours["training set"].startswith("40 queries, ")
    other = tiny_dataset()
    other.train[7] = replace(other.train[7], negatives=other.train[7].negatives[::-1])
    assert fingerprint(other)["corpus"] == ours["corpus"]
    assert fingerprint(other)["training set"] != ours["training set"]
    text = replace(dataset.corpus["p3"], text=dataset.corpus["p3"].text + ".")
    for corpus in (
        dataset.corpus | {"p3": text},
        {"p3": dataset.corpus["p3"]} | dataset.corpus,  # another order, other numbers in the bank
    ):
        assert fingerprint(replace(dataset, corpus=corpus))["corpus"] != ours["corpus"]
    # Held-out queries are not trained on.
    assert fingerprint(replace(dataset, test=[], valid=[])) == ours


@pytest.fixture
def finished(runs, tmp_path):
    """Arguments of a finished run of five updates, its directory, and a way to tell changes."""
    run = tmp_path / "run"
    assert runs.train(run, updates=5) == 0
    arguments = [*runs.arguments, "--output", str(run), "--updates", "5"]

    def content() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}

    return arguments, run, content


def refusal(arguments, capsys) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_is_never_overwritten(finished, capsys):
    arguments, run, content = finished
    before = content()
    assert "already holds a run; choose another directory, or --resume" in refusal(
        arguments, capsys
    )
    for gone in ("metrics.jsonl", "run.json"):  # what is left of it is still a run
        (run / gone).unlink()
    shutil.rmtree(run / "final")
    assert "already holds a run" in refusal(arguments, capsys)
    assert {p: t for p, t in before.items() if p in content()} == content()


def test_other_settings_or_other_data_are_refused_by_name(finished, capsys, tmp_path):
    arguments, run, content = finished
    shutil.rmtree(run / "final")  # as if cut off after the fourth update
    before = content()
    resumed = [*arguments, "--resume"]
    assert f"temperature is 0.07, but {run} was trained with 0.05" in refusal(
        [*resumed, "--set", "temperature=0.07"], capsys
    )
    other = write_tiny_data(tmp_path / "other")
    lines = (other / "corpus.jsonl").read_text().splitlines()
    (other / "corpus.jsonl").write_text("\n".join([*lines, lines[0].replace("p0", "p999")]) + "\n")
    says = refusal([*resumed, "--data", str(other)], capsys)
    assert f"the corpus is not the one {run} was trained on: expected 56 passages, " in says
    assert "got 57 passages, " in says
    says = refusal([*resumed, "--mine-negatives", "2"], capsys)
    assert "the training set is not the one" in says
    assert content() == before

    # What changes no number may change.
    assert main([*resumed, "--set", "checkpoint_every=1", "--set", "keep_checkpoints=1"]) == 0


def test_a_foreign_or_damaged_checkpoint_is_refused_and_left_alone(finished, capsys):
    arguments, run, content = finished
    shutil.rmtree(run / "final")
    resumed = [*arguments, "--resume"]
    newest = run / "checkpoint-000004"
    settings = json.loads((newest / "contaccum.json").read_text())

    def check(says: str) -> None:
        before = content()
        error = refusal(resumed, capsys)
        assert str(newest) in error
        assert says in error
        assert content() == before

    foreign = settings | {"config": settings["config"] | {"seed": 2}}
    (newest / "contaccum.json").write_text(json.dumps(foreign))
    check("seed is 1, but")
    foreign = settings | {"data": settings["data"] | {"corpus": "1 passages, 0"}}
    (newest / "contaccum.json").write_text(json.dumps(foreign))
    check("the corpus is not the one")
    (newest / "contaccum.json").write_text("{")
    check("damaged contaccum.json; nothing was changed: to go on from the checkpoint before it")
    (newest / "contaccum.json").write_text(json.dumps(settings))

    for name in ("training_state.pt", "passage_encoder/model.safetensors"):
        file = newest / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        check(f"damaged: {name}: expected {len(whole)} bytes, got {len(whole) // 2} bytes")
        file.write_bytes(whole)
    (newest / "training_state.pt").write_bytes(
        b"\0" * len((newest / "training_state.pt").read_bytes())
    )
    check("damaged: training_state.pt: ")
    (newest / "training_state.pt").unlink()
    check("damaged: training_state.pt: expected a file, got none")

    newest.rename(run / "aside")  # as the message says
    assert main(resumed) == 0
    assert len(lines_without_times(run)) == 5


def test_a_run_whose_settings_cannot_be_told_is_refused(finished, capsys):
    arguments, run, content = finished
    for text in (None, "{", '{"config": {}}'):
        (run / "run.json").unlink(missing_ok=True)
        if text is not None:
            (run / "run.json").write_text(text)
        before = content()
        says = refusal([*arguments, "--resume"], capsys)
        assert f"what {run} was trained with cannot be told" in says
        assert content() == before


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    arguments, _, content = finished
    before = content()
    assert main([*arguments, "--resume"]) == 0
    assert "already trained to the end" in capsys.readouterr().err
    assert content() == before
