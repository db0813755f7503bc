"""Means shared by blocks of slots, against values by hand and against the library's oracle."""

from __future__ import annotations

import pytest
import torch
from test_drift_corrections import SIZE, UPDATES, D, World, rotation
from test_drift_corrections import N as WORLD_N
from test_drift_loss import TOLERANCE, context, cut, drawn, sequential

from benchmarks.drift.blocks import BlockMeans
from benchmarks.drift.corrections import History
from benchmarks.drift.loss import LossShape, Seen, update_loss
from benchmarks.drift.methods import make
from contaccum_ext import reference
from contaccum_ext.layout import BankLayout

PROBES = {"probes": 12, "ridge": 0.1, "predict": True, "moved": True}


def history(capacity: int, examples: int = 16) -> History:
    return History(torch.zeros(examples, 1), torch.zeros(examples, 1, 1), 2, 4, capacity)


def told(values) -> list[float]:
    """Of (..., 2, 1), the same for query and passage."""
    assert torch.equal(values[..., 0, :], values[..., 1, :])
    return values[..., 0, 0].tolist()


def test_averages_by_hand():
    """Updates of two micro-batches of two slots; 8 slots of a block are two updates."""
    means = BlockMeans(history(8), 8)
    by_batch = torch.tensor([1.0, 2.0, 6.0, 7.0, 9.0])[:, None, None].expand(-1, 2, 1)
    means.enqueue(slice(0, 4), by_batch[:2])
    assert told(means.apart(slice(0, 4))) == [-0.5, -0.5, 0.5, 0.5]  # so far: 1.5
    means.enqueue(slice(4, 8), by_batch[2:4])
    assert told(means.apart(slice(0, 8))) == [-3.0, -3.0, -2.0, -2.0, 2.0, 2.0, 3.0, 3.0]
    # The second update finds 1.5, after its first micro-batch 3: (1 + 2 + 6) / 3.
    added, shift, part = means.seen(slice(0, 8), 4, torch.full((2, 2, 1), 10.0))
    assert told(added) == [1.0, 1.0, 2.0, 2.0, 6.0, 6.0, 7.0, 7.0]
    assert told(shift) == [[10.0, 8.5], [10.0, 7.0]] and part.tolist() == [1] * 8
    # A block that is full keeps its average, of which half has left the bank.
    means.enqueue(slice(8, 12), by_batch[[4, 4]])
    added, shift, part = means.seen(slice(4, 12), 8, torch.zeros(2, 2, 1))
    assert told(added) == [2.0, 2.0, 3.0, 3.0] + [9.0] * 4
    assert told(shift) == [[0.0, 0.0], [0.0, -9.0]] and part.tolist() == [0] * 4 + [1] * 4
    # Moved to a mean of 5 between the updates, slots have that one in the average.
    means.move(slice(4, 12), torch.full((2, 1), 5.0))
    assert told(means.apart(slice(4, 12))) == [0.0] * 8
    means.enqueue(slice(12, 16), by_batch[[4, 4]])
    _, shift, _ = means.seen(slice(8, 16), 12, torch.zeros(2, 2, 1))
    assert told(shift) == [[0.0, -5.0], [0.0, pytest.approx(-(5 + 5 + 9) / 3)]]


def test_blocks_that_begin_within_an_update():
    means = BlockMeans(history(4), 2)
    by_batch = torch.tensor([1.0, 2.0, 6.0, 7.0])[:, None, None].expand(-1, 2, 1)
    means.enqueue(slice(0, 8), by_batch)
    assert not means.apart(slice(0, 8)).any()
    _, shift, part = means.seen(slice(0, 8), 4, torch.zeros(2, 2, 1))
    # The update's own blocks have nothing before their micro-batch, and are not seen before.
    assert told(shift) == [[0.0, 0.0, 0.0], [0.0, -6.0, 0.0]]
    assert part.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("block, capacity", [(2, 6), (4, 4), (4, 8), (6, 12), (8, 16), (10, 20)])
@pytest.mark.parametrize("m", [1, 2])
def test_equals_the_reference_with_blocks(block, capacity, m):
    """Updates of 6 slots: blocks end within one, at its end, or go on over two."""
    slots, ids = drawn(5, m, capacity)
    shape = LossShape(3.0, capacity)
    correction = make("mean", context(slots), {"block": block})
    layout = BankLayout(1, block, block)
    for update in range(5):
        correction.after_encode(update, *cut(slots, update))
        view = correction.before_loss(update)
        leaves = [x.requires_grad_() for x in cut(slots, update)]
        loss = update_loss(*leaves, Seen(ids[slots.view(update)], view, shape))
        ours = loss, *torch.autograd.grad(loss, leaves)
        theirs = sequential(slots, ids, update, shape, "mean", layout)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name, options", [("mean", {}), ("transport-mean", PROBES)])
def test_a_block_of_one_micro_batch_changes_nothing(name, options):
    found = []
    for more in ({}, {"block": WORLD_N}):
        world = World(rotation)
        view = world.run(make(name, world.context, options | more))
        # What micro-batch k sees: nothing of its own update from its own place on.
        own = len(view.queries) - SIZE
        found += [[view.seen(slice(0, own + k * WORLD_N), k) for k in range(4)]]
        found[-1] += [view.frozen_queries, view.frozen_passages]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, more", [("transport-mean", {}), ("follow-mean", {"limit": 1e9})])
@pytest.mark.parametrize("block", [2, 4, 16])
def test_probes_move_what_the_reference_moves(name, more, block):
    world = World(rotation)
    correction = make(name, world.context, PROBES | more | {"block": block})
    bank = reference.DualMemoryBank(
        16, D, 2, torch.float64, drift="mean", layout=BankLayout(1, block, block)
    )
    for update in range(UPDATES):
        again = World(rotation)
        view = again.run(make(name, again.context, PROBES | more | {"block": block}), update + 1)
        first, own = again.history.view(update).start, again.history.bank(update).stop
        slots = again.history
        for k in range(SIZE // WORLD_N):
            start = own + k * WORLD_N
            seen = view.seen(slice(0, start - first), k)[-16:]
            assert len(bank) == len(seen)
            if len(bank):
                queries = bank.queries() + bank.query_offsets()
                passages = bank.passages() + bank.passage_offsets()
                torch.testing.assert_close(seen[:, 0], queries, rtol=0, atol=TOLERANCE)
                torch.testing.assert_close(seen[:, 1:], passages, rtol=0, atol=TOLERANCE)
            batch = slice(start, start + WORLD_N)
            bank.enqueue(slots.queries[batch], slots.passages[batch])
        for kind, probes in enumerate(("queries", "passages")):
            texts = (correction.probe.query_probes, correction.probe.passage_probes)[kind]
            vectors = (world.queries, world.passages)[kind][texts]
            old, new = (rotation(vectors, now) for now in (update, update + 1))
            bank.transport(old, new, probes, 0.1, False)


@pytest.mark.parametrize("block", [0, 3, 12])
def test_refuses_a_block_that_does_not_fit(block):
    with pytest.raises(ValueError, match=rf"block: .* n = 2 .* capacity 16, got {block}"):
        make("mean", World(rotation).context, {"block": block})


@pytest.mark.parametrize("other", ["turned", "between"])
def test_refuses_blocks_where_no_offsets_are(other):
    with pytest.raises(ValueError, match="block: expected None with turned or between"):
        make("transport-mean", World(rotation).context, {"block": 4, other: True})
