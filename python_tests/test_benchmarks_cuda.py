"""The GPU suite, on the CPU: cases, checks of peers, refusals, rows, page and plot.

No test asserts a time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks/ is not installed with the package
    sys.path.insert(0, str(ROOT))

from benchmarks import cli, cuda_cases, cuda_op, op_command, report  # noqa: E402
from benchmarks.cases import Batches, Case, fill_batch  # noqa: E402
from benchmarks.ceilings import Ceilings  # noqa: E402
from benchmarks.cuda_peers import (  # noqa: E402
    CCE,
    COMPILED,
    CUDA_PEERS,
    FULL_BF16,
    FULL_TF32,
    INF_CL,
    LIGER,
)
from benchmarks.device import CpuDevice, StepTimes, told  # noqa: E402
from benchmarks.peers import LINEAR_TORCH, OURS, Ours, Peer  # noqa: E402

CEILINGS = Ceilings({"copy": 3e12}, {"8192^3 bf16": 8e14})
PUBLISHED = {CCE.name: "cut_cross_entropy", LIGER.name: "liger_kernel", INF_CL.name: "inf_cl"}
SMALL = cuda_op.CudaOptions(seconds=0.02, ceiling_size=64, ceiling_bytes=1 << 16)


class FakeDevice(CpuDevice):
    """A small GPU: it counts, has graphs and little memory."""

    def __init__(self, total: int = 80 << 30, cache: int = 50 << 20) -> None:
        self.total, self.cache, self.released = total, cache, 0

    def peak_extra(self, call, count):
        call()
        return 1000 * count

    def graph(self, call, count):
        return lambda: [call() for _ in range(count)]

    def cache_bytes(self):
        return self.cache

    def total_bytes(self):
        return self.total

    def free_bytes(self):
        return self.total

    def release(self):
        self.released += 1


def named(case: Case, *peers: Peer, label: str = "X", **targets) -> cuda_cases.NamedCase:
    return cuda_cases.NamedCase(label, case, peers=peers, **targets)


def run(*cases: cuda_cases.NamedCase, device=None, **changes) -> cuda_op.CudaResult:
    options = dataclasses.replace(SMALL, cases=cases, **changes)
    return cuda_op.run(options, device or CpuDevice(), lambda result: None)


def test_cases_are_those_that_have_targets_and_fit_the_peers_that_run_them():
    by_label = {one.label: one for one in cuda_cases.CASES}
    assert {label: one.target_ms for label, one in by_label.items() if one.target_ms} == {
        "A": 0.12,
        "B": 0.15,
        "C": 0.20,
        "D": 0.35,
        "E": 25.0,
    }
    assert by_label["A"].graph_target_ms == 0.05
    assert by_label["E"].case == Case(1 << 20, 1024, 768, 1, "bf16")
    assert by_label["C-mean"].case == dataclasses.replace(by_label["C"].case, drift="mean")
    every = dataclasses.replace(by_label["D-mean"].case, center_over=16)
    assert by_label["D-all"].case == every and every.corrections == "mean, centered gradients"
    assert COMPILED not in by_label["C-d384"].peers and COMPILED in by_label["C"].peers
    assert [one.label for one in cuda_cases.find_cases(["C", "A"])] == ["A", "C"]
    with pytest.raises(ValueError, match=r"got Y,Z"):
        cuda_cases.find_cases(["Z", "A", "Y"])


def test_sweep_measures_nothing_twice_and_leaves_the_largest_for_last():
    swept = cuda_cases.with_sweep(cuda_cases.CASES, cuda_cases.SWEEP_CASE, cuda_cases.SWEEP_SIZES)
    labels = [one.label for one in swept]
    assert labels[-1] == "E" and "F=1024" in labels and "F=32768" not in labels
    assert len({one.case for one in swept}) == len(swept)
    assert cuda_cases.with_sweep(cuda_cases.CASES, cuda_cases.SWEEP_CASE, ()) == cuda_cases.CASES


@pytest.mark.parametrize(("label", "banks"), [("A", 12), ("B", 3), ("C", 2), ("D", 1), ("E", 1)])
def test_banks_in_rotation_are_twice_the_cache(label, banks):
    (one,) = cuda_cases.find_cases([label])
    assert cuda_cases.banks_in_rotation(one.case, 50 << 20) == banks
    assert cuda_cases.banks_in_rotation(one.case, 0) == 1


def test_rotation_steps_on_each_bank_in_turn():
    case = Case(16, n=4, d=8)
    rotation = cuda_cases.Rotation(OURS, case, CpuDevice(), banks=3)
    for _ in range(4):
        rotation.step()
    heads = [int(stepper.bank.cursor[0]) for stepper in rotation.steppers]
    assert heads == [8, 4, 4]
    assert all(len(stepper.bank) == 16 for stepper in rotation.steppers)


def test_banks_are_filled_in_large_batches():
    assert [fill_batch(slots) for slots in (16, 65536, 1 << 17, 1 << 20)] == [
        1024,
        1024,
        2048,
        4096,
    ]
    ours = Ours(Case(2500, d=4))
    ours.fill(*(t.detach() for t in Batches(Case(1, n=2500, d=4), count=1).next()))
    assert len(ours.bank) == 2500


def test_a_run_measures_checks_and_counts():
    case = named(Case(64, n=4, d=16, m=2, dtype="bf16"), OURS, LINEAR_TORCH, FULL_TF32)
    written = []
    options = dataclasses.replace(SMALL, cases=(case,))
    device = FakeDevice(cache=10_000)
    result = cuda_op.run(options, device, lambda now: written.append(len(now.measured)))
    assert written == [3, 3]  # after the case and at the end
    assert device.released > 3
    for one in result.measured:
        assert one.note == "" and one.errors.small and one.banks == 4
        assert one.times.median > 0 and one.fill_seconds > 0 and one.calling.median > 0
    assert result.host_floor.times.median > 0 and result.host_floor.calling.median > 0
    ours, full, linear = result.measured  # the order of CUDA_PEERS
    assert (ours.peer, full.peer, linear.peer) == (OURS, FULL_TF32, LINEAR_TORCH)
    assert ours.graph.steps % 4 == 0 and full.graph is None
    assert 2000 <= ours.extra_bytes <= 32000 and full.extra_bytes == 1000
    assert ours.table_bytes > 0 and full.table_bytes == 0
    assert torch.get_float32_matmul_precision() == "highest"


def test_every_peer_is_timed_with_the_backward_in_the_calling_thread_too():
    seen = []

    class Watched(Ours):
        def step(self, queries, passages):
            seen.append(torch._C._is_multithreading_enabled())
            return super().step(queries, passages)

    first, second = (
        dataclasses.replace(peer, name=f"watched {peer.name}", build=Watched)
        for peer in (OURS, LINEAR_TORCH)
    )
    for peer in (first, second):
        seen.clear()
        (one,) = run(named(Case(16, n=4, d=8), peer), peers=(peer,), rounds=1).measured
        assert one.note == "" and one.calling.steps > 0
        begin = seen.index(False)
        assert seen[begin:].count(False) >= one.calling.steps and begin >= one.times.steps
        assert seen[begin:] == sorted(seen[begin:])  # nothing after it in the calling thread
    assert torch._C._is_multithreading_enabled()


def test_what_cannot_be_run_says_why():
    huge = Case(1 << 20, n=1024, d=768, dtype="bf16")
    runner = cuda_op._Runner(SMALL, FakeDevice())
    runner.result.ceilings = CEILINGS
    assert runner._refusal(FULL_BF16, huge) == "impossible: 12,312.0 GiB of matrices"
    assert runner._refusal(CCE, huge).startswith("not run: about 6.3 s a step expected, limit 1 s")
    assert runner._refusal(OURS, huge) == runner._refusal(LINEAR_TORCH, huge) == ""
    small = cuda_op._Runner(SMALL, FakeDevice(total=50 << 30))
    refused = small._refusal(FULL_BF16, Case(65536, n=128, dtype="bf16"))
    assert refused == "out of memory: would need 48.2 GiB of matrices"
    spent = cuda_op._Runner(dataclasses.replace(SMALL, budget=-1.0), FakeDevice())
    assert spent._refusal(LINEAR_TORCH, Case(64)).startswith("not run: the -1 s of the run")
    assert spent._refusal(OURS, Case(64)) == ""


def test_a_quadratic_peer_is_expected_to_take_what_its_largest_case_says():
    done = cuda_op.CudaMeasured(named(Case(1016, n=8, d=64), CCE), CCE, 1)
    done.times = StepTimes((0.5,), (0.5,), 1)
    result = cuda_op.CudaResult(
        SMALL, CEILINGS, cuda_cases.measure_host_floor(CpuDevice(), 0), [done]
    )
    twice_wide = Case(2040, n=8, d=128)
    assert cuda_op.expected_seconds(CCE, twice_wide, result) == pytest.approx(0.5 * 4 * 2)
    assert cuda_op.expected_seconds(OURS, twice_wide, result) == 0
    least = 6 * 2048**2 * 128 / 8e14
    assert cuda_op.expected_seconds(LIGER, twice_wide, result) == pytest.approx(least)


def test_a_peer_that_fails_is_told_and_the_others_go_on():
    def broken(case, device):
        raise RuntimeError("no such kernel\nwith a long story")

    failing = dataclasses.replace(FULL_TF32, name="broken", build=broken)
    case = named(Case(64, n=4, d=16, dtype="bf16"), OURS, failing, *CUDA_PEERS[6:])
    result = run(case, peers=(OURS, failing, CCE, LIGER, INF_CL))
    notes = {one.peer.name: one.note for one in result.measured}
    assert notes["ours"] == "" and result.measured[0].times is not None
    assert notes["broken"] == "RuntimeError: no such kernel"
    for name, module in PUBLISHED.items():
        if importlib.util.find_spec(module) is None:
            assert notes[name] == f"not installed: No module named '{module}'"
    assert told(ValueError()) == "ValueError: "


def test_ceilings_are_measured():
    ceilings = cuda_cases.measure_ceilings(CpuDevice(), size=32, copied=1 << 12)
    assert ceilings.best_reading()[1] > 0 and ceilings.best_multiplying()[0] == "32^3 bf16"


@pytest.mark.parametrize("drawable", [True, False])
def test_the_command_line_runs_a_tiny_sweep_to_the_end(tmp_path, monkeypatch, capsys, drawable):
    def draw(results, out):
        if not drawable:
            raise SystemExit("scaling-plot: needs matplotlib")
        out.write_bytes(b"drawn")

    monkeypatch.setattr(op_command, "open_device", lambda name: FakeDevice(cache=0))
    monkeypatch.setattr(op_command, "scaling_plot", draw)
    monkeypatch.setattr(cuda_op, "measure_ceilings", lambda *_: CEILINGS)
    shape = ["--cases", "none", "--sizes", "64,128", "--n", "4", "--d", "16", "--m", "2"]
    how = ["--peers", "ours,full-matrix-bf16", "--seconds", "0.02", "--plot", "--out"]
    assert cli.main(["op", "--device", "cuda", *shape, *how, str(tmp_path)]) == 0
    shown = capsys.readouterr()
    (table,) = tmp_path.glob("*-cpu-op.csv")
    header, rows = report.read_csv(table)
    assert str(tmp_path) not in header["command"] and "cut-cross-entropy" in header
    assert [(row["label"], row["peer"]) for row in rows] == [
        (f"F={slots}", peer) for slots in (64, 128) for peer in ("ours", "full matrix bf16")
    ]
    assert {(row["dtype"], row["m"], row["note"]) for row in rows} == {("bf16", "2", "")}
    assert "full matrix bf16" in shown.out and "## F=64" in table.with_suffix(".md").read_text()
    assert table.with_suffix(".png").exists() == drawable
    assert ("not drawn" in shown.err) != drawable
