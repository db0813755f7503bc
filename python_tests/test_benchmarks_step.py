"""The benchmark of a whole training step: its variants, what a bank adds, its page and command.

No test asserts a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks/ is not installed with the package
    sys.path.insert(0, str(ROOT))

from benchmarks import cli, report, step, step_page  # noqa: E402
from benchmarks.cases import TEMPERATURE, make_vectors  # noqa: E402
from benchmarks.device import CpuDevice, StepTimes  # noqa: E402
from contaccum_ext import reference  # noqa: E402

CPU = CpuDevice()
TINY = ["--layers", "1", "--hidden", "16", "--heads", "2", "--vocabulary", "50", "--n", "3"]
TINY += ["--query-length", "4", "--passage-length", "5", "--rounds", "2", "--steps", "1"]


def variant(name: str, bank: int, *seconds: float) -> step.Variant:
    one = step.Variant(name, bank)
    one.times = StepTimes(seconds, seconds, len(seconds))
    return one


class DeviceWithGraphs(CpuDevice):
    def graph(self, call, count):
        return lambda: [call() for _ in range(count)]


def test_what_a_bank_adds_is_taken_within_each_round():
    base = variant(step.OURS, 0, 1.0, 2.0, 4.0)  # the clock slows down
    assert step.added(variant(step.OURS, 8, 1.02, 2.04, 4.08), base) == pytest.approx(0.02)
    assert step.added(step.Variant(step.OURS, 8), base) is None
    assert step.added(base, None) is None
    banked = variant(step.OURS, 8, 1.0, 2.0, 4.0)
    assert step.added(banked, base, in_graph=True) is None
    for one, seconds in ((base, (1.0, 3.0)), (banked, (1.1, 3.3))):
        one.graph = StepTimes(seconds, seconds, 2)
    assert step.added(banked, base, in_graph=True) == pytest.approx(0.1)
    assert step.added(banked, base) == 0


def test_the_target_is_held_against_both_steps_without_a_bank():
    result = step.StepResult(
        step.StepOptions(),
        [
            variant(step.OURS, 0, 1.0),
            variant(step.OFFICIAL, 0, 0.99),
            variant(step.OURS, 65536, 1.025),
        ],
    )
    own, own_graph, pytorch, _ = step.targets(result)
    assert "eager" in own.text and "graph" in own_graph.text and own_graph.passed is None
    assert (own.value, own.passed) == (pytest.approx(2.5), True)
    assert (pytorch.value, pytorch.passed) == (pytest.approx(100 * (1.025 / 0.99 - 1)), False)
    result.variants.pop()
    assert [target.passed for target in step.targets(result)] == [None] * 4


@pytest.mark.parametrize("bank", [0, 24])
def test_both_losses_are_the_reference(bank):
    options = step.StepOptions(banks=(bank,), n=3, m=2, hidden=16, dtype="fp32")
    ours, official = step._variants(options, CPU)
    oracle = None
    if bank:
        oracle = reference.DualMemoryBank(bank, 16, 2)
        oracle.enqueue(*make_vectors(options.case(bank), bank, 0))
    queries, passages = make_vectors(options.case(bank), 3, 7)
    wanted = reference.contaccum_loss(queries, passages, oracle, TEMPERATURE)
    assert (ours.loss_name, official.loss_name) == (step.OURS, step.OFFICIAL)
    torch.testing.assert_close(ours.loss(queries, passages), wanted)
    tolerance = {} if bank else {"rtol": 2e-2, "atol": 2e-2}  # in-batch products are bf16
    torch.testing.assert_close(official.loss(queries, passages), wanted, **tolerance)


def test_a_matrix_too_large_is_computed_not_tried():
    options = step.StepOptions()
    refused = step._official(options.case(65536), CPU)  # of 4 GiB
    assert refused.loss is None and refused.note == "impossible: 96.0 GiB of matrices"


def test_towers_give_unit_vectors_of_two_encoders():
    pytest.importorskip("transformers")
    options = step.StepOptions(m=2, layers=1, hidden=16, heads=2, vocabulary=50)
    towers = step.Towers(options)
    queries, passages = towers(torch.randint(50, (3, 4)), torch.randint(50, (6, 5)))
    assert queries.shape == (3, 16) and passages.shape == (3, 2, 16)
    torch.testing.assert_close(passages.norm(dim=-1), torch.ones(3, 2))
    assert towers.query is not towers.passage


def test_the_command_line_runs_a_tiny_step_to_the_end(tmp_path, capsys):
    pytest.importorskip("transformers")
    command = ["step", *TINY, "--banks", "0,16,64", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    (table,) = tmp_path.glob("*-cpu-step.csv")
    header, rows = report.read_csv(table)
    assert str(tmp_path) not in header["command"] and "transformers" in header
    assert [(row["loss"], row["bank"]) for row in rows] == [
        (name, bank) for bank in ("0", "16", "64") for name in (step.OURS, step.OFFICIAL)
    ]
    for row in rows:
        assert float(row["ms_median"]) > 0 and row["steps"] == "2" and row["note"] == ""
    text = table.with_suffix(".md").read_text()
    assert "1 positive + 1 hard negative)" in text and "not measured" in text
    assert shown.strip() in text


def test_steps_are_replayed_in_turns_where_there_are_graphs():
    pytest.importorskip("transformers")
    options = step.StepOptions((0, 16), 3, 2, 4, 5, 1, 16, 2, 50, rounds=2, steps=3)
    result = step.run(options, DeviceWithGraphs())
    for one in result.variants:
        assert len(one.graph.elapsed) == 2 and one.graph.steps == 6
    row = step_page.make_row(result.find(step.OURS, 16), result)
    assert row.graph_ms_median > 0 and row.graph_adds_percent is not None
    assert f"{row.graph_adds_percent:+.2f}%" in step_page.summary(result)


def test_a_loss_that_fails_is_a_note(monkeypatch):
    pytest.importorskip("transformers")

    def broken(case, device):
        def loss(queries, passages):
            raise RuntimeError("out of something")

        return step.Variant(step.OFFICIAL, case.slots, loss)

    monkeypatch.setattr(step, "_official", broken)
    options = step.StepOptions((0, 16), 3, 2, 4, 5, 1, 16, 2, 50, rounds=1, steps=1)
    result = step.run(options, CPU)
    assert result.find(step.OURS, 16) and result.find(step.OFFICIAL, 16) is None
    assert result.variants[-1].note == "RuntimeError: out of something"
    assert "RuntimeError" in step_page.summary(result)
