"""The loss as a module that owns its bank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.functional import contaccum_loss


class ContAccumLoss(nn.Module):
    """`contaccum_ext.contaccum_loss` with a `contaccum_ext.DualMemoryBank` inside.

    In ``train()`` each call uses the bank and enqueues its batch; in ``eval()`` it neither reads
    nor writes the bank and gives the in-batch loss.

    Args:
        capacity: slots C of the bank.
        dim: embedding size d.
        passages_per_query: m, the positive first, then hard negatives.
        temperature: positive number; scores are inner products divided by it.
        row_weighting: "local" weights every row 1/n; "all" 1/(n + F) as in the paper.
        dtype: what representations are rounded to: float32, float64, bfloat16 or float16.
        device: where the bank lives.
        drift: "none", or "mean": correct old representations by the shift of their mean.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; for temperature
            and row_weighting at the first call.

    Source: ContAccum, arXiv 2406.12356, equations 5-9.
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
        """() loss of a batch, float32, or float64 for a float64 bank; see `contaccum_loss`.

        Args:
            queries: (n, d) floating.
            passages: (n, m, d) of the same dtype, positive first; (n, d) means m = 1.
            passage_ids: (n, m) int64, -1 for none; None leaves nothing out.
        """
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
