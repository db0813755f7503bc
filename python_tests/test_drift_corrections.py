"""Corrections of banked vectors, by what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.drift import transport
from benchmarks.drift.corrections import Context, History
from benchmarks.drift.data import Draws
from benchmarks.drift.methods import CORRECTIONS, make
from benchmarks.drift.transport import Displacement

N, K, D, M, UPDATES = 2, 4, 6, 2, 5
SIZE = N * K


class World:
    """Texts whose vectors are a function of the update: an encoder that drifts as it is told."""

    def __init__(self, move, capacity: int = 16) -> None:
        generator = torch.Generator().manual_seed(3)
        examples = UPDATES * SIZE
        self.move, self.now = move, 0
        self.queries = torch.randn(examples, D, generator=generator, dtype=torch.float64)
        self.passages = torch.randn(30, D, generator=generator, dtype=torch.float64)
        passages = np.random.default_rng(4).integers(30, size=(examples, M))
        self.draws = Draws(np.arange(examples), passages)
        self.history = History(
            torch.zeros(examples, D, dtype=torch.float64),
            torch.zeros(examples, M, D, dtype=torch.float64),
            N,
            SIZE,
            capacity,
        )
        self.context = Context(
            self.history,
            self.draws,
            lambda ids, _: move(self.queries[ids], self.now),
            lambda ids, _: move(self.passages[ids], self.now),
            False,
            1,
            torch.device("cpu"),
        )

    def truth(self, update: int) -> torch.Tensor:
        """(slots, 1 + m, d) of all slots in an update's view, by its weights."""
        self.now = update
        slots = self.history.view(update)
        queries, passages = self.context.encode_slots(np.arange(slots.start, slots.stop))
        return torch.cat([queries[:, None], passages], 1)

    def run(self, correction, updates: int = UPDATES):
        """The view of the last of some updates, before its step, by the calls of a run."""
        for update in range(updates):
            self.now = update
            own = slice(update * SIZE, (update + 1) * SIZE)
            queries, passages = self.context.encode_slots(np.arange(own.start, own.stop))
            self.history.queries[own], self.history.passages[own] = queries, passages
            correction.after_encode(
                update, queries.unflatten(0, (K, N)), passages.unflatten(0, (K, N))
            )
            view = correction.before_loss(update)
            if update == updates - 1:
                return view
            correction.before_step(update)
            self.now = update + 1
            correction.after_step(update)
        raise AssertionError("no updates")


def rotation(vectors, update):
    """Linear: rotate and stretch a little in every update."""
    generator = torch.Generator().manual_seed(5)
    step = torch.eye(D) + 0.1 * torch.randn(D, D, generator=generator)
    return vectors @ torch.linalg.matrix_power(step.double(), update)


def translation(vectors, update):
    return vectors + 0.3 * update * torch.arange(D)


