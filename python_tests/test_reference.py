"""The oracle itself: against loops in plain Python, and its bank against a deque."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch

import contaccum_ext as ca
from contaccum_ext import reference


def batch(n: int, m: int, d: int = 3):
    q, p = torch.randn(n, d, dtype=torch.float64), torch.randn(n, m, d, dtype=torch.float64)
    return q, p, torch.randint(-1, 4, (n, m))


def filled_bank(slots=(4, 5), m=2, ids=False, capacity=7, **options) -> reference.DualMemoryBank:
    torch.manual_seed(0)
    layout = ca.BankLayout(1, 2, 4)
    bank = reference.DualMemoryBank(capacity, 3, m, torch.float64, layout=layout, **options)
    for n in slots:
        q, p, given = batch(n, m)
        bank.enqueue(q, p, given if ids else None)
    return bank


def loss_by_loops(q, p, bank, tau, ids, row_weighting, banks) -> float:
    """The definition, one score at a time. Rows and columns are (vector, id, owner's row)."""

    def dot(x, y):
        return sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / tau

    used = min(bank.effective_window(), len(bank))
    first = len(bank) - used
    n, m = p.shape[:2]
    banked_ids = bank.passage_ids()
    rows = [("local", i, q[i], None) for i in range(n)]
    rows += [
        ("banked", first + j, bank.queries()[first + j], bank.query_offsets()[first + j])
        for j in range(used)
    ]
    total = 0.0
    for kind, i, query, query_offset in rows[: n if banks == "passages" else None]:
        mine = ids[i, 0] if kind == "local" else banked_ids[i, 0]
        terms, target = [], 0.0
        for other, j, _, _ in rows:
            for k in range(m):
                own = other == kind and i == j and k == 0
                its = ids[j, k] if other == "local" else banked_ids[j, k]
                if ids is not None and its == mine and its != -1 and not own:
                    continue
                if other == "banked" and banks == "queries" and not own:
                    continue
                x, y = query, (p[j, k] if other == "local" else bank.passages()[j, k])
                if kind == "banked" and other == "local":
                    x = x + query_offset
                if kind == "local" and other == "banked":
                    y = y + bank.passage_offsets()[j, k]
                terms.append(math.exp(dot(x, y)))
                if own:
                    target = dot(x, y)
        total += math.log(sum(terms)) - target
    counted = n if row_weighting == "local" or banks == "passages" else n + used
    return total / counted


@pytest.mark.parametrize("banks", ["both", "passages", "queries"])
@pytest.mark.parametrize("row_weighting", ["local", "all"])
@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_the_matrix_against_loops(window, drift, row_weighting, banks):
    bank = filled_bank(ids=True, drift=drift)
    bank.window = window
    q, p, ids = batch(3, 2)
    got = reference.contaccum_loss(q, p, bank, 0.7, ids, row_weighting, False, banks)
    expected = loss_by_loops(q, p, bank, 0.7, ids, row_weighting, banks)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    assert bank.effective_window() < 7 or window != 1


def test_its_bank_is_a_deque():
    torch.manual_seed(0)
    bank = reference.DualMemoryBank(6, 3, 2, torch.bfloat16)
    queries, passages, ids = (deque(maxlen=6) for _ in range(3))
    assert len(bank) == 0 and bank.queries().shape == (0, 3) and bank.passages().shape == (0, 2, 3)
    for n in (4, 1, 3, 9, 2):
        q, p, given = batch(n, 2)
        bank.enqueue(q, p, given)
        queries.extend(q.bfloat16())
        passages.extend(p.bfloat16())
        ids.extend(given)
        assert len(bank) == len(queries)
        assert torch.equal(bank.queries(), torch.stack(list(queries)))
        assert torch.equal(bank.passages(), torch.stack(list(passages)))
        assert torch.equal(bank.passage_ids(), torch.stack(list(ids)))


def test_running_means_and_offsets_by_hand():
    """decay 0.5, blocks of two slots: 1, then (1 + 3) / 2 = 2, then (2 + 6) / 2 = 4, then 1."""
    bank = reference.DualMemoryBank(
        6, 1, 1, torch.float64, "mean", drift_decay=0.5, layout=ca.BankLayout(1, 2, 2)
    )
    for value in (1.0, 3.0, 6.0):
        x = torch.tensor([[value]], dtype=torch.float64)
        bank.enqueue(x, 10 * x)
    assert bank.mean.flatten().tolist() == [4.0, 40.0]
    # Slots 0 and 1 share the average of the means 1 and 2; slot 2 has 4.
    assert bank.query_offsets().flatten().tolist() == [2.5, 2.5, 0.0]
    assert bank.passage_offsets().flatten().tolist() == [25.0, 25.0, 0.0]
    # One batch of two counts as one step of the mean: (4 + (-3 - 1) / 2) / 2 = 1.
    x = torch.tensor([[-3.0], [-1.0]], dtype=torch.float64)
    bank.enqueue(x, 10 * x)
    assert bank.query_offsets().flatten().tolist() == [-0.5, -0.5, 1 - 2.5, 1 - 2.5, 0.0]


def test_the_package_and_the_oracle_keep_the_same_means_by_hand():
    twins = [
        kind(4, 1, 1, torch.float64, drift="mean", drift_decay=0.5, layout=ca.BankLayout(1, 2, 2))
        for kind in (ca.DualMemoryBank, reference.DualMemoryBank)
    ]
    for value in (1.0, 3.0, 6.0, 2.0, 0.0):  # the fifth overwrites the first
        x = torch.tensor([[value]], dtype=torch.float64)
        for bank in twins:
            bank.enqueue(x, 10 * x[:, None])
    # means 1, 2, 4, 3, 1.5; blocks (1 + 2) / 2, (4 + 3) / 2 and, for the newest, 1.5
    for bank in twins:
        assert bank.query_offsets().flatten().tolist() == [0.0, -2.0, -2.0, 0.0]
        assert bank.passage_offsets().flatten().tolist() == [0.0, -20.0, -20.0, 0.0]


def test_rounding_to_the_bank_passes_gradients_straight_through():
    """The loss is of the rounded vectors, its gradient that of the loss at the rounded vectors."""
    q, p, _ = batch(4, 2)
    bank = reference.DualMemoryBank(5, 3, 2, torch.bfloat16)
    rounded = [x.bfloat16().double().requires_grad_() for x in (q, p)]
    exact = reference.contaccum_loss(*rounded)
    leaves = [x.requires_grad_() for x in (q, p)]
    got = reference.contaccum_loss(*leaves, bank, compute_dtype=torch.float64)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact.item(), rel=1e-6)
    expected = torch.autograd.grad(exact, rounded)
    for g, e in zip(torch.autograd.grad(got, leaves), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=0)


def test_it_takes_the_packages_own_bank():
    torch.manual_seed(0)
    bank = ca.DualMemoryBank(5, 3, 2, torch.float64, drift="mean")
    mine = reference.DualMemoryBank(5, 3, 2, torch.float64, drift="mean", layout=bank.layout)
    for n in (2, 4, 3):
        q, p, ids = batch(n, 2)
        losses = [reference.contaccum_loss(q, p, b, 0.5, ids) for b in (bank, mine)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-13)
    assert torch.equal(bank.queries(), mine.queries())
    with pytest.raises(RuntimeError, match="queries"):
        reference.contaccum_loss(q[:, :1], p[..., :1], ca.DualMemoryBank(5, 3, 2, torch.float64))
