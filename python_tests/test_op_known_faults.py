"""Faults that other implementations of memory banks have, each as a small explicit test."""

from __future__ import annotations

import math

import pytest
import torch
from test_op_refusals import assert_same_state, state

import contaccum_ext as ca
from contaccum_ext import reference


def one_hot(device, *positions: int, d: int = 8) -> torch.Tensor:
    return torch.eye(d, dtype=torch.float64, device=device)[list(positions)]


def new_bank(device, capacity=4, d=8, m=1, **options):
    return ca.DualMemoryBank(capacity, d, m, torch.float64, device, **options)


def test_capacity_counts_slots_not_batches(device):
    bank = new_bank(device, capacity=4)
    for first in (0, 3):
        x = one_hot(device, first, first + 1, first + 2)
        ca.contaccum_loss(x, x, bank)
        assert len(bank) <= 4
    assert torch.equal(bank.queries(), one_hot(device, 2, 3, 4, 5))
    assert torch.equal(bank.passages()[:, 0], bank.queries())


def test_the_oldest_slots_leave_first_whatever_the_batch_sizes(device):
    bank = new_bank(device, capacity=5, d=40)
    kept: list[int] = []
    at = 0
    for n in (1, 2, 5, 1, 1, 3, 7, 4, 1, 12):
        x = one_hot(device, *range(at, at + n), d=40)
        ca.contaccum_loss(x, x, bank)
        kept = (kept + list(range(at, at + n)))[-5:]
        at += n
        assert torch.equal(bank.queries(), one_hot(device, *kept, d=40))


def test_banked_queries_are_loss_rows(device):
    """Two orthogonal pairs: the banked row alone contributes log(1 + 1/e), and its gradient."""
    bank = new_bank(device)
    old = one_hot(device, 0)
    ca.contaccum_loss(old, old, bank)
    q, p = one_hot(device, 1), one_hot(device, 1).requires_grad_()
    row = math.log(1 + math.exp(-1))  # own score 1 against one other score of 0

    def loss(banks):
        return ca.contaccum_loss(q, p, bank, enqueue=False, banks=banks)

    assert loss("both").item() == pytest.approx(2 * row, rel=1e-14)
    assert loss("passages").item() == pytest.approx(row, rel=1e-14)
    (with_rows,) = torch.autograd.grad(loss("both"), p)
    (without,) = torch.autograd.grad(loss("passages"), p)
    # The banked row pushes the local passage away from the banked query; nothing else does.
    other = 1 / (1 + math.e)
    assert with_rows[0, 0].item() == pytest.approx(other, rel=1e-13)
    assert without[0, 0].item() == 0.0


def test_targets_with_hard_negatives_and_a_bank(device):
    """Target columns are i * m, behind them the bank's at (n + j) * m: each row's loss is small
    exactly when its own positive scores high."""
    n, m = 3, 3
    bank = new_bank(device, m=m, d=32)

    def batch(first):
        q = 20 * one_hot(device, *range(first, first + n), d=32)
        p = torch.zeros(n, m, 32, dtype=torch.float64, device=device)
        p[:, 0] = q  # positives score 400, every other column 0
        return q, p

    q, p = batch(0)
    assert ca.contaccum_loss(q, p, bank).item() < 1e-12
    q, p = batch(n)
    assert ca.contaccum_loss(q, p, bank).item() < 1e-12
    q, p = batch(2 * n)
    wrong = p[:, [1, 0, 2]]  # the positive second
    assert ca.contaccum_loss(q, wrong, bank, enqueue=False).item() > 399


def test_a_smaller_last_batch_is_used_and_banked(device):
    bank = new_bank(device, capacity=6)
    for n in (4, 4, 1):
        x = torch.randn(n, 8, dtype=torch.float64, device=device).requires_grad_()
        ca.contaccum_loss(x, x.detach(), bank).backward()
        assert x.grad.abs().sum() > 0 or len(bank) == n
        assert torch.equal(bank.queries()[-n:], x.detach())
    assert len(bank) == 6


