"""The processes of a grid, its file of rows, its tables."""

from __future__ import annotations

import json
import math

import pytest
from tiny_retriever import write_tiny_data, write_tiny_encoder

from benchmarks.drift import cli, rows, tables
from benchmarks.drift.grid import Forecast, Grid, run_grid, work
from benchmarks.drift.prepare import prepare
from benchmarks.drift.report import brief, mean, paired, table
from benchmarks.drift.settings import Setting, from_row


def tiny(seed: int = 1, **changes) -> Setting:
    changes.setdefault("method", "gradaccum")
    return Setting("tiny", seed, layers=1, n=4, accumulation=2, bf16=False, updates=2, **changes)


def row(setting: Setting, ndcg: float = 0.5, seconds: float = 1.0) -> rows.Row:
    return {
        "key": setting.key,
        "label": setting.label,
        "setting": vars(setting),
        "test_ndcg10": ndcg,
        "test_recall20": ndcg + 0.1,
        "valid_ndcg10": ndcg + 0.2,
        "seconds": seconds,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("grid")
    encoder = write_tiny_encoder(root / "encoder")
    prepare(encoder, [write_tiny_data(root / "tiny")], root / "out", layers=1)
    return root / "out"


def test_a_grid_resumes_skips_and_survives_failures(data, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    done, missing, fails, bank = (
        tiny(1),
        tiny(2),
        tiny(3, method="bank", bank=8, correction="pray"),
        tiny(4, method="bank", bank=8, correction="mean"),
    )
    rows.append(out, row(done, ndcg=0.123))
    with out.open("a") as file:
        file.write('{"key": "half a li')  # what a killed run leaves
    grid = Grid(data, out, gpus=0, workers=2, deadline=120)
    assert run_grid([done, missing, fails, bank], grid) == 1
    found = rows.read(out)
    assert [line["key"] for line in found if line["key"] == done.key] == [done.key]
    assert {line["key"] for line in found} == {done.key, missing.key, fails.key, bank.key}
    failed = next(line for line in found if line["key"] == fails.key)
    assert "correction: expected one of" in failed["error"]
    assert rows.finished(out).keys() == {done.key, missing.key, bank.key}
    assert rows.finished(out)[done.key]["test_ndcg10"] == 0.123
    assert from_row(rows.finished(out)[bank.key]["setting"]) == bank
    # What is done is skipped, what failed is tried again.
    assert run_grid([done, missing, fails, bank], grid) == 1
    assert len(rows.read(out)) == len(found) + 1
    assert "4 settings, 3 done before" in capsys.readouterr().err


def test_a_grid_starts_nothing_that_cannot_finish(data, tmp_path):
    out = tmp_path / "rows.jsonl"
    long, short = tiny(2), tiny(2, method="inbatch")
    rows.append(out, row(tiny(1), seconds=1000.0))
    rows.append(out, row(tiny(1, method="inbatch"), seconds=0.1))
    assert run_grid([long, short], Grid(data, out, gpus=0, workers=1, deadline=100)) == 1
    assert short.key in rows.finished(out) and long.key not in rows.finished(out)
    assert run_grid([long], Grid(data, out, gpus=0, workers=1, deadline=0)) == 1


def test_a_worker_that_dies_is_told_and_replaced(data, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    # A setting that cannot be unpickled ends the worker that receives it.
    fatal = tiny(1)
    object.__setattr__(fatal, "options", {"bomb": Bomb()})
    monkeypatch.setattr("benchmarks.drift.grid._failure", lambda setting, error: {
        "key": "fatal", "label": "", "setting": vars(tiny(1)), "error": error})  # fmt: skip
    monkeypatch.setattr(Forecast, "seconds", lambda self, setting: None)
    monkeypatch.setattr(Setting, "key", property(lambda self: f"{self.seed}"))
    after = tiny(2)
    assert run_grid([fatal, after], Grid(data, out, gpus=0, workers=1, deadline=120)) == 1
    first, second = rows.read(out)
    assert first["error"] == "the process ended with 7"
    assert second["setting"]["seed"] == 2 and "error" not in second


def test_a_grid_gives_up_when_every_worker_dies(data, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.drift.grid._DEATHS", 1)
    settings = [tiny(seed) for seed in (1, 2, 3)]
    for setting in settings:
        object.__setattr__(setting, "options", {"bomb": Bomb()})
    monkeypatch.setattr("benchmarks.drift.grid._failure", lambda setting, error: {
        "key": setting.key, "label": "", "setting": vars(tiny(1)), "error": error})  # fmt: skip
    monkeypatch.setattr(Forecast, "seconds", lambda self, setting: None)
    monkeypatch.setattr(Setting, "key", property(lambda self: f"{self.seed}"))
    out = tmp_path / "rows.jsonl"
    assert run_grid(settings, Grid(data, out, gpus=0, workers=1, deadline=120)) == 3
    assert len(rows.read(out)) == 1


class Bomb:
    def __reduce__(self):
        import os

        return os._exit, (7,)


def test_forecast_prefers_other_seeds_and_else_scales_by_work():
    big = Setting("a", 1, bank=4096, correction="oracle")
    small = Setting("a", 1, method="gradaccum")
    forecast = Forecast([row(small, seconds=3.0), row(Setting("a", 2, "gradaccum"), seconds=5.0)])
    assert forecast.seconds(Setting("a", 3, "gradaccum")) == 5.0
    assert forecast.seconds(big) == pytest.approx(4.0 * work(big) / work(small))
    assert forecast.seconds(Setting("b", 1, "gradaccum")) == pytest.approx(4.0)
    assert Forecast().seconds(small) is None
    failed = {**row(small), "error": "no"}
    assert Forecast([failed]).seconds(small) is None


def test_means_and_standard_errors():
    found = mean([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.error == pytest.approx(math.sqrt(7 / 3 / 3))  # variance 7/3
    assert mean([0.5]).error is None and str(mean([0.5])) == "0.5000" and str(mean([])) == "-"
    difference = paired({1: 0.5, 2: 0.7, 3: 0.9}, {2: 0.5, 1: 0.4})
    assert difference.count == 2
    assert difference.mean == pytest.approx(0.15) and difference.error == pytest.approx(0.05)


def test_a_table_aggregates_over_seeds_and_compares_pairs():
    settings = [
        x for seed in (1, 2) for x in (tiny(seed, method="inbatch"), tiny(seed), tiny(seed, clip=1))
    ]
    values = [0.4, 0.5, 0.1, 0.6, 0.9]  # the last setting has one seed only
    done = {s.key: row(s, ndcg, 2.0) for s, ndcg in zip(settings, values, strict=False)}
    baseline = settings[0].label
    lines = table(settings, done, "inbatch").splitlines()
    assert lines[0] == "tiny"
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines[4:]
    }
    assert cells[baseline][0] == "0.5000 ± 0.1000"
    expected = ["0.7000 ± 0.2000", "0.8000 ± 0.2000", "0.9000 ± 0.2000", "+0.2000 ± 0.1000"]
    assert cells[settings[1].label] == [*expected, "2"]
    # Nothing to compare it with: there is no in-batch row at its clipping.
    assert cells[settings[2].label] == ["0.1000", "0.2000", "0.3000", "-", "1"]


def test_a_table_compares_like_with_like_and_leaves_out_what_was_not_run():
    settings = [tiny(method=m, clip=c) for c in (2.0, 1.0) for m in ("inbatch", "gradaccum")]
    done = {s.key: row(s, x) for s, x in zip(settings, (0.4, 0.5, 0.7, 0.75), strict=True)}
    lines = table([*settings, tiny(clip=3.0)], done, "inbatch").splitlines()
    assert len(lines) == 4 + 4
    assert "+0.1000" in lines[5] and "+0.0500" in lines[7]
    lines = brief([*settings, tiny(clip=3.0)], done, "inbatch").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    assert cells[0] == ["tiny", "less inbatch", "seeds"] and len(lines) == 2 + 4
    assert cells[2] == ["0.4000", "-", "1"] and cells[5] == ["0.7500", "+0.0500", "1"]


def test_settings_have_hashes_and_labels():
    setting = Setting("a", 3, bank=1024, correction="transport", options={"ridge": 0.1, "r": 4})
    assert setting.label == "bank 1024 transport r=4 ridge=0.1"
    assert Setting("a", 1, "inbatch", learning_rate=5e-5).label == "inbatch learning_rate=5e-05"
    assert from_row(json.loads(json.dumps(vars(setting)))).key == setting.key
    assert setting.key != Setting("a", 3, bank=1024).key
    assert setting.without_seed() == from_row({**vars(setting), "seed": 9}).without_seed()


def test_tables_are_unique_and_lead_with_what_matters():
    for name in tables.TABLES:
        found = tables.settings([name])
        assert len({setting.key for setting in found}) == len(found) > 20, name
        labels = {setting.label.split()[0] for setting in found}
        assert {"inbatch", "bank"} <= labels <= {"inbatch", "gradaccum", "bank"}
    central = tables.settings(["central"])
    assert len(central) == 2 * 5 * 14
    assert [s.seed for s in central[:28]] == [1] * 28
    assert len(tables.settings(["central", "central"])) == len(central)
    with pytest.raises(ValueError, match=r"table: expected one of central.* got 'nothing'"):
        tables.settings(["nothing"])


def test_the_command_prints_a_table(tmp_path, capsys):
    first = tables.settings(["central"])[0]
    rows.append(tmp_path / "rows.jsonl", row(first, 0.25))
    assert cli.main(["table", "central", "--rows", str(tmp_path / "rows.jsonl")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("### central") and "0.2500" in told and "medquad" in told
