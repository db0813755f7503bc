"""ContAccum's loss for all K micro-batches of an update at once, exactly.

Within an update the weights do not change, so all embeddings are there before the first loss is
taken. Lay the slots out in the order in which they are enqueued: F old ones, then the update's own
K n. Micro-batch k sees as its bank the C slots before its own n, a window that moves by n. Hence

- local rows need one product of K n queries with all passages, masked to their windows;
- banked rows need one product of all queries with the K n m local passages, and for each window
  the log-sum-exp over the banked columns in it. Most columns are in every window: they are summed
  once. Those that enter or leave are kept as one partial log-sum-exp per group of n slots.

A test compares the loss and its gradients with `contaccum_ext.reference`, micro-batch by
micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_CHUNK = 1 << 26  # banked x banked scores held at once


@dataclass(frozen=True)
class BankView:
    """N = F + K n slots, oldest first, as the loss is to see them; the last K n are the update's.

    Where a banked vector v meets a local one in micro-batch k it is `gain[k] * v + shift[k]`; with
    `part` every slot has one of P shifts, `shift[k, part]`.
    """

    queries: Tensor  # (N, d)
    passages: Tensor  # (N, m, d)
    frozen_queries: Tensor  # (N, d) for banked x banked scores
    frozen_passages: Tensor  # (N, m, d)
    shift: Tensor | None = None  # (K, [P,] 1 + m, d), of the query and of each kind of passage
    gain: Tensor | None = None  # (K, 1 + m, d)
    bias: Tensor | None = None  # (N,) added to scores with banked negatives of the slot
    absent: Tensor | None = None  # (N,) bool: neither rows nor columns, as if not in the bank
    part: Tensor | None = None  # (N,) int64, of P

    def seen(self, slots: slice | Tensor, k: int) -> Tensor:
        """(slots, 1 + m, d): query and passages as micro-batch k sees them."""
        vectors = torch.cat([self.queries[slots, None], self.passages[slots]], 1)
        if self.gain is not None:
            vectors = vectors * self.gain[k]
        if self.shift is None:
            return vectors
        return vectors + (self.shift[k] if self.part is None else self.shift[k, self.part[slots]])

    def exchanged(self) -> BankView:
        """Positives for queries, queries for passages."""
        shift, gain = (
            None if x is None else x[..., :2, :].flip(-2) for x in (self.shift, self.gain)
        )
        return replace(
            self,
            queries=self.passages[:, 0],
            passages=self.queries[:, None],
            frozen_queries=self.frozen_passages[:, 0],
            frozen_passages=self.frozen_queries[:, None],
            shift=shift,
            gain=gain,
        )


@dataclass(frozen=True)
class LossShape:
    """What does not change during a run."""

    scale: float
    capacity: int  # C slots, a multiple of n; 0 for no bank
    row_weighting: str = "local"  # or "all"
    mask: bool = True


@dataclass(frozen=True)
class Seen:
    """All that an update's loss depends on, beside the update's own vectors."""

    ids: (
        Tensor  # (N, m) integers of all slots' passages, the update's last; without a bank (K n, m)
    )
    view: BankView | None  # of the bank; None for in-batch negatives alone
    shape: LossShape

    def exchanged(self) -> Seen:
        """As the loss in the other direction sees it."""
        view = None if self.view is None else self.view.exchanged()
        return replace(self, ids=self.ids[:, :1], view=view)


def update_loss(queries: Tensor, passages: Tensor, seen: Seen) -> Tensor:
    """Mean over the micro-batches of their losses.

    Args:
        queries: (K, n, d).
        passages: (K, n, m, d), positive first.
        seen: the bank, the passages' ids, scale, capacity and options.

    Returns:
        () in the dtype of the queries; its gradients are those of the sequential algorithm.
    """
    per_row = row_losses(queries, passages, seen)
    ids, view, shape = seen.ids, seen.view, seen.shape
    if view is None or not shape.capacity:
        return per_row.mean()
    n, window = queries.shape[1], _Window.of(queries, view, shape)
    banked_rows = _banked_rows(passages, ids, view, window, shape)  # (N, K)
    totals = per_row.sum(1) + torch.where(window.slots.T, banked_rows, 0).sum(0)
    rows = n + window.slots.sum(1) if shape.row_weighting == "all" else n
    return (totals / rows).mean()


def row_losses(queries: Tensor, passages: Tensor, seen: Seen) -> Tensor:
    """Those of local rows alone, (K, n); arguments as those of `update_loss`."""
    ids, view, shape = seen.ids, seen.view, seen.shape
    k, n, m, d = passages.shape
    local_ids = ids[-k * n :].reshape(k, n, m)
    local = shape.scale * torch.bmm(queries, passages.reshape(k, n * m, d).mT)  # (K, n, nm)
    target = torch.arange(n, device=queries.device) * m
    target_scores = local[:, torch.arange(n, device=queries.device), target]
    if shape.mask:
        same = local_ids[:, :, :1] == local_ids.reshape(k, 1, n * m)
        same[:, torch.arange(n, device=queries.device), target] = False
        local = local.masked_fill(same, -math.inf)
    if view is None or not shape.capacity:
        return local.logsumexp(-1) - target_scores
    banked = _local_rows(queries, ids, view, _Window.of(queries, view, shape), shape)
    return torch.cat([local, banked], -1).logsumexp(-1) - target_scores


class _Window:
    """Which slots, and which groups of n slots, are in the bank of each micro-batch."""

    def __init__(self, total: int, k: int, n: int, capacity: int, device: torch.device) -> None:
        groups, own, size = total // n, total // n - k, capacity // n
        if total % n or capacity % n:
            raise ValueError(f"expected slots in whole groups of n = {n}, got {total}, {capacity}")
        first = torch.arange(own, own + k, device=device)[:, None]  # the micro-batch's own group
        group = torch.arange(groups, device=device)
        self.groups = (group >= first - size) & (group < first)  # (K, G)
        self.slots = self.groups.repeat_interleave(n, 1)  # (K, N)
        begin = max(0, own + k - 1 - size)
        self.always = slice(begin, max(begin, own))  # groups that all micro-batches see
        self.edges = torch.cat([group[: self.always.start], group[self.always.stop :]])
        self.n = n

    @classmethod
    def of(cls, queries: Tensor, view: BankView, shape: LossShape) -> _Window:
        """That of an update's (K, n, d) queries, less what is absent."""
        k, n, _ = queries.shape
        window = cls(len(view.queries), k, n, shape.capacity, queries.device)
        if view.absent is not None:
            window.slots = window.slots & ~view.absent
        return window


