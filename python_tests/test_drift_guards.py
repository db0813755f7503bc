"""Windows, projections, and corrections that go beyond moving vectors."""

from __future__ import annotations

import pytest
import torch
from test_drift_corrections import SIZE, UPDATES, D, World, rotation, translation
from test_drift_loss import TOLERANCE, K, N, cut, drawn

import contaccum_ext as ca
from benchmarks.drift.corrections import History, stacked
from benchmarks.drift.default_bank import PARTS
from benchmarks.drift.lag import Lag
from benchmarks.drift.loss import BankView, LossShape, Seen, update_loss
from benchmarks.drift.methods import make
from contaccum_ext.staleness import SlotStaleness

SLOPE = 0.3 * 55**0.5  # of `translation`, a update: 0.3 |(0, 1, 2, 3, 4, 5)|


def absent(options, move=translation, correction="none", capacity=32):
    """Whole updates that a guard leaves out of the last view, as ages."""
    world = World(move, capacity)
    guard = make("guard", world.context, {"correction": correction, **options})
    view = world.run(guard)
    ages = UPDATES - 1 - torch.arange(len(view.absent)).div(SIZE, rounding_mode="floor")
    assert all(len(set(view.absent[ages == age].tolist())) == 1 for age in ages)
    return {age.item() for age in ages[view.absent]}, guard


@pytest.mark.parametrize("weighting", ["local", "all"])
def test_absent_slots_are_as_if_not_in_the_bank(weighting):
    history, ids = drawn(3, 2, 12)
    shape, out = LossShape(3.0, 12, weighting), 5
    slots = history.view(2)
    vectors = history.queries[slots], history.passages[slots]
    gone = torch.zeros(len(vectors[0]), dtype=torch.bool)
    gone[:out] = gone[7] = True
    # Without them, and whole groups of n again, with a capacity that holds all that is left.
    kept = [x[~gone] for x in (*vectors, ids[slots])]
    assert len(kept[0]) % N == 0 and len(kept[0]) <= shape.capacity + N * K
    everything = LossShape(3.0, 12, weighting)
    found = []
    for view, numbers, form in (
        (BankView(*vectors, *vectors, absent=gone), ids[slots], shape),
        (BankView(*kept[:2], *kept[:2]), kept[2], everything),
    ):
        leaves = [x.requires_grad_() for x in cut(history, 2)]
        loss = update_loss(*leaves, Seen(numbers, view, form))
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("measure", ["residual", "shift"])
def test_a_window_ends_where_staleness_reaches_the_limit(measure):
    options = {"measure": measure, "sample": SIZE}
    _, guard = absent({**options, "limit": 1e9})
    spread = guard.spread.mean().sqrt().item()
    # Staleness is age times the slope over the spread, which varies from update to update and kind
    # to kind: a window of 1.5 and of 2.5 updates is told from one of a whole number.
    if measure == "shift":  # as different texts have different means
        options["limit"] = 1.5 * SLOPE / spread
        assert absent(options)[0] >= {3, 4}
        return
    assert absent({**options, "limit": 1.5 * SLOPE / spread})[0] == {2, 3, 4}
    assert absent({**options, "limit": 2.5 * SLOPE / spread})[0] == {3, 4}


def test_nothing_is_absent_where_nothing_is_stale():
    def still(vectors, _):
        return vectors

    assert absent({"limit": 1e-6}, still)[0] == set()
    assert absent({"limit": 0.5, "sample": SIZE}, translation, "oracle")[0] == set()
    assert absent({"limit": 3.0, "measure": "scores", "sample": SIZE}, still)[0] == set()


def test_scores_tell_a_shift_and_the_mean_correction_removes_it():
    options = {"limit": 1.0, "measure": "scores", "sample": SIZE}

    def leap(vectors, update):
        return vectors + 4.0 * update

    plain = absent(options, leap)[0]
    # A running mean of few batches: one of many would lag behind such leaps.
    corrected = absent({**options, "options": {"decay": 0.5}}, leap, "mean")[0]
    assert plain >= {2, 3, 4} and len(corrected) < len(plain)


