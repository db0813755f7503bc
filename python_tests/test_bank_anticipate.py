"""Running means that see a batch before its own loss does: `DualMemoryBank.anticipate`."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

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


def bank_of(kind, dtype: torch.dtype = F64, **options):
    return kind(CAPACITY, D, M, dtype, drift="mean", drift_decay=DECAY, layout=LAYOUT, **options)


@pytest.mark.parametrize("symmetric", [False, True])
def test_histories_are_the_oracles(device, symmetric):
    ours = bank_of(ca.DualMemoryBank, device=device, symmetric=symmetric)
    oracle = bank_of(reference.DualMemoryBank)
    lagging = bank_of(reference.DualMemoryBank)
    differ = 0
    for step, (queries, passages) in enumerate(batches(8)):
        oracle.anticipate(queries, passages)
        expected, late = (
            reference.contaccum_loss(queries, passages, bank, 2.0, symmetric=symmetric)
            for bank in (oracle, lagging)
        )
        q, p = queries.to(device), passages.to(device)
        ours.anticipate(q, p)
        loss = ca.contaccum_loss(q, p, ours, 2.0, symmetric=symmetric)
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-10, atol=0)
        differ += not torch.isclose(expected, late, rtol=1e-3)
        torch.testing.assert_close(ours.means[0].cpu(), oracle.mean, rtol=1e-12, atol=1e-12)
        if step == 0:  # an empty bank has no mean yet to keep a part of
            torch.testing.assert_close(ours.means[0, 0], q.mean(0), rtol=1e-12, atol=1e-12)
    assert differ == 7  # it is not a test of nothing: without it all but the first are others


def test_a_whole_updates_batch_is_met_where_it_is(device):
    """With decay 0 banked vectors have the mean of the batch that meets them."""
    layout = ca.BankLayout(1, 1, 8)  # a mean for each slot
    bank = ca.DualMemoryBank(CAPACITY, D, M, F64, device, "mean", 0.0, layout=layout)
    first, second = ([x.to(device) for x in batch] for batch in batches(2))
    ca.contaccum_loss(*first, bank, 2.0)
    bank.anticipate(*second)
    banked = (bank.queries() + bank.query_offsets(), bank.passages() + bank.passage_offsets())
    for vectors, local in zip(banked, second, strict=True):
        torch.testing.assert_close(vectors.mean(0), local.mean(0))


def test_numbers_are_rounded_as_the_bank_stores_them(device):
    bank = bank_of(ca.DualMemoryBank, torch.bfloat16, device=device)
    ((queries, passages),) = batches(1, torch.float32)
    bank.anticipate(queries.to(device), passages.to(device))
    expected = queries.bfloat16().float().mean(0)
    torch.testing.assert_close(bank.means[0, 0].cpu(), expected, rtol=1e-6, atol=1e-6)


def test_one_passage_may_have_no_dimension_of_its_own(device):
    bank = ca.DualMemoryBank(CAPACITY, D, 1, F64, device, "mean", DECAY)
    ((queries, passages),) = batches(1)
    bank.anticipate(queries.to(device), passages[:, 0].to(device))
    torch.testing.assert_close(bank.means[0, 1].cpu(), passages[:, 0].mean(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_a_batch_that_the_bank_refuses_moves_nothing(device, value):
    bank = bank_of(ca.DualMemoryBank, device=device)
    first, second = batches(2)
    ca.contaccum_loss(*(x.to(device) for x in first), bank, 2.0)
    before = {name: x.clone() for name, x in bank.named_buffers()}
    second[1][3, 1, 2] = value
    bank.anticipate(*(x.to(device) for x in second))
    ca.contaccum_loss(*(x.to(device) for x in second), bank, 2.0)
    assert all(torch.equal(x, before[name]) for name, x in bank.named_buffers())


def test_it_takes_no_gradient(device):
    bank = bank_of(ca.DualMemoryBank, device=device)
    queries, passages = (normalize(x, dim=-1).to(device) for x in batches(1)[0])
    bank.anticipate(queries.requires_grad_(), passages.requires_grad_())
    assert not bank.means.requires_grad


def test_without_running_means_it_is_refused(device):
    bank = ca.DualMemoryBank(CAPACITY, D, M, F64, device)
    with pytest.raises(ValueError, match="drift: expected 'mean' to have running means, got 'non"):
        bank.anticipate(*(x.to(device) for x in batches(1)[0]))


def test_it_is_for_updates_of_few_batches():
    assert all(anticipates(k) for k in (None, 1, 4, 7))
    assert not any(anticipates(k) for k in (8, 16, 128))


def test_it_compiles_with_the_loss(device):
    compiled_bank, bank = (bank_of(ca.DualMemoryBank, device=device) for _ in range(2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(queries, passages):
        compiled_bank.anticipate(queries, passages)
        return ca.contaccum_loss(queries, passages, compiled_bank, 2.0)

    for batch in batches(3):
        queries, passages = (x.to(device) for x in batch)
        bank.anticipate(queries, passages)
        expected = ca.contaccum_loss(queries, passages, bank, 2.0)
        torch.testing.assert_close(step(queries, passages), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(compiled_bank.means, bank.means, rtol=1e-12, atol=1e-12)
