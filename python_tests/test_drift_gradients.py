"""Gradients that sum to zero, in the drift experiments: the option, and the look at gradients."""

from __future__ import annotations

import pytest
import torch
from test_drift_run import CPU, prepared, tiny  # noqa: F401 (a fixture)

import contaccum_ext as ca
from benchmarks.drift import methods
from benchmarks.drift.data import load
from benchmarks.drift.gradients import _Probe, gradients

SMALL = {"layers": 1, "n": 4, "accumulation": 2}


def first_gradients(directory, centre, bank=16, update=2):
    """Of passages (K, n, m, d), in an update with a bank that has been filled."""
    options = {} if centre is None else {"centre": centre}
    setting = tiny(bank=bank, options=options, dropout=0.0)
    probe = _Probe(setting, load(directory, setting, CPU), directory, CPU)
    probe.fill(update)
    one = probe.run
    queries, passages = one._encode(update)
    found = one._loss(update, queries.detach(), passages.detach())[1][1]
    return found, one, queries.detach(), passages.detach()


@pytest.mark.parametrize("centre", methods.CENTRES)
def test_gradients_sum_to_zero(prepared, centre):  # noqa: F811
    plain = first_gradients(prepared[0], None)[0]
    found = first_gradients(prepared[0], centre)[0]
    assert plain.sum((0, 1, 2)).norm() > 1e-3
    assert found.sum((0, 1, 2)).norm() < 1e-6
    if centre == "batch":
        assert found.sum((1, 2)).norm() < 1e-6
    taken = (plain - found).flatten(1, 2)
    torch.testing.assert_close(taken, taken[:, :1].expand_as(taken))
    if centre == "update":
        torch.testing.assert_close(taken[0], taken[1])


def test_spread_is_what_the_library_does(prepared):  # noqa: F811
    """Batch after batch, as `contaccum_loss(center_over=K)` sees them."""
    found, one, queries, passages = first_gradients(prepared[0], "spread")
    history, ids = one.correction.history, one.ids.long()
    bank = ca.DualMemoryBank(16, queries.shape[-1], passages.shape[2])
    old = slice(0, 16)
    bank.enqueue(history.queries[old], history.passages[old], ids[old])
    for batch in range(2):
        p = passages[batch].clone().requires_grad_()
        own = ids[16 + 4 * batch : 20 + 4 * batch]
        loss = ca.contaccum_loss(queries[batch], p, bank, 1 / 20, own, center_over=2)
        (ours,) = torch.autograd.grad(loss / 2, p)
        torch.testing.assert_close(ours, found[batch], rtol=1e-4, atol=1e-6)


def test_unknown_ways_are_refused(prepared):  # noqa: F811
    with pytest.raises(ValueError, match="centre: expected one of"):
        first_gradients(prepared[0], "everything")


def test_a_look_at_gradients(prepared):  # noqa: F811
    table = gradients(
        "tiny", prepared[0], learning_rate=1e-3, updates=2, banks=(8, 16), averaged=2, **SMALL
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [line[:2] for line in lines[2:]] == [
        ["in-batch", ""],
        *([f"bank {b}", c] for b in (8, 16) for c in ("as is", *methods.CENTRES)),
    ]
    assert lines[2][2] == "1.000" and lines[2][-1] == "0.000"
    for line in lines[3:]:
        assert all(-1 <= float(cell) <= 1 for cell in line[2:6])
        assert (float(line[-1]) > 0.001) == (line[1] == "as is")
