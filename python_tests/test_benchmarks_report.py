"""What the benchmark suite makes of its measurements: targets, CSV, page, plot, command line."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks/ is not installed with the package
    sys.path.insert(0, str(ROOT))

from benchmarks import arguments, cli, lap, op, op_command, op_page, report  # noqa: E402
from benchmarks.cases import Case  # noqa: E402
from benchmarks.ceilings import Ceilings  # noqa: E402
from benchmarks.cuda_peers import CCE, CUDA_PEERS, FULL_TF32  # noqa: E402
from benchmarks.measure import Timing  # noqa: E402
from benchmarks.peers import FULL_MATRIX, OURS, PEERS  # noqa: E402
from benchmarks.plot import scaling_plot, series  # noqa: E402

CEILINGS = Ceilings({"sum": 40e9, "norm": 50e9}, {"1024^3": 200e9, "2048^3": 100e9})


def test_line_and_power_of_a_known_curve():
    fit = op.linearity([1024, 2048, 4096], [3e-3, 5e-3, 9e-3])
    assert fit.constant == pytest.approx(1e-3)
    assert fit.slope * 1024 == pytest.approx(2e-3)
    assert op.linearity([10, 20, 40], [4.0, 16.0, 64.0]).exponent == pytest.approx(2.0)
    assert op.linearity([10], [4.0]) is None


def measured(peer, slots: int, seconds: float | None, note: str = "") -> op.Measured:
    timing = None if seconds is None else Timing((seconds,) * 3, 2 * 3 * seconds)
    return op.Measured(peer, Case(slots), CEILINGS, timing, table_bytes=4 << 20, note=note)


def result_of(*rows: op.Measured, case: Case = op.TARGET_CASE) -> op.OpResult:
    return op.OpResult(op.OpOptions(case), list(rows))


def test_targets_pass_fail_or_are_not_measured():
    floor = CEILINGS.floor(op.TARGET_CASE)
    ours = measured(OURS, 32768, 2 * floor)
    fast, near = op.targets(result_of(ours, measured(FULL_MATRIX, 32768, 500 * floor)))
    assert (fast.value, fast.passed) == (pytest.approx(250), True)
    assert (near.value, near.passed) == (pytest.approx(2), True)
    fast, near = op.targets(
        result_of(measured(OURS, 32768, 4 * floor), measured(FULL_MATRIX, 32768, 500 * floor))
    )
    assert (fast.passed, near.passed) == (False, False)
    fast, near = op.targets(result_of(ours, measured(FULL_MATRIX, 32768, None, "out of memory")))
    assert (fast.passed, near.passed) == (None, True)
    other_shape = result_of(ours, case=Case(32768, n=16))
    assert [target.passed for target in op.targets(other_shape)] == [None, None]


def test_every_size_is_held_to_the_best_product_of_the_run_but_to_its_own_reading():
    small, large = measured(OURS, 1024, 0.1), measured(OURS, 2048, 0.1)
    large.ceilings = Ceilings({"sum": 9e9}, {"1024^3": 300e9})
    op.share_products([small, large])
    assert small.ceilings == Ceilings(CEILINGS.reading, {"1024^3": 300e9, "2048^3": 100e9})
    assert large.ceilings.best_reading() == ("sum", 9e9)


def test_what_a_quadratic_peer_will_take_grows_with_the_square():
    known = [measured(FULL_MATRIX, 1024, 0.5), measured(FULL_MATRIX, 2048, None)]
    assert op.expected_seconds(FULL_MATRIX, Case(4096), known) == pytest.approx(8.0)
    assert op.expected_seconds(FULL_MATRIX, Case(4096), []) == 0
    assert op.expected_seconds(OURS, Case(4096), [measured(OURS, 1024, 0.5)]) == 0


def test_csv_has_the_machine_on_top_and_reads_back(tmp_path):
    header = report.environment(["op", "--n", "8"], "cpu")
    keys = {"date", "command", "cpu", "cores", "threads", "torch", "contaccum_ext"}
    assert keys <= set(header)
    assert header["command"] == "python -m benchmarks op --n 8"
    assert header["torch"] == torch.__version__
    refused = measured(FULL_MATRIX, 65536, None, note="out of memory, computed")
    rows = [report.make_row(measured(OURS, 1024, 0.002)), report.make_row(refused)]
    path = tmp_path / "x.csv"
    report.write_csv(path, header, rows)

    lines = path.read_text().splitlines()
    assert lines[0].startswith("# date: ")
    names = next(line for line in lines if not line.startswith("#"))
    assert names == ",".join(field.name for field in fields(report.Row))
    assert names.startswith("peer,slots,n,d,m,dtype,drift,repetitions,ms_median,ms_p20,ms_p80")
    again, read = report.read_csv(path)
    assert again == header
    assert read[0]["ms_median"] == "2"
    assert float(read[0]["cpu_ms_mean"]) == pytest.approx(4.0)
    assert float(read[0]["gflops_per_s"]) == pytest.approx(8 * 8 * 1024 * 384 / 0.002 / 1e9, 1e-4)
    assert float(read[0]["gbytes_per_s"]) == pytest.approx(1024 * 2 * 384 * 4 / 0.002 / 1e9, 1e-4)
    assert read[1]["ms_median"] == "" and read[1]["note"] == "out of memory, computed"
    assert series(read, "ours", "ms_median") == ([1024], [2.0])
    assert series(read, "full matrix", "ms_median") == ([], [])


def test_results_are_named_by_date_device_and_what_and_never_overwritten(tmp_path):
    first = report.result_path(tmp_path, "cpu", "op")
    assert first.name.endswith("-cpu-op") and first.name[:2] == "20"
    first.with_suffix(".csv").write_text("")
    assert report.result_path(tmp_path, "cpu", "op").name == first.name + "-2"
    assert report.what_was_run(Case(4096)) == "op"
    assert report.what_was_run(Case(1, n=128, dtype="bf16", drift="mean")) == "op-n128-bf16-mean"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.12345, "0.123"),
        (1.2345, "1.23"),
        (123.4, "123"),
        (98765.0, "98765"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert report.number(value) == text


def test_page_tells_what_was_refused_and_what_peers_lack():
    rows = [measured(OURS, 1024, 0.002), measured(FULL_MATRIX, 1024, None, "out of memory: would")]
    result = result_of(*rows, case=Case(1024))
    result.lap = lap.LapResult(Case(12, n=4), 2, (1.0, 3.0, 2.0), (False, True, False))
    text = op_page.compose({"cpu": "some model"}, result)
    for wanted in ("some model", "out of memory: would", "not measured", "It lacks drift", "1.50"):
        assert wanted in text


def test_sizes_are_read_with_and_without_k():
    assert arguments.sizes("1k,4096,64K") == (1024, 4096, 65536)
    assert arguments.banks("0,1k,0") == (0, 1024, 0)
    for wrong in ("", "0", "-1", "1.5k", "k", "1k,,2k"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.sizes(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        ["op", "--peers", "full"],
        ["op", "--peers", "ours,nobody"],
        ["op", "--peers", "ours,"],
        ["op", "--device", "cuda", "--cases", "A,Z"],
        ["op", "--n", "0"],
        ["step", "--banks", "0,-1"],
        ["fly"],
        [],
    ],
)
def test_wrong_arguments_are_refused_with_usage(wrong, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(wrong)
    assert refused.value.code == 2
    assert "usage: python -m benchmarks" in capsys.readouterr().err


def test_peers_are_chosen_by_the_first_letters_of_their_names():
    choose = op_command.choose_peers
    assert choose(None, CUDA_PEERS) == CUDA_PEERS
    assert choose(["ours", "full-matrix-t", "cce"], CUDA_PEERS) == (OURS, FULL_TF32, CCE)
    assert choose(["full", "ours"], CUDA_PEERS)[0] is OURS
    for wrong in (["full"], ["ours", "x"], ["ours", ""]):
        with pytest.raises(ValueError, match="expected ours and any of"):
            choose(wrong, CUDA_PEERS)


def test_help_teaches():
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert "scaling-plot" in shown.stdout and "examples:" in shown.stdout


def test_where_results_went_is_no_part_of_the_command():
    assert cli.recorded(["op", "--out", "/home/me/x", "--n", "4"]) == ["op", "--n", "4"]
    assert cli.recorded(["op", "--out=/home/me/x", "--plot"]) == ["op", "--plot"]


def test_the_command_line_runs_a_tiny_case_to_the_end(tmp_path):
    small = ["--sizes", "64,128", "--n", "4", "--d", "16", "--m", "2", "--threads", "1"]
    quick = ["--seconds", "0.02", "--rounds", "1", "--laps", "1"]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks", "op", *small, *quick, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    (table,) = tmp_path.glob("*-cpu-op-n4-d16-m2.csv")
    header, rows = report.read_csv(table)
    assert str(tmp_path) not in header["command"]
    assert [(row["peer"], row["slots"]) for row in rows] == [
        (peer.name, slots) for slots in ("64", "128") for peer in PEERS
    ]
    for row in rows:
        assert float(row["ms_median"]) > 0 and float(row["extra_mib"]) >= 0 and row["note"] == ""
        assert float(row["bank_mib"]) == pytest.approx(int(row["slots"]) * 3 * 16 * 4 / 2**20, 1e-4)
    text = table.with_suffix(".md").read_text()
    assert ran.stdout == text + "\n"
    for section in ("Targets", "Time", "Memory", "Linear in F", "No step is slow", "Ceilings"):
        assert f"\n## {section}" in text


def test_plot_is_drawn_from_the_csv(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [measured(peer, 1024 << i, 0.002 * 2**i) for peer in PEERS for i in (0, 1)]
    table = tmp_path / "x.csv"
    report.write_csv(table, {"cpu": "some model"}, [report.make_row(row) for row in rows])
    scaling_plot(table, tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    assert cli.main(["scaling-plot", str(table)]) == 0
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_plot_refuses_an_empty_table(tmp_path):
    pytest.importorskip("matplotlib")
    with (tmp_path / "x.csv").open("w") as file:
        csv.writer(file).writerow(["peer", "slots"])
    with pytest.raises(SystemExit, match="no rows of ours"):
        scaling_plot(tmp_path / "x.csv", tmp_path / "x.png")
