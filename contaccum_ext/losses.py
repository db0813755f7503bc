"""The loss as a module that owns its bank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.functional import contaccum_loss


class ContAccumLoss(nn.Module):
    """:func:`contaccum_ext.contaccum_loss` with a :class:`contaccum_ext.DualMemoryBank` inside.

    In ``train()`` each call uses the bank and enqueues its batch; in ``eval()`` it neither reads
    nor writes the bank and gives the in-batch loss.

    Args:
        capacity, dim, passages_per_query, dtype, device, drift: see ``DualMemoryBank``.
        temperature, row_weighting: see ``contaccum_loss``.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        passages_per_query: int = 1,
        *,
        temperature: float = 1.0,
        row_weighting: str = "local",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        drift: str = "none",
    ) -> None:
        super().__init__()
        self.bank = DualMemoryBank(capacity, dim, passages_per_query, dtype, device, drift)
        self.temperature = temperature
        self.row_weighting = row_weighting

    def forward(
        self, queries: Tensor, passages: Tensor, passage_ids: Tensor | None = None
    ) -> Tensor:
        """() loss of a batch: queries (n, d), passages (n, m, d) or (n, d), passage_ids (n, m)."""
        return contaccum_loss(
            queries,
            passages,
            self.bank if self.training else None,
            self.temperature,
            passage_ids,
            self.row_weighting,
        )

    def extra_repr(self) -> str:
        """Say what ``repr`` shows beside the bank."""
        return f"temperature={self.temperature}, row_weighting={self.row_weighting!r}"
