"""Keys by encoders that move slowly: averages of the weights that training has (MoCo)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.drift.corrections import Context, Correction
from benchmarks.drift.loss import BankView, Seen, row_losses


class Momentum(Correction):
    """Slow copies of both towers encode what enters the bank.

    Args:
        context: of the run.
        decay: of the copies' weights, per update; 0 for no memory.
        dropout: the copies encode with dropout, as training does.
        correction: of what is banked, by name; its probes are encoded by the copies.
        options: of the correction.
    """

    def __init__(
        self,
        context: Context,
        decay: float,
        dropout: bool = True,
        correction: str = "none",
        options: dict[str, Any] | None = None,
    ) -> None:
        from benchmarks.drift.methods import make

        super().__init__(context)
        assert context.towers is not None
        self.decay, self.dropout = decay, dropout
        slow = copy.deepcopy(context.towers).requires_grad_(False)
        self.weights = [p.data for p in slow.parameters()]
        self.trained = [p.data for p in context.towers.parameters()]
        self.slow = replace(
            context,
            encode_queries=lambda ids, drop: context.encode_queries(ids, drop, slow),
            encode_passages=lambda ids, drop: context.encode_passages(ids, drop, slow),
            towers=slow,
        )
        self.inner = make(correction, self.slow, options or {})

    def after_encode(self, update: int, queries: Tensor, passages: Tensor) -> None:
        own = slice(self.history.bank(update).stop, self.history.view(update).stop)
        keys = self.slow.encode_slots(np.arange(own.start, own.stop), self.dropout)
        self.history.queries[own], self.history.passages[own] = keys
        self.keys = [x.unflatten(0, queries.shape[:2]) for x in keys]
        self.inner.after_encode(update, *self.keys)

    def before_loss(self, update: int) -> BankView:
        return self.inner.before_loss(update)

    def before_step(self, update: int) -> None:
        self.inner.before_step(update)

    def after_step(self, update: int) -> None:
        torch._foreach_lerp_(self.weights, self.trained, 1 - self.decay)
        self.inner.after_step(update)


class MomentumAlike(Momentum):
    """Positives are keys as well, so that nothing tells them from banked negatives (xMoCo).

    The mean of two losses, neither of which has banked rows. One has training's queries for rows,
    slow passages of the batch and the bank for columns; the other training's positives for rows
    and slow queries for columns. (Yang et al., ACL 2021, https://aclanthology.org/2021.acl-long.477)
    """

    def loss(self, queries: Tensor, passages: Tensor, seen: Seen) -> Tensor:
        slow_queries, slow_passages = self.keys
        forth = row_losses(queries, slow_passages, seen)
        back = row_losses(passages[:, :, 0], slow_queries[:, :, None], seen.exchanged())
        return (forth.mean() + back.mean()) / 2
