"""Texts that are encoded again after every update, so that the bank can follow the encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from contaccum_ext.training.data import Batch, Collator, Draw
    from contaccum_ext.training.encoder import DualEncoder


class Probes:
    """As many passages as queries of the training set: hard negatives are probes like positives.

    Args:
        draws: R examples, whose queries are probes; passages are those of the first ones.
        collate: tokenizes draws.
        size: examples encoded at once.
        device: where the encoders are.
    """

    def __init__(
        self, draws: Sequence[Draw], collate: Collator, size: int, device: torch.device
    ) -> None:
        def batches(draws: Sequence[Draw]) -> list[Batch]:
            groups = (draws[begin : begin + size] for begin in range(0, len(draws), size))
            return [collate(group).to(device) for group in groups]

        with_passages = -(-len(draws) // len(draws[0].passages))
        self._queries = [batch.queries for batch in batches(draws)]
        self._passages = [batch.passages for batch in batches(draws[:with_passages])]

    @torch.no_grad()
    def encode(self, model: DualEncoder) -> tuple[Tensor, Tensor]:
        """(R, d) queries and at least R passages (R', d) by the weights as they are.

        Without dropout, so also without a number from the random generators.
        """
        training = model.training
        model.eval()
        try:
            queries = [model.query(**inputs) for inputs in self._queries]
            passages = [model.passage(**inputs) for inputs in self._passages]
        finally:
            model.train(training)
        return torch.cat(queries), torch.cat(passages)
