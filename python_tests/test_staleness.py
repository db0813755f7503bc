"""Which slots an update has written, how stale each is, and the window that follows from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import contaccum_ext as ca
from contaccum_ext.staleness import SlotStaleness

CAPACITY, D, LIMIT = 12, 3, 1.0


def make_bank(**options) -> ca.DualMemoryBank:
    return ca.DualMemoryBank(CAPACITY, D, layout=ca.BankLayout(1, 1, 1), **options)


def write(bank: ca.DualMemoryBank, count: int) -> None:
    bank.enqueue(torch.randn(count, D), torch.randn(count, 1, D))


WRITE = st.tuples(st.just("write"), st.integers(1, 2 * CAPACITY))
MOVE = st.tuples(st.just("move"), st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.5]))
OTHER = st.tuples(st.sampled_from(["clear", "reload"]), st.none())


@given(st.lists(st.one_of(WRITE, MOVE, OTHER), max_size=30))
def test_slots_age_as_in_a_list(steps):
    """Against a list of [staleness, number of the move before which it was written]."""
    bank, slots = make_bank(), []
    ours = SlotStaleness(bank, LIMIT)
    moves = 0
    for step, value in steps:
        if step == "write":
            write(bank, value)
            slots = (slots + [[0.0, moves]] * value)[-CAPACITY:]
        elif step == "clear":
            bank.clear()
            slots = []
        elif step == "reload":
            state, other = (bank.state_dict(), ours.state_dict()), make_bank()
            other.load_state_dict(state[0])
            bank, ours = other, SlotStaleness(other, LIMIT)
            ours.load_state_dict(state[1])
        else:
            ours.note_written()
            bank.bank_queries.mul_(1 + value)  # so does a map
            ours.age(value)
            slots, moves = [[s + value, move] for s, move in slots], moves + 1
            fresh = sum(s <= LIMIT for s, _ in slots)
            last = sum(move == slots[-1][1] for _, move in slots)
            all_fresh = fresh == len(slots)
            assert ours.within_limit() == (None if all_fresh else max(fresh, last))
            assert bank.window == (CAPACITY if all_fresh else max(fresh, last))
        used = slots[-bank.window :]
        assert ours.staleness == pytest.approx(used[0][0] if used else 0.0)


def test_what_follows_a_clear_is_fresh_however_much_it_is():
    bank = make_bank()
    slots = SlotStaleness(bank, LIMIT)
    write(bank, 4)
    slots.note_written()
    slots.age(0.9)
    bank.clear()
    write(bank, 6)  # the cursor has gone from 4 to 6
    slots.note_written()
    slots.age(0.9)
    assert slots.within_limit() is None and slots.staleness == pytest.approx(0.9)


def test_a_move_without_anything_new_refreshes_nothing():
    bank = make_bank()
    slots = SlotStaleness(bank, LIMIT)
    for written in (CAPACITY, 4):
        write(bank, written)
        slots.note_written()
        slots.age(0.6)
    assert (slots.within_limit(), bank.window) == (4, 4)
    slots.note_written()  # the cursor stands where it stood, as after a whole lap
    slots.age(0.6)
    assert slots.staleness == pytest.approx(1.2)  # what was written last stays in use
    write(bank, CAPACITY)
    slots.note_written()
    slots.age(0.6)
    assert slots.within_limit() is None and slots.staleness == pytest.approx(0.6)


def test_a_window_rounded_up_to_blocks_is_as_stale_as_its_oldest_slot():
    bank = ca.DualMemoryBank(CAPACITY, D, layout=ca.BankLayout(4, 4, 4))
    slots = SlotStaleness(bank, LIMIT)
    for written, error in ((4, 0.2), (6, 1.5), (2, 0.1)):
        write(bank, written)
        slots.note_written()
        slots.age(error)
    assert (slots.within_limit(), bank.window) == (2, 4)
    assert slots.staleness == pytest.approx(1.6)
    write(bank, 4)  # not moved yet: the window has nothing else in it
    assert (bank.window, slots.staleness) == (4, 0.0)


def test_the_first_slots_of_all_are_those_that_are_there():
    bank = make_bank()
    write(bank, 5)
    follow = ca.BankTransport(bank, limit=LIMIT)
    probes = [torch.randn(8, D, dtype=torch.float64) for _ in range(2)]
    follow(*probes)
    follow(*probes)
    assert follow.within_limit() is None and follow.staleness < 1e-6


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf")])
def test_a_limit_is_positive(limit):
    with pytest.raises(ValueError, match="limit: expected a positive"):
        SlotStaleness(make_bank(), limit)
