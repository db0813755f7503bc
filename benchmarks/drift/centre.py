"""Gradients of passages less their mean."""

from __future__ import annotations

import torch
from torch import Tensor

CENTRES = ("batch", "spread", "update")


def centred(passages: Tensor, centre: str) -> Tensor:
    """Gradients (K, n, m, d) that sum to zero.

    Args:
        passages: (K, n, m, d) gradients of an update's K micro-batches.
        centre: over each micro-batch, over the update as it can be known micro-batch by
            micro-batch, or over all of it.
    """
    if centre == "spread":
        return passages - _spread_evenly(passages)
    return passages - passages.mean((1, 2) if centre == "batch" else (0, 1, 2), keepdim=True)


def _spread_evenly(passages: Tensor) -> Tensor:
    """(K, 1, 1, d) to take from (K, n, m, d): what has come so far, spread over what is to come.

    Micro-batch k knows the sums of those before it and its own alone. Nothing is left at the end.
    """
    k, n, m, d = passages.shape
    sums, owed, taken = passages.sum((1, 2)), passages.new_zeros(d), []
    for batch in range(k):
        owed = owed + sums[batch]
        taken.append(owed / (k - batch))
        owed = owed - taken[-1]
    return torch.stack(taken)[:, None, None] / (n * m)
