"""Running means that have a batch before its own loss: `DualMemoryBank(anticipate=True)`."""

from __future__ import annotations

import pytest
import torch

import contaccum_ext as ca
from contaccum_ext import reference
from contaccum_ext.bank_size import anticipates

D, M, N, CAPACITY, DECAY = 8, 2, 5, 21, 0.4
F64 = torch.float64
LAYOUT = ca.BankLayout(1, 4, 8)


def batches(count: int, dtype: torch.dtype = F64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """That drift apart, as those of a model in training."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            (torch.randn(N, D, generator=generator, dtype=F64) + 0.5 * step).to(dtype),
            (torch.randn(N, M, D, generator=generator, dtype=F64) - 0.3 * step).to(dtype),
        )
        for step in range(count)
    ]


def bank_of(kind, dtype: torch.dtype = F64, anticipate: bool = True, **options):
    options |= {"drift_decay": DECAY, "layout": LAYOUT, "anticipate": anticipate}
    return kind(CAPACITY, D, M, dtype, drift="mean", **options)


@pytest.mark.parametrize("symmetric", [False, True])
def test_histories_are_the_oracles(device, symmetric):
    ours = bank_of(ca.DualMemoryBank, device=device, symmetric=symmetric)
    oracle = bank_of(reference.DualMemoryBank)
    lagging = bank_of(reference.DualMemoryBank, anticipate=False)
    differ = 0
    for queries, passages in batches(8):
        q, p = queries.to(device).requires_grad_(), passages.to(device).requires_grad_()
        other = reference.contaccum_loss(q, p, ours, 2.0, symmetric=symmetric, enqueue=False)
        seen = ca.contaccum_loss(q, p, ours, 2.0, symmetric=symmetric, enqueue=False)
        loss = ca.contaccum_loss(q, p, ours, 2.0, symmetric=symmetric)
        found = torch.autograd.grad(loss, (q, p))
        q, p = queries.requires_grad_(), passages.requires_grad_()
        expected, late = (
            reference.contaccum_loss(q, p, bank, 2.0, symmetric=symmetric)
            for bank in (oracle, lagging)
        )
        for one in (loss, seen, other):
            torch.testing.assert_close(one.cpu(), expected, rtol=1e-10, atol=0)
        for got, wanted in zip(found, torch.autograd.grad(expected, (q, p)), strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-9, atol=1e-12)
        differ += not torch.isclose(expected, late, rtol=1e-3)
        torch.testing.assert_close(ours.means[0].cpu(), oracle.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(oracle.mean, lagging.mean)  # moved once, only sooner
    assert differ == 7  # it is not a test of nothing: without it all but the first are others


@pytest.mark.parametrize("decay", [0.0, 0.36])
def test_a_steady_drift_leaves_no_systematic_difference(device, decay):
    """Once means have settled, a slot of age a is moved by a steps: it lags by nothing."""
    layout = ca.BankLayout(1, 1, 8)  # a mean for each slot
    options = {"layout": layout, "anticipate": True}
    bank = ca.DualMemoryBank(CAPACITY, D, M, F64, device, "mean", decay, **options)
    generator = torch.Generator().manual_seed(1)
    q, p = (torch.randn(1, *shape, D, generator=generator, dtype=F64) for shape in ((), (M,)))
    for step in range(80):
        batch = (q + 0.01 * step).to(device), (p - 0.02 * step).to(device)
        if step == 79:
            ahead = bank.ahead(*batch)
        else:
            ca.contaccum_loss(*batch, bank, 2.0)
    ages = torch.arange(CAPACITY, 0, -1, dtype=F64, device=device)
    offsets = bank.query_offsets() + ahead[0], bank.passage_offsets()[:, 0] + ahead[1]
    for found, rate in zip(offsets, (0.01, -0.02), strict=True):
        expected = (rate * ages)[:, None].expand_as(found)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_numbers_are_rounded_as_the_bank_stores_them(device):
    bank = bank_of(ca.DualMemoryBank, torch.bfloat16, device=device)
    ((queries, passages),) = batches(1, torch.float32)
    ahead = bank.ahead(queries.to(device), passages.to(device))
    expected = queries.bfloat16().float().mean(0)  # an empty bank has no mean to keep a part of
    torch.testing.assert_close(ahead[0].cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200, 1e154])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_batch_that_the_bank_refuses_moves_nothing(device, value, symmetric):
    """The last one's square is finite, but not times the scale; a hard negative's."""
    bank = bank_of(ca.DualMemoryBank, device=device, symmetric=symmetric)
    first, second = batches(2)
    ca.contaccum_loss(*(x.to(device) for x in first), bank, 0.01, symmetric=symmetric)
    before = {name: x.clone() for name, x in bank.named_buffers()}
    second[1][3, 1, 2] = value
    loss = ca.contaccum_loss(*(x.to(device) for x in second), bank, 0.01, symmetric=symmetric)
    assert loss.isnan()
    assert all(torch.equal(x, before[name]) for name, x in bank.named_buffers())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, p: (q[:, :1], p), r"queries: expected shape \(5, 8\)"),
        (lambda q, p: (q, p[:, :, :1]), r"passages: expected shape \(5, 2, 8\)"),
        (lambda q, p: (q, p[:, :0]), r"passages: expected shape \(5, 2, 8\)"),
        (lambda q, p: (q.long(), p), "queries: expected"),
        (lambda q, p: (q, p.float()), "passages: expected torch.float64 as queries"),
    ],
)
def test_what_is_refused_leaves_the_means(device, change, message):
    bank = bank_of(ca.DualMemoryBank, device=device)
    (first, second) = ([x.to(device) for x in batch] for batch in batches(2))
    ca.contaccum_loss(*first, bank, 2.0)
    before = bank.means.clone()
    with pytest.raises((TypeError, ValueError), match=message):
        ca.contaccum_loss(*change(*second), bank, 2.0)
    assert torch.equal(bank.means, before)


def test_an_error_of_the_op_itself_leaves_the_means(device, monkeypatch):
    bank = bank_of(ca.DualMemoryBank, device=device)
    first, second = ([x.to(device) for x in batch] for batch in batches(2))
    ca.contaccum_loss(*first, bank, 2.0)
    before = bank.means.clone()

    def failing(*_):
        raise RuntimeError("out of something")

    monkeypatch.setattr("contaccum_ext.ops.banked_loss_", failing)
    with pytest.raises(RuntimeError, match="out of something"):
        ca.contaccum_loss(*second, bank, 2.0)
    assert torch.equal(bank.means, before)


def test_it_is_shown():
    assert "window=all, anticipate=True" in repr(bank_of(ca.DualMemoryBank))


def test_without_running_means_it_is_refused():
    with pytest.raises(ValueError, match="anticipate: expected False with drift='none', got True"):
        ca.DualMemoryBank(CAPACITY, D, M, anticipate=True)


def test_a_bank_that_does_not_anticipate_is_another(device):
    bank, other = (bank_of(ca.DualMemoryBank, anticipate=a) for a in (True, False))
    with pytest.raises(RuntimeError, match="anticipate"):
        bank.load_state_dict(other.state_dict())


def test_it_is_for_updates_of_few_batches():
    assert all(anticipates(k) for k in (None, 1, 4, 7))
    assert not any(anticipates(k) for k in (8, 16, 128))


def test_it_compiles_with_the_loss(device):
    compiled_bank, bank = (bank_of(ca.DualMemoryBank, device=device) for _ in range(2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(queries, passages):
        return ca.contaccum_loss(queries, passages, compiled_bank, 2.0)

    for batch in batches(3):
        queries, passages = (x.to(device) for x in batch)
        expected = ca.contaccum_loss(queries, passages, bank, 2.0)
        torch.testing.assert_close(step(queries, passages), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(compiled_bank.means, bank.means, rtol=1e-12, atol=1e-12)
