"""What an update is trained by: its loss, one way or both, and the gradients that follow."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.drift.corrections import Correction
from benchmarks.drift.loss import Seen, update_loss

Gradients = tuple[Tensor, Tensor]  # with respect to queries (K, n, d) and passages (K, n, m, d)


class Objective:
    """The loss of an update and its gradients.

    Args:
        correction: may have a loss of its own, and changes gradients; None for no bank.
        symmetric: the mean of this loss and of the one in the other direction, whose rows are
            positives and whose columns are queries.
    """

    def __init__(self, correction: Correction | None, symmetric: bool = False) -> None:
        self.correction, self.symmetric = correction, symmetric

    def __call__(
        self, update: int, queries: Tensor, passages: Tensor, seen: Seen
    ) -> tuple[Tensor, Gradients]:
        """The loss () of detached vectors (K, n, d) and (K, n, m, d), and gradients."""
        loss, (of_queries, of_passages) = self._one_way(update, queries, passages, seen)
        if not self.symmetric:
            return loss, (of_queries, of_passages)
        other, (of_positives, of_columns) = self._one_way(
            update, passages[:, :, 0], queries[:, :, None], seen.exchanged()
        )
        of_passages = of_passages.clone()
        of_passages[:, :, 0] += of_positives
        return (loss + other) / 2, ((of_queries + of_columns[:, :, 0]) / 2, of_passages / 2)

    def _one_way(
        self, update: int, rows: Tensor, columns: Tensor, seen: Seen
    ) -> tuple[Tensor, Gradients]:
        leaves = rows.detach().requires_grad_(), columns.detach().requires_grad_()
        loss_of = update_loss if self.correction is None else self.correction.loss
        loss = loss_of(*leaves, seen)
        of_rows, of_columns = torch.autograd.grad(loss, leaves)
        if self.correction is None:
            return loss.detach(), (of_rows, of_columns)
        return loss.detach(), self.correction.gradients(update, of_rows, of_columns)
