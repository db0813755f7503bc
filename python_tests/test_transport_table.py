"""The table of a bank whose vectors are moved: what it holds while it lags, when it is rebuilt."""

from __future__ import annotations

import pytest
import torch
from test_transport import DRIFTS, F64, D, M, probes, vectors

import contaccum_ext as ca


class DenseTable:
    """All scores among a full bank's vectors, each as it was when the table took it in.

    That is when the younger of the two was enqueued; but what head is about to overwrite in its
    block is what was scored ahead of it, while head passed by the same places of the block before.
    """

    def __init__(self, bank: ca.DualMemoryBank) -> None:
        self.bank, self.block, self.head = bank, bank.layout.block, int(bank.cursor[0])
        self.rebuild()

    def vectors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(C, d) and (C, m, d) as they lie in the ring."""
        return self.bank.bank_queries.cpu(), self.bank.bank_passages.cpu()

    def now(self) -> torch.Tensor:
        """(C, C, m) scores at temperature 0.2 of the vectors as they are."""
        return 5 * torch.einsum("id,jmd->ijm", *self.vectors())

    def rebuild(self) -> None:
        self.scores, self.ahead = self.now(), self.now()
        self.own = self.scores.diagonal()[0].clone()  # (C,) each query with its positive

    def enqueued(self, count: int) -> None:
        """Follow the op, which has taken in that many, no more than a block."""
        now, places = self.now(), (self.head + torch.arange(count)) % len(self.scores)
        after = (self.head + count) % len(self.scores)
        self.scores[places], self.ahead[places] = now[places], now[places]
        self.scores[:, places] = now[:, places]
        self.own[places] = now[places, places, 0]
        opposite = (places + self.block) % len(self.scores)
        self.ahead[:, opposite] = now[:, opposite]
        if after // self.block != self.head // self.block:
            old = torch.arange(after, (after // self.block + 1) * self.block)
            self.scores[:, old] = self.ahead[:, old]
        self.head = after

    def loss(self, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """() of a batch that is not in yet."""
        n, columns = len(q), p.flatten(0, 1)
        offsets = self.bank.offsets(torch.arange(len(self.scores), device=self.bank.device)).cpu()
        queries, passages = self.vectors()
        passages = (passages + offsets[:, 1:]).flatten(0, 1)
        local = 5 * q @ torch.cat([columns, passages]).T
        banked = 5 * (queries + offsets[:, 0]) @ columns.T
        banked = torch.cat([banked, self.scores.flatten(1)], 1)
        targets = local[torch.arange(n), torch.arange(n) * M]
        losses = torch.cat([local.logsumexp(1) - targets, banked.logsumexp(1) - self.own])
        return losses.sum() / n


@DRIFTS
def test_a_table_may_stay_while_vectors_are_moved(device, drift):
    bank = ca.DualMemoryBank(24, D, M, F64, device, drift, layout=ca.BankLayout(1, 2, 4))
    for step in range(9):
        batch = vectors(3, seed=step), vectors(3, M, seed=step + 9)
        ca.contaccum_loss(*(x.to(device) for x in batch), bank, 0.2)
    table, moves = DenseTable(bank), probes(6)
    lags = []
    for step in range(24):  # three laps
        if step % 3 == 0:
            back = step % 2  # or vectors that are not brought to length 1 would grow
            moved = [moves[i ^ back].to(device) for i in range(4)]
            ca.transport(bank, *moved, ridge=3.0, normalize=False, rebuild=step == 12)
            if step == 12:
                table.rebuild()
        lags.append((table.now() - table.scores).abs().max().item())
        batch = vectors(3, seed=50 + step), vectors(3, M, seed=80 + step)
        results = []
        op = lambda q, p: ca.contaccum_loss(q, p, bank, 0.2)  # noqa: E731
        for place, loss_of in (("cpu", table.loss), (device, op)):
            leaves = [x.to(place).requires_grad_() for x in batch]
            loss = loss_of(*leaves)
            results.append([x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, leaves))])
        table.enqueued(3)
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
    assert lags[12] == 0 and min(lags[:12] + lags[15:]) > 0.1, lags


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_table_is_rebuilt_once_a_32nd_of_the_bank_is_new(symmetric):
    """So that it is linear in the bank for each slot; and a resumed run goes on counting."""
    bank = ca.DualMemoryBank(160, D, M, F64, symmetric=symmetric)
    follow, new, found, wanted = ca.BankTransport(bank), 0, [], []
    follow(vectors(9), vectors(9))
    for step in range(100):
        bank.enqueue(vectors(2, seed=step), vectors(2, M, seed=step + 1))
        follow(vectors(9), vectors(9))
        new += 2
        found.append(bank.pending_rebuild(1.0, -1) != 0)
        wanted.append(32 * new >= min(160, 2 * step + 2))
        if wanted[-1]:
            new = 0
        if symmetric:
            assert (bank.mirror.pending_rebuild(1.0, -1) != 0) == found[-1]
        resumed = ca.BankTransport(bank)
        resumed.load_state_dict(follow.state_dict())
        follow = resumed
    assert found == wanted and sum(wanted[-9:]) == 3
