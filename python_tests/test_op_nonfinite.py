"""NaN, infinity and overflow: a loss that says so, a bank that never gets to hold them."""

from __future__ import annotations

import math

import pytest
import torch
from test_op_refusals import assert_same_state, state

import contaccum_ext as ca
from contaccum_ext import reference

N, M, D = 4, 2, 6


def bank_and_batch(device, dtype=torch.float32, ids=False, drift="mean", slots=14):
    """A wrapped-around bank of 10 slots and a good batch."""
    torch.manual_seed(0)
    layout = ca.BankLayout(1, 2, 4)
    bank = ca.DualMemoryBank(10, D, M, dtype, device, drift, layout=layout)
    kind = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}

    def batch(n):
        given = torch.randint(0, 5, (n, M), device=device) if ids else None
        return torch.randn(n, D, **kind), torch.randn(n, M, D, **kind), given

    for _ in range(slots // 7):
        q, p, given = batch(7)
        ca.contaccum_loss(q, p, bank, 0.5, given)
    return bank, batch(N)


# (tensor, index of the bad component, what it becomes)
FAULTS = {
    "NaN in a query": (0, (1, 2), math.nan),
    "NaN in a positive": (1, (3, 0, 5), math.nan),
    "NaN in a hard negative": (1, (0, 1, 0), math.nan),
    "infinity in a query": (0, (0, 0), math.inf),
    "infinity in a positive": (1, (1, 0, 1), math.inf),
    "infinity in a hard negative": (1, (2, 1, 3), math.inf),
    "minus infinity in a hard negative": (1, (2, 1, 3), -math.inf),
}


def assert_refused_by_the_bank(bank, q, p, ids=None):
    """Loss and gradients not finite, and not a bit of the bank's state changed."""
    before = state(bank)
    q, p = q.clone().requires_grad_(), p.clone().requires_grad_()
    loss = ca.contaccum_loss(q, p, bank, 0.5, ids)
    assert not loss.isfinite()
    loss.backward()
    # What watches gradients for overflow, such as loss scaling, sees it too.
    assert not q.grad.isfinite().any() and not p.grad.isfinite().any()
    assert_same_state(bank, before)
    with torch.no_grad():
        assert not ca.contaccum_loss(q, p, bank, 0.5, ids).isfinite()
    assert_same_state(bank, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
def test_a_non_finite_batch(device, name, dtype):
    bank, (q, p, _) = bank_and_batch(device, dtype)
    undisturbed, _ = bank_and_batch(device, dtype)
    which, index, value = FAULTS[name]
    bad = [q.clone(), p.clone()]
    bad[which][index] = value
    assert_refused_by_the_bank(bank, *bad)
    good, expected = (ca.contaccum_loss(q, p, b, 0.5) for b in (bank, undisturbed))
    assert good.isfinite() and torch.equal(good, expected)
    assert_same_state(bank, state(undisturbed))


@pytest.mark.parametrize("n", [1, 10, 25])
def test_a_non_finite_batch_of_any_size(device, n):
    bank, _ = bank_and_batch(device)
    q, p = torch.randn(n, D, device=device), torch.randn(n, M, D, device=device)
    q[-1, 0] = math.nan
    assert_refused_by_the_bank(bank, q, p)


def test_nan_in_a_hard_negative_that_is_masked_out(device):
    """No row counts that column, but its gradient is NaN and it may not be banked."""
    bank, (q, p, _) = bank_and_batch(device, slots=0)
    ids = torch.full((N, M), 7, device=device)  # every other column is a false negative
    ca.contaccum_loss(q, p, bank, 0.5, ids)
    p[0, 1, 0] = math.nan
    assert_refused_by_the_bank(bank, q, p, ids)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 1e5), (torch.float16, -7e4), (torch.bfloat16, 3.4e38)],
)
def test_a_value_beyond_the_banks_dtype(device, dtype, size):
    """Finite in float32, infinite once rounded to the bank's type."""
    bank, (q, p, _) = bank_and_batch(device, dtype)
    assert torch.tensor(size).isfinite() and torch.tensor(size).to(dtype).isinf()
    p[1, 1, 2] = size
    assert_refused_by_the_bank(bank, q, p)


@pytest.mark.parametrize("side", ["query", "positive", "hard negative"])
def test_a_finite_vector_whose_scaled_norm_overflows(device, side):
    """Its scores may still be finite here; later ones in the bank need not be."""
    bank, (q, p, _) = bank_and_batch(device)
    if side == "query":
        q[0] = 1e20
    else:
        p[0, 1 if side == "hard negative" else 0] = 1e20
    assert_refused_by_the_bank(bank, q, p)


def test_a_silent_refusal_is_impossible(device):
    """Huge queries against tiny passages: every score is finite, yet such a batch is not banked.

    Then the loss must not look as if all were well.
    """
    bank = ca.DualMemoryBank(10, D, device=device)
    q = torch.full((2, D), 1e20, device=device)
    p = torch.full((2, 1, D), 1e-20, device=device)
    loss = ca.contaccum_loss(q, p, bank)
    assert len(bank) == 2 or not loss.isfinite()


def test_a_scale_that_overflows_the_norm(device):
    """The vectors are small; their scaled norm is not."""
    bank = ca.DualMemoryBank(10, D, device=device)
    q, p = torch.ones(2, D, device=device), torch.ones(2, 1, D, device=device)
    assert not ca.contaccum_loss(q, p, bank, temperature=1e-39).isfinite()
    assert len(bank) == 0
    assert ca.contaccum_loss(q, p, bank).isfinite()
    assert len(bank) == 2


@pytest.mark.parametrize("ids", [False, True])
def test_an_empty_bank_stays_as_if_new(device, ids):
    bank, _ = bank_and_batch(device, slots=0)
    q, p = torch.full((2, D), math.nan, device=device), torch.ones(2, M, D, device=device)
    given = torch.ones(2, M, dtype=torch.int64, device=device) if ids else None
    assert not ca.contaccum_loss(q, p, bank, 0.5, given).isfinite()
    assert len(bank) == 0
    assert bank.has_ids is None, "nothing was banked, so nothing about ids is decided"
    other = None if ids else torch.ones(2, M, dtype=torch.int64, device=device)
    assert ca.contaccum_loss(torch.ones_like(q), p, bank, 0.5, other).isfinite()
    assert len(bank) == 2


def test_the_oracle_refuses_the_same_batches(device):
    """Random faults, so that no kind of fault is banked by one and refused by the other."""
    generator = torch.Generator().manual_seed(0)
    bank = ca.DualMemoryBank(5, D, M, torch.float16, device)
    oracle = reference.DualMemoryBank(5, D, M, torch.float16)
    sizes = [1.0, 1e3, 6e4, 1e6, math.inf, math.nan]
    for _ in range(40):
        q, p = torch.randn(2, D, generator=generator), torch.randn(2, M, D, generator=generator)
        for x in (q, p):
            size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
            x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] *= size
        ours = ca.contaccum_loss(q.to(device), p.to(device), bank)
        assert ours.isfinite().item() == reference.contaccum_loss(q, p, oracle).isfinite().item()
        assert torch.equal(bank.queries().cpu(), oracle.queries())
        assert torch.equal(bank.passages().cpu(), oracle.passages())
    assert 0 < oracle.written < 80


def test_without_a_bank_a_non_finite_batch_gives_a_non_finite_loss(device):
    p = torch.ones(3, D, device=device)
    for value in (math.nan, math.inf):
        q = torch.ones(3, D, device=device)
        q[1, 1] = value
        assert not ca.contaccum_loss(q, p).isfinite()