def test_a_lost_model_gets_the_smallest_window():
    def broken(vectors, update):
        return vectors * float("nan") if update == UPDATES - 1 else vectors

    assert absent({"limit": 1.0, "measure": "shift"}, broken)[0] == {1, 2, 3, 4}


def test_a_guard_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match=r"measure: expected one of .*got 'mood'"):
        make("guard", World(translation).context, {"limit": 1.0, "measure": "mood"})


def test_projection_takes_the_drift_out_of_the_gradient_and_nothing_else():
    world = World(translation)
    correction = make("project", world.context, {})
    view = world.run(correction)
    assert view.shift is None  # banked vectors stay as they were
    generator = torch.Generator().manual_seed(8)
    queries = torch.randn(4, 2, D, generator=generator, dtype=torch.float64)
    passages = torch.randn(4, 2, 2, D, generator=generator, dtype=torch.float64)
    first = correction.gradients(0, queries, passages)
    assert first[0] is queries and first[1] is passages
    found = correction.gradients(UPDATES - 1, queries, passages)
    bank, own = world.history.bank(UPDATES - 1), slice((UPDATES - 1) * SIZE, UPDATES * SIZE)
    for before, after, vectors in zip(
        (queries, passages), found, (world.history.queries, world.history.passages), strict=True
    ):
        drift = vectors[own].mean(0) - vectors[bank.start : bank.stop].mean(0)
        torch.testing.assert_close(
            (after * drift).sum(-1), torch.zeros_like(after[..., 0]), rtol=0, atol=1e-12
        )
        taken = before - after
        along = (taken * drift).sum(-1, keepdim=True) / drift.square().sum(-1, keepdim=True)
        torch.testing.assert_close(taken, along * drift, rtol=0, atol=1e-12)


def test_kept_scores_are_those_of_enqueued_vectors():
    world = World(rotation)
    view = world.run(make("transport", world.context, {"probes": 30, "ridge": 1e-12, "keep": True}))
    torch.testing.assert_close(
        view.seen(slice(None), 0), world.truth(UPDATES - 1), rtol=0, atol=1e-8
    )
    slots = world.history.view(UPDATES - 1)
    first = slots.start // SIZE
    torch.testing.assert_close(
        view.frozen_queries[:SIZE],
        rotation(world.queries[slots.start : slots.start + SIZE], first),
        rtol=0,
        atol=1e-12,
    )


