"""The update's loss at once against the reference, micro-batch after micro-batch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.drift.corrections import Context, History, MeanAll, running
from benchmarks.drift.loss import BankView, LossShape, Seen, update_loss
from benchmarks.drift.methods import make
from benchmarks.drift.objective import Objective
from contaccum_ext import reference
from contaccum_ext.layout import BankLayout

N, K, D = 2, 3, 5
# All arithmetic is float64, sums have fewer than 1e3 terms of order 10: 1e-10 would do.
TOLERANCE = 1e-6


def drawn(updates: int, m: int, capacity: int, seed: int = 0) -> tuple[History, torch.Tensor]:
    """Slots of some updates, as vectors and as ids; few ids, so that false negatives occur."""
    generator = torch.Generator().manual_seed(seed)
    examples = updates * N * K
    queries = torch.randn(examples, D, generator=generator, dtype=torch.float64)
    passages = torch.randn(examples, m, D, generator=generator, dtype=torch.float64)
    drift = torch.arange(examples)[:, None] / examples  # means move, so that offsets matter
    history = History(queries + drift, passages - drift[:, None], N, N * K, capacity)
    return history, torch.randint(12, (examples, m), generator=generator)


def context(history: History) -> Context:
    def never(_):
        raise AssertionError("no text is encoded here")

    return Context(history, None, never, never, False, 0, torch.device("cpu"))


def cut(history: History, update: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = slice(update * N * K, (update + 1) * N * K)
    queries, passages = history.queries[own].clone(), history.passages[own].clone()
    return queries.unflatten(0, (K, N)), passages.unflatten(0, (K, N))


def sequential(history, ids, update, shape, drift, layout=None, **options):
    """Losses and gradients of the reference, which has seen all slots before the update."""
    m = history.passages.shape[1]
    layout = layout or BankLayout(1, 1, 1)
    bank = reference.DualMemoryBank(shape.capacity, D, m, torch.float64, drift=drift, layout=layout)
    for start in range(0, update * N * K, N):
        slots = slice(start, start + N)
        bank.enqueue(
            history.queries[slots], history.passages[slots], ids[slots] if shape.mask else None
        )
    queries, passages = cut(history, update)
    queries.requires_grad_()
    passages.requires_grad_()
    losses = []
    for k in range(K):
        start = (update * K + k) * N
        losses.append(
            reference.contaccum_loss(
                queries[k],
                passages[k],
                bank,
                1 / shape.scale,
                ids[start : start + N] if shape.mask else None,
                shape.row_weighting,
                **options,
            )
        )
    loss = torch.stack(losses).mean()
    return loss, *torch.autograd.grad(loss, [queries, passages])


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("weighting", ["local", "all"])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("capacity", [2, 4, 6, 10, 40])
def test_equals_the_reference_with_every_history(drift, weighting, m, mask, capacity):
    history, ids = drawn(4, m, capacity)
    shape = LossShape(3.0, capacity, weighting, mask)
    correction = make(drift, context(history), {})
    for update in range(4):
        queries, passages = cut(history, update)
        correction.after_encode(update, queries, passages)
        view = correction.before_loss(update)
        queries.requires_grad_()
        passages.requires_grad_()
        loss = update_loss(queries, passages, Seen(ids[history.view(update)], view, shape))
        gradients = torch.autograd.grad(loss, [queries, passages])
        for ours, theirs in zip(
            (loss, *gradients), sequential(history, ids, update, shape, drift), strict=True
        ):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("drift", ["none", "mean"])
@pytest.mark.parametrize("centre", [None, "spread"])
@pytest.mark.parametrize("m", [1, 2])
def test_both_directions_equal_the_reference(drift, centre, m):
    history, ids = drawn(4, m, 10)
    shape = LossShape(3.0, 10)
    correction = make(drift, context(history), {"centre": centre, "symmetric": True})
    objective = Objective(correction, symmetric=True)
    both = {"symmetric": True, "center_over": K if centre else None}
    for update in range(4):
        queries, passages = cut(history, update)
        correction.after_encode(update, queries, passages)
        seen = Seen(ids[history.view(update)], correction.before_loss(update), shape)
        loss, gradients = objective(update, queries, passages, seen)
        expected = sequential(history, ids, update, shape, drift, **both)
        for ours, theirs in zip((loss, *gradients), expected, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=TOLERANCE)


def test_both_directions_without_a_bank_equal_the_reference():
    history, ids = drawn(1, 2, 0)
    queries, passages = (x.requires_grad_() for x in cut(history, 0))
    seen = Seen(ids, None, LossShape(3.0, 0))
    loss, gradients = Objective(None, symmetric=True)(0, queries, passages, seen)
    theirs = torch.stack(
        [
            reference.contaccum_loss(
                queries[k],
                passages[k],
                None,
                1 / 3,
                ids[k * N : (k + 1) * N],
                symmetric=True,
            )
            for k in range(K)
        ]
    ).mean()
    expected = (theirs, *torch.autograd.grad(theirs, (queries, passages)))
    for ours, other in zip((loss, *gradients), expected, strict=True):
        torch.testing.assert_close(ours, other.detach(), rtol=0, atol=TOLERANCE)


def test_without_a_bank_equals_the_reference():
    history, ids = drawn(1, 2, 0)
    queries, passages = cut(history, 0)
    ours = update_loss(queries, passages, Seen(ids, None, LossShape(3.0, 0)))
    theirs = [
        reference.contaccum_loss(queries[k], passages[k], None, 1 / 3, ids[k * N : (k + 1) * N])
        for k in range(K)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs).mean(), rtol=0, atol=TOLERANCE)


def test_a_shift_and_a_gain_are_applied_where_banked_meets_local():
    """The same as a bank whose vectors were changed beforehand, if nothing is frozen."""
    history, ids = drawn(2, 2, 8)
    shape = LossShape(3.0, 8)
    slots = history.view(1)
    raw_queries, raw_passages = history.queries[slots], history.passages[slots]
    gain, shift = torch.randn(2, 1, 3, D, dtype=torch.float64).abs() + 0.5
    moved = torch.cat([raw_queries[:, None], raw_passages], 1) * gain + shift
    same = moved[:, 0], moved[:, 1:]
    applied = BankView(raw_queries, raw_passages, *same, shift.expand(K, 3, D),
                       gain.expand(K, 3, D))  # fmt: skip
    beforehand = BankView(*same, *same)
    torch.testing.assert_close(applied.seen(slice(None), 1), moved)
    found = []
    for view in (applied, beforehand):
        leaves = [x.requires_grad_() for x in cut(history, 1)]
        loss = update_loss(*leaves, Seen(ids[slots], view, shape))
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_bias_weighs_banked_negatives_and_spares_targets():
    """A bias of -inf leaves of the bank only the targets of its own rows: no more negatives."""
    history, ids = drawn(2, 1, 6)
    queries, passages = cut(history, 1)
    ids = torch.arange(len(ids))[:, None]
    slots = history.view(1)
    vectors = history.queries[slots], history.passages[slots]
    bias = torch.full((len(vectors[0]),), -torch.inf, dtype=torch.float64)
    shape = LossShape(3.0, 6)
    view = BankView(*vectors, *vectors, bias=bias)
    ours = update_loss(queries, passages, Seen(ids[slots], view, shape))
    losses = []
    for k in range(K):
        local = 3.0 * queries[k] @ passages[k, :, 0].T
        total = (local.logsumexp(1) - local.diagonal()).sum()
        window = slice(k * N, k * N + 6)
        own = 3.0 * (vectors[0][window] * vectors[1][window, 0]).sum(1)
        with_local = 3.0 * vectors[0][window] @ passages[k, :, 0].T
        total += (torch.cat([own[:, None], with_local], 1).logsumexp(1) - own).sum()
        losses.append(total / N)
    torch.testing.assert_close(ours, torch.stack(losses).mean(), rtol=0, atol=TOLERANCE)


def test_banked_scores_in_chunks_are_the_same(monkeypatch):
    history, ids = drawn(3, 2, 8)
    queries, passages = cut(history, 2)
    slots = history.view(2)
    view = BankView(*(history.queries[slots], history.passages[slots]) * 2)
    whole = update_loss(queries, passages, Seen(ids[slots], view, LossShape(3.0, 8)))
    monkeypatch.setattr("benchmarks.drift.loss._CHUNK", 3 * len(view.queries) * 2)
    parts = update_loss(queries, passages, Seen(ids[slots], view, LossShape(3.0, 8)))
    torch.testing.assert_close(parts, whole, rtol=0, atol=TOLERANCE)


def test_refuses_a_capacity_that_cuts_a_micro_batch():
    history, ids = drawn(1, 1, 3)
    view = BankView(*(history.queries, history.passages) * 2)
    with pytest.raises(ValueError, match="whole groups of n = 2, got 6, 3"):
        update_loss(*cut(history, 0), Seen(ids, view, LossShape(1.0, 3)))


def test_running_means_are_those_of_one_batch_after_the_other():
    batches = torch.randn(2, K, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = running(running(None, batches[0], 0.9), batches[1], 0.9)
    mean = batches[0, 0]
    for batch in batches[0, 1:]:
        mean = 0.9 * mean + 0.1 * batch
    expected = [mean]
    for batch in batches[1]:
        expected.append(0.9 * expected[-1] + 0.1 * batch)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-14)


def test_mean_all_moves_banked_vectors_among_themselves_too():
    history, _ = drawn(2, 2, 6)
    correction = MeanAll(context(history))
    for update in range(2):
        correction.after_encode(update, *cut(history, update))
    view = correction.before_loss(1)
    frozen = torch.cat([view.frozen_queries[:, None], view.frozen_passages], 1)
    torch.testing.assert_close(frozen, view.seen(slice(None), 0), rtol=0, atol=1e-14)
