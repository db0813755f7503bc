"""How slots are grouped, and what the effective window is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts

import contaccum_ext as ca


@given(
    layout=layouts, capacity=st.integers(1, 60), window=st.integers(1, 70), head=st.integers(0, 59)
)
def test_the_effective_window_is_whole_blocks_and_at_least_what_was_asked(
    layout, capacity, window, head
):
    """In use: the block being filled and, going back, as many whole blocks as were asked for."""
    head %= capacity
    got = layout.effective_window(capacity, head, window)
    blocks = [range(b, min(b + layout.block, capacity)) for b in range(0, capacity, layout.block)]
    wanted = -(-window // layout.block)
    if window >= capacity or wanted >= len(blocks):
        assert got == capacity
        return
    current = head // layout.block
    whole = [blocks[(current - age) % len(blocks)] for age in range(1, wanted + 1)]
    assert got == head % layout.block + sum(map(len, whole))
    assert layout.effective_window(capacity, head, None) == capacity


@given(
    layout=layouts,
    capacity=st.integers(1, 60),
    head=st.integers(0, 59),
    most=st.integers(0, 70),
    least=st.integers(0, 70),
)
def test_a_window_within_a_number_of_slots_is_the_largest_that_has_the_least(
    layout, capacity, head, most, least
):
    """As many whole blocks as fit into `most`, and before that as many as `least` needs; one."""
    head, most, least = head % capacity, max(most, least), min(most, least)
    windows = [w * layout.block for w in range(1, layout.blocks(capacity))] + [None]
    used = {w: layout.effective_window(capacity, head, w) for w in windows}
    enough = [w for w in windows if used[w] >= min(least, capacity)]
    fitting = [w for w in enough if used[w] <= most]
    assert layout.window_within(capacity, head, most, least) == (fitting or enough[:1])[-1]


@given(capacity=st.integers(1, 2**22))
def test_the_default_layout_keeps_the_table_small(capacity):
    """Both parts of the table together stay below 600 entries a row up to four million slots."""
    layout = ca.BankLayout.default(capacity)
    assert layout.offset_block % layout.group == 0 and layout.block % layout.offset_block == 0
    assert layout.blocks(capacity) * layout.block >= capacity
    assert layout.blocks(capacity) + layout.groups() <= 600
    assert layout.blocks(capacity) <= 4 * layout.groups() + 4


@given(capacity=st.integers(512, 2**22))
def test_an_offset_serves_64_slots_or_up_to_a_64th_of_the_bank(capacity):
    """Whole tiles of the kernels; drift within so few slots is little beside that over all."""
    size = ca.BankLayout.default(capacity).offset_block
    assert size % 64 == 0 and size <= max(64, capacity // 64)
    # A bank of any size has no more than 256: what they cost does not grow with it.
    assert -(-capacity // size) <= 256


def test_the_window_is_readable_and_settable():
    bank = ca.DualMemoryBank(20, 2, layout=ca.BankLayout(1, 2, 4))
    assert bank.window == 20
    bank.window = 5
    assert bank.window == 8  # two whole blocks; the ring stands at the start of a block
    bank.enqueue(torch.randn(3, 2), torch.randn(3, 2))
    assert bank.window == 11  # and the three slots of the block that has been begun
    bank.window = 17
    assert bank.window == 20
    bank.window = None
    assert bank.window == 20


@pytest.mark.parametrize("capacity", [1, 7, 8, 9, 64, 1000, 4096])
def test_the_default_layout_is_what_a_bank_has(capacity):
    bank = ca.DualMemoryBank(capacity, 3, 2)
    layout = bank.layout
    assert layout == ca.BankLayout.default(capacity)
    assert bank.block_lse.shape == (layout.blocks(capacity), capacity)
    assert bank.group_lse.shape == (layout.groups(), capacity)


def test_a_new_bank_says_what_it_is():
    bank = ca.DualMemoryBank(6, 3, 2, torch.bfloat16, drift="mean")
    assert (bank.capacity, bank.dim, bank.passages_per_query) == (6, 3, 2)
    assert len(bank) == 0 and bank.dtype == torch.bfloat16 and bank.has_ids is None
    assert bank.queries().shape == (0, 3) and bank.queries().dtype == torch.bfloat16
    assert bank.passages().shape == (0, 2, 3) and bank.passage_ids().shape == (0, 2)
    assert bank.query_offsets().shape == (0, 3) and bank.passage_offsets().shape == (0, 2, 3)
    assert "drift='mean'" in repr(bank) and "window=all" in repr(bank)


def test_queries_and_passages_are_copies():
    bank = ca.DualMemoryBank(4, 2, layout=ca.BankLayout(1, 1, 2))
    bank.enqueue(torch.ones(3, 2), torch.ones(3, 2))
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    for copy in (bank.queries(), bank.passages(), bank.passage_ids(), bank.table()):
        copy.fill_(9)
    assert all(torch.equal(before[name], tensor) for name, tensor in bank.state_dict().items())
