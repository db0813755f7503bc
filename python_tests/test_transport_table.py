"""The table of a bank whose vectors are moved: what it holds while it lags, when it is rebuilt."""

from __future__ import annotations

import pytest
import torch
from test_transport import DRIFTS, F64, D, M, probes, vectors

import contaccum_ext as ca
from contaccum_ext import reference

LAYOUTS = pytest.mark.parametrize(
    "layout", [ca.BankLayout(1, 2, 4), ca.BankLayout(2, 2, 4), ca.BankLayout(3, 3, 6)], ids=str
)
SIZES = (3, 1, 5, 2, 9, 4, 3, 7, 30, 1, 2, 6, 17, 3, 4)


@DRIFTS
@LAYOUTS
@pytest.mark.parametrize("both", [False, True], ids=["one way", "symmetric"])
@pytest.mark.parametrize("capacity", [23, 24])
def test_a_table_may_stay_while_vectors_are_moved(device, drift, layout, both, capacity):
    """Batches that end before, at and after groups and blocks, one as large as the bank."""
    bank = ca.DualMemoryBank(capacity, D, M, F64, device, drift, layout=layout, symmetric=both)
    oracle = reference.DualMemoryBank(capacity, D, M, F64, drift, layout=layout)
    moves, lags, moved = probes(6), [], 0
    for step, size in enumerate(SIZES * 3):
        if step % 3 == 2:
            back, anew = moved % 2, moved % 5 == 4  # or vectors that are not of length 1 would grow
            pairs = [moves[i ^ back] for i in range(4)]
            options = {"ridge": 3.0, "normalize": False}
            ca.transport(bank, *(x.to(device) for x in pairs), **options, rebuild=anew)
            oracle.transport(*pairs[:2], "queries", 3.0, False, anew)
            oracle.transport(*pairs[2:], "passages", 3.0, False, anew)
            moved += 1
            assert not anew or oracle.lagging_scores(0.2) is None
        lagging = oracle.lagging_scores(0.2)
        if lagging is not None:
            now = torch.einsum("id,jmd->ijm", oracle.queries(), oracle.passages())
            lags.append((now - lagging[0].among(oracle.places())).abs().max().item())
        results = []
        for memory, place, function in (
            (bank, device, ca.contaccum_loss),
            (oracle, "cpu", reference.contaccum_loss),
        ):
            leaves = [
                vectors(size, seed=50 + step).to(place).requires_grad_(),
                vectors(size, M, seed=150 + step).to(place).requires_grad_(),
            ]
            loss = function(*leaves, memory, 0.2, symmetric=both)
            results.append([x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, leaves))])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert len(lags) > 20 and max(lags) > 0.1, lags


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_table_is_rebuilt_once_a_32nd_of_the_bank_is_new(symmetric):
    """So that it is linear in the bank for each slot; and a resumed run goes on counting."""
    bank = ca.DualMemoryBank(160, D, M, F64, symmetric=symmetric)
    follow, new, found, wanted = ca.BankTransport(bank), 0, [], []
    follow(vectors(9), vectors(9))
    for step in range(100):
        bank.enqueue(vectors(2, seed=step), vectors(2, M, seed=step + 1))
        follow(vectors(9), vectors(9))
        new += 2
        found.append(bank.pending_rebuild(1.0, -1) != 0)
        wanted.append(32 * new >= min(160, 2 * step + 2))
        if wanted[-1]:
            new = 0
        if symmetric:
            assert (bank.mirror.pending_rebuild(1.0, -1) != 0) == found[-1]
        resumed = ca.BankTransport(bank)
        resumed.load_state_dict(follow.state_dict())
        follow = resumed
    assert found == wanted and sum(wanted[-9:]) == 3