def test_transport_about_the_mean_turns_differences_and_follows_the_mean():
    world = World(rotation)
    correction = make("transport-mean", world.context, {"probes": 30, "ridge": 1e-12})
    world.run(correction, 1)
    before = correction.centred[:SIZE].clone()
    again = World(rotation)
    correction = make("transport-mean", again.context, {"probes": 30, "ridge": 1e-12})
    view = again.run(correction, 3)
    step = rotation(torch.eye(D, dtype=torch.float64), 2)  # two updates later
    torch.testing.assert_close(correction.centred[:SIZE], before @ step, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        view.seen(slice(0, SIZE), 0), before @ step + correction.means[0], rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("option", ["moved", "turned"])
def test_scores_among_banked_vectors_are_of_what_a_library_would_store(option):
    """Moved: turned about where the mean is now; turned: about the mean of the slot's own time."""
    world = World(rotation)
    options = {"probes": 30, "ridge": 1e-12, "predict": True, option: True}
    correction = make("transport-mean", world.context, options)
    view = world.run(correction)
    slots = world.history.view(UPDATES - 1)
    if option == "moved":
        means = correction.means[0].expand(slots.stop - slots.start, -1, -1)
    else:
        means = []
        for now in range(UPDATES):  # a run of so many updates ends with the means of the last
            again = World(rotation)
            kept = make("transport-mean", again.context, options | {option: False})
            again.run(kept, now + 1)
            means.append(kept.means[1:].repeat_interleave(2, 0))
        means = torch.cat(means)[slots]
    expected = correction.centred[slots] + means
    torch.testing.assert_close(view.frozen_queries, expected[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(view.frozen_passages, expected[:, 1:], rtol=0, atol=1e-10)


def test_scores_among_banked_vectors_may_lag_behind_these():
    """Moved at the beginning of updates 0, 3, 6, ...; what has been enqueued since is as it was."""
    world = World(rotation)
    options = {"probes": 30, "ridge": 1e-12, "predict": True, "moved": True}
    lagging = make("transport-mean", world.context, options | {"rebuild": UPDATES - 2})
    slots = world.history.view(UPDATES - 1)
    view = world.run(lagging)
    again = World(rotation)
    whole = make("transport-mean", again.context, options)
    again.run(whole, UPDATES - 1)  # ends in the update of the rebuild
    rebuilt = again.history.bank(UPDATES - 2)
    at_rebuild = whole.centred[slots] + whole.means[0]
    at_rebuild[rebuilt.stop - slots.start :] = stacked(world.history, slots)[
        rebuilt.stop - slots.start :
    ]
    torch.testing.assert_close(view.frozen_queries, at_rebuild[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(view.frozen_passages, at_rebuild[:, 1:], rtol=0, atol=1e-10)
    assert (view.frozen_queries - view.queries).abs().max() > 0.01


@pytest.mark.parametrize("capacity", [8, 256, 264, 1000])
def test_tables_of_large_banks_lag_as_the_library_s_do(capacity):
    bank, lag = ca.DualMemoryBank(capacity, 2), Lag(8, parts=PARTS)
    slots, filled = SlotStaleness(bank), []
    for update in range(1, 3 * capacity // 8 + 70):
        bank.enqueue(torch.randn(8, 2), torch.randn(8, 1, 2))
        slots.note_written()
        due = slots.rebuild_due()
        slots.age(0.0, due)
        assert lag.due(update, len(bank)) == due, update
        filled.append(due)
    assert all(filled) == (capacity <= 256)


def test_between_updates_alone_means_correct_old_slots_alone():
    world = World(rotation)
    options = {"probes": 30, "ridge": 1e-12, "predict": True, "moved": True, "between": True}
    correction = make("transport-mean", world.context, options)
    view = world.run(correction)
    seen = world.history.view(UPDATES - 1)
    own = slice(seen.stop - SIZE, seen.stop)
    old = correction.centred[seen.start : own.start] + correction.means[0]
    fresh = torch.cat([world.history.queries[own, None], world.history.passages[own]], 1)
    assert view.shift is None
    for k in (0, 1):  # the same for all micro-batches
        torch.testing.assert_close(view.seen(slice(None), k), torch.cat([old, fresh]))
    torch.testing.assert_close(view.frozen_queries, view.queries)


def test_predicted_means_do_not_lag():
    """Means that batches hardly correct are where an exact map takes them."""

    def move(vectors, update):
        return rotation(vectors, update) + 0.3 * update

    world = World(move)
    options = {"probes": 30, "ridge": 1e-12, "decay": 1 - 1e-12, "predict": True}
    view = world.run(make("transport-mean", world.context, options))
    torch.testing.assert_close(
        view.seen(slice(None), 0), world.truth(UPDATES - 1), rtol=0, atol=1e-7
    )


def test_an_oracle_draws_dropout_if_asked():
    world = World(translation)
    drawn_with = []
    encode = world.context.encode_queries
    world.context.encode_queries = lambda ids, drop: drawn_with.append(drop) or encode(ids, drop)
    correction = make("oracle", world.context, {"dropout": True})
    assert isinstance(world.history, History)
    world.run(correction)
    # The test's own update is encoded without; the bank with, in every update that has one.
    assert drawn_with.count(True) == UPDATES - 1
