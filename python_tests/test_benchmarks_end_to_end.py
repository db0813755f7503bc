"""The end-to-end run: both trainers on the same examples, its rows, page and command.

No test asserts a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for package in ("sentence_transformers", "accelerate", "datasets"):
    pytest.importorskip(package, reason=f"{package} is not installed")

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks/ is not installed with the package
    sys.path.insert(0, str(ROOT))

import end_to_end_children  # noqa: E402
from tiny_retriever import write_tiny_data  # noqa: E402

from benchmarks import cli, end_to_end, report  # noqa: E402
from benchmarks.device import CpuDevice  # noqa: E402

SMALL = ["--n", "4", "--accumulation", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def result(start, data, tmp_path_factory):
    """All methods, five updates of eight: every training example once."""
    out = tmp_path_factory.mktemp("results")
    command = ["end-to-end", "--data", str(data), "--model", str(start), *SMALL]
    assert cli.main([*command, "--out", str(out)]) == 0
    (table,) = out.glob("*-cpu-end-to-end-tiny.csv")
    header, rows = report.read_csv(table)
    return header, {row["method"]: row for row in rows}, table.with_suffix(".md").read_text()


def test_every_method_has_a_row(result):
    header, rows, page = result
    assert list(rows) == [end_to_end.UNTRAINED, *end_to_end.METHODS]
    assert header["command"].startswith("python -m benchmarks end-to-end --data tiny --model enc")
    assert "sentence-transformers" in header and "transformers" in header
    for name, method in end_to_end.METHODS.items():
        row = rows[name]
        assert row["queries"] == "40" and float(row["seconds"]) > 0
        assert float(row["queries_per_second"]) == pytest.approx(40 / float(row["seconds"]), 1e-4)
        assert 0 < float(row["ndcg_at_10"]) < 1
        assert row["peak_mib"] == ""  # a CPU does not tell it by method
        banked = "contaccum" in name
        assert row["bank_filled"] == ("40" if banked else "0")
        assert bool(row["score_gap"]) == banked
        assert f"`{name}`: {method.loss}" in page
    assert "5 updates of 4 x 2 queries" in page


def test_both_trainers_do_the_same(result):
    """Without dropout: what differs is rounding and the first steps' learning rates."""
    _, rows, _ = result
    for ours, theirs in (
        ("gradaccum", "st-mnrl"),
        ("contaccum", "st-contaccum"),
        ("gradcache-contaccum", "st-cached-contaccum"),
    ):
        scores = [float(rows[name]["ndcg_at_10"]) for name in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=0.02), (ours, theirs)
        assert scores[0] != float(rows[end_to_end.UNTRAINED]["ndcg_at_10"])


def test_warnings_of_banks_are_told_below_the_table(result):
    _, rows, page = result
    for name in ("contaccum-2048", "st-contaccum-2048"):
        assert rows[name]["note"].startswith("bank_size 2048 keeps vectors up to 256 updates old")
    assert "## Warnings and failures\n\n- `contaccum-2048`: bank_size 2048 keeps" in page


def test_examples_are_the_same_in_the_same_order(start, data, tmp_path):
    from benchmarks.end_to_end_st import _columns
    from contaccum_ext.training.data import Sampler

    options = end_to_end.EndToEndOptions(data, start, n=4, accumulation=2, updates=3)
    setup = end_to_end.prepare(options, CpuDevice(), tmp_path)
    columns = _columns(setup).to_dict()
    assert list(columns) == ["anchor", "positive", "negative_1"]
    draws = [draw for i in range(3) for draw in Sampler(setup.dataset, setup.config).update(i)]
    assert columns["anchor"] == [draw.query for draw in draws]
    texts = [setup.dataset.corpus[draw.passages[1]].full() for draw in draws]
    assert columns["negative_1"] == texts


def test_side_by_side_is_the_same(result, start, data, tmp_path):
    _, alone, _ = result
    names = ("st-contaccum", "contaccum")
    command = ["end-to-end", "--data", str(data), "--model", str(start), *SMALL]
    command += ["--methods", ",".join(names), "--processes", "2", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    (table,) = tmp_path.glob("*.csv")
    rows = {row["method"]: row for row in report.read_csv(table)[1]}
    assert list(rows) == [end_to_end.UNTRAINED, *names]  # in the order asked for
    for name in names:
        assert rows[name]["ndcg_at_10"] == alone[name]["ndcg_at_10"], name
    assert "2 methods at a time share the machine" in table.with_suffix(".md").read_text()


def side_by_side(monkeypatch, measure, names, device, directory) -> dict[str, str]:
    """What each method's row notes, where children do `measure`, two at a time."""
    monkeypatch.setattr(end_to_end, "_measure_alone", measure)
    options = end_to_end.EndToEndOptions(directory, directory, methods=names, processes=2)
    outcomes = list(end_to_end._side_by_side(options, None, device, directory))
    assert all(row.integration == end_to_end.METHODS[row.method].integration for row in outcomes)
    return {row.method: row.note for row in outcomes}


def test_a_child_that_fails_has_a_row_and_leaves_the_others(tmp_path, monkeypatch):
    names = tuple(end_to_end_children.ENDS)
    notes = side_by_side(monkeypatch, end_to_end_children.end, names, CpuDevice(), tmp_path)
    assert notes.pop("gradaccum").startswith("BrokenProcessPool: A process in the process pool")
    assert notes == {
        "contaccum-128": "ValueError: out of something",
        "contaccum": "no CUDA device",
        "st-mnrl": "measured",
    }


@pytest.mark.parametrize(
    ("visible", "gpus"), [("5,GPU-7c,-1,6", {"5", "GPU-7c"}), (None, {"0", "1"})]
)
def test_a_method_has_the_gpu_that_is_free(tmp_path, monkeypatch, visible, gpus):
    """The first one is at work until the third is done, so that two share the other GPU."""
    device = CpuDevice()
    device.name = "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    names = ("gradaccum", "contaccum-128", "contaccum")
    found = side_by_side(monkeypatch, end_to_end_children.tell_gpu, names, device, tmp_path)
    assert {found["gradaccum"], found["contaccum"]} == gpus
    assert found["contaccum-128"] == found["contaccum"]


def test_some_methods_and_updates_and_failures_that_leave_the_others(
    start, data, tmp_path, monkeypatch, capsys
):
    def broken(method, setup, directory):
        raise RuntimeError("out of something")

    monkeypatch.setattr(end_to_end, "trainer_of", lambda m: broken)
    command = ["end-to-end", "--data", str(data), "--model", str(start), *SMALL, "--updates", "2"]
    command += ["--methods", "gradaccum,st-mnrl", "--out", str(tmp_path)]
    assert cli.main(command) == 1
    (page,) = tmp_path.glob("*.md")
    assert page.read_text().count("RuntimeError: out of something") == 2
    with pytest.raises(SystemExit, match=r"--methods: expected some of gradaccum, .* got nothing"):
        cli.main([*command[:-4], "--methods", "nothing"])