def test_none_keeps_what_was_encoded():
    world = World(translation)
    view = world.run(make("none", world.context, {}))
    first = world.history.view(UPDATES - 1).start
    expected = translation(world.queries[first], first // SIZE)
    torch.testing.assert_close(view.queries[0], expected, rtol=0, atol=1e-14)
    assert view.frozen_queries is view.queries


@pytest.mark.parametrize(
    "name, options",
    [("oracle", {}), ("refresh", {"count": 4})],  # 4 a micro-batch: the whole bank in an update
)
def test_reencoding_everything_leaves_nothing_stale(name, options):
    world = World(rotation)
    view = world.run(make(name, world.context, options))
    torch.testing.assert_close(
        torch.cat([world.history.queries[:, None], world.history.passages], 1)[
            world.history.view(UPDATES - 1)
        ],
        world.truth(UPDATES - 1),
        rtol=0,
        atol=1e-12,
    )
    if name == "oracle":
        torch.testing.assert_close(
            view.seen(slice(None), 0), world.truth(UPDATES - 1), rtol=0, atol=1e-12
        )


def test_refresh_takes_those_encoded_longest_ago():
    world = World(translation)
    correction = make("refresh", world.context, {"count": 1})
    world.run(correction)
    # 4 of the bank's 16 slots an update; update 4 finds those of updates 2 and 3, of which update 3
    # has refreshed the first four of update 2 (its bank began with update 1's, which have left).
    bank = world.history.bank(UPDATES - 1)
    encoded = correction.encoded[bank.start : bank.stop]
    refreshed = world.history.queries[bank.start : bank.stop]
    truth = torch.stack(
        [
            translation(world.queries[slot], update)
            for slot, update in zip(bank, encoded, strict=True)
        ]
    )
    torch.testing.assert_close(refreshed, truth, rtol=0, atol=1e-12)
    assert (encoded == UPDATES - 1).sum() == K
    assert encoded[:K].tolist() == [UPDATES - 1] * K


def test_mean_equals_its_definition():
    """Running means by micro-batch with decay .9; a slot moves by now's less its own."""
    world = World(rotation, capacity=12)
    correction = make("mean", world.context, {})
    view = world.run(correction)
    history = world.history
    slots = torch.cat([history.queries[:, None], history.passages], 1)
    mean, means = None, []
    for batch in slots.split(N):
        mean = batch.mean(0) if mean is None else 0.9 * mean + 0.1 * batch.mean(0)
        means.append(mean)
    k, first = 2, history.view(UPDATES - 1).start
    now = means[(UPDATES - 1) * K + k - 1]  # of the micro-batch before
    expected = torch.stack(
        [slots[t] + now - means[t // N] for t in range(first, UPDATES * SIZE - 2 * N)]
    )
    torch.testing.assert_close(view.seen(slice(0, len(expected)), k), expected, rtol=0, atol=1e-12)
    # Among themselves banked vectors are as they were.
    raw = slots[first : UPDATES * SIZE]
    assert torch.equal(view.frozen_queries, raw[:, 0])
    assert torch.equal(view.frozen_passages, raw[:, 1:])


def test_moments_give_old_vectors_the_mean_and_deviation_of_now():
    world = World(rotation, capacity=12)
    view = world.run(make("moments", world.context, {"decay": 0.8}))
    slots = torch.cat([world.history.queries[:, None], world.history.passages], 1)
    moments, each = None, []
    for batch in slots.split(N):
        new = torch.stack([batch.mean(0), batch.square().mean(0)])
        moments = new if moments is None else 0.8 * moments + 0.2 * new
        each.append((moments[0], (moments[1] - moments[0].square()).sqrt()))
    slot, k = world.history.view(UPDATES - 1).start, 1
    (mean, deviation), (now, now_deviation) = each[slot // N], each[(UPDATES - 1) * K + k - 1]
    expected = (slots[slot] - mean) / deviation * now_deviation + now
    torch.testing.assert_close(view.seen(slice(0, 1), k)[0], expected, rtol=0, atol=1e-9)


def test_age_lowers_logits_by_updates():
    world = World(translation, capacity=12)
    view = world.run(make("age", world.context, {"beta": 0.5}))
    assert view.bias.tolist() == [-1.0] * 4 + [-0.5] * SIZE + [0.0] * SIZE


@pytest.mark.parametrize("name, options", [
    ("transport", {"probes": 30}),
    ("transport-batch", {"batches": K}),
])  # fmt: skip
def test_transport_with_enough_probes_follows_a_linear_map(name, options):
    # R > d probes in general position determine it; a ridge of 1e-12 leaves 1e-12 of it, times the
    # condition of the probes' covariance (below 100) and three updates of age.
    world = World(rotation)
    view = world.run(make(name, world.context, {**options, "ridge": 1e-12}))
    truth = world.truth(UPDATES - 1)
    torch.testing.assert_close(view.seen(slice(None), 0), truth, rtol=0, atol=1e-8)
    stale = World(rotation)
    plain = stale.run(make("none", stale.context, {})).seen(slice(None), 0)
    assert (plain - truth)[:SIZE].norm(dim=-1).min() > 0.1  # there was something to follow


def test_transport_by_the_mean_follows_a_translation():
    world = World(translation)
    view = world.run(make("transport", world.context, {"probes": 3, "kernel": "mean"}))
    torch.testing.assert_close(
        view.seen(slice(None), 0), world.truth(UPDATES - 1), rtol=0, atol=1e-12
    )


def test_transport_brings_moved_vectors_back_to_length_one_if_asked():
    world = World(rotation)
    world.context.normalized = True
    view = world.run(make("transport", world.context, {"probes": 30}))
    lengths = view.passages[:SIZE].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-12)
    loose = World(rotation)
    loose.context.normalized = True
    view = loose.run(make("transport", loose.context, {"probes": 30, "renormalize": False}))
    assert (view.passages[:SIZE].norm(dim=-1) - 1).abs().max() > 0.01


def test_a_strong_ridge_leaves_the_mean_displacement():
    generator = torch.Generator().manual_seed(6)
    old, moved, other = torch.randn(3, 20, D, generator=generator, dtype=torch.float64)
    for kernel in ("linear", "exp"):
        field = Displacement(old, old + moved, kernel, ridge=1e12)
        torch.testing.assert_close(field(other), other + moved.mean(0), rtol=0, atol=1e-8)


def test_the_exponential_kernel_follows_each_probe():
    generator = torch.Generator().manual_seed(7)
    old, moved = torch.randn(2, 20, D, generator=generator, dtype=torch.float64)
    field = Displacement(old, old + moved, "exp", ridge=1e-12, width=0.1)
    torch.testing.assert_close(field(old), old + moved, rtol=0, atol=1e-8)


def test_probes_come_from_training():
    world = World(rotation)
    world.draws.passages[:] = world.draws.passages % 7
    correction = transport.Transport(world.context, probes=5)
    assert len(set(correction.query_probes)) == 5
    assert set(correction.passage_probes) <= set(range(7))


def test_a_window_may_grow_with_the_training():
    """A bank of two updates, whole from the fourth of five on: half an update more in each."""

    def still(vectors, _):
        return vectors

    options = {"limit": 1e9, "probes": 12, "ridge": 0.1, "floor": 0, "ramp": 0.8}
    for update, oldest in ((1, 0), (2, 1), (3, 1), (4, 2)):
        world = World(still)
        view = world.run(make("follow-mean", world.context, options), update + 1)
        slots = world.history.view(update)
        ages = update - torch.arange(slots.start, slots.stop) // SIZE
        assert ages[~view.absent].max() == oldest, update


def test_refuses_what_it_does_not_know():
    world = World(rotation)
    with pytest.raises(ValueError, match=rf"expected one of .*{next(iter(CORRECTIONS))}.*'pray'"):
        make("pray", world.context, {})
    with pytest.raises(ValueError, match=r"kernel: expected one of .*got 'cubic'"):
        make("transport", world.context, {"kernel": "cubic"})


@pytest.mark.parametrize("name", ["follow", "follow-mean"])
def test_follow_leaves_out_what_its_maps_have_lost(name):
    """The window is that of the sums of errors; the last update's slots always count."""
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(UPDATES, D, generator=generator, dtype=torch.float64)

    def twist(vectors, now):  # no linear map: every probe by itself
        return vectors + 0.3 * now * (vectors @ noise[now][:, None]).sin()

    world = World(twist)
    correction = make(name, world.context, {"limit": 1e9, "probes": 12, "ridge": 0.1})
    assert not world.run(correction).absent.any()
    stale = correction.trust.stale[: UPDATES - 1]
    assert (stale > 0).all() and (stale[:-1] > stale[1:]).all()
    assert correction.trust.stale[-1] == 0
    world = World(twist)
    small = make(name, world.context, {"limit": 1e-9, "probes": 12, "ridge": 0.1})
    view, slots = world.run(small), world.history.view(UPDATES - 1)
    written = torch.arange(slots.start, slots.stop) // SIZE
    assert torch.equal(view.absent, written < UPDATES - 2)
    world = World(twist)
    least = make(name, world.context, {"limit": 1e-9, "probes": 12, "ridge": 0.1, "floor": 0})
    assert torch.equal(world.run(least).absent, written < UPDATES - 1)
