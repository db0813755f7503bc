"""The page that compares training runs."""

from __future__ import annotations

import json
import re

import pytest
from test_report import Page
from trainer_parts import make_trainer

from contaccum_ext.cli import main
from contaccum_ext.reporting import read_run
from contaccum_ext.reporting.plots import bank_plot, loss_plot, mass_plot
from contaccum_ext.training import RunError


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    """A finished run with banks, and one without them that was cut off."""
    directory = tmp_path_factory.mktemp("runs")
    settings = {"max_updates": 5, "bank_size": 20, "diagnostics_every": 2}
    make_trainer(start, directory / "banks", **settings).train(progress=False)
    make_trainer(start, directory / "plain", method="gradaccum", max_updates=5).train(False)
    (directory / "plain" / "final").rename(directory / "aside")
    with (directory / "plain" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 6, "lo')
    return directory


def test_a_run_is_read_as_it_was_trained(trained):
    run = read_run(trained / "banks")
    assert run.finished
    assert (run.config.method, run.config.bank_size) == ("contaccum", 20)
    assert [metrics.update for metrics in run.history] == [1, 2, 3, 4, 5]
    lines = (trained / "banks" / "metrics.jsonl").read_text().splitlines()
    assert vars(run.history[3]) == json.loads(lines[3])
    cut_off = read_run(trained / "plain")
    assert (cut_off.finished, len(cut_off.history)) == (False, 5)


def test_the_page_shows_figures_differences_and_curves(trained, tmp_path, capsys):
    file = tmp_path / "new" / "report.html"
    runs = [str(trained / "banks"), str(trained / "plain")]
    assert main(["report", *runs, "--output", str(file)]) == 0
    assert f"report: {file}" in capsys.readouterr().out
    text = file.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(reference.startswith("#") for reference in page.fetched)
    assert page.seen["svg"] == 7
    loss = read_run(runs[0]).history[-1].in_batch_loss
    row = rf"<td>banks</td><td>contaccum</td><td>5</td><td>{loss:.4f}</td>.*?<td>finished</td>"
    assert re.search(row, text)
    assert re.search(r"<td>plain</td><td>gradaccum</td><td>5</td>.*?<td>not finished</td>", text)
    differences, shared = text.split("Settings they share")
    assert "<td>method</td><td>contaccum</td><td>gradaccum</td>" in differences
    assert "<td>bank_size</td><td>20</td><td>auto</td>" in differences
    assert "<td>learning_rate</td><td>0.001</td>" in shared
    assert "<td>method</td>" not in shared
    assert "do not compare" not in text
    assert f"contaccum report {runs[0]}" in text


def test_one_run_without_banks_has_no_mass_and_no_differences(trained, tmp_path):
    file = tmp_path / "report.html"
    assert main(["report", str(trained / "plain"), "--output", str(file)]) == 0
    text = file.read_text()
    assert text.count("<svg") == 6
    assert "What differs" not in text
    assert "<h1>1 training run</h1>" in text


def test_runs_on_other_data_or_of_another_n_say_so(trained, start, tmp_path):
    from tiny_retriever import tiny_dataset

    settings = {"max_updates": 1, "local_batch_size": 2}
    make_trainer(start, tmp_path / "banks", tiny_dataset(train=30), **settings).train(False)
    file = tmp_path / "report.html"
    runs = [str(trained / "banks"), str(tmp_path / "banks")]
    assert main(["report", *runs, "--output", str(file)]) == 0
    text = file.read_text()
    assert "The runs differ in the training set: their losses do not compare." in text
    assert "The runs differ in n: " in text
    assert f"<td>{runs[1]}</td>" in text  # the same name twice: told apart by path


def test_a_run_has_the_same_colour_in_every_plot(trained):
    runs = [read_run(trained / name) for name in ("plain", "banks")]
    histories = {run.path.name: run.history for run in runs}
    second = "#d55e00"
    assert second in bank_plot(histories)  # where the first run has no bank and no line
    assert second in loss_plot(histories)
    assert second not in bank_plot({"banks": runs[1].history})


def test_mass_is_averaged_over_the_looks_that_reach_an_age(trained):
    run = read_run(trained / "banks")
    looks = [metrics.mass_by_age for metrics in run.history if metrics.mass_by_age]
    assert [len(look) for look in looks] == [2, 3]
    svg = mass_plot({"banks": run.history})
    assert svg.startswith("<svg") and ">age in updates<" in svg and ">banks<" in svg
    assert mass_plot({"banks": run.history}) == svg


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda run: (run / "run.json").unlink(), "run.json: missing or damaged"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: cannot be read: No such"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no update has been written yet"),
        (
            lambda run: (run / "metrics.jsonl").write_text("[]\n{}\n"),
            "metrics.jsonl:1: not a line of metrics",
        ),
    ],
)
def test_what_is_no_run_is_refused(start, tmp_path, capsys, break_it, says):
    run = tmp_path / "run"
    make_trainer(start, run, max_updates=1).train(progress=False)
    break_it(run)
    with pytest.raises(RunError, match=re.escape(says)):
        read_run(run)
    output = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(output)]) == 2
    assert says in capsys.readouterr().err
    assert not output.exists()