def _local_rows(
    queries: Tensor, ids: Tensor, view: BankView, window: _Window, shape: LossShape
) -> Tensor:
    """(K, n, N m) scores of local queries with banked passages."""
    k, n, _ = queries.shape
    slots, m, _ = view.passages.shape
    if view.gain is None:
        scores = torch.einsum("knd,jmd->knjm", queries, view.passages)
    else:
        gained = queries[:, :, None] * view.gain[:, None, 1:]
        scores = torch.einsum("knmd,jmd->knjm", gained, view.passages)
    if view.shift is not None:
        added = torch.einsum("knd,k...md->kn...m", queries, view.shift[..., 1:, :])
        scores = scores + (added[:, :, None] if view.part is None else added[:, :, view.part])
    scores = shape.scale * scores
    if view.bias is not None:
        scores = scores + view.bias[:, None]
    absent = ~window.slots[:, None, :, None]
    if shape.mask:
        own = ids[-k * n :, 0].reshape(k, n, 1, 1)
        absent = absent | (own == ids)
    return scores.masked_fill(absent, -math.inf).reshape(k, n, slots * m)


def _banked_rows(
    passages: Tensor, ids: Tensor, view: BankView, window: _Window, shape: LossShape
) -> Tensor:
    """(N, K) losses of banked rows; entries outside of the windows are finite and meaningless."""
    k, n, m, d = passages.shape
    columns = passages
    if view.gain is not None:
        columns = columns * view.gain[:, None, None, 0]
    scores = torch.einsum("id,kcd->ikc", view.queries, columns.reshape(k, n * m, d))
    if view.shift is not None:
        added = torch.einsum(
            "k...d,kcd->...kc", view.shift[..., 0, :], passages.reshape(k, n * m, d)
        )
        scores = scores + (added if view.part is None else added[view.part])
    scores = shape.scale * scores
    if shape.mask:
        own = ids[-k * n :].reshape(k, n * m)
        scores = scores.masked_fill(ids[:, 0, None, None] == own, -math.inf)
    with torch.no_grad():
        among, target = _banked_columns(ids, view, window, shape)
        # Outside of its windows a row may have no column at all: its loss is not used, but an
        # infinite one would still spoil the gradient.
        among = torch.where(window.slots.T, among, 0)
    return torch.cat([among[..., None], scores], -1).logsumexp(-1) - target[:, None]


def _banked_columns(
    ids: Tensor, view: BankView, window: _Window, shape: LossShape
) -> tuple[Tensor, Tensor]:
    """For banked rows: (N, K) log-sum-exp over each window's banked columns, (N,) target score."""
    slots, m, d = view.frozen_passages.shape
    columns = view.frozen_passages.reshape(slots * m, d)
    target = shape.scale * (view.frozen_queries * view.frozen_passages[:, 0]).sum(-1)
    always = slice(window.always.start * window.n * m, window.always.stop * window.n * m)
    in_window = window.groups[:, window.edges]  # (K, edges)
    found = []
    for rows in torch.arange(slots, device=ids.device).split(max(1, _CHUNK // (slots * m))):
        scores = torch.mm(view.frozen_queries[rows], columns.T).mul_(shape.scale)
        if view.bias is not None:
            scores += view.bias.repeat_interleave(m)
        if shape.mask:
            scores.masked_fill_(ids[rows, :1] == ids.reshape(-1), -math.inf)
        if view.absent is not None:
            scores.masked_fill_(view.absent.repeat_interleave(m), -math.inf)
        # Last: the target is neither masked nor biased.
        scores[torch.arange(len(rows), device=ids.device), rows * m] = target[rows]
        by_group = scores.view(len(rows), -1, window.n * m)[:, window.edges].logsumexp(-1)
        edges = by_group[:, None].masked_fill(~in_window, -math.inf)  # (rows, K, edges)
        middle = scores[:, always].logsumexp(-1)
        middle = middle[:, None, None].expand(-1, len(in_window), 1)
        found.append(torch.cat([middle, edges], -1).logsumexp(-1))
    return torch.cat(found), target
