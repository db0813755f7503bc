"""A bank's tables from their definitions, and its own in that shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import contaccum_ext as ca
from contaccum_ext import ops


def scratch_table(
    bank: ca.DualMemoryBank, written: int, scale: float, among: Tensor | None = None
) -> Tensor:
    """Invariant T from its definition: (F, blocks) float64, from the banked vectors and ids alone.

    `written` is the number of slots ever written, from which the ring positions follow; `among`,
    (F, F, m), inner products that are not those of the vectors as they are.
    """
    scores, of_block = (
        _scratch_scores(bank, scale, among),
        _blocks_of_columns(bank, written)[0, :, 0],
    )
    columns = [scores[:, of_block == b].flatten(1) for b in range(bank.block_lse.shape[0])]
    empty = scores.new_full((len(scores),), -math.inf)
    return torch.stack([c.logsumexp(1) if c.shape[1] else empty for c in columns], 1)


def _scratch_scores(bank: ca.DualMemoryBank, scale: float, among: Tensor | None) -> Tensor:
    """(F, F, m) float64 scores of banked rows with banked columns, masked, oldest first."""
    q, p, ids = bank.queries().double(), bank.passages().double(), bank.passage_ids()
    if among is None:
        among = torch.einsum("id,jkd->ijk", q, p)
    scores = scale * among.to(q.device)
    same = (ids[:, :1, None] == ids) & (ids[:, :1, None] != -1)
    index = torch.arange(len(ids))
    same[index, index, 0] = False  # the target itself stays
    return scores.masked_fill(same, -math.inf)


def _blocks_of_columns(bank: ca.DualMemoryBank, written: int) -> Tensor:
    """(1, F, 1) the block of each banked slot, oldest first."""
    slot = torch.arange(written - len(bank), written) % bank.capacity
    return (slot // bank.layout.block).to(bank.cursor.device)[None, :, None]


def scratch_expected(
    bank: ca.DualMemoryBank, written: int, scale: float, among: Tensor | None = None
) -> Tensor:
    """(F, blocks) float64: what the second table is to hold; arguments as of `scratch_table`."""
    scores = _scratch_scores(bank, scale, among)
    lse = scratch_table(bank, written, scale, among)
    of_block = _blocks_of_columns(bank, written)
    expected = torch.zeros_like(lse)
    for b in range(lse.shape[1]):
        inside = (of_block == b) & ~torch.isinf(scores)
        weights = (scores - lse[:, b, None, None]).exp()
        expected[:, b] = torch.where(inside, weights * scores, 0.0).sum((1, 2))
    return expected


def expected_table(bank: ca.DualMemoryBank) -> Tensor:
    """(F, blocks) the bank's expected scores, oldest row first, as `DualMemoryBank.table`."""
    blocks, head = bank.block_lse.shape[0], int(bank.cursor[0]) // bank.layout.block
    table = bank.expected[:blocks].clone()
    fresh, old = bank.expected[-2], bank.expected[-1]  # kFreshWeighted, kOldExpected
    lse = bank.row_state[ops.FRESH_MAX] + bank.row_state[ops.FRESH_SUM].log()
    both = torch.logaddexp(lse, bank.row_state[ops.OLD_LSE])
    of_fresh = (bank.row_state[ops.FRESH_MAX] - both).exp() * fresh
    of_old = (bank.row_state[ops.OLD_LSE] - both).exp() * old
    table[head] = torch.where(torch.isinf(both), 0.0, of_fresh + of_old)
    return table[:, bank.slots()].T
