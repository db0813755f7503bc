"""Keys by encoders that move slowly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.drift.corrections import Context, History
from benchmarks.drift.data import Draws
from benchmarks.drift.loss import LossShape, Seen
from benchmarks.drift.methods import make

N, K, D, M, CAPACITY, UPDATES = 2, 3, 4, 2, 8, 4
SIZE = N * K
SCALE = 1.5
# float64, sums of fewer than 1e2 terms of order 10.
TOLERANCE = 1e-11


class Tower(nn.Module):
    """Stretches texts' vectors by its only weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stretch = nn.Parameter(torch.ones(1, dtype=torch.float64))


class World:
    """A tower whose weight is 1 at first and `UPDATES` more after every update."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        examples = UPDATES * SIZE
        self.queries = torch.randn(examples, D, generator=generator, dtype=torch.float64)
        self.passages = torch.randn(9, D, generator=generator, dtype=torch.float64)
        drawn = np.random.default_rng(2).integers(9, size=(examples, M))
        self.ids = torch.from_numpy(drawn)
        self.towers = tower = Tower()
        self.history = History(
            torch.zeros(examples, D, dtype=torch.float64),
            torch.zeros(examples, M, D, dtype=torch.float64),
            N,
            SIZE,
            CAPACITY,
        )

        @torch.no_grad()
        def queries(ids, _, by=tower):
            return self.queries[ids] * by.stretch

        @torch.no_grad()
        def passages(ids, _, by=tower):
            return self.passages[ids] * by.stretch

        draws = Draws(np.arange(examples), drawn)
        self.context = Context(
            self.history, draws, queries, passages, False, 1, torch.device("cpu"), tower
        )

    def fresh(self, update: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(K, n, d) and (K, n, m, d) by the weights of now."""
        slots = np.arange(update * SIZE, (update + 1) * SIZE)
        queries, passages = self.context.encode_slots(slots)
        return queries.unflatten(0, (K, N)), passages.unflatten(0, (K, N))

    def run(self, correction) -> None:
        """All updates but the last one's step."""
        for update in range(UPDATES):
            correction.after_encode(update, *self.fresh(update))
            if update < UPDATES - 1:
                with torch.no_grad():
                    self.towers.stretch += UPDATES
                correction.after_step(update)


@pytest.mark.parametrize("name", ["momentum", "momentum-alike"])
def test_the_bank_holds_what_slow_copies_encode(name):
    world = World()
    world.run(make(name, world.context, {"decay": 0.75}))
    slow = fast = 1.0
    for update in range(UPDATES):
        own = slice(update * SIZE, (update + 1) * SIZE)
        torch.testing.assert_close(
            world.history.queries[own], world.queries[own] * slow, rtol=0, atol=TOLERANCE
        )
        passages = world.passages[world.ids[own]] * slow
        torch.testing.assert_close(world.history.passages[own], passages, rtol=0, atol=TOLERANCE)
        fast += UPDATES
        slow = 0.75 * slow + 0.25 * fast
    assert world.towers.stretch.item() == 1 + UPDATES * (UPDATES - 1)


def row_loss(query, columns, column_ids, own_id, target):
    """Of one row; false negatives left out."""
    scores = SCALE * columns @ query
    absent = column_ids == own_id
    absent[target] = False
    return scores.masked_fill(absent, -torch.inf).logsumexp(0) - scores[target]


@pytest.mark.parametrize("inner", ["none", "mean"])
def test_positives_and_negatives_alike_are_slow_keys(inner):
    """Row by row, from the definition: the bank of a micro-batch is the slots before its own."""
    world = World()
    options = {"decay": 0.75, "correction": inner}
    correction = make("momentum-alike", world.context, options)
    world.run(correction)
    view = correction.before_loss(UPDATES - 1)
    queries, passages = (x.requires_grad_() for x in world.fresh(UPDATES - 1))
    slots = world.history.view(UPDATES - 1)
    seen = Seen(world.ids[slots], view, LossShape(SCALE, CAPACITY))
    loss = correction.loss(queries, passages, seen)

    expected = []
    for k in range(K):
        begin = (UPDATES - 1) * SIZE + k * N
        banked, own = slice(begin - CAPACITY, begin), slice(begin, begin + N)
        seen = view.seen(slice(banked.start - slots.start, banked.stop - slots.start), k)
        slow_queries = torch.cat([world.history.queries[own], seen[:, 0]])
        slow_passages = torch.cat([world.history.passages[own], seen[:, 1:]]).flatten(0, 1)
        ids = torch.cat([world.ids[own], world.ids[banked]])
        for i in range(N):
            query, positive, own_id = queries[k, i], passages[k, i, 0], world.ids[begin + i, 0]
            forth = row_loss(query, slow_passages, ids.flatten(), own_id, i * M)
            back = row_loss(positive, slow_queries, ids[:, 0], own_id, i)
            expected.append((forth + back) / 2)
    truth = torch.stack(expected).mean()
    torch.testing.assert_close(loss, truth, rtol=0, atol=TOLERANCE)
    for found, right in zip(
        torch.autograd.grad(loss, (queries, passages)),
        torch.autograd.grad(truth, (queries, passages)),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=0, atol=TOLERANCE)
