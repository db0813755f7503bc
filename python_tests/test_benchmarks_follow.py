"""The benchmark of following the encoders. No test asserts a time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks/ is not installed with the package
    sys.path.insert(0, str(ROOT))

import contaccum_ext as ca  # noqa: E402
from benchmarks import cli, follow, report  # noqa: E402
from benchmarks.device import CpuDevice  # noqa: E402


class Clock(CpuDevice):
    """Calls in earnest, but every loss takes 1 ms, a rebuild 100 more, a move 10."""

    def __init__(self, monkeypatch) -> None:
        self.seconds, self.calls = 0.0, []
        loss, move = ca.contaccum_loss, ca.transport

        def timed_loss(q, p, bank, *args, **options):
            rebuilds = bank.pending_rebuild(1 / args[0], bank.window_blocks()) != 0
            self._note(0.101 if rebuilds else 0.001, "rebuild" if rebuilds else "loss")
            return loss(q, p, bank, *args, **options)

        def timed_move(bank, *args, **options):
            self._note(0.010, "move")
            return move(bank, *args, **options)

        monkeypatch.setattr(ca, "contaccum_loss", timed_loss)
        monkeypatch.setattr(ca, "transport", timed_move)

    def _note(self, seconds: float, what: str) -> None:
        self.seconds += seconds
        self.calls.append(what)

    def burst(self, call, count):
        before = self.seconds
        for _ in range(count):
            call()
        return self.seconds - before, 0.0


def test_a_row_is_of_losses_moves_and_rebuilds(monkeypatch):
    options = follow.FollowOptions(n=1, m=2, d=4, accumulation=2, probes=5)
    clock = Clock(monkeypatch)
    row = follow.measure(options, clock, 256, rate=1e3)
    assert {*clock.calls} == {"loss", "rebuild", "move"}
    assert row.losses_ms == pytest.approx(2.0)
    assert (row.move_ms, row.rebuild_ms) == (pytest.approx(10.0), pytest.approx(100.0))
    assert row.move_floor_ms == pytest.approx(2 * 256 * 3 * 16 / 1e3)
    assert row.rebuild_floor_ms == pytest.approx(2 * 256 * 256 * 2 * 4 / 1e3)
    assert row.updates_between == 4  # 8 slots of 256, 2 an update
    assert row.following_ms == pytest.approx(10 + 100 / 4)


def test_rebuilds_are_as_often_as_the_library_has_them():
    options = follow.FollowOptions(n=2, accumulation=4)
    for slots in (8, 256, 257, 1000):
        bank = ca.DualMemoryBank(slots, 3)
        slot_staleness = ca.staleness.SlotStaleness(bank)
        rebuilt = []
        for _ in range(3 * slots // 8 + 70):
            bank.enqueue(torch.randn(8, 3), torch.randn(8, 1, 3))
            slot_staleness.note_written()
            rebuilt.append(slot_staleness.rebuild_due())
            slot_staleness.age(0.0, rebuilt[-1])
        last = [i for i, due in enumerate(rebuilt) if due][-2:]
        assert last[1] - last[0] == options.updates_between(slots), slots


def test_the_command_writes_a_page_and_rows(tmp_path, monkeypatch):
    sizes = ["--sizes", "32,64", "--d", "8", "--n", "2", "--accumulation", "2", "--probes", "4"]
    monkeypatch.setitem(follow._SQUARE, "cpu", 64)
    assert cli.main(["follow", *sizes, "--out", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("*-cpu-follow.md")
    header, rows = report.read_csv(page.with_suffix(".csv"))
    assert [row["slots"] for row in rows] == ["32", "64"]
    assert header["command"].startswith("python -m benchmarks follow --sizes 32,64")
    lines = page.read_text().splitlines()
    assert [x.split("|")[1].strip() for x in lines if x.startswith("|")][2:] == ["32", "64"]
    assert any("updates of 4 queries" in line for line in lines)
