"""The command line: what it refuses and how, and the whole way from data to report."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from tiny_retriever import write_tiny_data, write_tiny_encoder

from contaccum_ext.cli import main
from contaccum_ext.commands import SCRATCH_SETTINGS
from contaccum_ext.training import METHODS, TrainConfig
from contaccum_ext.training.methods import Accumulated


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_tiny_data(tmp_path_factory.mktemp("data") / "tiny"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(write_tiny_encoder(tmp_path_factory.mktemp("start") / "encoder"))


SHORT = ["--set", "query_max_length=16", "--set", "passage_max_length=24"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--data", "/none/here"], "/none/here: no such file or directory"),
        (["train", "--encoder", "/none/model"], "/none/model: no such directory"),
        (
            ["train", "--method", "dpr"],
            "settings: method: expected one of inbatch, gradaccum, contaccum, prebatch, gradcache",
        ),
        (
            ["train", "--set", "bank_sise=3"],
            "--set: unknown key 'bank_sise'; did you mean 'bank_size'?",
        ),
        (
            ["train", "--set", "temperature=-1"],
            "--set: temperature: expected a number > 0, got -1",
        ),
        (["train", "--config", "/none.yaml"], "/none.yaml: cannot be read: No such file"),
        (["train", "--layers", "5"], "has 1 layers, asked for the first 5"),
        (
            ["train", "--set", "query_max_length=32"],
            "encoder takes at most 32 tokens, got 256",
        ),
        (["demo", "--methods", "gradaccum", "dpr"], "--methods: expected some of inbatch, "),
        (["eval", "--checkpoint", "/none"], "/none: no checkpoint there"),
    ],
)
def test_bad_input_is_one_readable_line_and_code_2(
    arguments, says, data, encoder, tmp_path, capsys
):
    command, *options = arguments
    needed = {"--data": data}
    if command == "train":
        needed |= {"--encoder": encoder, "--output": str(tmp_path / "run")}
    for option, value in needed.items():
        if option not in options:
            options += [option, value]
    assert main([command, *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("contaccum: error: ")
    assert says in error[-1]
    assert not any("Traceback" in line for line in error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["train", "--data", "x"], "--encoder, --output"),
        (["demo", "--epochs", "1", "--updates", "1"], "not allowed with"),
        (["eval", "--checkpoint", "x", "--data", "y", "--split", "train"], "invalid choice"),
    ],
)
def test_bad_usage_is_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_help_teaches(capsys):
    def help_of(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--help"])
        assert caught.value.code == 0
        return capsys.readouterr().out

    overview = help_of()
    for words in ("local_batch_size", "accumulation_steps", "bank_size", "contaccum demo --data"):
        assert words in overview
    for command in ("demo", "train"):
        text = help_of(command)
        assert all(f"\n  {method} " in text for method in METHODS)
        assert all(f"\n  {key}=" in text for key in TrainConfig().to_dict())
    scratch = help_of("demo")
    assert all(f"\n  {key}={value}\n" in scratch for key, value in SCRATCH_SETTINGS.items())
    assert "--checkpoint" in help_of("eval")


def test_data_without_a_test_split(tmp_path, capsys):
    directory = write_tiny_data(tmp_path / "tiny")
    (directory / "test.jsonl").unlink()
    assert main(["demo", "--data", str(directory), "--output", str(tmp_path / "out")]) == 2
    assert "--data: data set 'tiny' has no 'test' split" in capsys.readouterr().err


def test_demo_from_nothing_to_the_report_and_eval_repeats_its_numbers(data, tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(["demo", "--data", data, "--updates", "3", "--output", str(output)]) == 0
    table = capsys.readouterr().out
    lines = [line.split() for line in table.splitlines()]
    rows = {line[0]: line[1:] for line in lines[3:7]}
    assert list(rows) == ["BM25", "untrained", "gradaccum", "contaccum"]
    assert "contaccum - gradaccum: " in table
    assert f"report: {output}/report.html" in table
    assert "<svg" in (output / "report.html").read_text()
    for method in ("gradaccum", "contaccum"):
        metrics = [
            json.loads(s) for s in (output / method / "metrics.jsonl").read_text().splitlines()
        ]
        assert len(metrics) == 3
        assert [m["bank_filled"] for m in metrics] == (
            [0, 0, 0] if method == "gradaccum" else [32, 40, 40]
        )

    numbers = tmp_path / "numbers.json"
    checkpoint = str(output / "contaccum")
    assert main(["eval", "--checkpoint", checkpoint, "--data", data, "--json", str(numbers)]) == 0
    scored = json.loads(numbers.read_text())
    assert scored.keys() == {"BM25", "contaccum"}
    heading = table.split("training", 1)[0].split()
    assert heading[0] == "NDCG@10"
    for name in ("BM25", "contaccum"):
        assert 0 < scored[name]["NDCG@10"] < 1
        assert [f"{scored[name][metric]:.3f}" for metric in heading] == rows[name][: len(heading)]


def test_demo_again_gives_the_same_numbers(data, encoder, tmp_path, capsys):
    tables = []
    for run in ("a", "b"):
        arguments = ["demo", "--data", data, "--encoder", encoder, "--updates", "2", *SHORT]
        assert main([*arguments, "--methods", "prebatch", "--output", str(tmp_path / run)]) == 0
        # The last column is seconds.
        lines = capsys.readouterr().out.splitlines()
        tables.append([line.split()[:5] for line in lines if line.startswith(("unt", "preb"))])
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2


def test_train_reads_settings_by_precedence_and_goes_on_where_it_stopped(
    data, encoder, tmp_path, capsys
):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        yaml.safe_dump({"learning_rate": "1e-4", "seed": 3, "epochs": 9, "accumulation_steps": 1})
    )
    output = tmp_path / "run"
    arguments = ["train", "--data", data, "--encoder", encoder, "--output", str(output), *SHORT]
    arguments += ["--config", str(settings), "--set", "seed=4", "--updates", "4"]
    arguments += ["--method", "gradaccum", "--set", "checkpoint_every=2"]
    assert main(arguments) == 0
    assert f"next: contaccum eval --checkpoint {output}" in capsys.readouterr().out
    saved = json.loads((output / "final" / "contaccum.json").read_text())
    expected = {"learning_rate": 1e-4, "seed": 4, "max_updates": 4, "method": "gradaccum"}
    assert {key: saved["config"][key] for key in expected} == expected
    assert saved["updates"] == 4

    assert main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--set", "seed=5"]) == 2
    assert "--resume: seed is 5, but" in capsys.readouterr().err
    final = (output / "final" / "query_encoder" / "model.safetensors").read_bytes()
    shutil.rmtree(output / "final")
    assert main([*arguments, "--resume"]) == 0
    assert "going on after update 2 of 4" in capsys.readouterr().err
    assert (output / "final" / "query_encoder" / "model.safetensors").read_bytes() == final
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 4


def test_mined_negatives_and_a_wide_bank_warning(data, encoder, tmp_path, capsys):
    arguments = ["train", "--data", data, "--encoder", encoder, "--output", str(tmp_path / "run")]
    arguments += [*SHORT, "--updates", "1", "--mine-negatives", "2"]
    arguments += ["--set", "hard_negatives=2", "--set", "bank_size=3000", "--set", "drift=mean"]
    assert main(arguments) == 0
    warned = capsys.readouterr().err
    assert "contaccum: warning: bank_size 3000 keeps vectors up to 23 updates old" in warned


def test_interrupting_says_so(data, encoder, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("contaccum_ext.training.trainer.Trainer.update", interrupt)
    arguments = ["train", "--data", data, "--encoder", encoder, "--output", str(tmp_path / "run")]
    assert main([*arguments, *SHORT]) == 130
    assert "contaccum: interrupted" in capsys.readouterr().err


def test_divergence_is_told_and_is_code_1(data, encoder, tmp_path, capsys, monkeypatch):
    result = Accumulated(float("inf"), 0.0, (1,))
    monkeypatch.setattr("contaccum_ext.training.methods.Method.accumulate", lambda *_: result)
    arguments = ["train", "--data", data, "--encoder", encoder, "--output", str(tmp_path / "run")]
    assert main([*arguments, *SHORT]) == 1
    assert "contaccum: stopped: update 1, micro-batch 2 of 5: " in capsys.readouterr().err
