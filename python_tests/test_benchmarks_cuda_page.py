"""The page of a GPU run, on the CPU: rows, targets, the summary and the plot's choice of them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks/ is not installed with the package
    sys.path.insert(0, str(ROOT))

from benchmarks import agreement, cuda_cases, cuda_op, cuda_page, report  # noqa: E402
from benchmarks.cases import Case  # noqa: E402
from benchmarks.ceilings import Ceilings  # noqa: E402
from benchmarks.cuda_peers import FULL_BF16, FULL_FP32  # noqa: E402
from benchmarks.device import StepTimes  # noqa: E402
from benchmarks.peers import OURS, Peer  # noqa: E402
from benchmarks.plot import scaling_plot, sweep_rows  # noqa: E402

CEILINGS = Ceilings({"copy": 3e12}, {"8192^3 bf16": 8e14})
HOST_FLOOR = cuda_cases.HostFloor(
    StepTimes((2.5e-4,), (2.25e-4,), 1), StepTimes((1.25e-4,), (1.5e-4,), 1)
)


def result_with(*times: tuple[str, Case, Peer, float | None]) -> cuda_op.CudaResult:
    measured = []
    for label, case, peer, seconds in times:
        target = cuda_cases.NamedCase(label, case, 0.2, 0.1)
        one = cuda_op.CudaMeasured(target, peer, 2, note="" if seconds else "out of memory")
        if seconds:
            one.times = StepTimes((seconds,) * 3, (seconds / 2,) * 3, 30)
            one.calling = StepTimes((seconds / 2,) * 3, (seconds / 3,) * 3, 30)
            one.errors = agreement.Errors(1e-4, 2e-3, 3e-3)
            one.extra_bytes, one.table_bytes = 3 << 20, 1 << 20
            if peer is OURS:
                one.graph = StepTimes((seconds / 4,), (1e-6,), 16)
        measured.append(one)
    cases = tuple({one.named.label: one.named for one in measured}.values())
    options = cuda_op.CudaOptions(cases=cases, peers=(OURS, FULL_BF16))
    return cuda_op.CudaResult(options, CEILINGS, HOST_FLOOR, measured)


C = Case(32768, n=128, d=768, dtype="bf16")
IN_CALLING = "backward in the calling thread"


def test_targets_are_met_missed_or_not_measured():
    result = result_with(("C", C, OURS, 3e-4), ("D", C.with_slots(65536), OURS, None))
    verdicts = [(t.text, t.value, t.passed) for t in cuda_page.targets(result)]
    assert verdicts == [
        ("C, eager: at most 0.2 ms", pytest.approx(0.3), False),
        (f"C, eager, {IN_CALLING}: at most 0.2 ms", pytest.approx(0.15), True),
        ("C, in a graph: at most 0.1 ms", pytest.approx(0.075), True),
        ("D, eager: at most 0.2 ms", None, None),
        (f"D, eager, {IN_CALLING}: at most 0.2 ms", None, None),
        ("D, in a graph: at most 0.1 ms", None, None),
    ]


def test_rows_page_and_summary_tell_the_rates_and_what_was_refused(tmp_path):
    result = result_with(("C", C, OURS, 4e-4), ("C", C, FULL_FP32, 4e-2), ("C", C, FULL_BF16, None))
    row, wide, refused = (cuda_page.make_row(one, result) for one in result.measured)
    assert row.tflops_per_s == pytest.approx(8 * 128 * 32768 * 768 / 4e-4 / 1e12)
    assert row.tbytes_per_s == pytest.approx(32768 * 2 * 768 * 2 / 4e-4 / 1e12)
    assert row.floor_ms == pytest.approx(32768 * 2 * 768 * 2 / 3e12 * 1e3)
    assert row.times_floor == pytest.approx(0.4 / row.floor_ms)
    assert (row.extra_mib, row.bank_mib, row.table_mib, row.target_ms) == (3, 96, 1, 0.2)
    assert (wide.dtype, wide.bank_mib, wide.target_ms) == ("fp32", 192, None)
    assert refused.ms_median is None and refused.note == "out of memory"

    path = tmp_path / "x.csv"
    report.write_csv(path, {"gpu": "some model"}, [row, wide, refused], cuda_page.CudaRow)
    header, read = report.read_csv(path)
    assert header == {"gpu": "some model"}
    assert list(read[0]) == [field.name for field in dataclasses.fields(cuda_page.CudaRow)]
    assert (read[0]["ms_median"], read[1]["ms_median"], read[2]["ms_median"]) == ("0.4", "40", "")

    page = cuda_page.compose({"gpu": "some model"}, result)
    for wanted in ("some model", "MISSED", "met", "out of memory", "It lacks", "## C: n=128"):
        assert wanted in page
    assert "1e-04 / 2e-03 / 3e-03" in page and "800 TFLOP/s" in page and "3.00 TB/s" in page
    assert (row.calling_thread_ms, wide.calling_thread_ms) == (pytest.approx(0.2), 20)
    assert row.calling_thread_host_ms == pytest.approx(0.4 / 3)
    assert refused.calling_thread_ms is None
    summary = cuda_page.summary(result)
    assert "| 0.400 |" in summary
    assert "| C | 0.4000 | 0.2000 | 0.1000 |" in " ".join(summary.split())
    for text in (" ".join(page.split()), " ".join(summary.split())):
        assert f"ms, {IN_CALLING} |" in text and "(x * 2).sum().backward()" in text
        assert "| eager | 0.2500 | 0.2250 |" in text
        assert f"| eager, {IN_CALLING} | 0.1250 | 0.1500 |" in text


def test_plot_takes_the_sweep_out_of_all_cases(tmp_path):
    sweep = [
        (f"F={slots}", C.with_slots(slots), peer, slots * 1e-8)
        for slots in (1024, 2048, 4096)
        for peer in (OURS, FULL_FP32, FULL_BF16)
    ]
    others = [("A", Case(2048, d=768, m=2, dtype="bf16"), OURS, 1e-4)]
    result = result_with(*others, *sweep)
    rows = [cuda_page.make_row(one, result) for one in result.measured]
    table = tmp_path / "x.csv"
    report.write_csv(table, {"gpu": "some model"}, rows, cuda_page.CudaRow)
    chosen = sweep_rows(report.read_csv(table)[1])
    assert [row["label"] for row in chosen] == [label for label, *_ in sweep]
    pytest.importorskip("matplotlib")
    scaling_plot(table, tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    assert "some model" in drawn or "<svg" in drawn
