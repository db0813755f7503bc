"""The training methods compared on equal terms: how one update's examples become gradients.

All see the same examples in the same order. They differ in how an update's n*K examples are cut
into batches, and in what a batch is scored against:

    inbatch     one batch of n*K: every passage of the update is a negative (needs the memory)
    gradaccum   K micro-batches of n, each scored against itself only
    contaccum   K micro-batches of n, each scored against itself and both memory banks
    prebatch    as contaccum with the passage bank only: banked queries are no loss rows

A method that encodes twice (gradient caching) overrides `accumulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.functional import contaccum_loss
from contaccum_ext.ops import op_runs_on

if TYPE_CHECKING:
    from contaccum_ext.training.config import TrainConfig
    from contaccum_ext.training.data import Batch

Encode = Callable[["Batch"], tuple[Tensor, Tensor]]


class Method:
    """Gradient accumulation over micro-batches of n; subclasses change the cut or the bank.

    Args:
        config: settings of the run.
        dim: embedding size d.
        training_queries: size of the training set; bounds the automatic bank size.
        device: where embeddings live.
    """

    banks: ClassVar[str | None] = None

    def __init__(
        self, config: TrainConfig, dim: int, training_queries: int, device: torch.device
    ) -> None:
        self.config = config
        # Where the op has no kernel for the device, the few embeddings travel to the CPU.
        self.loss_device = device if op_runs_on(device) else torch.device("cpu")
        self.bank: DualMemoryBank | None = None
        if self.banks:
            self.bank = DualMemoryBank(
                config.bank_capacity(training_queries),
                dim,
                passages_per_query=1 + config.hard_negatives,
                device=self.loss_device,
                drift=config.drift,
            )

    @staticmethod
    def micro_batch_size(config: TrainConfig) -> int:
        """Examples encoded and scored together."""
        return config.local_batch_size

    def loss(self, queries: Tensor, passages: Tensor, passage_ids: Tensor) -> Tensor:
        """Loss of one micro-batch, in fp32.

        Args:
            queries: (n, d).
            passages: (n, m, d), positive first.
            passage_ids: (n, m) int64.
        """
        return contaccum_loss(
            queries,
            passages,
            self.bank,
            temperature=self.config.temperature,
            passage_ids=passage_ids if self.config.mask_false_negatives else None,
            row_weighting=self.config.row_weighting,
            banks=self.banks or "both",
        )

    def accumulate(self, encode: Encode, batches: Sequence[Batch]) -> tuple[float, float]:
        """Add the gradients of one update to the parameters.

        Each micro-batch weighs in by its share of the update's examples: 1/K, and less for a
        smaller last one.

        Args:
            encode: maps a batch to queries (n, d) and passages (n, m, d).
            batches: the micro-batches of the update.

        Returns:
            The update's loss, and its in-batch loss over groups of n without any bank: the one
            number that means the same for every method.
        """
        examples = sum(batch.size for batch in batches)
        totals = []  # per micro-batch, read once at the end: no wait for the device in between
        for batch in batches:
            queries, passages = (vectors.to(self.loss_device) for vectors in encode(batch))
            passage_ids = batch.passage_ids.to(self.loss_device)
            loss = self.loss(queries, passages, passage_ids)
            share = batch.size / examples
            (loss * share).backward()
            in_batch = self._in_batch_loss(queries, passages, passage_ids)
            totals.append(share * torch.stack([loss.detach(), in_batch]))
        total, in_batch_total = torch.stack(totals).sum(0).tolist()
        return total, in_batch_total

    @torch.no_grad()
    def _in_batch_loss(self, queries: Tensor, passages: Tensor, passage_ids: Tensor) -> Tensor:
        size = self.config.local_batch_size
        groups = zip(
            queries.split(size), passages.split(size), passage_ids.split(size), strict=True
        )
        total = queries.new_zeros(())
        for group_queries, group_passages, group_ids in groups:
            loss = contaccum_loss(
                group_queries,
                group_passages,
                None,
                temperature=self.config.temperature,
                passage_ids=group_ids if self.config.mask_false_negatives else None,
            )
            total += len(group_queries) / len(queries) * loss
        return total


class InBatch(Method):
    """DPR's in-batch negatives over the whole update: what enough memory would allow."""

    @staticmethod
    def micro_batch_size(config: TrainConfig) -> int:
        return config.update_size


class GradAccum(Method):
    """Gradient accumulation: the memory of n, and only n-1 other queries' passages as negatives."""


class ContAccum(Method):
    """Memory banks of queries and passages shared by the micro-batches (arXiv 2406.12356)."""

    banks = "both"


class PreBatch(Method):
    """Passage bank only: more negatives, unbalanced gradients."""

    banks = "passages"


METHODS: dict[str, type[Method]] = {
    "inbatch": InBatch,
    "gradaccum": GradAccum,
    "contaccum": ContAccum,
    "prebatch": PreBatch,
}