def test_a_batch_larger_than_the_bank_leaves_its_newest_rows(device):
    bank = new_bank(device, capacity=3)
    x = torch.randn(8, 8, dtype=torch.float64, device=device)
    loss = ca.contaccum_loss(x, x, bank)
    assert torch.equal(bank.queries(), x[-3:])
    assert torch.equal(loss, ca.contaccum_loss(x, x))  # all eight rows counted
    expected = reference.contaccum_loss(x, x, bank, enqueue=False)
    torch.testing.assert_close(ca.contaccum_loss(x, x, bank), expected, rtol=1e-12, atol=0)


def test_the_loss_sees_the_bank_before_its_own_batch(device):
    """Enqueueing first would make every row its own false negative: at least log 2."""
    bank = new_bank(device)
    x = 30 * one_hot(device, 0, 1)
    assert ca.contaccum_loss(x, x, bank).item() < 1e-12
    assert ca.contaccum_loss(x, x, bank).item() > math.log(2) - 1e-12  # now it is there


def test_the_write_position_survives_a_resume(device):
    bank, other = new_bank(device, capacity=5), new_bank(device, capacity=5)
    ca.contaccum_loss(one_hot(device, 0, 1, 2), one_hot(device, 0, 1, 2), bank)
    other.load_state_dict(bank.state_dict())
    for x in (one_hot(device, 3, 4), one_hot(device, 5)):
        ca.contaccum_loss(x, x, other)
    assert torch.equal(other.queries(), one_hot(device, 1, 2, 3, 4, 5))


def test_banked_vectors_are_constants(device):
    """No graph is kept alive by the bank, and a later change of the inputs changes no slot."""
    bank = new_bank(device)
    q = torch.randn(2, 8, dtype=torch.float64, device=device).requires_grad_()
    ca.contaccum_loss(q * 2, q * 3, bank).backward()
    first = q.grad.clone()
    banked = bank.queries()
    assert not banked.requires_grad and not bank.bank_queries.requires_grad
    with torch.no_grad():
        q.zero_()
    assert torch.equal(bank.queries(), banked)
    x = torch.randn(2, 8, dtype=torch.float64, device=device).requires_grad_()
    ca.contaccum_loss(x, x.detach(), bank).backward()
    assert torch.equal(q.grad, first)


def test_a_false_negative_is_left_out_and_a_duplicate_target_is_not(device):
    """The same passage banked under another query is no negative; the target itself stays."""
    bank = new_bank(device, d=4)
    passage = one_hot(device, 0, d=4)

    def ids(x):
        return torch.tensor([[x]], device=device)

    for given, expected in ((7, 0.0), (8, 2 * math.log(2))):
        bank.clear()
        ca.contaccum_loss(passage, passage, bank, passage_ids=ids(7))
        loss = ca.contaccum_loss(passage, passage, bank, passage_ids=ids(given))
        assert loss.item() == pytest.approx(expected, abs=1e-14)


def test_ids_of_minus_one_never_match(device):
    x = one_hot(device, 0, d=4)
    none = torch.tensor([[-1]], device=device)
    with_ids, without = new_bank(device, d=4), new_bank(device, d=4)
    for _ in range(3):
        got = ca.contaccum_loss(x, x, with_ids, passage_ids=none)
        assert torch.equal(got, ca.contaccum_loss(x, x, without))
    assert got.item() == pytest.approx(3 * math.log(3), rel=1e-14)  # three rows of three equals


def test_clear_forgets_everything(device):
    torch.manual_seed(0)
    used, new = (new_bank(device, drift="mean", m=2) for _ in range(2))
    for n in (3, 2, 6):
        x = torch.randn(n, 2, 8, dtype=torch.float64, device=device)
        ids = torch.zeros(n, 2, dtype=torch.int64, device=device)
        ca.contaccum_loss(x[:, 0], x, used, passage_ids=ids)
    used.clear()
    assert len(used) == 0 and used.queries().shape == (0, 8) and used.passages().shape == (0, 2, 8)
    assert_same_state(used, state(new))
    for n in (3, 2, 6):
        x = torch.randn(n, 2, 8, dtype=torch.float64, device=device)
        assert torch.equal(*(ca.contaccum_loss(x[:, 0], x, bank) for bank in (used, new)))
    assert_same_state(used, state(new))
